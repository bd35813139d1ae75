//! What is lost is made again from its lineage: the compile that made it runs once more, and what it makes
//! is taken if it is the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::{Must, Package, Project, Sandbox, processes, samples, tree};

/// How long a lost name may stay.
const PATIENCE: Duration = Duration::from_secs(10);

/// A machine that built a project, one that got all of it from there, and what lies between them.
struct Machines {
    bucket: tempfile::TempDir,
    warm: Sandbox,
    cold: Sandbox,
    project: Project,
    checkout: Project,
}

impl Machines {
    /// `limit` is how long the second machine waits for what is made again, in milliseconds.
    fn built(sample: impl FnOnce(PathBuf) -> Project, limit: Option<&str>) -> Self {
        let bucket = tempfile::tempdir().must("a directory");
        let (warm, cold) = (Sandbox::new(), Sandbox::new());
        for machine in [&warm, &cold] {
            let set = format!("remote set {} --wait 2", bucket.path().display());
            machine.kachefs(&set).ok();
        }
        let project = sample(warm.path("project"));
        warm.mount(project.target());
        warm.cargo(&project, "build --release").ok();
        warm.kachefs("push --wait").ok();
        let checkout = project.checkout(cold.path("somewhere/else"));
        let mount = cold.kachefs("mount").arg(checkout.target());
        match limit {
            Some(limit) => mount.env("KACHEFS_TEST_RECOMPUTE_MS", limit).ok(),
            None => mount.ok(),
        };
        let (seen, _) = cold.during(|| cold.cargo(&checkout, "build --release").ok());
        seen.assert_no_miss();
        assert!(seen.hits > 0, "{seen:?}");
        Self {
            bucket,
            warm,
            cold,
            project,
            checkout,
        }
    }

    /// Removes objects from the bucket: those that hold one blob, or all that hold any.
    fn lose(&self, kinds: &[&str]) {
        for kind in kinds {
            let directory = self.bucket.path().join("v1").join(kind);
            let objects = tree::files(&directory);
            assert!(!objects.is_empty(), "nothing in {}", directory.display());
            for object in objects {
                fs::remove_file(object).must("remove");
            }
        }
    }

    fn lose_everything(&self) {
        self.lose(&["blobs", "packs"]);
    }

    fn program(&self) -> PathBuf {
        self.checkout.path("target/release/app")
    }

    fn recomputed(&self) -> u64 {
        let number = self.cold.stats()["actions"]["recomputed"].as_u64();
        number.must("a number")
    }
}

fn error_of<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn libraries(project: &Project) -> Vec<PathBuf> {
    let deps = tree::files(&project.path("target/release/deps"));
    let is_library = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "rlib");
    deps.into_iter().filter(is_library).collect()
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    let [one, other] = [one, other].map(|path| fs::read(path).must(path.display()));
    assert!(one == other, "other bytes");
}

#[test]
fn a_program_that_is_lost_is_linked_again() {
    let machines = Machines::built(samples::plain, None);
    machines.lose(&["blobs"]);
    let cold = &machines.cold;
    assert_eq!(cold.output_of(machines.program()), samples::PLAIN_OUTPUT);
    let warm = machines.project.path("target/release/app");
    assert_same(&machines.program(), &warm);
    assert_eq!(machines.recomputed(), 1);
    let said = cold.kachefs("stats").ok().stdout;
    assert!(said.contains("recomputed      1 compile"), "{said}");
    // Nothing of it shows in the view, and cargo has nothing to do.
    let (idle, _) = cold.during(|| cold.cargo(&machines.checkout, "build --release").ok());
    assert_eq!((idle.hits, idle.misses), (0, 0), "{idle:?}");
    let left = cold.store().join("recompute");
    assert!(tree::files(&left).is_empty(), "{left:?}");
}

#[test]
fn what_it_is_made_of_is_made_again_first() {
    let machines = Machines::built(samples::plain, None);
    machines.lose_everything();
    let cold = &machines.cold;
    assert_eq!(cold.output_of(machines.program()), samples::PLAIN_OUTPUT);
    assert_eq!(machines.recomputed(), 3, "two libraries and a program");
    // Everything shows the same as on the machine that made it.
    for (here, there) in libraries(&machines.checkout)
        .iter()
        .zip(&libraries(&machines.project))
    {
        assert_eq!(here.file_name(), there.file_name());
        assert_same(here, there);
    }
    assert_eq!(machines.recomputed(), 3);
}

#[test]
fn a_compile_gets_the_crates_it_loads_made_again() {
    let machines = Machines::built(samples::plain, None);
    machines.lose_everything();
    let (cold, checkout) = (&machines.cold, &machines.checkout);
    checkout.write(
        "crates/app/src/main.rs",
        "fn main() { println!(\"new: {}\", middle::sentence()); }\n",
    );
    let (seen, _) = cold.during(|| cold.cargo(checkout, "build --release").ok());
    assert_eq!((seen.misses, seen.failed), (1, 0), "{seen:?}");
    let expected = format!("new: {}", samples::PLAIN_OUTPUT);
    assert_eq!(cold.output_of(machines.program()), expected);
    assert_eq!(machines.recomputed(), 2);
}

