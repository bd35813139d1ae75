//! The life of a mounted target: `cargo clean` succeeds, what was mounted comes back by itself
//! until a person unmounts it, and no mount is stuck for ever.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::killer::SetOnDrop;
use harness::messages::Messages;
use harness::unprivileged::can_mount_unprivileged;
use harness::{Must, Project, Running, Sandbox, mounts, processes, samples, tree};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Uid;

/// Who runs the commands of a test.
#[derive(Clone, Copy)]
enum As {
    Ourselves,
    OrdinaryUser,
}

/// A sandbox with a project, built once in its mounted target, and its number of units; nothing
/// where an ordinary user cannot mount, and the reason printed.
fn built(who: As) -> Option<(Sandbox, Project, u64)> {
    let sandbox = match (who, can_mount_unprivileged()) {
        (As::Ourselves, _) => Sandbox::new(),
        (As::OrdinaryUser, Ok(())) => Sandbox::unprivileged(),
        (As::OrdinaryUser, Err(reason)) => {
            eprintln!("skipped: {reason}");
            return None;
        }
    };
    let project = samples::plain(sandbox.path("project"));
    sandbox.hand_over(project.root());
    sandbox.mount(project.target());
    let first = sandbox.cargo(&project, "build --message-format=json").ok();
    let units = Messages::of(&first).units();
    // What is still being recorded would be a miss later.
    sandbox.counters();
    Some((sandbox, project, units))
}

#[track_caller]
fn assert_works(sandbox: &Sandbox, project: &Project) {
    assert!(sandbox.is_mounted(&project.target()));
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::PLAIN_OUTPUT
    );
}

/// No daemon and no mount, as after a reboot.
#[track_caller]
fn reboot(sandbox: &Sandbox) {
    sandbox.kill_keeper_and_daemon();
    mounts::cut_below(sandbox.root());
    assert_eq!(mounts::below(sandbox.root()), []);
}

/// Starts a command of the sandbox in a shell, and returns when the shell has come to `exec`.
#[track_caller]
fn start(sandbox: &Sandbox, script: &str) -> Running {
    let ready = sandbox.path("tmp/ready");
    let script = script.replace("exec ", &format!("touch '{}' && exec ", ready.display()));
    let running = sandbox.command("sh").args(["-c", &script]).spawn();
    assert!(
        processes::wait_for(Duration::from_secs(20), || ready.exists()),
        "`{script}` starts"
    );
    // From the shell to the program itself.
    std::thread::sleep(Duration::from_millis(100));
    fs::remove_file(ready).must("remove");
    running
}

fn cargo_clean_and_the_next_build(who: As) {
    let Some((sandbox, project, units)) = built(who) else {
        return;
    };
    let target = project.target();
    for _ in 0..3 {
        let cleaned = sandbox.cargo(&project, "clean").ok();
        assert!(cleaned.stderr.contains("Removed"), "{cleaned}");
        assert!(!sandbox.is_mounted(&target));
        assert!(!target.exists(), "cargo clean removes the directory too");
        let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
        seen.assert_all_hit(units);
        assert_works(&sandbox, &project);
    }
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    Messages::of(&again).assert_all_fresh();
}

#[test]
fn cargo_clean_succeeds_and_the_next_build_hits() {
    cargo_clean_and_the_next_build(As::Ourselves);
}

#[test]
fn cargo_clean_succeeds_for_an_ordinary_user() {
    cargo_clean_and_the_next_build(As::OrdinaryUser);
}

#[test]
fn a_clean_of_something_leaves_the_mount() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    let _ = sandbox.cargo(&project, "build --release").ok();
    for words in [
        "clean -p app",
        "clean --release",
        "clean --profile dev",
        "clean --doc",
        "clean --dry-run",
    ] {
        let _ = sandbox.cargo(&project, words).ok();
        assert!(sandbox.is_mounted(&project.target()), "{words}");
    }
    // Even where it takes the last name.
    sandbox.empty_view(project.target());
    fs::create_dir(project.path("target/release")).must("mkdir");
    let _ = sandbox.cargo(&project, "clean --release").ok();
    assert!(!project.path("target/release").exists());
    assert!(sandbox.is_mounted(&project.target()));
}

