//! The power goes while cargo builds and programs write: whatever the disk had by then, the store
//! opens, nothing torn is served, what was synced is there, and builds go on.
//!
//! 5 cuts, or 100 with `KACHEFS_TEST_LONG=1`.

mod files;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use files::{Files, Moment};
use harness::chance::Chance;
use harness::killer::SetOnDrop;
use harness::lossy_disk::Cut;
use harness::messages::Messages;
use harness::{Cmd, LossyDisk, Must, Outcome, Package, Project, Sandbox, tree};
use store::{Cas, Content, Digest, Index, StoreDir};

/// Instead of a reboot.
const BOOT: &str = "KACHEFS_TEST_BOOT_ID";
/// So that cuts come before, in and after sync points.
const SYNC: (&str, &str) = ("KACHEFS_TEST_SYNC_MS", "1300");

/// Between two cuts, at most.
const BETWEEN: Duration = Duration::from_secs(3);
/// How many states the sources have: they come back, so some builds hit.
const STATES: usize = 4;

fn long() -> bool {
    std::env::var_os("KACHEFS_TEST_LONG").is_some_and(|value| value == "1")
}

/// A library that a build script makes and no fingerprint looks at, large and small generated files,
/// and a program that tells whether all of them are right.
fn project(sandbox: &Sandbox) -> Project {
    let native = Package::new("native")
        .build_script(
            "use std::{env, fs, path::Path, process::Command};\n\
             fn run(program: &str, args: &[&str]) {\n\
                 let status = Command::new(program).args(args).status().expect(program);\n\
                 assert!(status.success());\n\
             }\n\
             fn main() {\n\
                 println!(\"cargo::rerun-if-changed=native.c\");\n\
                 let out = env::var(\"OUT_DIR\").expect(\"OUT_DIR\");\n\
                 let out = Path::new(&out);\n\
                 let path = |name: &str| out.join(name).to_str().expect(\"UTF-8\").to_owned();\n\
                 let _ = fs::remove_file(path(\"libnative.a\"));\n\
                 run(\"cc\", &[\"-c\", \"-o\", &path(\"native.o\"), \"native.c\"]);\n\
                 run(\"ar\", &[\"crs\", &path(\"libnative.a\"), &path(\"native.o\")]);\n\
                 let table: Vec<u8> = (0..30_000_u32).map(|i| (i % 251) as u8).collect();\n\
                 fs::write(path(\"table.bin\"), table).expect(\"write\");\n\
                 println!(\"cargo::rustc-link-search=native={}\", out.display());\n\
                 println!(\"cargo::rustc-link-lib=static=native\");\n\
             }\n",
        )
        .lib(
            "unsafe extern \"C\" { fn number() -> i32; }\n\
             static TABLE: &[u8] = include_bytes!(concat!(env!(\"OUT_DIR\"), \"/table.bin\"));\n\
             pub fn native() -> i32 { unsafe { number() } }\n\
             pub fn sum() -> u32 { TABLE.iter().map(|byte| u32::from(*byte)).sum() }\n",
        );
    let app = Package::new("app").dep("native").dep("words").bin(
        "fn main() { println!(\"{} {} {}\", words::WORD, native::native(), native::sum()); }\n",
    );
    let words = Package::new("words").lib("");
    let project = Project::new(sandbox.path("project"), &[native, words, app]);
    edit(&project, 0);
    project
}

fn edit(project: &Project, state: usize) {
    let word = format!("pub const WORD: &str = \"word-{state}\";\n");
    project.write("crates/words/src/lib.rs", &word);
    let code = format!(
        "const char fill[20000] = {{1}};\nint number(void) {{ return {state} + fill[1]; }}\n"
    );
    project.write("crates/native/native.c", &code);
}

/// The sum of the table, which never changes.
fn expected(state: usize) -> String {
    let sum: u32 = (0..30_000_u32).map(|i| i % 251).sum();
    format!("word-{state} {state} {sum}\n")
}

