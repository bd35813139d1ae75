//! `kachefs remote gc` removes what nothing names from a remote, and nothing else, whoever uploads
//! meanwhile.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Chance, Must, Project, Sandbox, Seaweed, samples, tree};
use serde_json::Value;

/// Machines that share a directory.
struct Machines {
    shared: tempfile::TempDir,
    builder: Sandbox,
    reader: Sandbox,
    project: Project,
}

/// What nothing names is left alone so long.
const GRACE: Duration = Duration::from_secs(3);

impl Machines {
    /// One of them has built a project, uploaded all of it and published its target.
    fn new() -> Self {
        let builder = Sandbox::new();
        let machines = Self {
            shared: tempfile::tempdir().must("a directory"),
            project: samples::whole(builder.path("project")),
            builder,
            reader: Sandbox::new(),
        };
        machines.set(&machines.builder, "");
        machines.set(&machines.reader, "");
        machines.builder.mount(machines.project.target());
        machines.builder.cargo(&machines.project, "build").ok();
        machines.builder.kachefs("push --wait").ok();
        machines.publish("app");
        machines
    }

    fn set(&self, machine: &Sandbox, more: &str) {
        let set = format!(
            "remote set {} --wait 2 --grace {}s {more}",
            self.shared.path().display(),
            GRACE.as_secs()
        );
        machine.kachefs(&set).ok();
    }

    /// A checkout of the project on the other machine, mounted.
    fn checkout(&self, name: &str) -> Project {
        let checkout = self.project.checkout(self.reader.path(name));
        self.reader.mount(checkout.target());
        checkout
    }

    /// Has everything removed that the builder has uploaded and published.
    fn remove_all(&self) {
        self.builder.kachefs("unpublish app").ok();
        thread::sleep(4 * GRACE);
        collect(&self.builder, "--keep 9s");
        thread::sleep(GRACE + Duration::from_secs(1));
        collect(&self.builder, "--keep 9s");
        assert_eq!(self.containers(), HashSet::new());
        assert_eq!(self.objects("actions"), HashSet::new());
    }

    fn publish(&self, name: &str) {
        publish(&self.builder, name, &self.project.target());
    }

    fn mount_read_only(&self, name: &str) -> PathBuf {
        let directory = self.reader.make_dir(&format!("farm/{name}"));
        let command = self.reader.kachefs(&format!("mount --read-only {name}"));
        command.arg(&directory).ok();
        directory
    }

    fn objects(&self, kind: &str) -> HashSet<PathBuf> {
        let directory = self.shared.path().join("v1").join(kind);
        if !directory.exists() {
            return HashSet::new();
        }
        let files = tree::files(&directory).into_iter();
        files.filter(|path| path.is_file()).collect()
    }

    /// The objects that hold blobs.
    fn containers(&self) -> HashSet<PathBuf> {
        let mut all = self.objects("blobs");
        all.extend(self.objects("packs"));
        all
    }
}

/// Publishes a target. A busy machine may take longer for that than a third of a short grace.
fn publish(machine: &Sandbox, name: &str, target: &Path) {
    let command = || {
        let command = machine.kachefs(&format!("publish --name {name}"));
        command.arg(target)
    };
    let first = command().run();
    if first.stderr.contains("it took so long") {
        command().ok();
    } else {
        assert!(first.status.success(), "{first}");
    }
}

fn collect(machine: &Sandbox, more: &str) -> Value {
    let outcome = machine.kachefs(&format!("remote gc --json {more}")).ok();
    let report: Value = serde_json::from_str(&outcome.stdout).must("JSON");
    assert_eq!(report["cut_short"], false, "{report}");
    report
}

fn removed(report: &Value, what: &str) -> u64 {
    report["removed"][what]["objects"].as_u64().unwrap_or(0)
}

