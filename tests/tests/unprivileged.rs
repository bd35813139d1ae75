//! All of it works for an ordinary user: the mount goes through fusermount3.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use harness::killer::killing;
use harness::messages::Messages;
use harness::unprivileged::can_mount_unprivileged;
use harness::{Must, Sandbox, samples};

/// A sandbox of an ordinary user, or the reason why there can be none, printed.
fn sandbox() -> Option<Sandbox> {
    match can_mount_unprivileged() {
        Ok(()) => Some(Sandbox::unprivileged()),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

#[test]
fn mount_build_hit_unmount() {
    let Some(sandbox) = sandbox() else { return };
    let project = samples::whole(sandbox.path("project"));
    sandbox.hand_over(project.root());
    let target = project.target();
    sandbox.mount(&target);

    let pid = sandbox.daemon_pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).must("the daemon's status");
    let uids = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .must("its user");
    assert!(
        uids.split_whitespace().all(|uid| uid != "0"),
        "the daemon is no root: {uids}"
    );

    let build = || sandbox.cargo(&project, "build --message-format=json").ok();
    let (cold, first) = sandbox.during(build);
    let units = Messages::of(&first).units();
    assert_eq!((cold.hits, cold.misses), (0, units), "{cold:?}");
    // The test itself may not look into another user's mount, only its commands may.
    let list = format!(
        "cd '{}' && find . -type f | sort | xargs sha256sum",
        target.join("debug/deps").display()
    );
    let outputs = || sandbox.command("sh").args(["-c", &list]).ok().stdout;
    let expected = outputs();
    assert!(expected.lines().count() > 5, "{expected}");

    sandbox.empty_view(&target);
    let (warm, _) = sandbox.during(build);
    warm.assert_all_hit(units);
    assert_eq!(outputs(), expected);
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
    Messages::of(&build()).assert_all_fresh();

    sandbox.unmount(&target);
    sandbox.mount(&target);
    Messages::of(&build()).assert_all_fresh();
    sandbox.unmount(&target);
}

#[test]
fn kill_and_mount_again() {
    let Some(sandbox) = sandbox() else { return };
    let project = samples::plain(sandbox.path("project"));
    sandbox.hand_over(project.root());
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.kill_daemon();
    sandbox.mount(project.target());
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    Messages::of(&again).assert_all_fresh();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::PLAIN_OUTPUT
    );
}

#[test]
fn a_build_goes_on_while_the_daemon_is_killed() {
    let Some(sandbox) = sandbox() else { return };
    let project = samples::many(sandbox.path("project"), 12, "");
    sandbox.hand_over(project.root());
    sandbox.mount(project.target());
    for _ in 0..2 {
        let (built, kills) = killing(&sandbox, 100, Duration::from_millis(600), |_| {
            sandbox.cargo(&project, "build").ok()
        });
        assert!(!built.stderr.contains("without the cache"), "{built}");
        eprintln!("{kills} kills");
        assert_eq!(sandbox.output_of(project.program("app")), "sum 12\n");
        let again = sandbox.cargo(&project, "build --message-format=json").ok();
        Messages::of(&again).assert_all_fresh();
        sandbox.empty_view(project.target());
    }
    // Together with the keeper it takes the mount along; the next mount brings it back.
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.kill_keeper_and_daemon();
    let _ = sandbox.command("ls").arg(project.target()).fails();
    sandbox.mount(project.target());
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    Messages::of(&again).assert_all_fresh();
}

#[test]
fn writing_to_what_a_hit_brought() {
    let Some(sandbox) = sandbox() else { return };
    let project = samples::plain(sandbox.path("project"));
    sandbox.hand_over(project.root());
    sandbox.mount(project.target());
    for _ in 0..2 {
        let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
        assert_eq!(seen.hits + seen.misses, 3, "{seen:?}");
        assert_eq!(
            sandbox.output_of(project.program("app")),
            samples::PLAIN_OUTPUT
        );
        let _ = sandbox.command("strip").arg(project.program("app")).ok();
        assert_eq!(
            sandbox.output_of(project.program("app")),
            samples::PLAIN_OUTPUT
        );
        sandbox.empty_view(project.target());
    }
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_all_hit(3);
}

#[test]
fn the_store_is_closed_to_others() {
    let Some(sandbox) = sandbox() else { return };
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    let mode = sandbox
        .store()
        .join("run")
        .metadata()
        .must("run")
        .permissions()
        .mode();
    assert_eq!(
        mode & 0o777,
        0o700,
        "the socket's directory is the user's own"
    );
}