/// Everything that is going on.
struct World<'a> {
    sandbox: &'a Sandbox,
    project: Project,
    files: Files,
    /// The state of the sources; held while they change.
    state: Mutex<usize>,
}

/// What a cut left, and what is known of the moment.
struct Scene {
    name: String,
    cut: Cut,
    state: usize,
    sources: PathBuf,
    before: Moment,
    after: Moment,
}

impl World<'_> {
    fn command(cmd: Cmd, boot: &str) -> Cmd {
        cmd.env(BOOT, boot).env(SYNC.0, SYNC.1)
    }

    fn mount(&self, boot: &str) {
        let mount = self.sandbox.kachefs("mount").arg(self.project.target());
        let _ = Self::command(mount, boot).ok();
    }

    fn build(&self, boot: &str) -> Outcome {
        let build = self.sandbox.cargo(&self.project, "build");
        Self::command(build, boot).run()
    }

    /// Edits and builds until told to stop.
    fn work(&self, stop: &AtomicBool) -> usize {
        let mut chance = Chance::new();
        let mut builds = 0;
        while !stop.load(Ordering::Relaxed) {
            let state = {
                let mut state = self.state.lock().must("sources");
                *state = (*state + 1 + chance.below(STATES - 1)) % STATES;
                edit(&self.project, *state);
                *state
            };
            let _ = self.build("running").success();
            let said = self.sandbox.output_of(self.project.program("app"));
            assert_eq!(said, expected(state));
            builds += 1;
            thread::sleep(chance.pause(Duration::from_millis(2500)));
        }
        builds
    }

    /// Has single files written to the disk earlier than others, as memory pressure and other
    /// programs do.
    fn disturb(&self, stop: &AtomicBool) {
        let mut chance = Chance::new();
        let store = self.sandbox.store();
        while !stop.load(Ordering::Relaxed) {
            thread::sleep(chance.pause(Duration::from_millis(400)));
            let dir = store.join(["index", "index", "scratch", "blobs", ""][chance.below(5)]);
            if dir == store.join("") {
                nix::unistd::syncfs(File::open(&store).must("open")).must("syncfs");
                continue;
            }
            let files = files_below(&dir);
            if let Some(path) = files.get(chance.below(files.len().max(1)))
                // It may be gone by now.
                && let Ok(file) = File::open(path)
            {
                file.sync_all().must("fsync");
            }
        }
    }

    fn cut(&self, disk: &LossyDisk<'_>, name: &str) -> Scene {
        let state = self.state.lock().must("sources");
        let before = self.files.moment();
        let cut = disk.cut(name);
        let after = self.files.moment();
        let sources = self.sandbox.path(&format!("sources-{name}"));
        copy_with_times(&self.project.path("crates"), &sources);
        Scene {
            name: name.to_owned(),
            cut,
            state: *state,
            sources,
            before,
            after,
        }
    }

    /// Cuts at random moments while everything is going on.
    fn cuts(&self, disk: &LossyDisk<'_>, count: usize) -> Vec<Scene> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let going_on = [
                scope.spawn(|| self.work(&stop)),
                scope.spawn(|| {
                    self.files.change(&stop);
                    0
                }),
                scope.spawn(|| {
                    self.disturb(&stop);
                    0
                }),
            ];
            let mut chance = Chance::new();
            let _stop = SetOnDrop(&stop);
            // Something to lose.
            thread::sleep(Duration::from_secs(1));
            let scenes = (0..count)
                .map(|number| {
                    thread::sleep(chance.pause(BETWEEN));
                    self.cut(disk, &format!("cut-{number}"))
                })
                .collect();
            stop.store(true, Ordering::Relaxed);
            let builds: usize = going_on
                .into_iter()
                .map(|thread| thread.join().ok().must("what was going on"))
                .sum();
            assert!(builds > 0, "nothing was built");
            scenes
        })
    }

    /// The power is back.
    fn check(&self, disk: &LossyDisk<'_>, scene: &Scene) {
        let Scene { name, state, .. } = scene;
        let started = Instant::now();
        disk.after(&scene.cut);
        fs::remove_dir_all(self.project.path("crates")).must("remove");
        copy_with_times(&scene.sources, &self.project.path("crates"));
        self.mount(name);
        let seen = read_all(&self.project.target());
        let files = self.project.path("target/files");
        let there = Files::check(&files, &scene.before, &scene.after);
        let built = self.build(name);
        assert!(built.status.success(), "{name}: {built}");
        let said = self.sandbox.output_of(self.project.program("app"));
        assert_eq!(said, expected(*state), "{name}: {built}");
        let again = self
            .sandbox
            .cargo(&self.project, "build --message-format=json");
        Messages::of(&Self::command(again, name).ok()).assert_all_fresh();
        let seen_again = read_all(&self.project.target());
        let _ = self.sandbox.kachefs("daemon stop").ok();
        let dropped = self.check_store(&seen_again);
        println!(
            "{name}: {} names, {there} of {} files, {} crates compiled, {} set aside, {:.1} s",
            seen.len(),
            scene.after.len(),
            built.stderr.matches("Compiling").count(),
            dropped,
            started.elapsed().as_secs_f64()
        );
    }

    /// Every blob is what its name says, and what the mount showed is what the index says. Returns
    /// how many blobs were set aside.
    fn check_store(&self, seen: &BTreeMap<u64, Digest>) -> usize {
        let dir = StoreDir::new(self.sandbox.store());
        let cas = Cas::new(&dir);
        for path in files_below(&dir.blobs()) {
            let name = path.file_name().and_then(|name| name.to_str());
            let digest: Digest = name.must("a name").parse().must(path.display());
            cas.verify(&digest).must("a blob");
        }
        let index = Index::open(&dir.index()).must("the index");
        let mut blobs = 0;
        for (view, _) in index.views().must("views") {
            for (ino, record) in index.inodes(view).must("inodes") {
                if let Content::Blob { digest, size } = record.content {
                    assert!(cas.has(&digest, size), "{ino:?} names a blob that is gone");
                    assert_eq!(seen.get(&ino.0), Some(&digest), "{ino:?} through the mount");
                    blobs += 1;
                }
            }
        }
        assert!(blobs > 0, "the build left no blob");
        fs::read_dir(dir.root().join("quarantine")).map_or(0, Iterator::count)
    }
}