/// Every file of a tree, with its bytes.
fn contents(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let name = |path: &PathBuf| path.strip_prefix(root).must("below the root").to_owned();
    let files = tree::files(root).into_iter().filter(|path| path.is_file());
    files
        .map(|path| (name(&path), fs::read(&path).must(path.display())))
        .collect()
}

#[test]
fn what_is_named_stays_and_what_is_not_goes() {
    let machines = Machines::new();
    let all = machines.containers();
    assert!(!all.is_empty());
    // Named by results, a manifest and a tree, however old it is.
    thread::sleep(GRACE + Duration::from_secs(2));
    let report = collect(&machines.builder, "");
    assert_eq!(machines.containers(), all, "{report}");
    // Results nobody wrote for long go; what the tree names stays.
    thread::sleep(2 * GRACE);
    let report = collect(&machines.builder, "--keep 9s --dry-run");
    assert!(removed(&report, "results") > 0, "{report}");
    assert_eq!(machines.containers(), all);
    assert!(!machines.objects("actions").is_empty());
    let again = collect(&machines.builder, "--keep 9s");
    assert_eq!(removed(&again, "results"), removed(&report, "results"));
    assert_eq!(removed(&again, "blobs"), removed(&report, "blobs"));
    assert_eq!(machines.objects("actions"), HashSet::new());
    assert_eq!(machines.objects("builds"), HashSet::new());
    assert_eq!(machines.objects("condemned"), HashSet::new());
    let there = machines.mount_read_only("app");
    assert!(contents(&there) == contents(&machines.project.target()));
}

#[test]
fn a_mounted_tree_stays_until_it_is_unmounted() {
    let machines = Machines::new();
    let there = machines.mount_read_only("app");
    let expected = contents(&machines.project.target());
    machines.builder.kachefs("unpublish app").ok();
    // Far behind the lease that who took it back has left.
    thread::sleep(4 * GRACE);
    let report = collect(&machines.builder, "--keep 9s");
    assert!(removed(&report, "results") > 0, "{report}");
    assert!(contents(&there) == expected, "{report}");
    machines.reader.unmount(&there);
    thread::sleep(2 * GRACE);
    let report = collect(&machines.builder, "--keep 9s");
    assert_eq!(machines.containers(), HashSet::new(), "{report}");
}

#[test]
fn who_may_not_write_a_lease_has_a_grace_after_the_tree_is_taken_back() {
    let machines = Machines::new();
    machines.set(&machines.reader, "--read-only");
    let there = machines.mount_read_only("app");
    thread::sleep(4 * GRACE);
    let before = machines.objects("leases").len();
    machines.builder.kachefs("unpublish app").ok();
    assert_eq!(machines.objects("leases").len(), before + 1);
    let report = collect(&machines.builder, "--keep 9s");
    assert!(removed(&report, "results") > 0, "{report}");
    assert!(contents(&there) == contents(&machines.project.target()));
}

