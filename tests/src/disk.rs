//! The store on a disk of its own: an image, mounted where the store will be. It can be made to fail
//! as a bad disk does, and be repaired.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::{Must, Sandbox, mounts};

/// A mounted disk image.
pub struct Disk<'a> {
    sandbox: &'a Sandbox,
    kind: String,
}

impl<'a> Disk<'a> {
    /// `None`, and why, where there is no such file system on this machine.
    #[track_caller]
    pub fn new(sandbox: &'a Sandbox, kind: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting a disk image takes root");
            return None;
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
            return None;
        }
        let image = sandbox.path("disk.img");
        File::create(&image)
            .must("image")
            .set_len(1 << 30)
            .must("set_len");
        run(Command::new(&mkfs).arg("-q").arg(&image));
        sandbox.make_dir("store");
        let disk = Self {
            sandbox,
            kind: kind.to_owned(),
        };
        disk.mount();
        Some(disk)
    }

    #[track_caller]
    fn mount(&self) {
        let options = if self.kind == "ext4" {
            "loop,errors=remount-ro"
        } else {
            "loop"
        };
        let (image, store) = (self.sandbox.path("disk.img"), self.sandbox.store());
        let mut mount = Command::new("mount");
        run(mount
            .args(["-o", options, "-t", &self.kind])
            .arg(image)
            .arg(store));
    }

    /// Writes everything to the disk.
    #[track_caller]
    pub fn sync(&self) {
        let store = File::open(self.sandbox.store()).must("open");
        nix::unistd::syncfs(&store).must("syncfs");
    }

    /// Bytes that are free.
    #[track_caller]
    pub fn free(&self) -> u64 {
        let stat = nix::sys::statvfs::statvfs(&self.sandbox.store()).must("statvfs");
        stat.blocks_free() * stat.fragment_size()
    }

    /// Makes an ext4 disk meet an error: the kernel makes it read-only under whoever uses it.
    #[track_caller]
    pub fn fail(&self) {
        let line = Command::new("findmnt")
            .args(["-n", "-o", "SOURCE"])
            .arg(self.sandbox.store())
            .output()
            .must("findmnt");
        let device = String::from_utf8_lossy(&line.stdout).trim().to_owned();
        let name = device.strip_prefix("/dev/").must("a loop device");
        let trigger = format!("/sys/fs/ext4/{name}/trigger_fs_error");
        fs::write(&trigger, "broken by a test").must(&trigger);
    }

    /// Makes a disk nobody uses read-only.
    #[track_caller]
    pub fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let mut mount = Command::new("mount");
        run(mount.args(["-o", &options]).arg(self.sandbox.store()));
    }

    /// Unmounts, checks and mounts again a disk nobody uses.
    #[track_caller]
    pub fn repair(&self) {
        assert!(self.unmount(), "the disk is still in use");
        let image = self.sandbox.path("disk.img");
        let checked = Command::new("e2fsck")
            .args(["-f", "-y"])
            .arg(image)
            .output()
            .must("e2fsck");
        // 1 and 2: errors were there and are corrected.
        assert!(
            checked.status.code().is_some_and(|code| code < 4),
            "{checked:?}"
        );
        self.mount();
    }

    fn unmount(&self) -> bool {
        let store = self.sandbox.store();
        for _ in 0..100 {
            let status = Command::new("umount").arg(&store).output();
            if status.is_ok_and(|output| output.status.success()) || mounts::at(&store).is_none() {
                return true;
            }
            thread::sleep(Duration::from_millis(100));
        }
        false
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        // Without a panic: one may be under way. What stays, the sandbox reports.
        for words in ["unmount --all", "daemon stop"] {
            let command = Command::new(self.sandbox.bin_dir().join("kachefs"))
                .args(words.split(' '))
                .env("KACHEFS_STORE", self.sandbox.store())
                .env("HOME", self.sandbox.path("home"))
                .env("CARGO_HOME", self.sandbox.cargo_home())
                .output();
            drop(command);
        }
        self.unmount();
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().must("a command");
    assert!(output.status.success(), "{command:?}: {output:?}");
}
