//! A published tree is the view it was made of, on any machine: read-only, or to start from.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use harness::{Chance, Must, Project, Sandbox, samples, tree};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

/// How long reading a program that is here may take.
const PROMPT: Duration = Duration::from_secs(20);

/// Two machines with a directory that both see.
struct Machines {
    shared: tempfile::TempDir,
    builder: Sandbox,
    shard: Sandbox,
}

impl Machines {
    fn new() -> Self {
        let machines = Self {
            shared: tempfile::tempdir().must("a directory"),
            builder: Sandbox::new(),
            shard: Sandbox::new(),
        };
        for machine in [&machines.builder, &machines.shard] {
            let set = format!("remote set {} --wait 2", machines.shared.path().display());
            machine.kachefs(&set).ok();
        }
        machines
    }

    /// Builds a project and publishes its target.
    fn publish(&self, words: &str) -> Project {
        let project = samples::whole(self.builder.path("project"));
        self.builder.mount(project.target());
        self.builder.cargo(&project, words).ok();
        self.builder
            .kachefs("publish --name app")
            .arg(project.target())
            .ok();
        project
    }

    /// A shard needs a daemon, which the first mount starts.
    fn mount_read_only(&self) -> std::path::PathBuf {
        let directory = self.shard.make_dir("farm/app");
        self.shard
            .kachefs("mount --read-only app")
            .arg(&directory)
            .ok();
        directory
    }
}

fn number(machine: &Sandbox, name: &str) -> u64 {
    machine.stats()["remote"][name].as_u64().must(name)
}

/// Every name with what can be seen of it.
fn seen(root: &Path) -> Vec<String> {
    let mut seen: Vec<_> = tree::files(root)
        .into_iter()
        .map(|path| {
            let meta = fs::symlink_metadata(&path).must(path.display());
            let name = path.strip_prefix(root).must("below the root");
            format!(
                "{} {} {:o} {} {}.{}",
                name.display(),
                meta.len(),
                meta.permissions().mode(),
                meta.nlink(),
                meta.mtime(),
                meta.mtime_nsec()
            )
        })
        .collect();
    seen.sort();
    seen
}

#[test]
fn a_shard_sees_the_view_and_fetches_what_it_reads() {
    let machines = Machines::new();
    let project = machines.publish("test --no-run");
    let there = machines.mount_read_only();
    let shard = &machines.shard;
    assert_eq!(seen(&there), seen(&project.target()));
    assert_eq!(number(shard, "faults"), 0, "names need no bytes");
    let tests: Vec<_> = tree::files(&there.join("debug/deps"))
        .into_iter()
        .filter(|path| path.extension().is_none())
        // That of a proc macro needs the compiler's library.
        .filter(|path| !path.to_string_lossy().contains("/shout-"))
        .filter(|path| fs::metadata(path).must("meta").permissions().mode() & 0o111 != 0)
        .collect();
    assert!(tests.len() >= 2, "{tests:?}");
    for test in &tests {
        shard.command(test).ok();
    }
    let faults = number(shard, "faults");
    assert!(faults <= tests.len() as u64, "{faults} for {tests:?}");
    let all = tree::files(&there);
    for path in all {
        let name = path.strip_prefix(&there).must("below");
        let original = fs::read(project.target().join(name)).must(path.display());
        assert!(fs::read(&path).must(path.display()) == original, "{name:?}");
    }
}

#[test]
fn nothing_is_written_to_a_tree_that_is_only_read() {
    let machines = Machines::new();
    machines.publish("build");
    let there = machines.mount_read_only();
    let program = there.join("debug/app");
    let error_of = |result: std::io::Result<()>| result.err().and_then(|e| e.raw_os_error());
    let read_only = Some(libc::EROFS);
    assert_eq!(error_of(fs::write(there.join("new"), "x")), read_only);
    assert_eq!(error_of(fs::write(&program, "x")), read_only);
    assert_eq!(error_of(fs::remove_file(&program)), read_only);
    assert_eq!(error_of(fs::create_dir(there.join("d"))), read_only);
    let mode = fs::Permissions::from_mode(0o600);
    assert_eq!(error_of(fs::set_permissions(&program, mode)), read_only);
    assert_eq!(machines.shard.output_of(&program), samples::WHOLE_OUTPUT);
    let again = machines
        .shard
        .kachefs("mount --read-only app")
        .arg(&there)
        .fails();
    assert!(
        again.one_line_error().contains("mounted already"),
        "{again}"
    );
}