#[test]
fn emptying_by_hand_leaves_the_mount() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    let target = project.target();
    let script = format!("rm -rf '{0}'/* '{0}'/.[a-z]*", target.display());
    let _ = sandbox.command("sh").args(["-c", &script]).ok();
    assert_eq!(fs::read_dir(&target).must("list").count(), 0);
    assert!(sandbox.is_mounted(&target));
}

#[test]
fn cargo_clean_below_what_still_runs() {
    for who in [As::Ourselves, As::OrdinaryUser] {
        let Some((sandbox, project, units)) = built(who) else {
            continue;
        };
        // A program of the target that goes on, and a shell that sits in it.
        let target = project.target();
        let script = format!(
            "cd '{}' && cp \"$(command -v sleep)\" server && exec ./server 98.6",
            target.join("debug").display()
        );
        let mut server = start(&sandbox, &script);
        let at_root = start(
            &sandbox,
            &format!("cd '{}' && exec sleep 98.5", target.display()),
        );
        let _ = sandbox.cargo(&project, "clean").ok();
        assert!(!target.exists());
        let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
        seen.assert_all_hit(units);
        assert_works(&sandbox, &project);
        assert!(server.is_running(), "what ran goes on");
        let _ = sandbox.cargo(&project, "clean").ok();
        let _ = sandbox.cargo(&project, "build").ok();
        assert_works(&sandbox, &project);
        drop((server, at_root));
    }
}

#[test]
fn nothing_can_be_made_in_a_target_that_was_cleaned() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    let target = project.target();
    let (go, done) = (sandbox.path("tmp/go"), sandbox.path("tmp/done"));
    // A shell that sat in the target all the time, and tries to write there afterwards.
    let script = format!(
        "cd '{}' && touch '{ready}' && while [ ! -e '{go}' ]; do sleep 0.05; done; \
         echo late > late; mkdir late-too; chmod 700 .; ls -A; touch '{done}'",
        target.display(),
        ready = sandbox.path("tmp/ready").display(),
        go = go.display(),
        done = done.display(),
    );
    let shell = sandbox.command("sh").args(["-c", &script]).spawn();
    let ready = || sandbox.path("tmp/ready").exists();
    assert!(processes::wait_for(Duration::from_secs(20), ready));
    let _ = sandbox.cargo(&project, "clean").ok();
    let _ = sandbox.cargo(&project, "build").ok();
    let before = harness::Tree::of(&target);
    fs::write(&go, "").must("write");
    let said = shell.finish();
    assert!(done.exists(), "{said}");
    assert!(
        said.stderr.contains("cannot create late") && said.stderr.contains("late-too"),
        "as in any removed directory\n{said}"
    );
    before.assert_same(&harness::Tree::of(&target), "after the late writes");
    reboot(&sandbox);
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    Messages::of(&again).assert_all_fresh();
}

fn comes_back_without_a_daemon(who: As) {
    let Some((sandbox, project, _)) = built(who) else {
        return;
    };
    let build = || sandbox.cargo(&project, "build --message-format=json").ok();
    // A dead mount is still there.
    sandbox.kill_keeper_and_daemon();
    Messages::of(&build()).assert_all_fresh();
    assert_works(&sandbox, &project);
    // Nothing is there.
    reboot(&sandbox);
    Messages::of(&build()).assert_all_fresh();
    assert_works(&sandbox, &project);
    // A daemon that ended in order.
    let _ = sandbox.kachefs("daemon stop").ok();
    Messages::of(&build()).assert_all_fresh();
    assert_works(&sandbox, &project);
}

#[test]
fn the_next_build_mounts_what_died() {
    comes_back_without_a_daemon(As::Ourselves);
}

#[test]
fn the_next_build_of_an_ordinary_user_mounts_what_died() {
    comes_back_without_a_daemon(As::OrdinaryUser);
}

