//! A store whose disk fails, that is removed or moved away, or whose daemon may open few files: nobody
//! hangs, errors say what is wrong, cargo builds, and what was acknowledged is there when all is well
//! again.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use harness::disk::Disk;
use harness::messages::Messages;
use harness::{Must, Project, Running, Sandbox, Tree, processes, samples};
use nix::libc::{EIO, EMFILE, ENFILE, EROFS};

/// How long an answer may take that is not about work.
const PROMPT: Duration = Duration::from_mins(1);

/// Builds in a plain directory, and runs the program.
#[track_caller]
fn builds_plainly(sandbox: &Sandbox, name: &str) {
    let project = samples::plain(sandbox.path(name));
    let built = sandbox.cargo(&project, "build").timeout(PROMPT);
    let _ = built.env("RUSTC_WRAPPER", sandbox.wrapper()).ok();
    runs(sandbox, &project);
}

/// The plain project, built in a view.
#[track_caller]
fn built_in_a_view(sandbox: &Sandbox) -> Project {
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    project
}

/// Starts a build, and waits until it has made more than so many files.
#[track_caller]
fn build_under_way(sandbox: &Sandbox, project: &Project, files: usize) -> Running {
    let build = sandbox.cargo(project, "build").spawn();
    let deps = project.target().join("debug/deps");
    let started = || deps.read_dir().is_ok_and(|names| names.count() > files);
    assert!(processes::wait_for(PROMPT, started), "the build starts");
    build
}

/// The program of the plain project does what it should.
#[track_caller]
fn runs(sandbox: &Sandbox, project: &Project) {
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::PLAIN_OUTPUT
    );
}

/// No view is mounted from a store on a disk that is read-only, and the reason is told.
#[track_caller]
fn is_refused(sandbox: &Sandbox, target: &Path) {
    let refused = sandbox.kachefs("mount").arg(target).fails();
    let line = refused.one_line_error();
    assert!(line.contains("Read-only file system"), "{line}");
}

/// The build has nothing to do, and says so.
#[track_caller]
fn is_fresh(sandbox: &Sandbox, project: &Project) {
    let again = sandbox.cargo(project, "build --message-format=json");
    Messages::of(&again.timeout(PROMPT).ok()).assert_all_fresh();
}

#[track_caller]
fn assert_errno(result: std::io::Result<()>, expected: &[i32], what: &str) {
    let error = result.err().must(format!("{what} fails"));
    let errno = error.raw_os_error();
    assert!(
        errno.is_some_and(|errno| expected.contains(&errno)),
        "{what}: {error}"
    );
}

/// Everything that writes.
fn ways_to_write(target: &Path) -> Vec<(&'static str, std::io::Result<()>)> {
    let opened = |name: &str| OpenOptions::new().append(true).open(target.join(name));
    vec![
        ("a small file", fs::write(target.join("new"), "new")),
        (
            "a large file",
            fs::write(target.join("new-large"), vec![1; 100_000]),
        ),
        ("a directory", fs::create_dir(target.join("new-dir"))),
        (
            "a rename",
            fs::rename(target.join("small"), target.join("renamed")),
        ),
        ("an unlink", fs::remove_file(target.join("small"))),
        (
            "appending to a small file",
            opened("small").and_then(|mut file| file.write_all(b"more")),
        ),
        (
            "appending to a large file",
            opened("large").and_then(|mut file| {
                file.write_all(b"more")?;
                file.sync_all()
            }),
        ),
    ]
}

