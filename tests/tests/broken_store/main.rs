//! Whatever of a store is damaged while no daemon runs: the daemon starts, what is damaged is named and
//! set aside, everything else is as before, and cargo builds.

mod damage;
mod takeover;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use harness::chance::Chance;
use harness::messages::Messages;
use harness::{Must, Outcome, Package, Project, Sandbox, Tree, processes, samples};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use damage::{FAMILIES, HARMS, Harm, harm, index_files, put, rows, view_at, with_index};

/// Two projects built in mounted targets of one store, by different compiles.
struct Scene {
    sandbox: Sandbox,
    damaged: Project,
    spared: Project,
}

const SPARED_OUTPUT: &str = "spared\n";

impl Scene {
    #[track_caller]
    fn new(limit: Duration) -> Self {
        let sandbox = Sandbox::with_limit(limit);
        let damaged = samples::plain(sandbox.path("damaged"));
        let spared = Project::new(
            sandbox.path("spared"),
            &[Package::new("app").bin("fn main() { println!(\"spared\"); }\n")],
        );
        let scene = Self {
            sandbox,
            damaged,
            spared,
        };
        scene.start();
        scene.builds();
        scene.sandbox.counters();
        scene
    }

    /// Ends the daemon, in order or not.
    #[track_caller]
    fn end(&self, in_order: bool) {
        if in_order {
            let _ = self.sandbox.kachefs("daemon stop").ok();
        } else {
            self.sandbox.kill_keeper_and_daemon();
        }
    }

    /// Whatever happened, the daemon starts and mounts.
    #[track_caller]
    fn start(&self) -> [Outcome; 2] {
        [&self.damaged, &self.spared].map(|project| self.sandbox.mount(project.target()))
    }

    /// Both projects build, their programs say what they should, and then there is nothing to do.
    #[track_caller]
    fn builds(&self) {
        self.build(&self.damaged, samples::PLAIN_OUTPUT);
        self.build(&self.spared, SPARED_OUTPUT);
    }

    /// The same, but what is left of a tree may be of several times: cargo may find that out in steps.
    #[track_caller]
    fn builds_in_the_end(&self) {
        for project in [&self.damaged, &self.spared] {
            let cargo = || {
                let cargo = self.sandbox.cargo(project, "build --message-format=json");
                cargo.env("CARGO_INCREMENTAL", "0").ok()
            };
            let settled = (0..3).any(|_| Messages::of(&cargo()).stale().is_empty());
            assert!(settled, "{}", cargo());
        }
        self.builds();
    }

    #[track_caller]
    fn build(&self, project: &Project, output: &str) {
        // What an incremental compiler makes depends on what it made before.
        let cargo = |words| {
            let cargo = self.sandbox.cargo(project, words);
            cargo.env("CARGO_INCREMENTAL", "0")
        };
        let _ = cargo("build").ok();
        assert_eq!(self.sandbox.output_of(project.program("app")), output);
        let again = cargo("build --message-format=json");
        Messages::of(&again.ok()).assert_all_fresh();
    }

    /// Waits until the daemon has noted how far it has come, which it does every second.
    #[track_caller]
    fn wait_for_the_mark(&self) {
        let mark = self.sandbox.store().join("index.mark");
        let now = SystemTime::now();
        let noted = || {
            // It has nothing to note while nothing changes.
            fs::write(self.damaged.target().join("tick"), "").must("write");
            fs::metadata(&mark).ok()?.modified().ok()
        };
        assert!(
            processes::wait_for(Duration::from_secs(30), || noted() > Some(now)),
            "no mark"
        );
    }