/// The digest of every file in a directory, by inode number.
fn read_all(dir: &Path) -> BTreeMap<u64, Digest> {
    let digest = |path: PathBuf| {
        let ino = path.metadata().must(path.display()).ino();
        let bytes = fs::read(&path).must(path.display());
        (ino, Digest::of(&bytes))
    };
    tree::files(dir).into_iter().map(digest).collect()
}

/// The files below a directory that changes meanwhile.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => pending.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files
}

fn copy_with_times(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).output();
    let copied = copied.must("cp");
    assert!(copied.status.success(), "{copied:?}");
}

fn lose_power(cuts: usize, options: &str) {
    let sandbox = Sandbox::with_limit(Duration::from_mins(20));
    let Some(disk) = LossyDisk::new(&sandbox, options) else {
        return;
    };
    let world = World {
        sandbox: &sandbox,
        project: project(&sandbox),
        files: Files::new(sandbox.path("project/target/files")),
        state: Mutex::new(0),
    };
    world.mount("running");
    let scenes = world.cuts(&disk, cuts);
    let _ = sandbox.kachefs("daemon stop").ok();
    for scene in &scenes {
        world.check(&disk, scene);
        disk.forget(&scene.cut);
    }
}

#[test]
fn the_power_may_go_at_any_moment() {
    if !long() {
        return lose_power(5, "commit=1,nobarrier");
    }
    for options in ["commit=1", "commit=2", "commit=5", "commit=15", "commit=60"] {
        println!("{options}");
        lose_power(20, &format!("{options},nobarrier"));
    }
}