#[test]
fn few_descriptors() {
    let sandbox = Sandbox::new();
    let project = samples::many(sandbox.path("project"), 8, "");
    fs::create_dir_all(project.root()).must("mkdir");
    let target = project.target();
    // Low enough that every bound is met, soft and hard, for keeper and daemon.
    let kachefs = sandbox.bin_dir().join("kachefs");
    let _ = sandbox
        .command("prlimit")
        .arg("--nofile=128:128")
        .arg(kachefs)
        .arg("mount")
        .arg(&target)
        .ok();
    let daemon = sandbox.current_daemon();
    let limits = fs::read_to_string(format!("/proc/{daemon}/limits")).must("limits");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    assert!(line.is_some_and(|line| line.contains(" 128 ")), "{line:?}");

    let _ = sandbox.cargo(&project, "build -j 8").ok();
    assert_eq!(sandbox.output_of(project.program("app")), "sum 8\n");
    is_fresh(&sandbox, &project);

    // Thousands of files with backings, open at once.
    let directory = target.join("many");
    fs::create_dir(&directory).must("mkdir");
    let path = |number: usize| directory.join(format!("{number}"));
    let bytes = |number: usize| format!("{number:08}").into_bytes().repeat(2_000);
    let files: Vec<File> = (0..3_000)
        .map(|number| {
            fs::write(path(number), bytes(number)).must("write");
            File::open(path(number)).must("open")
        })
        .collect();
    thread::scope(|scope| {
        for part in 0..8 {
            let (files, bytes) = (&files, &bytes);
            scope.spawn(move || {
                use std::os::unix::fs::FileExt;
                for number in (part..files.len()).step_by(8) {
                    let mut found = vec![0; 16_000];
                    let file = &files[number];
                    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                    nix::fcntl::posix_fadvise(file, 0, 0, advice).must("drop pages");
                    file.read_exact_at(&mut found, 0).must("read");
                    assert!(found == bytes(number), "{number}");
                }
            });
        }
    });
    let held = fs::read_dir(format!("/proc/{daemon}/fd"))
        .must("fd")
        .count();
    assert!(held < 120, "{held} descriptors held");
    assert_eq!(sandbox.current_daemon(), daemon, "it lives");

    sandbox.empty_view(&target);
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build -j 8").ok());
    seen.assert_no_miss();
}

