//! Disk images that stand in for disks: what [`crate::disk`] and [`crate::lossy_disk`] share.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::{Must, Sandbox, mounts};

/// Whether images of this kind can be made and mounted here; says why not.
#[track_caller]
pub(crate) fn is_possible(kind: &str) -> bool {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting a disk image takes root");
        return false;
    }
    let known = fs::read_to_string("/proc/filesystems").must("/proc/filesystems");
    let mkfs = format!("mkfs.{kind}");
    let has_tool = ["/sbin", "/usr/sbin", "/usr/bin"]
        .iter()
        .any(|dir| Path::new(dir).join(&mkfs).exists());
    if !has_tool || !known.contains(&format!("\t{kind}\n")) {
        assert!(
            std::env::var_os("CI").is_none(),
            "no {kind} here: run scripts/setup"
        );
        eprintln!("skipped: this machine has no {mkfs}, or its kernel no {kind}");
        return false;
    }
    true
}

/// Makes an empty image of this length; sparse.
#[track_caller]
pub(crate) fn make(path: &Path, size: u64) {
    let file = File::create(path).must(path.display());
    file.set_len(size).must(path.display());
}

/// Runs a program that must succeed.
#[track_caller]
pub(crate) fn run(program: &str, flags: &[&str], paths: &[&Path]) {
    let output = Command::new(program).args(flags).args(paths).output();
    let output = output.must(program);
    assert!(
        output.status.success(),
        "{program} {flags:?} {paths:?}: {output:?}"
    );
}

/// Unmounts, when whoever used it has ended; whether it is gone. Its loop device goes with it.
pub(crate) fn unmount(point: &Path) -> bool {
    for _ in 0..100 {
        if mounts::at(point).is_none() {
            return true;
        }
        let status = Command::new("umount").arg(point).output();
        if status.is_ok_and(|output| output.status.success()) {
            continue;
        }
        thread::sleep(Duration::from_millis(100));
    }
    mounts::at(point).is_none()
}

/// Ends whatever has the store open, by `unmount` and by stopping the daemon. For destructors: without
/// a panic, because one may be under way. What stays, the sandbox reports.
pub(crate) fn end_users(sandbox: &Sandbox, unmount: &str) {
    for words in [unmount, "daemon stop"] {
        let command = Command::new(sandbox.bin_dir().join("kachefs"))
            .args(words.split(' '))
            .env("KACHEFS_STORE", sandbox.store())
            .env("HOME", sandbox.path("home"))
            .env("CARGO_HOME", sandbox.cargo_home())
            .output();
        drop(command);
    }
}
