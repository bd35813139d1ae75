//! The store on a disk of its own: an image, mounted where the store will be. It can be made to fail
//! as a bad disk does, and be repaired.

use std::fs::{self, File};
use std::process::Command;

use crate::image::{self, run};
use crate::{Must, Sandbox};

/// Room on the disk; sparse.
const DISK: u64 = 1 << 30;

/// A mounted disk image.
pub struct Disk<'a> {
    sandbox: &'a Sandbox,
    kind: String,
}

impl<'a> Disk<'a> {
    /// `None`, and why, where there is no such file system on this machine.
    #[track_caller]
    pub fn new(sandbox: &'a Sandbox, kind: &str) -> Option<Self> {
        if !image::is_possible(kind) {
            return None;
        }
        let image = sandbox.path("disk.img");
        image::make(&image, DISK);
        run(&format!("mkfs.{kind}"), &["-q"], &[&image]);
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
        let flags = ["-o", options, "-t", &self.kind];
        run("mount", &flags, &[&image, &store]);
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
        run("mount", &["-o", &options], &[&self.sandbox.store()]);
    }

    /// Unmounts, checks and mounts again a disk nobody uses.
    #[track_caller]
    pub fn repair(&self) {
        let unmounted = image::unmount(&self.sandbox.store());
        assert!(unmounted, "the disk is still in use");
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
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        image::end_users(self.sandbox, "unmount --all");
        image::unmount(&self.sandbox.store());
    }
}
