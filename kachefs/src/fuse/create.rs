//! Making names. What the kernel sends again after a daemon died is made once; what a compiler is to
//! write is opened straight onto its backing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{FileHandle, FopenFlags, INodeNo, ReplyCreate, Request};
use store::Ino;

use super::convert::{attr, caller, errno, number_of};
use super::{Adapter, GENERATION, ttl};
use crate::fs::names::NewNode;
use crate::fs::{Entry, Errno, FsResult};
use crate::storage::is_out_of_descriptors;

impl Adapter {
    pub(super) fn make(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new: NewNode,
    ) -> FsResult<Entry> {
        let (parent, name, caller) = (Ino(parent.0), name.as_bytes(), caller(request));
        if number_of(request).1 {
            self.view.create_again(parent, name, new, caller)
        } else {
            let (_, entry) = self.view.create_node(parent, name, new, caller)?;
            Ok(entry)
        }
    }

    /// Creates a regular file and opens it.
    pub(super) fn create_file(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let again = number_of(request).1;
        if !again
            && self.passthrough.load(Ordering::Relaxed)
            && self.view.creates_past(Ino(parent.0), request.pid())
        {
            return self.create_passthrough(request, Ino(parent.0), name, mode, flags, reply);
        }
        match self.make(request, parent, name, NewNode::file(mode)) {
            Ok(entry) => reply.created(
                ttl(name),
                &attr(&entry),
                GENERATION,
                FileHandle(entry.ino.0),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(error) => reply.error(errno(create_error(error, flags))),
        }
    }

    /// Creates a file that its creator writes past us.
    fn create_passthrough(
        &self,
        request: &Request,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        // Until the file is among those written past us, a sync point waits.
        let _change = self.view.storage.epochs.change();
        let made = self
            .view
            .create_backed(parent, name.as_bytes(), mode, caller(request));
        let (node, entry, backing) = match made {
            Ok(made) => made,
            Err(error) => return reply.error(errno(create_error(error, flags))),
        };
        let (attr, handle) = (attr(&entry), FileHandle(entry.ino.0));
        match reply.open_backing(&backing) {
            Ok(grant) => {
                let (flags, grant) = (FopenFlags::empty(), Arc::new(grant));
                // Before the creator goes on: it may be quick to remove the file again.
                self.view.granted(&node, Box::new(Arc::clone(&grant)));
                reply.created_passthrough(ttl(name), &attr, GENERATION, handle, flags, &grant);
            }
            Err(error) => {
                // Otherwise not privileged enough, or the store is on a stacked file system.
                if !is_out_of_descriptors(error.raw_os_error()) {
                    tracing::info!(%error, "no passthrough");
                    self.passthrough.store(false, Ordering::Relaxed);
                }
                self.view.keep_asking(&node);
                reply.created(
                    ttl(name),
                    &attr,
                    GENERATION,
                    handle,
                    FopenFlags::FOPEN_KEEP_CACHE,
                );
            }
        }
    }
}

/// What to answer when a file that the kernel knows nothing of cannot be created. A hit may have
/// brought it since the kernel looked; then ESTALE makes the kernel look again, and check whether
/// the caller may open what is there. With `O_EXCL` the caller is told.
fn create_error(error: Errno, flags: i32) -> Errno {
    if error == Errno::EEXIST && flags & libc::O_EXCL == 0 {
        Errno::ESTALE
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_hit_brought_is_looked_up_again() {
        let (any, exclusive) = (libc::O_CREAT | libc::O_RDWR, libc::O_CREAT | libc::O_EXCL);
        assert_eq!(create_error(Errno::EEXIST, any), Errno::ESTALE);
        assert_eq!(create_error(Errno::EEXIST, exclusive), Errno::EEXIST);
        assert_eq!(create_error(Errno::ENOSPC, any), Errno::ENOSPC);
    }
}
