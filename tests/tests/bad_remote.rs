//! Between a machine and its remote everything goes wrong that can, and builds are correct all the
//! same: nothing damaged is used, nothing hangs.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::machines::{DEBUG_LOG, read_late};
use harness::proxy::Fault;
use harness::{Chance, Must, Project, Proxy, Sandbox, Seaweed, samples};

/// How long anything waits for the remote, in seconds.
const WAIT: u64 = 3;

/// How long a build may take, with all that waits in it one after the other.
const LONGEST: Duration = Duration::from_mins(2);

/// One of this many answers is not what it should be.
const BAD: usize = 8;

fn rounds() -> u64 {
    if std::env::var_os("KACHEFS_TEST_LONG").is_some() {
        200
    } else {
        6
    }
}

/// What is dropped in this order: the server before the machine it runs on.
struct Bucket {
    seaweed: Seaweed,
    project: Project,
    _machine: Sandbox,
}

/// A bucket with everything a project is made of.
fn warm_bucket() -> Bucket {
    bucket_of(samples::whole)
}

/// The same for another project.
fn bucket_of(sample: impl FnOnce(PathBuf) -> Project) -> Bucket {
    let machine = Sandbox::with_limit(Duration::from_secs(60 + rounds() * 60));
    let seaweed = Seaweed::start(&machine);
    seaweed.make_bucket("cache");
    set(&machine, &seaweed.endpoint());
    let project = sample(machine.path("project"));
    machine.mount(project.target());
    machine.cargo(&project, "build").ok();
    machine.kachefs("push --wait").ok();
    Bucket {
        seaweed,
        project,
        _machine: machine,
    }
}

fn set(machine: &Sandbox, endpoint: &str) {
    let set = format!("remote set s3://cache --endpoint {endpoint} --anonymous --wait {WAIT}");
    machine.kachefs(&set).ok();
}

fn any_fault(chance: &mut Chance) -> Fault {
    if chance.below(BAD) > 0 {
        return Fault::None;
    }
    match chance.below(9) {
        0 => Fault::Late(chance.pause(Duration::from_millis(500))),
        1 => Fault::Slow(200_000),
        2 | 3 => Fault::Overloaded,
        4 => Fault::Reset,
        5 => Fault::Truncated,
        6 => Fault::Flipped,
        7 => Fault::Hung,
        _ => Fault::Skewed,
    }
}

#[test]
fn builds_are_correct_whatever_the_remote_does() {
    let bucket = warm_bucket();
    let mut chance = Chance::new();
    let (mut hits, mut misses, mut faulty) = (0, 0, 0);
    for round in 0..rounds() {
        let bad = std::sync::Arc::new(AtomicU64::new(0));
        let (counted, seed) = (std::sync::Arc::clone(&bad), chance.number());
        let choices = Mutex::new(Chance::of(seed));
        let proxy = Proxy::start(&bucket.seaweed.endpoint(), move |_| {
            let mut choices = choices
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let fault = any_fault(&mut choices);
            counted.fetch_add(u64::from(fault != Fault::None), Ordering::Relaxed);
            fault
        });
        let machine = Sandbox::with_limit(Duration::from_mins(5));
        set(&machine, &proxy.endpoint());
        let checkout = bucket.project.checkout(machine.path("checkout"));
        machine.mount(checkout.target());
        let build = || {
            let began = Instant::now();
            let outcome = machine.cargo(&checkout, "build").timeout(LONGEST).run();
            assert!(
                began.elapsed() < LONGEST,
                "round {round}, seed {seed}: {outcome}"
            );
            outcome
        };
        let (seen, first) = machine.during(build);
        let _ = first.success();
        // What was bound may not come: then the next build makes it.
        let program = checkout.program("app");
        let output = run_or_rebuild(&program, &build);
        assert_eq!(output, samples::WHOLE_OUTPUT, "round {round}, seed {seed}");
        checkout.write(
            "crates/app/src/main.rs",
            &format!("fn main() {{ println!(\"{round} {{}}\", app::line()); }}\n"),
        );
        let output = run_or_rebuild(&program, &build);
        let expected = format!("{round} {}", samples::WHOLE_OUTPUT);
        assert_eq!(output, expected, "round {round}, seed {seed}");
        hits += seen.hits;
        misses += seen.misses;
        faulty += bad.load(Ordering::Relaxed);
    }
    println!("{hits} hits, {misses} misses, {faulty} bad answers");
    assert!(hits > 0 && faulty > 0);
}

/// Builds until the program runs: a build may find that something it needs is gone, and say so once
/// for each.
fn run_or_rebuild(program: &PathBuf, build: &dyn Fn() -> harness::Outcome) -> String {
    for _ in 0..6 {
        if build().status.success() && program.exists() {
            let mut command = std::process::Command::new(program);
            if let Ok(output) = command.output()
                && output.status.success()
            {
                return String::from_utf8_lossy(&output.stdout).into_owned();
            }
        }
        std::thread::sleep(Duration::from_millis(1500));
    }
    panic!("no build repairs it:\n{}", build());
}