    /// What is in the two views.
    fn trees(&self) -> [Tree; 2] {
        [&self.damaged, &self.spared].map(|project| Tree::of(&project.target()))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.sandbox.store().join("daemon.log")).must("daemon.log")
    }

    /// What the log has named since it was `before` long.
    fn named(&self, before: usize) -> Vec<String> {
        let log = self.log();
        let lines = log[before..].lines();
        let named =
            lines.filter(|line| line.contains("damaged: ") || line.contains("bytes are lost"));
        named.map(ToOwned::to_owned).collect()
    }

    /// The files in the quarantine, as `stats` and `doctor` count them.
    #[track_caller]
    fn quarantined(&self) -> u64 {
        let files = self.sandbox.stats()["quarantine"]["files"].as_u64();
        let files = files.must("a number of files");
        let doctor = self.sandbox.kachefs("doctor").run();
        let line = doctor
            .stdout
            .lines()
            .find(|line| line.contains("quarantine"));
        let line = line.must("doctor looks at the quarantine");
        let told = if files == 0 {
            "empty".to_owned()
        } else {
            format!("{files} files")
        };
        assert!(line.contains(&told) && line.starts_with("ok"), "{line}");
        files
    }
}

const LIMIT: Duration = Duration::from_mins(7);

#[test]
fn every_file_of_the_index_in_every_way() {
    let mut chance = Chance::new();
    let scene = Scene::new(Duration::from_mins(15));
    for kind in ["sst", "log", "MANIFEST", "CURRENT"] {
        for how in HARMS {
            // A start moves what the log holds into tables.
            scene.end(true);
            scene.start();
            fs::write(
                scene.damaged.target().join("note"),
                format!("{kind} {how:?}"),
            )
            .must("write");
            scene.wait_for_the_mark();
            let trees = scene.trees();
            scene.end(matches!(how, Harm::Flip | Harm::Empty));
            let files = index_files(&scene.sandbox.store(), kind);
            assert!(!files.is_empty(), "there is a {kind}");
            for file in files {
                harm(&file, how, &mut chance);
            }
            let before = scene.log().len();
            scene.start();
            let named = scene.named(before);
            println!("{kind} {how:?}: {named:?}");
            if named.is_empty() {
                // The last records of a manifest may say nothing that the logs do not say again.
                let may_be_spare = kind == "MANIFEST" && matches!(how, Harm::Truncate);
                assert!(may_be_spare, "{kind} {how:?} is named");
                for (before, after) in trees.iter().zip(scene.trees()) {
                    before.assert_same(&after, "what is not named has lost nothing");
                }
            }
            scene.builds();
            let before = scene.log().len();
            scene.end(true);
            scene.start();
            assert!(scene.named(before).is_empty(), "{kind} {how:?}: named once");
            scene.builds();
        }
    }
}

/// Damages rows of one view, or of no view, so that the other must be untouched.
#[track_caller]
fn spoil(scene: &Scene, family: &str, chance: &mut Chance) -> usize {
    with_index(&scene.sandbox.store(), |db| {
        let damaged = view_at(db, &scene.damaged.target());
        let of_view = ["views", "inodes", "dentries"].contains(&family);
        let known: Vec<_> = rows(db, family)
            .into_iter()
            .filter(|(key, _)| !of_view || key.starts_with(&damaged))
            .collect();
        let mut spoiled = 0;
        for (key, value) in &known {
            let garbage = match chance.below(4) {
                0 => vec![0xff; 3],
                1 => Vec::new(),
                2 => value[..value.len() / 2].to_vec(),
                _ => [value.as_slice(), b"more"].concat(),
            };
            let all = ["meta", "views"].contains(&family) || spoiled == 0;
            if all || chance.below(3) == 0 {
                put(db, family, key, &garbage);
                spoiled += 1;
            }
        }
        spoiled
    })
}

#[test]
fn garbage_in_every_family_of_the_index() {
    let mut chance = Chance::new();
    let scene = Scene::new(LIMIT);
    for family in FAMILIES {
        let tree = Tree::of(&scene.spared.target());
        scene.end(true);
        let spoiled = spoil(&scene, family, &mut chance);
        assert!(spoiled > 0, "{family}");
        let before = scene.log().len();
        scene.start();
        let named = scene.named(before);
        println!("{family}: {spoiled} spoiled, {named:?}");
        assert!(!named.is_empty(), "{family}: what is damaged is named");
        tree.assert_same(&Tree::of(&scene.spared.target()), family);
        let (seen, ()) = scene.sandbox.during(|| scene.builds_in_the_end());
        if !["actions", "records"].contains(&family) {
            assert_eq!(seen.misses, 0, "{family}: everything hits again: {seen:?}");
        }
        assert!(scene.quarantined() > 0, "{family}");
        let before = scene.log().len();
        scene.end(true);
        scene.start();
        assert_eq!(
            scene.named(before),
            Vec::<String>::new(),
            "{family}: named once"
        );
    }
}

