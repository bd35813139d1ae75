//! `kill -9` of the daemon, and whoever uses a view notices nothing but a pause.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::killer::killing;
use harness::messages::Messages;
use harness::{Chance, Must, Project, Sandbox, Tree, mounts, processes, samples};
use nix::fcntl::{AT_FDCWD, PosixFadviseAdvice, RenameFlags, posix_fadvise, renameat2};
use nix::sys::signal::{Signal, kill};

/// Whether the long versions are wanted.
fn long() -> bool {
    std::env::var_os("KACHEFS_TEST_LONG").is_some()
}

fn exchange(one: &Path, other: &Path) {
    renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE).must("exchange");
}

/// One of everything that changes names, over and over; each must do exactly what it says.
fn change_names(dir: &Path, over: &AtomicBool) {
    fs::create_dir(dir).must("mkdir");
    let (left, right) = (dir.join("left"), dir.join("right"));
    for side in [&left, &right] {
        fs::write(side, side.as_os_str().as_encoded_bytes()).must("write");
    }
    let mut turns = 0_usize;
    while !over.load(Ordering::Relaxed) {
        let name = |kind: &str| dir.join(format!("{kind}-{turns}"));
        let text = format!("turn {turns}");
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(name("file"))
            .must("create");
        file.write_all(text.as_bytes()).must("write");
        fs::hard_link(name("file"), name("link")).must("link");
        assert_eq!(file.metadata().must("stat").nlink(), 2);
        fs::rename(name("file"), name("new")).must("rename");
        symlink("new", name("symlink")).must("symlink");
        assert_eq!(fs::read_to_string(name("link")).must("read"), text);
        fs::create_dir(name("dir")).must("mkdir");
        fs::write(name("dir").join("inside"), &text).must("write");
        exchange(&left, &right);
        fs::remove_file(name("dir").join("inside")).must("unlink");
        fs::remove_dir(name("dir")).must("rmdir");
        fs::remove_file(name("link")).must("unlink");
        assert_eq!(file.metadata().must("stat").nlink(), 1);
        if turns.is_multiple_of(2) {
            fs::remove_file(name("new")).must("unlink");
            fs::remove_file(name("symlink")).must("unlink");
        }
        turns += 1;
        let first = if turns.is_multiple_of(2) {
            &left
        } else {
            &right
        };
        let found = fs::read(&left).must("read");
        assert_eq!(found, first.as_os_str().as_encoded_bytes(), "turn {turns}");
    }
    // Both sides, and of every second turn two names.
    let names = fs::read_dir(dir).must("list").count();
    assert_eq!(names, 2 + turns / 2 * 2, "after {turns} turns");
    assert!(turns > 10, "{turns} turns");
}

/// Lines at the end of a file; every one is there at the end.
fn append(path: &Path, over: &AtomicBool) {
    let mut file = OpenOptions::new()
        .append(true)
        .create_new(true)
        .open(path)
        .must("create");
    let mut expected = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let line = format!("line {}\n", expected.len());
        file.write_all(line.as_bytes()).must("append");
        expected.extend_from_slice(line.as_bytes());
        thread::sleep(Duration::from_micros(200));
    }
    assert!(fs::read(path).must("read") == expected, "every line once");
}

/// Reads past the kernel's page cache.
fn read_anew(path: &Path, expected: &[u8], over: &AtomicBool) {
    fs::write(path, expected).must("write");
    while !over.load(Ordering::Relaxed) {
        let mut file = File::open(path).must("open");
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).must("drop pages");
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).must("read");
        assert!(bytes == expected, "{} bytes", bytes.len());
    }
}

/// Writes as large as the kernel passes on: the daemon dies in the middle of taking one in.
fn write_large(path: &Path, bytes: &[u8], over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let mut file = File::create(path).must("create");
        for _ in 0..4 {
            file.write_all(bytes).must("write");
        }
        assert_eq!(file.metadata().must("stat").len(), 4 * bytes.len() as u64);
    }
    assert!(fs::read(path).must("read") == bytes.repeat(4));
}

/// A directory's names while it does not change, some of them at a time.
fn list(dir: &Path, over: &AtomicBool) {
    fs::create_dir(dir).must("mkdir");
    for number in 0..2_000 {
        fs::write(dir.join(format!("a rather long name {number}")), "").must("write");
    }
    let mut extra = 0;
    while !over.load(Ordering::Relaxed) {
        // A change makes the kernel ask again.
        extra += 1;
        fs::write(dir.join(format!("extra {extra}")), "").must("write");
        let mut names: Vec<_> = fs::read_dir(dir)
            .must("list")
            .map(|entry| entry.must("list").file_name())
            .collect();
        let total = names.len();
        names.sort();
        names.dedup();
        assert_eq!((names.len(), total), (2_000 + extra, 2_000 + extra));
    }
}