#[test]
fn unmounting_ends_it() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    let target = project.target();
    let plain_build = || {
        let built = sandbox.cargo(&project, "build").ok();
        assert!(!sandbox.is_mounted(&target), "{built}");
        fs::remove_dir_all(&target).must("remove");
    };
    sandbox.unmount(&target);
    plain_build();
    // Away already, with a daemon and without one.
    for stop in [false, true] {
        sandbox.mount(&target);
        let _ = sandbox.cargo(&project, "build").ok();
        let _ = sandbox.cargo(&project, "clean").ok();
        if stop {
            let _ = sandbox.kachefs("daemon stop").ok();
        }
        let ended = sandbox.kachefs("unmount").arg(&target).ok();
        assert!(ended.stdout.contains("not mounted"), "{ended}");
        plain_build();
        let _ = sandbox.kachefs("unmount").arg(&target).fails();
    }
    // All at once, dead ones included.
    sandbox.mount(&target);
    sandbox.kill_keeper_and_daemon();
    let _ = sandbox.kachefs("unmount --all").ok();
    assert_eq!(mounts::below(sandbox.root()), []);
    plain_build();
}

#[test]
fn a_clean_while_nothing_is_mounted_counts() {
    let Some((sandbox, project, units)) = built(As::Ourselves) else {
        return;
    };
    reboot(&sandbox);
    let _ = sandbox.cargo(&project, "clean").ok();
    assert!(!project.target().exists());
    // Another target brings the daemon back; this one waits for its own build.
    sandbox.make_dir("other");
    sandbox.mount(sandbox.path("other/target"));
    assert!(!project.target().exists());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_all_hit(units);
    assert_works(&sandbox, &project);
}

#[test]
fn another_checkout_at_the_same_path_is_not_the_old_one() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    reboot(&sandbox);
    let copy = project.checkout(sandbox.path("copy"));
    fs::remove_dir_all(project.root()).must("remove");
    fs::rename(copy.root(), project.root()).must("rename");
    let _ = sandbox.cargo(&project, "build").ok();
    assert!(!sandbox.is_mounted(&project.target()));
    // Until it is mounted itself.
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "clean").ok();
    let _ = sandbox.cargo(&project, "build").ok();
    assert_works(&sandbox, &project);
}

#[test]
fn targets_in_other_places_come_back() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    let disk = sandbox.make_dir("disk");
    let comes_back = |target: &Path, how: &dyn Fn() -> harness::Cmd| {
        sandbox.mount(target);
        let _ = how().ok();
        let built = target.join("debug/app");
        assert!(built.exists(), "it builds in {}", target.display());
        reboot(&sandbox);
        let again = how().arg("--message-format=json").ok();
        assert!(sandbox.is_mounted(target), "{}\n{again}", target.display());
        Messages::of(&again).assert_all_fresh();
        sandbox.unmount(target);
    };
    let build = |dir: &Path, words: &str| sandbox.cargo(dir, words);
    let root = project.root();
    let named = disk.join("named");
    let words = format!("build --target-dir {}", named.display());
    comes_back(&named, &|| build(root, &words));
    let set = disk.join("set");
    comes_back(&set, &|| build(root, "build").env("CARGO_TARGET_DIR", &set));
    comes_back(&project.target(), &|| {
        build(&project.path("crates/app"), "build")
    });
    let words = format!("build --manifest-path {}/Cargo.toml", root.display());
    comes_back(&project.target(), &|| build(&disk, &words));
    let configured = project.path("out");
    project.write(".cargo/config.toml", "[build]\ntarget-dir = \"out\"\n");
    comes_back(&configured, &|| build(root, "build"));
    project.remove(".cargo/config.toml");
    let linked = disk.join("linked");
    if project.target().exists() {
        fs::remove_dir_all(project.target()).must("remove");
    }
    symlink(&linked, project.target()).must("symlink");
    comes_back(&linked, &|| build(root, "build"));
}

#[test]
fn a_build_elsewhere_starts_nothing() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    reboot(&sandbox);
    let other = samples::plain(sandbox.path("other"));
    let _ = sandbox.cargo(&other, "build").ok();
    // A target of its own is meant, not the managed one.
    let _ = sandbox.cargo(&project, "build --target-dir plain").ok();
    assert_eq!(mounts::below(sandbox.root()), []);
    assert_eq!(processes::naming(sandbox.root()), []);
    let _ = sandbox
        .cargo(&project, "build")
        .env("KACHEFS_DISABLE", "1")
        .ok();
    assert_eq!(mounts::below(sandbox.root()), [], "switched off");
    fs::remove_dir_all(project.target()).must("remove");
}