/// What one answer says of a blob that a compiler needs is not the last word.
#[test]
fn one_refusal_breaks_no_build() {
    let bucket = warm_bucket();
    for fault in [Fault::Skewed, Fault::Forbidden] {
        let refused = std::sync::Arc::new(AtomicU64::new(0));
        let counted = std::sync::Arc::clone(&refused);
        let proxy = Proxy::start(&bucket.seaweed.endpoint(), move |asked| {
            let holds_blobs = ["/blobs/", "/packs/"]
                .iter()
                .any(|kind| asked.target.contains(kind));
            let is_first = asked.method == "GET"
                && holds_blobs
                && counted.fetch_add(1, Ordering::Relaxed) == 0;
            if is_first { fault } else { Fault::None }
        });
        let machine = Sandbox::new();
        set(&machine, &proxy.endpoint());
        let checkout = bucket.project.checkout(machine.path("checkout"));
        machine.mount(checkout.target());
        // Nothing is read for a hit, and its crates for a miss.
        checkout.write(
            "crates/app/src/main.rs",
            "fn main() { println!(\"changed {}\", app::line()); }\n",
        );
        let (seen, _) = machine.during(|| machine.cargo(&checkout, "build").ok());
        assert!(refused.load(Ordering::Relaxed) > 1, "{fault:?} was seen");
        assert!(seen.hits > 0 && seen.misses <= 1, "{fault:?}: {seen:?}");
        let expected = format!("changed {}", samples::WHOLE_OUTPUT);
        assert_eq!(
            machine.output_of(checkout.program("app")),
            expected,
            "{fault:?}"
        );
    }
}

/// How a file in the directory of libraries is asked for: the target and the range.
fn request_of(bucket: &Bucket, begin: &str, end: &str) -> (String, String) {
    let requests = std::sync::Arc::new(Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&requests);
    let proxy = Proxy::start(&bucket.seaweed.endpoint(), move |asked| {
        let request = (asked.target.clone(), asked.range.clone());
        seen.lock().must("is whole").push(request);
        Fault::None
    });
    let machine = Sandbox::new();
    let options = format!("{} --prefetch off --read-only", proxy.endpoint());
    set(&machine, &options);
    let checkout = bucket.project.checkout(machine.path("checkout"));
    machine.mount(checkout.target());
    let (hits, _) = machine.during(|| machine.cargo(&checkout, "build").ok());
    hits.assert_no_miss();
    let before = requests.lock().must("is whole").len();
    let deps = checkout.target().join("debug/deps");
    let entries = std::fs::read_dir(deps).must("lists");
    let mut names = entries.map(|entry| entry.must("an entry").path());
    let is_it = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(begin) && name.ends_with(end)
    };
    std::fs::read(names.find(is_it).must("a library")).must("comes");
    let mut requests = requests.lock().must("is whole").split_off(before);
    assert_eq!(requests.len(), 1, "one request fetches it: {requests:?}");
    requests.remove(0)
}

/// Rustc maps the `.rmeta` beside an `.rlib` that it links, and looks at it: when that does not come, rustc is killed
/// (SIGBUS). So it comes before, and who waits for one blob in vain asks once more.
#[test]
fn bad_answers_for_what_rustc_maps_break_no_build() {
    let bucket = warm_bucket();
    let changed = "fn main() { println!(\"changed {}\", app::line()); }\n";
    let expected = format!("changed {}", samples::WHOLE_OUTPUT);
    let request = request_of(&bucket, "libgreeting-", ".rmeta");
    let (printed, late) = built_where_badly_answered(&bucket, request, changed);
    assert_eq!((printed, late), (expected, Vec::new()));
}

/// What the last compile of a program did not load comes when rustc has mapped it: who reads asks once more, too.
#[test]
fn bad_answers_for_what_a_source_has_come_to_load_break_no_build() {
    let bucket = bucket_of(samples::something_unused);
    let request = request_of(&bucket, "libunused-", ".rlib");
    let (printed, late) = built_where_badly_answered(&bucket, request, samples::USES_BOTH);
    assert_eq!(printed, samples::BOTH_OUTPUT);
    let is_it = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libunused-") && name.ends_with(".rlib")
    };
    assert!(late.iter().any(is_it), "{late:?}");
}

