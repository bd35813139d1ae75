//! Tells the kernel what it must no longer believe: what makes timeouts of a year possible.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use fuser::{INodeNo, Notifier};
use store::Ino;

use crate::fs::Invalidate;

/// Invalidations through the kernel's notification channel.
pub struct KernelInvalidate(pub Notifier);

impl Invalidate for KernelInvalidate {
    fn entry(&self, parent: Ino, name: &[u8]) {
        if let Err(error) = self
            .0
            .inval_entry(INodeNo(parent.0), OsStr::from_bytes(name))
        {
            // ENOENT (nothing remembered) is filtered by fuser; the rest means the mount is gone.
            tracing::debug!(?parent, %error, "invalidation refused");
        }
    }

    fn attributes(&self, ino: Ino) {
        // A negative offset leaves the data alone (fuse_reverse_inval_inode).
        self.inode(ino, -1);
    }

    fn data(&self, ino: Ino) {
        // Offset and length 0 mean all of it; dirty pages are written back first
        // (invalidate_inode_pages2_range).
        self.inode(ino, 0);
    }
}

impl KernelInvalidate {
    fn inode(&self, ino: Ino, offset: i64) {
        if let Err(error) = self.0.inval_inode(INodeNo(ino.0), offset, 0) {
            tracing::debug!(?ino, %error, "invalidation refused");
        }
    }
}