#[test]
fn generated_sources_and_proc_macros_that_are_here_are_used() {
    let machines = Machines::built(samples::whole, None);
    machines.lose(&["blobs"]);
    let cold = &machines.cold;
    assert_eq!(cold.output_of(machines.program()), samples::WHOLE_OUTPUT);
    let warm = machines.project.path("target/release/app");
    assert_same(&machines.program(), &warm);
}

#[test]
fn many_readers_wait_for_one_compile() {
    let machines = Machines::built(samples::plain, None);
    machines.lose(&["blobs"]);
    let program = machines.program();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| fs::read(&program).map(|bytes| bytes.len())))
            .collect();
        for reader in readers {
            let read = reader.join().ok().must("a reader");
            assert!(read.must("read") > 100_000);
        }
    });
    assert_eq!(machines.recomputed(), 1);
}

#[test]
fn what_was_edited_since_is_for_the_next_build() {
    let machines = Machines::built(samples::plain, None);
    machines.lose_everything();
    let (cold, checkout) = (&machines.cold, &machines.checkout);
    let edited = "crates/leaf/src/lib.rs";
    checkout.replace(edited, "{ 42 }", "{ 43 }");
    let program = machines.program();
    assert_eq!(error_of(fs::read(&program)), Some(nix::libc::EIO));
    assert!(
        processes::wait_for(PATIENCE, || !program.exists()),
        "its name goes"
    );
    // One failure tells enough: the rest goes as well, and one build makes all of it.
    let none = || libraries(checkout).is_empty();
    assert!(processes::wait_for(PATIENCE, none), "libraries");
    cold.cargo(checkout, "build --release").ok();
    assert_eq!(cold.output_of(&program), "the answer is 43\n");
    assert_eq!(machines.recomputed(), 0);
}

#[test]
fn what_is_damaged_in_the_bucket_is_made_again() {
    let machines = Machines::built(samples::plain, None);
    for object in tree::files(&machines.bucket.path().join("v1/blobs")) {
        let mut bytes = fs::read(&object).must("read");
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::remove_file(&object).must("remove");
        fs::write(&object, bytes).must("write");
    }
    let printed = machines.cold.output_of(machines.program());
    assert_eq!(printed, samples::PLAIN_OUTPUT);
    assert_eq!(machines.recomputed(), 1);
}

#[test]
fn what_this_machine_alone_had_and_lost_is_made_again() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    sandbox.cargo(&project, "build --release").ok();
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build --release").ok());
    seen.assert_no_miss();
    // A daemon that has nothing open, and knows what the one before was asked.
    let asked = sandbox.kachefs("stats --last-build").in_dir(&project);
    asked.ok();
    sandbox.kill_daemon();
    sandbox.current_daemon();
    for blob in tree::files(&sandbox.store().join("blobs")) {
        fs::remove_file(blob).must("remove");
    }
    let program = project.path("target/release/app");
    assert_eq!(sandbox.output_of(program), samples::PLAIN_OUTPUT);
    let recomputed = sandbox.stats()["actions"]["recomputed"].as_u64();
    assert_eq!(recomputed, Some(3));
}

/// A program that is edited, and one that is not.
fn two(root: PathBuf) -> Project {
    let base = Package::new("base").lib("pub const N: u32 = 7;\n");
    let app = Package::new("app")
        .dep("base")
        .bin("fn main() { println!(\"{}\", base::N); }\n");
    let other = Package::new("other").bin("fn main() {}\n");
    Project::new(root, &[base, app, other])
}

#[test]
fn later_builds_leave_the_lineage_of_what_they_do_not_touch() {
    let machines = Machines::built(two, None);
    let (cold, checkout) = (&machines.cold, &machines.checkout);
    for number in 0..6 {
        let main = format!("fn main() {{ println!(\"{number}\"); }}\n");
        checkout.write("crates/other/src/main.rs", &main);
        let (seen, _) = cold.during(|| cold.cargo(checkout, "build --release").ok());
        assert_eq!((seen.hits, seen.misses), (0, 1), "{seen:?}");
    }
    machines.lose_everything();
    assert_eq!(cold.output_of(machines.program()), "7\n");
    assert_eq!(machines.recomputed(), 2);
}

#[test]
fn what_is_published_is_made_again_first() {
    let machines = Machines::built(two, None);
    machines.lose_everything();
    let cold = &machines.cold;
    assert_eq!(
        cold.output_of(machines.checkout.path("target/release/other")),
        ""
    );
    assert_eq!(machines.recomputed(), 1);
    let log = cold.store().join("daemon.log");
    let found = || fs::read_to_string(&log).is_ok_and(|text| text.contains("it is gone, too"));
    assert!(
        processes::wait_for(PATIENCE, found),
        "the rest is lost, too"
    );
    let publish = cold.kachefs("publish --name tree");
    publish.arg(machines.checkout.target()).ok();
    assert_eq!(machines.recomputed(), 3);
    assert!(machines.program().exists());
}