#[test]
fn names_that_lead_nowhere_and_directories_that_are_gone() {
    let scene = Scene::new(LIMIT);
    let target = scene.damaged.target();
    fs::create_dir_all(target.join("gone/below")).must("mkdir");
    fs::write(target.join("gone/below/large"), vec![1; 100_000]).must("write");
    fs::hard_link(target.join("gone/below/large"), target.join("linked")).must("link");
    let tree = Tree::of(&scene.spared.target());
    scene.end(true);
    with_index(&scene.sandbox.store(), |db| {
        let view = view_at(db, &target);
        let gone = rows(db, "dentries");
        let gone = gone.iter().find(|(key, _)| key.ends_with(b"gone"));
        let inode = &gone.must("the directory").1;
        let handle = db.cf_handle("inodes").must("inodes");
        db.delete_cf(handle, [view.as_slice(), inode].concat())
            .must("delete");
        let dangling = [&view, &1_u64.to_be_bytes()[..], b"dangling"].concat();
        put(db, "dentries", &dangling, &999_999_u64.to_be_bytes());
    });
    scene.start();
    for name in ["gone", "dangling"] {
        let found = target.join(name).symlink_metadata();
        assert!(found.is_err(), "{name}: {found:?}");
        fs::write(target.join(name), name).must("the name is free");
    }
    let linked = target.join("linked");
    assert_eq!(fs::read(&linked).must("read"), vec![1; 100_000]);
    let links = std::os::unix::fs::MetadataExt::nlink(&linked.metadata().must("stat"));
    assert_eq!(links, 1, "names are counted again");
    tree.assert_same(&Tree::of(&scene.spared.target()), "the other view");
    scene.builds();
    let before = scene.log().len();
    scene.end(true);
    scene.start();
    assert_eq!(scene.named(before), Vec::<String>::new(), "named once");
}

#[test]
fn the_index_of_a_later_kachefs_is_moved_and_never_removed() {
    let scene = Scene::new(LIMIT);
    fs::write(scene.damaged.target().join("large"), vec![7; 50_000]).must("write");
    scene.end(true);
    with_index(&scene.sandbox.store(), |db| {
        put(db, "meta", b"schema", &99_u32.to_be_bytes());
    });
    scene.start();
    assert!(scene.log().contains("schema 99"), "it is named");
    scene.builds();
    let quarantine = scene.sandbox.store().join("quarantine");
    let foreign = || -> Vec<PathBuf> {
        let places = fs::read_dir(&quarantine).must("list").flatten();
        places
            .map(|place| place.path())
            .filter(|path| path.to_string_lossy().ends_with("-schema-99"))
            .collect()
    };
    let place = foreign().pop().must("a place for the later kachefs");
    assert!(place.join("index/CURRENT").is_file());
    let bytes: Vec<_> = harness::tree::files(&place.join("scratch"));
    let kept = bytes
        .iter()
        .any(|file| fs::read(file).must("read") == vec![7; 50_000]);
    assert!(kept, "its private files are with it: {bytes:?}");
    // As if it had been there for years.
    fs::rename(&place, quarantine.join("5-5-schema-99")).must("rename");
    scene.end(true);
    scene.start();
    assert_eq!(foreign().len(), 1, "it stays");
}

