//! Objects vanish from the remote while a build uses them: the build ends, or the next one repairs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{Chance, Must, Project, Sandbox, samples, tree};

/// No build waits longer for what does not come.
const LONGEST: Duration = Duration::from_mins(2);

fn rounds() -> usize {
    if std::env::var_os("KACHEFS_TEST_LONG").is_some() {
        60
    } else {
        3
    }
}

fn set(machine: &Sandbox, bucket: &Path, more: &str) {
    let set = format!("remote set {} --wait 2 {more}", bucket.display());
    machine.kachefs(&set).ok();
}

/// The objects that hold blobs.
fn objects(bucket: &Path) -> Vec<PathBuf> {
    let mut objects = tree::files(&bucket.join("v1/blobs"));
    objects.extend(tree::files(&bucket.join("v1/packs")));
    objects.retain(|path| path.is_file());
    objects
}

/// Removes some of the objects now and then, until it is told to stop. Returns how many.
fn remove_some(bucket: &Path, chance: &mut Chance, stop: &AtomicBool) -> usize {
    let mut removed = 0;
    while !stop.load(Ordering::Relaxed) {
        for object in objects(bucket) {
            if chance.percent(20) {
                fs::remove_file(object).must("remove");
                removed += 1;
            }
        }
        std::thread::sleep(chance.pause(Duration::from_millis(400)));
    }
    removed
}

/// Builds until the program runs, at most so often; returns how often.
fn build_until_it_runs(
    machine: &Sandbox,
    checkout: &Project,
    expected: &str,
    most: u32,
    mut has_failed: impl FnMut(),
) -> u32 {
    let program = checkout.program("app");
    for tries in 1..=most {
        let began = Instant::now();
        let built = machine.cargo(checkout, "build").timeout(LONGEST).run();
        assert!(began.elapsed() < LONGEST, "{built}");
        if built.status.success() && program.exists() {
            // Whose bytes do not come does not start.
            let shell = machine.command("sh").args(["-c", "exec \"$0\""]);
            let outcome = shell.arg(&program).run();
            if outcome.status.success() {
                assert_eq!(outcome.stdout, expected);
                return tries;
            }
        }
        has_failed();
    }
    panic!("no build repairs it");
}

/// A bucket with everything a project is made of.
struct Warm {
    machine: Sandbox,
    bucket: PathBuf,
    project: Project,
}

impl Warm {
    fn new(limit: Duration) -> Self {
        let machine = Sandbox::with_limit(limit);
        let bucket = machine.make_dir("bucket");
        set(&machine, &bucket, "");
        let project = samples::whole(machine.path("project"));
        machine.mount(project.target());
        machine.cargo(&project, "build").ok();
        machine.kachefs("push --wait").ok();
        Self {
            machine,
            bucket,
            project,
        }
    }
}

/// A machine that has built everything from a bucket of its own, and read nothing.
struct Cold {
    machine: Sandbox,
    checkout: Project,
    bucket: PathBuf,
}

impl Cold {
    fn new(warm: &Warm) -> Self {
        let machine = Sandbox::new();
        let bucket = machine.path("bucket");
        let copy = machine.command("cp").arg("-a").arg(&warm.bucket);
        copy.arg(&bucket).ok();
        set(&machine, &bucket, "");
        let checkout = warm.project.checkout(machine.path("checkout"));
        machine.mount(checkout.target());
        let (seen, _) = machine.during(|| machine.cargo(&checkout, "build").ok());
        seen.assert_no_miss();
        Self {
            machine,
            checkout,
            bucket,
        }
    }

    fn assert_runs(&self) {
        let program = self.machine.output_of(self.checkout.program("app"));
        assert_eq!(program, samples::WHOLE_OUTPUT);
    }
}

/// Who builds again at once finds nothing that is still to be found lost; nor does the next daemon.
#[test]
fn the_next_build_heals_however_soon_it_comes() {
    let warm = Warm::new(LONGEST);
    for is_restarted in [false, true] {
        let cold = Cold::new(&warm);
        for object in objects(&cold.bucket) {
            fs::remove_file(object).must("remove");
        }
        let read = fs::read(cold.checkout.program("app"));
        assert!(read.is_err(), "it comes from nowhere");
        if is_restarted {
            cold.machine.kachefs("daemon stop").ok();
        }
        cold.machine.cargo(&cold.checkout, "build").ok();
        cold.assert_runs();
    }
}