/// A proc macro that takes its time when nobody has given the compiler a jobserver, as cargo does.
fn patient(root: PathBuf, seconds: u32) -> Project {
    let slow = format!(
        "use proc_macro::TokenStream;\n#[proc_macro]\n\
         pub fn wait(_: TokenStream) -> TokenStream {{\n    \
         if std::env::var_os(\"CARGO_MAKEFLAGS\").is_none() {{\n        \
         std::process::Command::new(\"sleep\").arg(\"{seconds}\").status().unwrap();\n    }}\n    \
         \"1\".parse().unwrap()\n}}\n"
    );
    let app = Package::new("app")
        .dep("slow")
        .bin("fn main() { println!(\"{}\", slow::wait!()); }\n");
    Project::new(root, &[Package::new("slow").proc_macro(&slow), app])
}

#[test]
fn a_compiler_that_hangs_is_ended() {
    let machines = Machines::built(|root| patient(root, 1000), Some("4000"));
    machines.lose(&["blobs"]);
    let cold = &machines.cold;
    let program = machines.program();
    let began = Instant::now();
    assert_eq!(error_of(fs::read(&program)), Some(nix::libc::EIO));
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(3), "it was tried: {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    // A second reader does not wait again.
    assert!(fs::read(&program).is_err());
    assert!(began.elapsed() < took + Duration::from_secs(3));
    assert!(
        processes::wait_for(PATIENCE, || sleeps(cold) == 0),
        "children"
    );
    assert!(
        processes::wait_for(PATIENCE, || !program.exists()),
        "its name goes"
    );
    cold.cargo(&machines.checkout, "build --release").ok();
    assert_eq!(cold.output_of(&program), "1\n");
    assert_eq!(machines.recomputed(), 1, "the macro itself was made again");
}

/// Processes of this kind that a machine runs.
fn sleeps(machine: &Sandbox) -> usize {
    let named = processes::naming(machine.root()).into_iter();
    let programs = named.filter_map(processes::program);
    programs.filter(|path| path.ends_with("sleep")).count()
}

/// Reads a program that is lost until a compiler is at work that never ends, and is gone then.
fn ask_in_vain(machines: &Machines) {
    let (cold, program) = (&machines.cold, machines.program());
    let mut reader = std::process::Command::new("cat")
        .arg(&program)
        .stdout(std::process::Stdio::null())
        .spawn()
        .must("cat");
    let began = processes::wait_for(PATIENCE, || sleeps(cold) > 0);
    reader.kill().must("kill the reader");
    reader.wait().must("wait for the reader");
    assert!(began, "a compiler");
}

#[test]
fn who_unmounts_waits_for_no_compiler() {
    let machines = Machines::built(|root| patient(root, 1000), None);
    machines.lose(&["blobs"]);
    ask_in_vain(&machines);
    let cold = &machines.cold;
    cold.unmount(machines.checkout.target());
    assert_eq!(sleeps(cold), 0);
}

#[test]
fn a_refused_unmount_ends_no_compiler() {
    let machines = Machines::built(|root| patient(root, 3), None);
    machines.lose(&["blobs"]);
    let (cold, program) = (&machines.cold, machines.program());
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&program));
        assert!(
            processes::wait_for(PATIENCE, || sleeps(cold) > 0),
            "a compiler"
        );
        let unmount = cold.kachefs("unmount").arg(machines.checkout.target());
        let refused = unmount.fails();
        assert!(refused.stderr.contains("in use"), "{refused}");
        reader.join().ok().must("a reader").must("read");
    });
}

#[test]
fn a_killed_daemon_leaves_no_compiler() {
    let machines = Machines::built(|root| patient(root, 1000), None);
    machines.lose(&["blobs"]);
    ask_in_vain(&machines);
    let cold = &machines.cold;
    cold.kill_daemon();
    assert!(
        processes::wait_for(PATIENCE, || sleeps(cold) == 0),
        "children"
    );
}

#[test]
fn the_next_daemon_goes_on_with_it() {
    let machines = Machines::built(|root| patient(root, 3), None);
    machines.lose(&["blobs"]);
    let (cold, program) = (&machines.cold, machines.program());
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&program));
        std::thread::sleep(Duration::from_millis(1500));
        cold.kill_daemon();
        let read = reader.join().ok().must("a reader").must("read");
        let warm = machines.project.path("target/release/app");
        assert!(read == fs::read(warm).must("read"), "other bytes");
    });
    assert_eq!(cold.output_of(&program), "1\n");
}

#[test]
fn what_a_remote_only_does_not_show_now_is_not_made_again() {
    let machines = Machines::built(samples::plain, None);
    let away = machines.bucket.path().with_extension("away");
    fs::rename(machines.bucket.path(), &away).must("take the remote away");
    let began = Instant::now();
    let read = fs::read(machines.program());
    fs::rename(&away, machines.bucket.path()).must("bring it back");
    assert_eq!(error_of(read), Some(nix::libc::EIO));
    assert!(began.elapsed() < Duration::from_secs(15));
    assert_eq!(machines.recomputed(), 0);
    drop(machines.warm);
}