#[test]
fn reads_writes_and_names_go_on() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    let pattern: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let kills = if long() { 100 } else { 12 };
    let ((), killed) = killing(&sandbox, kills, Duration::from_millis(600), |over| {
        thread::scope(|scope| {
            let work: Vec<_> = vec![
                scope.spawn(|| change_names(&target.join("one"), over)),
                scope.spawn(|| change_names(&target.join("two"), over)),
                scope.spawn(|| append(&target.join("log"), over)),
                scope.spawn(|| read_anew(&target.join("pattern"), &pattern, over)),
                scope.spawn(|| write_large(&target.join("large"), &pattern, over)),
                scope.spawn(|| list(&target.join("many"), over)),
            ];
            for thread in work {
                thread.join().ok().must("a worker");
            }
        });
    });
    assert_eq!(killed, kills);
    let before = Tree::of(&target);
    sandbox.unmount(&target);
    sandbox.mount(&target);
    before.assert_same(&Tree::of(&target), "mounted afresh");
}

#[test]
fn what_is_open_stays_open() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    let open = |name: &str, size: usize| {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(target.join(name))
            .must("create");
        file.write_all(&vec![7; size]).must("write");
        file
    };
    let mut files = [
        open("named", 100_000),
        open("small", 100),
        open("large", 100_000),
    ];
    fs::remove_file(target.join("small")).must("unlink");
    fs::remove_file(target.join("large")).must("unlink");
    fs::create_dir_all(target.join("a/b")).must("mkdir");
    let waits = "cd \"$1\" && until [ -e go ]; do sleep 0.05; done && pwd -P && cat ../beside";
    let shell = sandbox
        .command("sh")
        .args(["-c", waits, "sh"])
        .arg(target.join("a/b"))
        .spawn();
    for round in 0..3 {
        sandbox.kill_daemon();
        for file in &mut files {
            file.write_all(&[round; 10]).must("write");
            let size = file.metadata().must("stat").len();
            posix_fadvise(&*file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).must("drop");
            let mut bytes = Vec::new();
            file.rewind().must("seek");
            file.read_to_end(&mut bytes).must("read");
            assert_eq!(bytes.len() as u64, size);
            assert_eq!(bytes[0], 7);
            assert_eq!(bytes[bytes.len() - 10..], [round; 10]);
        }
    }
    fs::write(target.join("a/beside"), "found\n").must("write");
    fs::write(target.join("a/b/go"), "").must("write");
    let said = shell.finish().success().stdout;
    assert_eq!(said, format!("{}\nfound\n", target.join("a/b").display()));
    let scratch = || {
        let names = fs::read_dir(sandbox.store().join("scratch")).must("list");
        names.count()
    };
    drop(files);
    let freed = || scratch() == 1;
    assert!(
        processes::wait_for(Duration::from_secs(10), freed),
        "{} files for the one that has a name",
        scratch()
    );
}

/// Builds in an empty store, and once more when the view was emptied, each time by `build`, and
/// returns what is in the target then: what compilers made, and what hits brought.
#[track_caller]
fn build_from_nothing(sandbox: &Sandbox, project: &Project, mut build: impl FnMut()) -> [Tree; 2] {
    let target = project.target();
    sandbox.mount(&target);
    let trees = [(); 2].map(|()| {
        sandbox.empty_view(&target);
        build();
        let again = sandbox.cargo(project, "build --message-format=json").ok();
        Messages::of(&again).assert_all_fresh();
        Tree::of_any_run(&target)
    });
    sandbox.counters();
    let _ = sandbox.kachefs("daemon stop").ok();
    fs::remove_dir_all(sandbox.store()).must("remove the store");
    let [compiled, hit] = trees;
    // What a daemon that was killed could not store is compiled again, and from which state, it may not know.
    [compiled, hit].map(|tree| tree.without_incremental().without_build_scripts())
}

/// How often the daemon is to be killed.
fn kills_wanted() -> usize {
    let given = std::env::var("KACHEFS_TEST_KILLS").ok();
    let given = given.map(|kills| kills.parse().must("KACHEFS_TEST_KILLS"));
    given.unwrap_or(if long() { 200 } else { 8 })
}