#[test]
fn what_cannot_come_back_is_one_line_and_the_build_goes_on() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    reboot(&sandbox);
    let alone = sandbox.make_dir("alone").join("kachefs-rustc");
    fs::copy(sandbox.wrapper(), &alone).must("copy");
    let build = |wrapper: &Path| {
        let built = sandbox
            .cargo(&project, "build")
            .env("RUSTC_WRAPPER", wrapper)
            .ok();
        assert_eq!(
            sandbox.output_of(project.program("app")),
            samples::PLAIN_OUTPUT
        );
        let said: Vec<_> = built
            .stderr
            .lines()
            .filter(|line| line.starts_with("kachefs: "))
            .map(ToOwned::to_owned)
            .collect();
        assert_eq!(said.len(), 1, "{built}");
        assert!(said[0].contains("cannot mount"), "{built}");
        fs::remove_dir_all(project.target()).must("remove");
    };
    // The program that mounts is missing; then the store is of no use.
    build(&alone);
    let blobs = sandbox.store().join("blobs");
    fs::rename(&blobs, sandbox.path("blobs")).must("rename");
    fs::write(&blobs, "no directory").must("write");
    build(&sandbox.wrapper());
    assert_eq!(mounts::below(sandbox.root()), []);
    fs::remove_file(&blobs).must("remove");
    fs::rename(sandbox.path("blobs"), &blobs).must("rename");
}

#[test]
fn builds_that_start_at_once_mount_once() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    reboot(&sandbox);
    let running: Vec<_> = (0..4)
        .map(|_| sandbox.cargo(&project, "build").spawn())
        .collect();
    for build in running {
        let _ = build.finish().success();
    }
    assert_eq!(mounts::below(sandbox.root()).len(), 1);
    assert_works(&sandbox, &project);
}

#[test]
fn sigterm_unmounts_and_the_views_come_back_at_the_next_start() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    sandbox.make_dir("two");
    let two = sandbox.path("two/target");
    sandbox.mount(&two);
    fs::write(two.join("file"), "kept").must("write");
    // Also what is in use is unmounted.
    let user = start(
        &sandbox,
        &format!("cd '{}' && exec sleep 98.4", two.display()),
    );
    sandbox.signal_daemon(Signal::SIGTERM);
    assert!(
        processes::wait_for(Duration::from_secs(20), || mounts::below(sandbox.root())
            .is_empty()),
        "{:?}",
        mounts::below(sandbox.root())
    );
    drop(user);
    assert!(processes::wait_gone(
        sandbox.root(),
        Duration::from_secs(20)
    ));
    sandbox.make_dir("three");
    sandbox.mount(sandbox.path("three/target"));
    assert_works(&sandbox, &project);
    assert_eq!(fs::read_to_string(two.join("file")).must("read"), "kept");
}

fn unmount_names_who_uses_it(who: As) {
    let Some((sandbox, project, _)) = built(who) else {
        return;
    };
    let target = project.target();
    let scripts = [
        (
            "working directory",
            "cd TARGET && exec sleep 98.1".to_owned(),
        ),
        (
            "open file",
            "exec sleep 98.2 < TARGET/.rustc_info.json".to_owned(),
        ),
        (
            "running program",
            "cp \"$(command -v sleep)\" TARGET/napper && exec TARGET/napper 98.3".to_owned(),
        ),
    ];
    for (what, script) in scripts {
        let running = start(
            &sandbox,
            &script.replace("TARGET", &target.display().to_string()),
        );
        let refused = sandbox.kachefs("unmount").arg(&target).fails();
        let line = refused.one_line_error();
        let pid = processes::naming(sandbox.root())
            .into_iter()
            .find(|pid| line.contains(&format!("pid {pid},")));
        assert!(pid.is_some(), "it names the process\n{refused}");
        assert!(line.contains(what), "{refused}");
        // Long command lines are cut.
        assert!(line.contains("98.") || line.contains('…'), "{refused}");
        assert!(line.contains("--lazy"), "it says what helps\n{refused}");
        assert!(sandbox.is_mounted(&target));
        drop(running);
    }
    sandbox.unmount(&target);
}