#[test]
fn a_build_hits_after_a_collection() {
    let machines = Machines::new();
    thread::sleep(2 * GRACE);
    collect(&machines.builder, "");
    let checkout = machines.checkout("checkout");
    let reader = &machines.reader;
    let (seen, _) = reader.during(|| reader.cargo(&checkout, "build").ok());
    assert_eq!((seen.misses, seen.failed), (0, 0), "{seen:?}");
    assert_eq!(
        reader.output_of(checkout.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn what_was_learned_long_ago_is_not_bound_unasked() {
    let machines = Machines::new();
    let reader = &machines.reader;
    // It has no lease.
    machines.set(reader, "--read-only");
    let first = machines.checkout("first");
    let (seen, _) = reader.during(|| reader.cargo(&first, "build").ok());
    assert_eq!((seen.misses, seen.failed), (0, 0), "{seen:?}");
    machines.remove_all();
    let second = machines.checkout("second");
    let (seen, _) = reader.during(|| reader.cargo(&second, "build").ok());
    assert!(seen.misses > 0, "{seen:?}");
    assert_eq!(
        reader.output_of(second.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn what_was_learned_long_ago_is_asked_for_again() {
    let machines = Machines::new();
    let reader = &machines.reader;
    let set = format!("remote set {}", machines.shared.path().display());
    let options = "--read-only --grace 36s --wait 2";
    reader.kachefs(&format!("{set} {options}")).ok();
    let requests = || {
        reader.stats()["remote"]["requests"]
            .as_u64()
            .must("a number")
    };
    let build = |checkout: &Project| {
        let (seen, _) = reader.during(|| reader.cargo(checkout, "build").ok());
        assert_eq!((seen.misses, seen.failed), (0, 0), "{seen:?}");
    };
    build(&machines.checkout("first"));
    let before = requests();
    build(&machines.checkout("second"));
    assert_eq!(requests(), before);
    thread::sleep(Duration::from_secs(13));
    build(&machines.checkout("third"));
    assert_eq!(requests(), before + 1, "the manifest");
    // A remote that does not answer: it is made here.
    let away = machines.shared.path().with_extension("away");
    fs::rename(machines.shared.path(), &away).must("takes it away");
    thread::sleep(Duration::from_secs(13));
    let last = machines.checkout("last");
    reader.cargo(&last, "build").ok();
    let output = reader.output_of(last.program("app"));
    assert_eq!(output, samples::WHOLE_OUTPUT);
    fs::rename(&away, machines.shared.path()).must("brings it back");
}

#[test]
fn what_was_removed_is_uploaded_again() {
    let machines = Machines::new();
    machines.remove_all();
    // The builder has not been told.
    machines.publish("again");
    let there = machines.mount_read_only("again");
    assert!(contents(&there) == contents(&machines.project.target()));
}

#[test]
fn what_cannot_be_read_stops_it() {
    let machines = Machines::new();
    let all = machines.containers();
    let odd = machines.shared.path().join("v1/trees/odd");
    fs::write(&odd, b"of a later kachefs").must("writes");
    thread::sleep(4 * GRACE);
    let failed = machines.builder.kachefs("remote gc --keep 9s").fails();
    assert!(failed.one_line_error().contains("v1/trees/odd"), "{failed}");
    assert_eq!(machines.containers(), all);
    assert!(!machines.objects("actions").is_empty());
    let short = machines.builder.kachefs("remote gc --keep 8s").fails();
    assert!(short.one_line_error().contains("too short"), "{short}");
    machines.set(&machines.reader, "--read-only");
    let only_read = machines.reader.kachefs("remote gc").fails();
    assert!(
        only_read.one_line_error().contains("only read"),
        "{only_read}"
    );
}

#[test]
fn what_was_removed_and_is_built_again_is_uploaded_again() {
    let machines = Machines::new();
    machines.remove_all();
    let (builder, reader) = (&machines.builder, &machines.reader);
    let again = machines.project.checkout(builder.path("again"));
    builder.mount(again.target());
    let (seen, _) = builder.during(|| builder.cargo(&again, "build").ok());
    assert_eq!((seen.misses, seen.failed), (0, 0), "{seen:?}");
    builder.kachefs("push --wait").ok();
    let checkout = machines.checkout("checkout");
    let (seen, _) = reader.during(|| reader.cargo(&checkout, "build").ok());
    assert_eq!((seen.misses, seen.failed), (0, 0), "{seen:?}");
    assert_eq!(
        reader.output_of(checkout.program("app")),
        samples::WHOLE_OUTPUT
    );
}

/// Versions a round may publish: this many from its own number on.
const VERSIONS: usize = 3;

/// Files of a version, and how many of them others have as well: they come back after a while.
const FILES: usize = 24;
const COMMON: usize = 18;
const BACK: usize = 5;

fn rounds() -> usize {
    if std::env::var_os("KACHEFS_TEST_LONG").is_some() {
        100
    } else {
        16
    }
}

/// What a file of a version holds: small ones are packed, large ones are not.
fn bytes_of(version: usize, file: usize) -> Vec<u8> {
    let id = if file < COMMON {
        (version / 2) % BACK * FILES + file
    } else {
        (BACK + version) * FILES + file
    };
    let size = if file.is_multiple_of(3) {
        90_000
    } else {
        12_000
    };
    Chance::of(id as u64).bytes(size)
}

fn write_version(target: &Path, version: usize) {
    for file in 0..FILES {
        fs::write(target.join(format!("f{file}")), bytes_of(version, file)).must("writes");
    }
    fs::write(target.join("version"), version.to_string()).must("writes");
}

/// The version that is shown, after all of it was read.
fn read_version(there: &Path) -> usize {
    let version = fs::read_to_string(there.join("version")).must("version");
    let version = version.parse().must("a number");
    for file in 0..FILES {
        let path = there.join(format!("f{file}"));
        let found = fs::read(&path);
        let found =
            found.unwrap_or_else(|error| panic!("{} of {version}: {error}", path.display()));
        assert!(found == bytes_of(version, file), "{}", path.display());
    }
    version
}

/// What nothing names is left alone so long while others publish; a third of it has to be enough for that.
const BUSY_GRACE: Duration = Duration::from_secs(9);

#[test]
fn no_tree_loses_a_blob_while_others_publish() {
    let limit = Duration::from_secs(120 + 30 * rounds() as u64);
    let first = Sandbox::with_limit(limit);
    let seaweed = Seaweed::start(&first);
    seaweed.make_bucket("cache");
    let set = format!(
        "remote set s3://cache --endpoint {} --anonymous --grace {}s",
        seaweed.endpoint(),
        BUSY_GRACE.as_secs()
    );
    let second = Sandbox::with_limit(limit);
    let publishers = [(&first, "a"), (&second, "b")];
    for (machine, _) in publishers {
        machine.kachefs(&set).ok();
        machine.mount(machine.make_dir("t"));
    }
    let mut chance = Chance::new();
    let (mut gone, mut versions) = (0, HashSet::new());
    let mut reader = None;
    for round in 0..rounds() {
        let mut pause = || chance.pause(Duration::from_millis(1500));
        let (pauses, late) = ([pause(), pause()], pause());
        let picks = [0, 1].map(|_| round + chance.below(VERSIONS));
        gone += thread::scope(|scope| {
            for ((machine, name), (pause, version)) in
                publishers.into_iter().zip(pauses.into_iter().zip(picks))
            {
                scope.spawn(move || {
                    thread::sleep(pause);
                    write_version(&machine.path("t"), version);
                    publish(machine, name, &machine.path("t"));
                });
            }
            thread::sleep(late);
            let began = Instant::now();
            let report = collect(&first, &format!("--keep {}s", 3 * BUSY_GRACE.as_secs()));
            assert!(began.elapsed() < BUSY_GRACE, "too slow a machine for this");
            removed(&report, "blobs") + removed(&report, "packs")
        });
        // What the last reader has had mounted since is as it was.
        if let Some((machine, mounted)) = reader.take() {
            let (machine, mounted): (Sandbox, Vec<(PathBuf, usize)>) = (machine, mounted);
            for (there, version) in mounted {
                assert_eq!(read_version(&there), version, "round {round}");
            }
            drop(machine);
        }
        let machine = Sandbox::with_limit(limit);
        machine.kachefs(&set).ok();
        let mounted = publishers
            .into_iter()
            .zip(picks)
            .map(|((_, name), version)| {
                let there = machine.make_dir(name);
                let mount = machine.kachefs(&format!("mount --read-only {name}"));
                mount.arg(&there).ok();
                versions.insert(version);
                (there, version)
            });
        let mounted = mounted.collect::<Vec<_>>();
        assert_eq!(read_version(&mounted[round % 2].0), mounted[round % 2].1);
        reader = Some((machine, mounted));
    }
    println!("{gone} objects removed, {} versions", versions.len());
    assert!(gone > 0, "nothing was collected: this shows nothing");
}