/// Builds another program where one request is answered badly: it arrives damaged, and then not before somebody asks
/// whether anything is answered. Returns what the program prints, and which libraries were waited for by who read them.
fn built_where_badly_answered(
    bucket: &Bucket,
    (target, range): (String, String),
    program: &str,
) -> (String, Vec<PathBuf>) {
    let times = std::sync::Arc::new(AtomicU64::new(0));
    let (counted, is_asked) = (std::sync::Arc::clone(&times), AtomicBool::new(false));
    let proxy = Proxy::start(&bucket.seaweed.endpoint(), move |asked| {
        is_asked.fetch_or(asked.method == "HEAD", Ordering::Relaxed);
        if (&asked.target, &asked.range) != (&target, &range) {
            return Fault::None;
        }
        match counted.fetch_add(1, Ordering::Relaxed) {
            0 => Fault::Flipped,
            _ if is_asked.load(Ordering::Relaxed) => Fault::None,
            _ => Fault::Hung,
        }
    });
    let machine = Sandbox::new();
    set(&machine, &format!("{} --prefetch off", proxy.endpoint()));
    let checkout = bucket.project.checkout(machine.path("checkout"));
    let mount = machine.kachefs("mount").arg(checkout.target());
    mount.env("KACHEFS_LOG", DEBUG_LOG).ok();
    checkout.write("crates/app/src/main.rs", program);
    machine.cargo(&checkout, "build").ok();
    assert!(times.load(Ordering::Relaxed) > 2, "it was wanted");
    let late = read_late(&machine, &checkout.target());
    (machine.output_of(checkout.program("app")), late)
}

#[test]
fn a_remote_that_hangs_is_left_alone() {
    let bucket = warm_bucket();
    let proxy = Proxy::start(&bucket.seaweed.endpoint(), |_| Fault::Hung);
    let machine = Sandbox::new();
    set(&machine, &proxy.endpoint());
    let checkout = bucket.project.checkout(machine.path("checkout"));
    machine.mount(checkout.target());
    let began = Instant::now();
    let (seen, _) = machine.during(|| machine.cargo(&checkout, "build").ok());
    let took = began.elapsed();
    assert_eq!((seen.hits, seen.failed), (0, 0), "{seen:?}");
    // Once as long as anything waits, and then again each time it is given another chance.
    assert!(took < Duration::from_secs(10 * WAIT), "{took:?}");
    assert_eq!(machine.stats()["remote"]["answers"], false);
}

/// The kernel locks what is written, and the directory of what is removed: whoever takes names away must not wait for
/// the one while somebody waits for the other.
#[test]
fn who_writes_what_does_not_come_keeps_nobody_from_removing_it() {
    let bucket = warm_bucket();
    let hangs = std::sync::Arc::new(AtomicU64::new(0));
    let hung = std::sync::Arc::clone(&hangs);
    let proxy = Proxy::start(&bucket.seaweed.endpoint(), move |_| {
        if hung.load(Ordering::Relaxed) == 0 {
            Fault::None
        } else {
            Fault::Hung
        }
    });
    let machine = Sandbox::new();
    set(&machine, &proxy.endpoint());
    let checkout = bucket.project.checkout(machine.path("checkout"));
    machine.mount(checkout.target());
    let (seen, _) = machine.during(|| machine.cargo(&checkout, "build").ok());
    seen.assert_no_miss();
    hangs.store(1, Ordering::Relaxed);
    let program = checkout.program("app");
    let most = Duration::from_secs(20 * WAIT);
    let wrote = std::thread::scope(|scope| {
        let writes = scope.spawn(|| {
            let mut command = machine.command("dd");
            command = command.args(["if=/dev/zero", "bs=1", "count=1", "seek=9", "conv=notrunc"]);
            let of = format!("of={}", program.display());
            command.arg(of).timeout(most).run()
        });
        std::thread::sleep(Duration::from_millis(500));
        let remove = machine.command("rm").arg("-f").arg(&program);
        remove.timeout(most).ok();
        writes.join()
    });
    let wrote = wrote.ok().must("it ends");
    assert!(!wrote.status.success(), "{wrote}");
    let build = || machine.cargo(&checkout, "build").timeout(LONGEST).run();
    assert_eq!(run_or_rebuild(&program, &build), samples::WHOLE_OUTPUT);
}

#[test]
fn a_remote_that_comes_back_is_used_again() {
    let bucket = warm_bucket();
    let is_up = std::sync::Arc::new(AtomicU64::new(0));
    let up = std::sync::Arc::clone(&is_up);
    let proxy = Proxy::start(&bucket.seaweed.endpoint(), move |_| {
        if up.load(Ordering::Relaxed) == 0 {
            Fault::Overloaded
        } else {
            Fault::None
        }
    });
    let machine = Sandbox::new();
    set(&machine, &proxy.endpoint());
    let checkout = bucket.project.checkout(machine.path("checkout"));
    machine.mount(checkout.target());
    machine.cargo(&checkout, "build -p greeting").ok();
    is_up.store(1, Ordering::Relaxed);
    // Its pause is five seconds at first.
    std::thread::sleep(Duration::from_secs(11));
    let (seen, _) = machine.during(|| machine.cargo(&checkout, "build").ok());
    assert!(seen.hits > 0, "{seen:?}");
}