#[test]
fn what_was_open_when_the_target_was_cleaned_goes_with_its_user() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    let backings = || {
        let files = tree::files(&sandbox.store().join("scratch"));
        let live = files.into_iter().filter(|path| path.extension().is_none());
        live.collect::<BTreeSet<_>>()
    };
    for round in 0..10 {
        let before = backings();
        let open: Vec<_> = (0..20)
            .map(|number| {
                let path = project.target().join(format!("open-{number}"));
                fs::write(&path, vec![number; 100_000]).must("write");
                fs::File::open(path).must("open")
            })
            .collect();
        let ours: BTreeSet<_> = backings().difference(&before).cloned().collect();
        assert_eq!(ours.len(), open.len());
        let _ = sandbox.cargo(&project, "clean").ok();
        let _ = sandbox.cargo(&project, "build").ok();
        let mut bytes = Vec::new();
        (&open[7]).read_to_end(&mut bytes).must("still there");
        assert_eq!(bytes, vec![7; 100_000]);
        drop(open);
        // The kernel says nothing more once the last user of a mount is gone.
        let gone = || backings().is_disjoint(&ours);
        assert!(
            processes::wait_for(Duration::from_secs(5), gone),
            "round {round}: left: {:?}",
            backings().intersection(&ours).collect::<Vec<_>>()
        );
    }
}

#[test]
fn who_only_looks_does_not_keep_a_target_mounted() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let _ended = SetOnDrop(&ended);
        for _ in 0..4 {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    // There or not there: the kernel has walked through the mount.
                    let _ = fs::metadata(target.join("nothing"));
                }
            });
        }
        for _ in 0..40 {
            sandbox.mount(&target);
            sandbox.unmount(&target);
        }
    });
}

#[test]
fn unmounting_what_is_in_use_names_the_users() {
    unmount_names_who_uses_it(As::Ourselves);
}

#[test]
fn unmounting_what_is_in_use_names_the_users_to_an_ordinary_user() {
    unmount_names_who_uses_it(As::OrdinaryUser);
}

#[test]
fn lazy_unmount_detaches_and_the_user_goes_on() {
    for who in [As::Ourselves, As::OrdinaryUser] {
        let Some((sandbox, project, _)) = built(who) else {
            continue;
        };
        let target = project.target();
        let go = sandbox.path("tmp/go");
        let script = format!(
            "cd '{}' && touch '{}' && while [ ! -e '{}' ]; do sleep 0.05; done; \
             echo late > late && cat late",
            target.display(),
            sandbox.path("tmp/ready").display(),
            go.display()
        );
        let shell = sandbox.command("sh").args(["-c", &script]).spawn();
        let ready = || sandbox.path("tmp/ready").exists();
        assert!(processes::wait_for(Duration::from_secs(20), ready));
        let detached = sandbox.kachefs("unmount --lazy").arg(&target).ok();
        assert!(!sandbox.is_mounted(&target));
        assert!(detached.stdout.contains("in use by"), "{detached}");
        // One tree is never served twice.
        let refused = sandbox.kachefs("mount").arg(&target).fails();
        assert!(refused.one_line_error().contains("in use by"), "{refused}");
        fs::write(&go, "").must("write");
        assert_eq!(shell.finish().success().stdout, "late\n");
        sandbox.mount(&target);
        let late = sandbox.command("cat").arg(target.join("late")).ok();
        assert_eq!(late.stdout, "late\n", "what was acknowledged is there");
    }
}