#[test]
fn blobs_damaged_while_nobody_looks() {
    let mut chance = Chance::new();
    let scene = Scene::new(LIMIT);
    let store = scene.sandbox.store();
    let whole: Vec<(PathBuf, Vec<u8>)> = damage::blobs(&store)
        .into_iter()
        .map(|path| (path.clone(), fs::read(path).must("read")))
        .collect();
    assert!(!whole.is_empty());
    for how in HARMS {
        scene.end(true);
        for (path, _) in &whole {
            harm(path, how, &mut chance);
        }
        let before = scene.log().len();
        scene.start();
        assert!(
            !scene.named(before).is_empty(),
            "{how:?}: what is lost is named"
        );
        scene.builds();
        // What is small is in the records of the view, and its blob is missed only by a hit.
        for project in [&scene.damaged, &scene.spared] {
            scene.sandbox.empty_view(project.target());
        }
        scene.builds();
        scene.sandbox.counters();
        for (path, bytes) in &whole {
            assert!(
                fs::read(path).must("stored again") == *bytes,
                "{how:?}: {}",
                path.display()
            );
        }
        scene.sandbox.empty_view(scene.damaged.target());
        let (seen, ()) = scene.sandbox.during(|| scene.builds());
        seen.assert_no_miss();
        if !matches!(how, Harm::Remove) {
            assert!(scene.quarantined() >= whole.len() as u64, "{how:?}");
        }
    }
}

#[test]
fn what_hits_above_a_miss_is_fresh() {
    let scene = Scene::new(LIMIT);
    let deps = scene.damaged.path("target/debug/deps");
    for round in 0..15 {
        let of_leaf: Vec<Vec<u8>> = harness::tree::files(&deps)
            .into_iter()
            .filter(|path| path.to_string_lossy().contains("libleaf"))
            .map(|path| fs::read(path).must("read"))
            .collect();
        for blob in damage::blobs(&scene.sandbox.store()) {
            if of_leaf.contains(&fs::read(&blob).must("read")) {
                fs::remove_file(&blob).must("remove");
            }
        }
        scene.sandbox.empty_view(scene.damaged.target());
        let build = |words| {
            let cargo = scene.sandbox.cargo(&scene.damaged, words);
            cargo.env("CARGO_INCREMENTAL", "0")
        };
        let (seen, _) = scene.sandbox.during(|| build("build").ok());
        assert_eq!((seen.hits, seen.misses), (2, 1), "{round}: {seen:?}");
        // The compiler of the dependency goes on after its metadata is there; what needs only that
        // has hit by then, and must not look older.
        let again = build("build --message-format=json")
            .env("CARGO_LOG", "cargo::core::compiler::fingerprint=info");
        let again = again.ok();
        let stale = Messages::of(&again).stale();
        assert!(stale.is_empty(), "{round}: {stale:?}\n{}", again.stderr);
    }
}