#[test]
fn a_build_goes_on() {
    let wanted = kills_wanted();
    let sandbox = Sandbox::with_limit(Duration::from_secs(if long() { 3600 } else { 420 }));
    let projects = [
        (samples::many(sandbox.path("many"), 16, ""), "sum 16\n"),
        (samples::whole(sandbox.path("whole")), samples::WHOLE_OUTPUT),
    ];
    let expected = projects.each_ref().map(|(project, _)| {
        build_from_nothing(&sandbox, project, || {
            let _ = sandbox.cargo(project, "build").ok();
        })
    });
    let mut killed = 0;
    while killed < wanted {
        for ((project, says), expected) in projects.iter().zip(&expected) {
            let mut here = 0;
            let trees = build_from_nothing(&sandbox, project, || {
                let longest = Duration::from_millis(800);
                let (built, kills) = killing(&sandbox, wanted, longest, |_| {
                    sandbox.cargo(project, "build").ok()
                });
                here += kills;
                assert!(!built.stderr.contains("without the cache"), "{built}");
                assert_eq!(sandbox.keeper().1, here as u64, "one keeper, all the time");
                // Hits go on as well: what the killed daemons stored is true.
                assert_eq!(sandbox.output_of(project.program("app")), *says);
            });
            killed += here;
            for ((expected, tree), what) in expected.iter().zip(&trees).zip(["compiled", "hit"]) {
                expected.assert_same(tree, &format!("undisturbed and killed, {what}"));
            }
        }
    }
    eprintln!("{killed} kills");
}

#[test]
fn keeper_and_daemon_killed_together() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let target = project.target();
    sandbox.mount(&target);
    let _ = sandbox.cargo(&project, "build").ok();
    let before = Tree::of(&target);
    sandbox.kill_keeper_and_daemon();
    // Until their descriptors are closed too, what is asked is under way, and ends as ECONNABORTED.
    let gone = || nix::sys::statvfs::statvfs(&target) == Err(nix::errno::Errno::ENOTCONN);
    assert!(processes::wait_for(Duration::from_secs(5), gone));
    let error = fs::read_dir(&target).err().must("nobody serves it");
    assert_eq!(error.raw_os_error(), Some(nix::libc::ENOTCONN), "{error}");

    sandbox.mount(&target);
    before.assert_same(&Tree::of(&target), "after both were killed");
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    Messages::of(&again).assert_all_fresh();
    sandbox.empty_view(&target);
    let _ = sandbox.cargo(&project, "build").ok();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn a_build_whose_keeper_and_daemon_die_ends_and_the_next_is_right() {
    let sandbox = Sandbox::with_limit(Duration::from_mins(10));
    let project = samples::many(sandbox.path("project"), 8, "");
    let target = project.target();
    let [expected, _] = build_from_nothing(&sandbox, &project, || {
        let _ = sandbox.cargo(&project, "build").ok();
    });
    sandbox.mount(&target);
    let mut chance = Chance::new();
    for round in 0..if long() { 20 } else { 3 } {
        sandbox.empty_view(&target);
        // Other sources each time: compilers run when both die.
        project.replace("crates/part0/src/lib.rs", "{ 1 }", "{ 1  }");
        let build = sandbox.cargo(&project, "build").spawn();
        thread::sleep(Duration::from_millis(200 + chance.number() % 2000));
        sandbox.kill_keeper_and_daemon();
        // It may fail, but it ends.
        let _ = build.finish();
        // Nothing but a build: it mounts what has died, and goes on.
        project.replace("crates/part0/src/lib.rs", "{ 1  }", "{ 1 }");
        let built = sandbox.cargo(&project, "build").ok();
        assert!(!built.stderr.contains("kachefs:"), "round {round}: {built}");
        assert!(sandbox.is_mounted(&target), "round {round}");
        assert_eq!(sandbox.output_of(project.program("app")), "sum 8\n");
        let again = sandbox.cargo(&project, "build --message-format=json").ok();
        Messages::of(&again).assert_all_fresh();
        // Compilers that died with the view may have left something, as on any disk.
        let tree = Tree::of_any_run(&target);
        expected
            .clone()
            .without_incremental()
            .assert_within(&tree, "undisturbed and killed");
    }
}

#[test]
fn a_daemon_that_cannot_start_again_is_given_up() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    fs::write(target.join("file"), "kept").must("write");
    // Nothing that is in the store keeps a daemon from starting, but that there is no place for it.
    let (scratch, away) = (sandbox.path("store/scratch"), sandbox.path("store/away"));
    fs::rename(&scratch, &away).must("rename");
    fs::write(&scratch, "no directory").must("write");
    sandbox.kill_daemon();

    let since = Instant::now();
    let error = fs::File::create(target.join("other")).err();
    let error = error.must("nobody serves it").raw_os_error();
    assert!(
        matches!(error, Some(nix::libc::ENOTCONN | nix::libc::ECONNABORTED)),
        "{error:?}"
    );
    assert!(since.elapsed() < Duration::from_secs(30), "and soon");
    assert!(
        processes::wait_gone(sandbox.root(), Duration::from_secs(10)),
        "nobody tries any longer"
    );
    let outcome = sandbox.kachefs("mount").arg(&target).fails();
    outcome.one_line_error();
    let log = fs::read_to_string(sandbox.path("store/daemon.log")).must("the log");
    assert!(log.contains("giving up"), "{log}");

    fs::remove_file(&scratch).must("remove");
    fs::rename(&away, &scratch).must("rename");
    sandbox.mount(&target);
    assert_eq!(fs::read_to_string(target.join("file")).must("read"), "kept");
}