#[test]
fn a_dead_mount_fails_at_once() {
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    let target = project.target();
    let reader = start(
        &sandbox,
        &format!("cd '{}' && exec sleep 98.7", target.display()),
    );
    sandbox.kill_keeper_and_daemon();
    // Until its descriptors are closed too, what is asked is under way, and ends as ECONNABORTED.
    let start = Instant::now();
    let dead = || nix::sys::statvfs::statvfs(&target) == Err(Errno::ENOTCONN);
    assert!(processes::wait_for(Duration::from_secs(5), dead));
    for result in [
        fs::write(target.join("new"), "x"),
        fs::create_dir(target.join("directory")),
        fs::remove_file(target.join("CACHEDIR.TAG")),
        fs::metadata(target.join("no such name")).map(drop),
        fs::read(target.join(".rustc_info.json")).map(drop),
    ] {
        let error = result.expect_err("nobody serves it");
        assert_eq!(
            error.raw_os_error(),
            Some(Errno::ENOTCONN as i32),
            "{error}"
        );
    }
    // What the kernel has in memory it may show, and it is right.
    if let Ok(text) = fs::read_to_string(target.join("CACHEDIR.TAG")) {
        assert!(text.starts_with("Signature:"), "{text}");
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(reader);
}

/// Runs `doctor --fix` where it sees the mounts of this sandbox only: it removes what is dead, and
/// tests that run beside this one have dead mounts of their own. Prints the report, its exit
/// status and the mounts that are left.
#[track_caller]
fn doctor_in_a_namespace(sandbox: &Sandbox, arguments: &str) -> String {
    let script = format!(
        "grep ' - fuse.kachefs ' /proc/self/mountinfo | cut -d' ' -f5 | grep -v '^{root}/' | \
         while read -r other; do umount -l \"$other\"; done\n\
         {user} '{kachefs}' doctor {arguments}; echo \"exit $?\"; \
         grep ' - fuse.kachefs ' /proc/self/mountinfo | cut -d' ' -f5",
        root = sandbox.root().display(),
        user = sandbox.user_prefix(),
        kachefs = sandbox.bin_dir().join("kachefs").display(),
    );
    let outcome = sandbox
        .privileged("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .ok();
    outcome.said()
}

fn doctor_removes_the_dead(who: As) {
    if !Uid::effective().is_root() {
        eprintln!("skipped: a namespace of our own takes root");
        return;
    }
    let Some((sandbox, project, _)) = built(who) else {
        return;
    };
    let (dead, alive) = (project.target(), sandbox.make_dir("alive").join("target"));
    sandbox.kill_keeper_and_daemon();
    // Of another store, and served.
    let elsewhere = sandbox.path("elsewhere");
    let _ = sandbox
        .kachefs("mount")
        .arg(&alive)
        .arg("--store")
        .arg(&elsewhere)
        .ok();
    let (dead_name, alive_name) = (dead.display().to_string(), alive.display().to_string());
    let named = doctor_in_a_namespace(&sandbox, "");
    assert!(named.contains("exit 1"), "{named}");
    assert!(
        named
            .lines()
            .any(|line| line.contains("PROBLEM") && line.contains(&dead_name)),
        "{named}"
    );
    assert!(named.contains("doctor --fix"), "{named}");
    assert!(named.lines().any(|line| line == dead_name), "{named}");
    let fixed = doctor_in_a_namespace(&sandbox, "--fix");
    assert!(fixed.contains("exit 0"), "{fixed}");
    assert!(
        fixed.contains(&format!("removed the dead mount {dead_name}")),
        "it says what it did\n{fixed}"
    );
    assert!(!fixed.lines().any(|line| line == dead_name), "{fixed}");
    assert!(fixed.lines().any(|line| line == alive_name), "{fixed}");
    let _ = sandbox.kachefs("daemon stop --store").arg(&elsewhere).ok();
}

#[test]
fn doctor_names_and_removes_dead_mounts() {
    doctor_removes_the_dead(As::Ourselves);
}

#[test]
fn doctor_names_and_removes_dead_mounts_of_an_ordinary_user() {
    doctor_removes_the_dead(As::OrdinaryUser);
}

#[test]
fn doctor_leaves_a_mount_that_only_does_not_answer() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: a namespace of our own takes root");
        return;
    }
    let Some((sandbox, project, _)) = built(As::Ourselves) else {
        return;
    };
    let target = project.target().display().to_string();
    let other = sandbox.path("unused");
    let pid = sandbox.stop_daemon();
    let store = format!("--fix --store {}", other.display());
    let report = doctor_in_a_namespace(&sandbox, &store);
    nix::sys::signal::kill(pid, Signal::SIGCONT).must("SIGCONT");
    assert!(report.contains("does not answer"), "{report}");
    assert!(report.lines().any(|line| line == target), "{report}");
    assert_works(&sandbox, &project);
}