#[test]
fn hardly_any_descriptors() {
    // Too few for anything but to say so, and to be well again.
    let sandbox = Sandbox::new();
    let project = built_in_a_view(&sandbox);
    let target = project.target();
    fs::write(target.join("kept"), vec![9; 50_000]).must("write");
    let daemon = sandbox.current_daemon();
    let limit = |number: &str| {
        let _ = sandbox
            .command("prlimit")
            .arg(format!("--nofile={number}"))
            .args(["--pid", &daemon.to_string()])
            .ok();
    };
    limit("3:1024");
    let mut refused = 0;
    for number in 0..50 {
        let written = fs::write(target.join(format!("large-{number}")), vec![1; 50_000]);
        if let Err(error) = written {
            let errno = error.raw_os_error();
            assert!(
                [EMFILE, ENFILE, EIO].map(Some).contains(&errno),
                "a reason that fits: {error}"
            );
            refused += 1;
        }
    }
    assert!(refused > 0, "it has no descriptors");
    limit("1024:1024");
    let patience = Instant::now() + PROMPT;
    while let Err(error) = fs::write(target.join("after"), vec![2; 50_000]) {
        assert!(Instant::now() < patience, "with descriptors again: {error}");
        thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(fs::read(target.join("kept")).must("read"), vec![9; 50_000]);
    is_fresh(&sandbox, &project);
}

#[test]
fn a_disk_that_turns_read_only_under_a_mount() {
    let sandbox = Sandbox::new();
    let Some(disk) = Disk::new(&sandbox, "ext4") else {
        return;
    };
    let project = built_in_a_view(&sandbox);
    let target = project.target();
    sandbox.counters();
    fs::write(target.join("small"), "small").must("write");
    fs::write(target.join("large"), vec![5; 100_000]).must("write");
    disk.sync();
    let before = Tree::of(&target);

    disk.fail();
    for (what, result) in ways_to_write(&target) {
        assert_errno(result, &[EROFS], what);
    }
    before.assert_same(&Tree::of(&target), "reading goes on");
    // Cargo finds nothing to do. Then it writes `app.d` anew, as it always does.
    let again = sandbox.cargo(&project, "build --message-format=json");
    let again = again.timeout(PROMPT).run();
    Messages::of(&again).assert_all_fresh();
    assert!(
        again.status.success() || again.stderr.contains("Read-only file system"),
        "{again}"
    );
    runs(&sandbox, &project);
    // Something to do: cargo says that it cannot.
    project.replace("crates/app/src/main.rs", "fn main", "// new\nfn main");
    let failed = sandbox.cargo(&project, "build").timeout(PROMPT).fails();
    assert!(
        failed.stderr.contains("Read-only file system"),
        "the reason is told\n{failed}"
    );
    project.replace("crates/app/src/main.rs", "// new\nfn main", "fn main");
    builds_plainly(&sandbox, "elsewhere");

    // Another daemon cannot open such a store; everybody is told, and nobody waits.
    let unmounted = sandbox.kachefs("unmount").arg(&target).run();
    assert!(!sandbox.is_mounted(&target), "{unmounted}");
    if !unmounted.status.success() {
        let line = unmounted.one_line_error();
        assert!(line.contains("Read-only file system"), "{line}");
    }
    builds_plainly(&sandbox, "project-plain");
    let _ = sandbox.kachefs("daemon stop").timeout(PROMPT).ok();
    is_refused(&sandbox, &target);

    disk.repair();
    sandbox.mount(&target);
    before.assert_same(&Tree::of(&target), "the disk is well again");
    let _ = sandbox.cargo(&project, "build").ok();
    runs(&sandbox, &project);
}

#[test]
fn a_disk_that_turns_read_only_while_cargo_builds() {
    let sandbox = Sandbox::new();
    let Some(disk) = Disk::new(&sandbox, "ext4") else {
        return;
    };
    let project = samples::many(sandbox.path("project"), 8, "");
    let target = project.target();
    sandbox.mount(&target);
    let build = build_under_way(&sandbox, &project, 6);
    disk.fail();
    let built = build.finish();
    println!("{built}");
    assert!(!built.status.success(), "it cannot be finished\n{built}");
    builds_plainly(&sandbox, "elsewhere");
    // The daemon is killed: no other can take over, and whoever asks is told soon.
    sandbox.kill_keeper_and_daemon();
    let dead = fs::metadata(target.join("debug/app"));
    assert!(dead.is_err(), "{dead:?}");
    // Only the mount is looked at: the store's own check must complain.
    let _ = sandbox.kachefs("doctor --fix").timeout(PROMPT).run();
    assert!(!sandbox.is_mounted(&target));
    let plain = sandbox.cargo(&project, "build").timeout(PROMPT);
    let _ = plain.ok();
    assert_eq!(sandbox.output_of(project.program("app")), "sum 8\n");

    disk.repair();
    sandbox.mount(&target);
    let _ = sandbox.cargo(&project, "build").ok();
    assert_eq!(sandbox.output_of(project.program("app")), "sum 8\n");
    is_fresh(&sandbox, &project);
}

#[test]
fn a_disk_that_is_read_only_from_the_start() {
    let sandbox = Sandbox::new();
    let Some(disk) = Disk::new(&sandbox, "ext4") else {
        return;
    };
    let project = built_in_a_view(&sandbox);
    let target = project.target();
    let before = Tree::of(&target);
    let _ = sandbox.kachefs("daemon stop").ok();
    disk.remount("ro");
    is_refused(&sandbox, &target);
    // The target is managed: the wrapper tries, says why not, and cargo builds.
    let _ = sandbox.cargo(&project, "build").timeout(PROMPT).ok();
    runs(&sandbox, &project);
    let doctor = sandbox.kachefs("doctor").timeout(PROMPT).run();
    let told = doctor.stdout.lines().any(|line| {
        line.starts_with("PROBLEM") && line.contains("store") && line.contains("Read-only")
    });
    assert!(told, "{doctor}");

    fs::remove_dir_all(&target).must("remove");
    fs::create_dir(&target).must("mkdir");
    disk.remount("rw");
    sandbox.mount(&target);
    before.assert_same(&Tree::of(&target), "writable again");
    is_fresh(&sandbox, &project);
}

/// A store taken away under a running daemon, by `take`, while nothing or a build goes on.
#[track_caller]
fn without_a_store(sandbox: &Sandbox, project: &Project, building: bool, take: impl FnOnce()) {
    let target = project.target();
    let build = building.then(|| build_under_way(sandbox, project, 3));
    take();
    // At once: whatever is written to now has nowhere to go, or still has.
    for result in [
        fs::write(target.join("small-after"), "small"),
        fs::write(target.join("large-after"), vec![1; 100_000]),
    ] {
        let errno = result.err().as_ref().and_then(Error::raw_os_error);
        assert_ne!(errno, Some(nix::libc::ENOENT), "no misleading error");
    }
    if let Some(build) = build {
        // It may fail, but it ends.
        println!("{}", build.finish());
    }
    let gone = || !sandbox.is_mounted(&target) && processes::naming(sandbox.root()).is_empty();
    assert!(
        processes::wait_for(PROMPT, gone),
        "daemon and keeper end: {}",
        processes::describe(sandbox.root())
    );
    let status = sandbox.kachefs("daemon status").run();
    assert_eq!(status.status.code(), Some(3), "{status}");
    let stats = sandbox.kachefs("stats").fails();
    stats.one_line_error();
    let unmount = sandbox.kachefs("unmount").arg(&target).fails();
    unmount.one_line_error();
    let _ = sandbox.kachefs("doctor --fix").timeout(PROMPT).run();
    let built = sandbox.cargo(project, "build").timeout(PROMPT);
    let _ = built.ok();
    assert_eq!(sandbox.output_of(project.program("app")), "sum 8\n");
    builds_plainly(sandbox, "elsewhere");
}

#[test]
fn a_store_removed_under_a_mount() {
    let sandbox = Sandbox::new();
    let project = samples::many(sandbox.path("project"), 8, "");
    for building in [false, true] {
        sandbox.mount(project.target());
        sandbox.empty_view(project.target());
        if !building {
            let _ = sandbox.cargo(&project, "build").ok();
        }
        without_a_store(&sandbox, &project, building, || {
            let removed = || fs::remove_dir_all(sandbox.store()).is_ok();
            // The daemon may be making new files meanwhile.
            assert!(processes::wait_for(PROMPT, removed), "removed");
        });
    }
    // A new store at the same path is a store like any other.
    sandbox.mount(project.target());
    is_fresh(&sandbox, &project);
}

#[test]
fn a_store_moved_away_under_a_mount() {
    let sandbox = Sandbox::new();
    let project = samples::many(sandbox.path("project"), 8, "");
    let (target, away) = (project.target(), sandbox.path("away"));
    for building in [false, true] {
        sandbox.mount(&target);
        sandbox.empty_view(&target);
        if !building {
            let _ = sandbox.cargo(&project, "build").ok();
            sandbox.counters();
        }
        fs::write(target.join("small"), "acknowledged").must("write");
        fs::write(target.join("large"), vec![6; 100_000]).must("write");
        without_a_store(&sandbox, &project, building, || {
            fs::rename(sandbox.store(), &away).must("move");
        });
        // What doctor made.
        let _ = fs::remove_dir_all(sandbox.store());
        fs::rename(&away, sandbox.store()).must("move back");
        fs::remove_dir_all(&target).must("remove the plain target");
        fs::create_dir(&target).must("mkdir");
        sandbox.mount(&target);
        let read = |name| fs::read(target.join(name)).must(name);
        assert_eq!(read("small"), b"acknowledged");
        assert_eq!(read("large"), vec![6; 100_000]);
        let _ = sandbox.cargo(&project, "build").ok();
        is_fresh(&sandbox, &project);
        sandbox.unmount(&target);
        let _ = sandbox.kachefs("daemon stop").ok();
    }
}