#[test]
fn a_keeper_alone_may_die() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    let (keeper, _) = sandbox.keeper();
    let daemon = sandbox.daemon_pid();
    kill(keeper, Signal::SIGKILL).must("kill");
    let gone = || !processes::naming(sandbox.root()).contains(&keeper);
    assert!(processes::wait_for(Duration::from_secs(10), gone));
    fs::write(target.join("file"), "served").must("write");
    sandbox.mount(&target);
    assert_eq!(sandbox.daemon_pid(), daemon);
    assert!(sandbox.stats()["daemon"]["keeper_pid"].is_null());
    sandbox.unmount(&target);
    sandbox.mount(&target);
    assert_eq!(
        fs::read_to_string(target.join("file")).must("read"),
        "served"
    );
}

#[test]
fn sigterm_to_the_keeper_is_a_clean_stop() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    fs::write(target.join("file"), "kept").must("write");
    kill(sandbox.keeper().0, Signal::SIGTERM).must("kill");
    assert!(
        processes::wait_gone(sandbox.root(), Duration::from_secs(20)),
        "both are gone"
    );
    assert_eq!(mounts::below(sandbox.root()), []);
    sandbox.mount(&target);
    assert_eq!(fs::read_to_string(target.join("file")).must("read"), "kept");
}

#[test]
fn what_a_person_unmounted_stays_so_and_the_rest_comes_back() {
    let sandbox = Sandbox::new();
    let targets = ["one", "two"].map(|name| sandbox.make_dir(name).join("target"));
    for target in &targets {
        sandbox.mount(target);
    }
    sandbox.unmount(&targets[0]);
    sandbox.kill_daemon();
    fs::write(targets[1].join("file"), "served").must("write");
    assert_eq!(mounts::at(&targets[0]), None);
    // Behind everybody's back: only `kachefs unmount` says that it is to stay away.
    let _ = sandbox.command("umount").arg(&targets[1]).run();
    if mounts::at(&targets[1]).is_none() {
        sandbox.kill_daemon();
        let _ = sandbox.kachefs("daemon status").ok();
        assert!(mounts::at(&targets[1]).is_some(), "it is managed");
        assert_eq!(mounts::at(&targets[0]), None);
    }
    assert_eq!(
        fs::read_to_string(targets[1].join("file")).must("read"),
        "served"
    );
}

#[test]
fn two_first_mounts_at_once_have_one_keeper() {
    let sandbox = Sandbox::new();
    let targets = ["one", "two", "three"].map(|name| sandbox.make_dir(name).join("target"));
    let mounts: Vec<_> = targets
        .iter()
        .map(|target| sandbox.kachefs("mount").arg(target).spawn())
        .collect();
    for mount in mounts {
        let _ = mount.finish().success();
    }
    sandbox.kill_daemon();
    for target in &targets {
        fs::write(target.join("file"), "served").must("write");
    }
    let ours = processes::naming(sandbox.root());
    assert_eq!(ours.len(), 2, "{}", processes::describe(sandbox.root()));
}

#[test]
fn a_program_on_a_mount_keeps_itself() {
    // The keeper must not wait for pages that only its daemon can bring.
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    let program = target.join("kachefs");
    fs::copy(sandbox.bin_dir().join("kachefs"), &program).must("copy");
    let store = sandbox.path("other-store");
    let other = sandbox.make_dir("other").join("target");
    let run = |words: &str| {
        let words = words.split(' ');
        sandbox
            .command(&program)
            .args(words)
            .arg("--store")
            .arg(&store)
    };
    let _ = run("mount").arg(&other).ok();
    fs::write(other.join("file"), "served").must("write");
    let maps = |pid: i32| fs::read_to_string(format!("/proc/{pid}/maps")).must("maps");
    let status = run("daemon status").ok().stdout;
    let number = |word: &str| -> i32 {
        let rest = status.split(word).nth(1).must(&status);
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|n| n.parse().ok()).must(&status)
    };
    for pid in [number("pid "), number("keeper ")] {
        let maps = maps(pid);
        assert!(!maps.contains(&*target.to_string_lossy()), "{maps}");
    }
    let _ = run("daemon stop").ok();
}