/// Reads a file past the page cache.
fn read_anew(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[test]
fn a_blob_that_is_lost_under_a_mount_fails_once() {
    let mut chance = Chance::new();
    let scene = Scene::new(LIMIT);
    let target = scene.damaged.target();
    // What a hit has brought would be made again: not here, where no time is given to that.
    scene.end(true);
    let mount = scene.sandbox.kachefs("mount").arg(&target);
    let _ = mount.env("KACHEFS_TEST_RECOMPUTE_MS", "0").ok();
    scene.start();
    for how in [Harm::Truncate, Harm::Empty, Harm::Remove] {
        scene.sandbox.empty_view(&target);
        scene.build(&scene.damaged, samples::PLAIN_OUTPUT);
        let program = scene.damaged.program("app");
        let bytes = fs::read(&program).must("read");
        let blobs = damage::blobs(&scene.sandbox.store());
        let blob = blobs
            .iter()
            .find(|blob| fs::read(blob).is_ok_and(|found| found == bytes));
        let blob = blob.must("the program is a blob");
        // A new daemon has not opened it yet.
        scene.sandbox.kill_daemon();
        scene.sandbox.current_daemon();
        harm(blob, how, &mut chance);
        let error = read_anew(&program).err().must("it cannot be read");
        assert_eq!(
            error.raw_os_error(),
            Some(nix::libc::EIO),
            "{how:?}: {error}"
        );
        let gone = || program.symlink_metadata().is_err();
        assert!(
            processes::wait_for(Duration::from_secs(20), gone),
            "{how:?}: the name goes, so that cargo makes it again"
        );
        let (seen, ()) = scene.sandbox.during(|| scene.builds());
        assert!(
            seen.misses > 0,
            "{how:?}: the action does not hit: {seen:?}"
        );
        scene.sandbox.empty_view(&target);
        let (seen, ()) = scene.sandbox.during(|| scene.builds());
        seen.assert_no_miss();
    }
}

#[test]
fn private_files_that_are_gone() {
    let scene = Scene::new(LIMIT);
    let target = scene.damaged.target();
    fs::write(target.join("large"), vec![3; 100_000]).must("write");
    fs::write(target.join("small"), "kept").must("write");
    scene.end(true);
    for file in harness::tree::files(&scene.sandbox.store().join("scratch")) {
        fs::remove_file(file).must("remove");
    }
    let before = scene.log().len();
    scene.start();
    assert!(!scene.named(before).is_empty(), "it is named");
    assert!(
        !target.join("large").exists(),
        "it is not shown as an empty file"
    );
    assert_eq!(
        fs::read_to_string(target.join("small")).must("read"),
        "kept"
    );
    scene.builds();
}

#[test]
fn garbage_among_the_managed_targets() {
    let scene = Scene::new(LIMIT);
    scene.end(true);
    let managed = scene.sandbox.store().join("managed");
    for file in harness::tree::files(&managed) {
        fs::write(file, "garbage").must("write");
    }
    fs::write(managed.join("beef"), "").must("write");
    let before = scene.log().len();
    scene.start();
    assert_eq!(scene.named(before).len(), 3, "{:?}", scene.named(before));
    scene.builds();
    assert_eq!(scene.quarantined(), 3);
}

#[test]
fn an_index_damaged_between_two_daemons() {
    takeover::index_damaged();
}

#[test]
fn a_write_that_was_under_way_is_no_error() {
    takeover::write_under_way();
}

#[test]
fn an_index_removed_between_two_daemons() {
    takeover::index_removed();
}

#[test]
fn records_spoiled_between_two_daemons() {
    takeover::records_spoiled();
}

#[test]
fn damage_at_random() {
    let rounds = if std::env::var_os("KACHEFS_TEST_LONG").is_some() {
        200
    } else {
        20
    };
    let mut chance = Chance::new();
    let scene = Scene::new(Duration::from_hours(1));
    let store = scene.sandbox.store();
    for round in 0..rounds {
        scene.end(chance.below(2) == 0);
        for _ in 0..=chance.below(3) {
            harm_anything(&store, round, &mut chance);
        }
        scene.start();
        scene.builds_in_the_end();
    }
}

/// Harms a file, or a few records, of the store.
#[track_caller]
fn harm_anything(store: &Path, round: usize, chance: &mut Chance) {
    if chance.below(3) == 0 {
        let family = *chance.pick(&FAMILIES).must("a family");
        // Only while RocksDB still takes it for an index.
        if !broken_by_us(&store.join("index")) {
            println!("{round}: garbage in {family}");
            spoil_any(store, family, chance);
        }
        return;
    }
    let files: Vec<_> = ["index", "blobs", "managed", "scratch"]
        .iter()
        .flat_map(|part| harness::tree::files(&store.join(part)))
        .collect();
    let file = chance.pick(&files).must("a file").clone();
    let how = *chance.pick(&HARMS).must("a harm");
    println!("{round}: {how:?} {}", file.display());
    // A private file's bytes are nobody's but its writer's: no one can check them.
    let is_private = file.starts_with(store.join("scratch"));
    harm(&file, if is_private { Harm::Remove } else { how }, chance);
}

/// Whether the index does not open any more.
fn broken_by_us(path: &Path) -> bool {
    let options = rocksdb::Options::default();
    let Ok(families) = rocksdb::DB::list_cf(&options, path) else {
        return true;
    };
    rocksdb::DB::open_cf_for_read_only(&options, path, families, false).is_err()
}

#[track_caller]
fn spoil_any(store: &Path, family: &str, chance: &mut Chance) {
    let known = std::panic::catch_unwind(|| with_index(store, |db| rows(db, family)));
    // A block that is damaged already.
    let Ok(known) = known else { return };
    with_index(store, |db| {
        for _ in 0..3 {
            if let Some((key, value)) = chance.pick(&known) {
                let garbage = &value[..value.len() / 2];
                put(db, family, key, garbage);
            }
        }
    });
}