#[test]
fn a_target_starts_from_a_tree() {
    let machines = Machines::new();
    let project = machines.publish("build");
    let shard = &machines.shard;
    let checkout = project.checkout(shard.path("another/place"));
    shard
        .kachefs("mount --from app")
        .arg(checkout.target())
        .ok();
    assert_eq!(seen(&checkout.target()), seen(&project.target()));
    let (counters, _) = shard.during(|| shard.cargo(&checkout, "build").ok());
    assert_eq!(counters.failed, 0, "{counters:?}");
    let program = checkout.program("app");
    assert_eq!(shard.output_of(&program), samples::WHOLE_OUTPUT);
    checkout.write(
        "crates/app/src/main.rs",
        "fn main() { println!(\"new\"); }\n",
    );
    shard.cargo(&checkout, "build").ok();
    assert_eq!(shard.output_of(&program), "new\n");
    // Its own by now: the tree is what it was.
    let there = machines.mount_read_only();
    assert_eq!(
        shard.output_of(there.join("debug/app")),
        samples::WHOLE_OUTPUT
    );
    let again = shard
        .kachefs("mount --from app")
        .arg(checkout.target())
        .fails();
    assert!(again.one_line_error().contains("mounted"), "{again}");
}

#[test]
fn trees_are_listed_replaced_and_taken_back() {
    let machines = Machines::new();
    let project = machines.publish("build");
    let builder = &machines.builder;
    let list = || -> Vec<String> {
        let outcome = builder.kachefs("trees --json").ok();
        let list: Value = serde_json::from_str(&outcome.stdout).must(outcome.stdout.clone());
        let names = list["trees"].as_array().must("a list").iter();
        names
            .map(|tree| tree["name"].as_str().must("a name").to_owned())
            .collect()
    };
    assert_eq!(list(), ["app"]);
    project.write(
        "crates/app/src/main.rs",
        "fn main() { println!(\"two\"); }\n",
    );
    builder.cargo(&project, "build").ok();
    let publish = |name: &str| {
        builder
            .kachefs(&format!("publish --name {name}"))
            .arg(project.target())
    };
    publish("app").ok();
    publish("other.one").ok();
    assert_eq!(list(), ["app", "other.one"]);
    let there = machines.mount_read_only();
    assert_eq!(machines.shard.output_of(there.join("debug/app")), "two\n");
    builder.kachefs("unpublish other.one").ok();
    assert_eq!(list(), ["app"]);
    let error = builder.kachefs("unpublish other.one").fails();
    assert!(error.one_line_error().contains("no tree"), "{error}");
    for name in ["../x", "a/b", ".x", ""] {
        let error = builder
            .kachefs("publish")
            .arg(project.target())
            .arg(format!("--name={name}"))
            .fails();
        assert!(!error.stderr.contains("panicked"), "{error}");
    }
    assert_eq!(list(), ["app"]);
}

#[test]
fn a_tree_that_strangers_signed_is_not_mounted() {
    let machines = Machines::new();
    machines.builder.kachefs("key generate").ok();
    machines.publish("build");
    let own = machines.shard.kachefs("key generate").ok();
    let set = format!("key trust {}", own.stdout.trim());
    machines.shard.kachefs(&set).ok();
    let directory = machines.shard.make_dir("farm");
    let error = machines
        .shard
        .kachefs("mount --read-only app")
        .arg(&directory)
        .fails();
    assert!(error.one_line_error().contains("trusted"), "{error}");
    assert!(!machines.shard.is_mounted(&directory));
}

