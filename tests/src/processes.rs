//! Finds the processes that belong to a sandbox, says what they wait for, and ends them.
//!
//! A process belongs to a sandbox when its command line or its environment names the sandbox's
//! root, a path no other process on the machine can know. Nothing else is ever signalled.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Must;

/// The live processes that name `root`, without this one.
pub fn naming(root: &Path) -> Vec<Pid> {
    let own = std::process::id().cast_signed();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| pid != own && (names(pid, "cmdline", root) || names(pid, "environ", root)))
        .map(Pid::from_raw)
        .collect()
}

fn names(pid: i32, file: &str, root: &Path) -> bool {
    let root = root.as_os_str().as_bytes();
    fs::read(format!("/proc/{pid}/{file}"))
        .is_ok_and(|text| text.windows(root.len()).any(|window| window == root))
}

/// The program a process runs.
pub fn program(pid: Pid) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Who started a process.
pub fn parent(pid: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok().map(Pid::from_raw)
}

/// A counter of a process's reading and writing (proc(5), `io`).
pub fn counter(pid: Pid, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).must("/proc/PID/io");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    value
        .and_then(|value| value.parse().ok())
        .must(format!("{name} in\n{text}"))
}

/// The most memory a process has had, in KiB (proc(5), `VmHWM` of `status`).
pub fn peak_memory(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).must("/proc/PID/status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.must(format!("VmHWM in\n{status}"))
}

/// Waits until no process names `root`; false if some still do when the time is over.
pub fn wait_gone(root: &Path, patience: Duration) -> bool {
    wait_for(patience, || naming(root).is_empty())
}

/// Ends every process that names `root`, asking first.
pub fn end(root: &Path) {
    for (signal, patience) in [(Signal::SIGTERM, 5), (Signal::SIGKILL, 10)] {
        for pid in naming(root) {
            // It may have ended since we looked.
            let _ = kill(pid, signal);
        }
        if wait_gone(root, Duration::from_secs(patience)) {
            return;
        }
    }
}

/// Whether every thread of `pid` is stopped (state `T`, `proc_pid_stat(5)`).
pub fn is_stopped(pid: Pid) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('T'))
    })
}

/// One paragraph per process of the sandbox: who it is and what each thread waits for.
pub fn describe(root: &Path) -> String {
    let mut text = String::new();
    for pid in naming(root) {
        text.push_str(&describe_one(pid.as_raw().unsigned_abs()));
    }
    text
}

/// One paragraph about one process.
pub fn describe_one(pid: u32) -> String {
    let mut text = String::new();
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    let _ = writeln!(
        text,
        "{pid}: {}",
        command.chars().take(300).collect::<String>()
    );
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return text;
    };
    for thread in threads.flatten().map(|entry| entry.path()) {
        let read = |name| fs::read_to_string(thread.join(name)).unwrap_or_default();
        let state = read("status");
        let state = state
            .lines()
            .find(|line| line.starts_with("State:"))
            .unwrap_or("State: ?");
        let stack = read("stack");
        let stack: Vec<_> = stack.lines().take(6).map(str::trim).collect();
        let _ = writeln!(
            text,
            "    {} {state}, in {} {}",
            read("comm").trim_end(),
            read("wchan"),
            stack.join(" < ")
        );
    }
    text
}

/// Polls until `done`; false if it is not when the time is over.
pub fn wait_for(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}
