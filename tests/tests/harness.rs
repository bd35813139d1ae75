//! The harness itself: it notices what it must, and its samples are sound.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use harness::{Must, Sandbox, processes, samples};

/// What `work` panics with.
#[track_caller]
fn panic_of(work: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(work)).expect_err("it must fail");
    panic
        .downcast_ref::<String>()
        .cloned()
        .must("a panic with a message")
}

#[test]
fn samples_build_with_plain_cargo() {
    let sandbox = Sandbox::new();
    let whole = samples::whole(sandbox.path("whole"));
    let plain = samples::plain(sandbox.path("plain"));
    let many = samples::many(sandbox.path("many"), 9, "salt ");
    for (project, output) in [
        (whole, samples::WHOLE_OUTPUT),
        (plain, samples::PLAIN_OUTPUT),
        (many, "sum 9\n"),
    ] {
        let _ = sandbox.plain_cargo(&project, "build").ok();
        assert_eq!(sandbox.output_of(project.program("app")), output);
    }
}

#[test]
fn the_environment_of_a_command_is_the_sandboxes() {
    let sandbox = Sandbox::new();
    let env = sandbox.command("env").ok().stdout;
    let names: Vec<_> = env
        .lines()
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    assert!(
        names.contains(&"KACHEFS_STORE") && names.contains(&"CARGO_HOME"),
        "{names:?}"
    );
    assert!(
        !names.contains(&"CARGO_MANIFEST_DIR"),
        "cargo's own variables stay out: {names:?}"
    );
    assert!(!names.contains(&"KACHEFS_BIN_DIR"), "{names:?}");
}

#[test]
fn an_ordinary_user_can_build_in_a_sandbox() {
    let sandbox = Sandbox::unprivileged();
    let project = samples::plain(sandbox.path("project"));
    sandbox.hand_over(project.root());
    assert_ne!(sandbox.command("id").arg("-u").ok().stdout, "0\n");
    let _ = sandbox.plain_cargo(&project, "build").ok();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::PLAIN_OUTPUT
    );
}

#[test]
fn a_command_that_hangs_is_killed_and_described() {
    let sandbox = Sandbox::new();
    let start = Instant::now();
    let message = panic_of(|| {
        let script = "echo started; sleep 100 & sleep 100";
        let command = sandbox.command("sh").args(["-c", script]);
        let _ = command.timeout(Duration::from_secs(2)).run();
    });
    assert!(message.contains("did not end within 2 s"), "{message}");
    assert!(
        message.contains("started"),
        "it shows the output so far\n{message}"
    );
    assert!(
        message.contains("sleep 100"),
        "it shows the processes\n{message}"
    );
    assert!(start.elapsed() < Duration::from_mins(1));
    assert_eq!(
        processes::naming(sandbox.root()),
        [],
        "its children are gone too"
    );
}

#[test]
fn a_command_that_leaves_its_output_open_is_reported() {
    let sandbox = Sandbox::new();
    let message = panic_of(|| {
        let _ = sandbox
            .command("sh")
            .args(["-c", "sleep 25 & exit 0"])
            .run();
    });
    assert!(
        message.contains("holds its stdout or stderr open"),
        "{message}"
    );
    processes::end(sandbox.root());
}

#[test]
fn a_process_left_behind_fails_the_test() {
    let sandbox = Sandbox::new();
    let root = sandbox.root().to_owned();
    let script = "setsid sleep 1000 >/dev/null 2>&1 </dev/null & exit 0";
    let _ = sandbox.command("sh").args(["-c", script]).ok();
    let message = panic_of(|| drop(sandbox));
    assert!(message.contains("processes left behind"), "{message}");
    assert_eq!(processes::naming(&root), []);
    assert!(!root.exists(), "and it is cleaned up nevertheless");
}

#[test]
fn the_watchdog_ends_a_test_that_takes_too_long() {
    let sandbox = Sandbox::with_limit(Duration::from_secs(1));
    let outcome = sandbox.command("sleep").arg("100").run();
    assert!(!outcome.status.success(), "{outcome}");
    let message = panic_of(|| drop(sandbox));
    assert!(message.contains("watchdog"), "{message}");
}
