//! As root, what a compiler writes goes to the disk without passing through the daemon.

use std::fs;

use harness::{Must, Sandbox, samples};
use nix::unistd::geteuid;

/// Bytes a process has given to write(2) and its kin (proc(5), `io`).
fn written(pid: i32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).must("read io");
    io.lines()
        .find_map(|line| line.strip_prefix("wchar: "))
        .and_then(|n| n.parse().ok())
        .must("wchar")
}

#[test]
fn a_miss_is_written_past_the_daemon() {
    if !geteuid().is_root() {
        println!("skipped: passthrough needs root");
        return;
    }
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let daemon = sandbox.daemon_pid().as_raw();
    let before = written(daemon);
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    let passed = written(daemon) - before;
    assert!(seen.bytes_ingested > 10 << 20, "{seen:?}");
    assert!(
        passed < seen.bytes_ingested / 2,
        "{passed} bytes went through the daemon, of {} made",
        seen.bytes_ingested
    );
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    harness::messages::Messages::of(&again).assert_all_fresh();
}