#[test]
fn what_is_gone_gives_eio_and_the_rest_is_there() {
    let machines = Machines::new();
    let project = machines.publish("build");
    let there = machines.mount_read_only();
    let mut chance = Chance::new();
    let blobs = tree::files(&machines.shared.path().join("v1/blobs"));
    let of_object = |path: &Path| {
        path.file_name()
            .must("a name")
            .to_string_lossy()
            .into_owned()
    };
    let mut gone = Vec::new();
    for (at, blob) in blobs.iter().enumerate() {
        // One goes and one stays, whatever chance says.
        if at == 0 || (at > 1 && chance.percent(50)) {
            fs::remove_file(blob).must("remove");
            gone.push(of_object(blob));
        }
    }
    assert!(
        gone.len() < blobs.len(),
        "{} of {}",
        gone.len(),
        blobs.len()
    );
    // Twice: what is lost stays lost, and nothing else goes with it.
    for _ in 0..2 {
        let mut lost = 0;
        for path in tree::files(&there) {
            let name = path.strip_prefix(&there).must("below");
            let original = fs::read(project.target().join(name)).must(path.display());
            let is_gone = gone.contains(&blake3::hash(&original).to_hex().to_string());
            match fs::read(&path) {
                Ok(bytes) => {
                    assert!(bytes == original, "{name:?}");
                    assert!(!is_gone, "{name:?} comes from nowhere");
                }
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name:?}: {error}");
                    assert!(is_gone, "{name:?} is in the remote");
                    lost += 1;
                }
            }
        }
        assert!(lost > 0);
    }
    let log = fs::read_to_string(machines.shard.store().join("daemon.log")).must("the log");
    for digest in &gone {
        assert!(log.contains(digest), "{digest} is not named");
    }
}

/// A mount that is only read has nobody who makes what is lost: it waits until it is there again.
#[test]
fn what_is_put_back_is_there_again() {
    let machines = Machines::new();
    machines.publish("build");
    let there = machines.mount_read_only();
    let program = there.join("debug/app");
    let blobs = machines.shared.path().join("v1/blobs");
    let aside = machines.shared.path().join("aside");
    fs::rename(&blobs, &aside).must("take away");
    let error = fs::read(&program).err().must("it comes from nowhere");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    fs::rename(&aside, &blobs).must("put back");
    // Looked for once a minute, and when another tree is mounted.
    let another = machines.shard.make_dir("another");
    let mount = machines.shard.kachefs("mount --read-only app");
    mount.arg(&another).ok();
    let deadline = Instant::now() + PROMPT;
    while fs::read(&program).is_err() {
        assert!(Instant::now() < deadline, "it is there and nobody looks");
        std::thread::sleep(Duration::from_millis(50));
    }
    machines.shard.command(&program).ok();
}

/// All that share a mount share what one of them has read: nobody is asked again, neither the remote nor the
/// daemon.
#[test]
fn a_tree_is_one_request_and_its_pages_are_everybodys() {
    let machines = Machines::new();
    machines.publish("build");
    let shard = &machines.shard;
    let directory = machines.shared.path().display();
    shard
        .kachefs(&format!("remote set {directory} --read-only"))
        .ok();
    let there = machines.mount_read_only();
    assert_eq!(number(shard, "requests"), 1, "the tree");
    let program = there.join("debug/app");
    let read = || {
        shard
            .command("sha256sum")
            .arg(&program)
            .timeout(PROMPT)
            .ok()
    };
    let first = read();
    let asked = number(shard, "requests");
    assert!(asked > 1, "the program");
    let daemon = shard.current_daemon();
    kill(daemon, Signal::SIGSTOP).must("stop the daemon");
    let second = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    kill(daemon, Signal::SIGCONT).must("let it go on");
    let second = second.ok().must("read while nobody answers");
    assert_eq!(first.stdout, second.stdout);
    assert_eq!(number(shard, "requests"), asked);
}
