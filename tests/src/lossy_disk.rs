//! A disk that can lose power: an ext4 image on XFS, which can clone a file in one moment.
//!
//! The image is what a disk's platters would hold. A clone of it, taken while programs write, has
//! exactly what the kernel had sent to the disk by then; what was only in the page cache is missing.
//! Mounting the clone is what happens after the power comes back.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use crate::image::{self, run, unmount};
use crate::{Sandbox, mounts};

/// Room for the image and its clones; sparse.
const PLATTERS: u64 = 16 << 30;
/// Room on the disk; sparse.
const DISK: u64 = 2 << 30;

/// The disk a sandbox's store is on. Must be dropped before the sandbox.
pub struct LossyDisk<'a> {
    sandbox: &'a Sandbox,
    options: String,
}

/// What the disk had when the power went.
#[derive(Clone, Debug)]
pub struct Cut(PathBuf);

impl<'a> LossyDisk<'a> {
    /// Puts the store on such a disk, mounted with these options; `None`, and why, where that cannot
    /// be done.
    #[track_caller]
    pub fn new(sandbox: &'a Sandbox, options: &str) -> Option<Self> {
        if !["ext4", "xfs"].into_iter().all(image::is_possible) {
            return None;
        }
        if !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: no loop devices");
            return None;
        }
        let disk = Self {
            sandbox,
            options: options.to_owned(),
        };
        let base = sandbox.path("platters.img");
        image::make(&base, PLATTERS);
        run("mkfs.xfs", &["-q", "-m", "reflink=1"], &[&base]);
        let platters = sandbox.make_dir("platters");
        run("mount", &["-o", "loop", "-t", "xfs"], &[&base, &platters]);
        image::make(&disk.image(), DISK);
        // Without its journal's lazy initialisation, which would write behind the test's back.
        let flags = ["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
        run("mkfs.ext4", &flags, &[&disk.image()]);
        sandbox.make_dir("store");
        disk.mount(&disk.image());
        Some(disk)
    }

    fn image(&self) -> PathBuf {
        self.sandbox.path("platters/disk.img")
    }

    #[track_caller]
    fn mount(&self, image: &Path) {
        let options = format!("loop,{}", self.options);
        let store = self.sandbox.store();
        run("mount", &["-o", &options, "-t", "ext4"], &[image, &store]);
    }

    /// Takes the power away, for a clone of the disk; the disk itself goes on.
    #[track_caller]
    pub fn cut(&self, name: &str) -> Cut {
        let clone = self.sandbox.path("platters").join(format!("{name}.img"));
        run("cp", &["--reflink=always"], &[&self.image(), &clone]);
        Cut(clone)
    }

    /// Puts what a cut left in the place of the disk. Nothing may use the store.
    #[track_caller]
    pub fn after(&self, cut: &Cut) {
        assert!(
            unmount(&self.sandbox.store()),
            "the disk is in use: {:?}",
            mounts::below(self.sandbox.root())
        );
        self.mount(&cut.0);
    }

    /// Removes a cut that is not mounted.
    pub fn forget(&self, cut: &Cut) {
        let _ = fs::remove_file(&cut.0);
    }
}

impl Drop for LossyDisk<'_> {
    fn drop(&mut self) {
        image::end_users(self.sandbox, "unmount --all --lazy");
        if thread::panicking() {
            // The end of the log is on this disk.
            let log = fs::read_to_string(self.sandbox.store().join("daemon.log"));
            eprintln!("--- daemon.log\n{}---", log.unwrap_or_default());
        }
        for point in [self.sandbox.store(), self.sandbox.path("platters")] {
            unmount(&point);
        }
    }
}