/// However everything goes, and whatever the build that finds out was about to make.
#[test]
fn one_build_finds_out_and_the_next_one_heals() {
    fn remove(bucket: &Path) {
        for object in objects(bucket) {
            fs::remove_file(object).must("remove");
        }
    }
    fn damage(bucket: &Path) {
        for object in objects(bucket) {
            let file = fs::OpenOptions::new().write(true).open(object).must("open");
            file.set_len(20).must("cut short");
        }
    }
    fn unmount(bucket: &Path) {
        fs::rename(bucket.join("v1"), bucket.join("elsewhere")).must("rename");
    }
    let warm = Warm::new(3 * LONGEST);
    for (what, goes) in [
        ("removed", remove as fn(&Path)),
        ("damaged", damage),
        ("away", unmount),
    ] {
        for source in [
            "app/src/main.rs",
            "generated/src/lib.rs",
            "greeting/src/lib.rs",
        ] {
            let cold = Cold::new(&warm);
            let path = format!("crates/{source}");
            let text = fs::read_to_string(cold.checkout.path(&path)).must(&path);
            cold.checkout.write(&path, &format!("{text}\n// changed\n"));
            goes(&cold.bucket);
            let finds_out = cold.machine.cargo(&cold.checkout, "build").run();
            let heals = cold.machine.cargo(&cold.checkout, "build").run();
            assert!(
                heals.status.success(),
                "{what}, {source} changed: {finds_out}, and then {heals}"
            );
            cold.assert_runs();
        }
    }
}

#[test]
fn builds_end_or_heal_while_blobs_vanish() {
    let warm = Warm::new(Duration::from_secs(120 + 60 * rounds() as u64));
    let mut chance = Chance::new();
    let (mut gone, mut hits, mut tries) = (0, 0, 0);
    for round in 0..rounds() {
        let cold = Sandbox::with_limit(Duration::from_mins(8));
        let bucket = cold.path("bucket");
        let copy = cold.command("cp").arg("-a").arg(&warm.bucket);
        copy.arg(&bucket).ok();
        // What is made again is not sent again: less and less is there.
        set(&cold, &bucket, "--read-only");
        let checkout = warm.project.checkout(cold.path("checkout"));
        cold.mount(checkout.target());
        let stop = AtomicBool::new(false);
        let mut mine = Chance::of(chance.number());
        gone += std::thread::scope(|scope| {
            let remover = scope.spawn(|| remove_some(&bucket, &mut mine, &stop));
            let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").timeout(LONGEST).run());
            hits += seen.hits;
            // Everything that links or is linked is read now, or found to be gone.
            let main = format!("fn main() {{ println!(\"{round} {{}}\", app::line()); }}\n");
            checkout.write("crates/app/src/main.rs", &main);
            let expected = format!("{round} {}", samples::WHOLE_OUTPUT);
            // The next build repairs it if no more is removed; and mostly if it is.
            let goes_on = round % 2 == 0;
            let most = if goes_on { 3 } else { 2 };
            let has_failed = || {
                if !goes_on {
                    stop.store(true, Ordering::Relaxed);
                }
            };
            tries += build_until_it_runs(&cold, &checkout, &expected, most, has_failed);
            stop.store(true, Ordering::Relaxed);
            remover.join().unwrap_or(0)
        });
        // All of it once more, from what is here.
        cold.cargo(&checkout, "build").ok();
        let program = cold.output_of(checkout.program("app"));
        assert!(program.starts_with(&format!("{round} ")), "{program}");
    }
    println!("{gone} objects removed, {hits} hits, {tries} builds until it ran");
    assert!(gone > 0 && hits > 0);
}

/// A mount point that is not mounted is a remote that does not answer: nothing is lost, and nothing is made
/// again or put where it will be.
#[test]
fn a_directory_that_is_not_mounted_has_lost_nothing() {
    let Warm {
        machine: warm,
        bucket,
        project,
    } = Warm::new(LONGEST);
    let (layout, elsewhere) = (bucket.join("v1"), warm.path("elsewhere"));

    let cold = Sandbox::new();
    set(&cold, &bucket, "--prefetch off");
    let checkout = project.checkout(cold.path("checkout"));
    cold.mount(checkout.target());
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    seen.assert_no_miss();

    fs::rename(&layout, &elsewhere).must("unmount");
    let read = fs::read(checkout.program("app"));
    assert!(read.is_err(), "it comes from nowhere");
    assert_eq!(cold.stats()["actions"]["recomputed"], 0);
    // What is made meanwhile waits.
    let changed = "fn main() { println!(\"changed {}\", app::line()); }\n";
    project.write("crates/app/src/main.rs", changed);
    warm.cargo(&project, "build").ok();
    warm.kachefs("push --wait").fails();
    assert!(!layout.exists(), "a directory of another disk is filled");

    fs::rename(&elsewhere, &layout).must("mount");
    // It is left alone for five seconds.
    std::thread::sleep(Duration::from_secs(6));
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    seen.assert_no_miss();
    assert_eq!(
        cold.output_of(checkout.program("app")),
        samples::WHOLE_OUTPUT
    );
    assert_eq!(cold.stats()["actions"]["recomputed"], 0);
    warm.kachefs("push --wait").ok();
    let waiting = &warm.stats()["remote"]["results_waiting"];
    assert_eq!(*waiting, 0, "what waited is sent");
}
