//! Directories of plain files that leave a view, and come back into it, whole.
//!
//! For what a compiler goes on from (`service/aside/incremental.rs`): hundreds of files, each of which would be
//! half a dozen requests. Some leave as other names of the same bytes, and those that come back are known
//! again by that: they are links, as the compiler made them. Nobody may write to such a file, for it is still
//! that of the view. All others, and blobs, are copied.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::MutexGuard;
use store::{Attributes, CasError, Ino, Kind, Timestamp};

use super::adopt::{Adopted, Linked};
use super::data::copy_all;
use super::names::{NewNode, live_directory, new_node, renamed_in};
use super::node::{Body, Node, State};
use super::outputs::Bound;
use super::passthrough::mtime;
use super::view::{Caller, View};
use super::{Errno, FsResult, errno, index_failed};

/// Tells a file of the store's file system from all others that are there, and from itself if it was written
/// to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: Timestamp,
}

impl From<&Metadata> for FileId {
    fn from(meta: &Metadata) -> Self {
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.len(),
            mtime: mtime(meta),
        }
    }
}

/// A file of a directory that comes into a view.
pub enum Coming<'a> {
    /// One that was made elsewhere.
    Made(Adopted<'a>),
    /// Another name of one that is there.
    Link {
        /// The name.
        name: Vec<u8>,
        /// What it names.
        ino: Ino,
    },
}

impl View {
    /// Gives what a file holds a name outside, on the file system of the store: another one of the same bytes where
    /// `linked` says so and nobody has sealed them, and else a copy. How it is known again, if it is no copy.
    /// EBUSY for a file that a compiler may be writing to, and EINVAL for what is none.
    pub fn take_out(&self, node: &Node, to: &Path, linked: bool) -> FsResult<Option<FileId>> {
        let failed = |error: io::Error| errno(&error);
        let (source, mode) = {
            let state = node.state.lock();
            // What a compiler makes an output of has its mode from here.
            let mode = u32::from(state.attributes.perm) & 0o777 | 0o600;
            let source = match &state.body {
                Body::Private {
                    passthrough: true, ..
                } => return Err(Errno::EBUSY),
                Body::Private { id, .. } if linked => {
                    fs::hard_link(self.storage.dir.scratch_file(*id), to).map_err(failed)?;
                    fs::set_permissions(to, Permissions::from_mode(mode)).map_err(failed)?;
                    let meta = fs::symlink_metadata(to).map_err(failed)?;
                    return Ok(Some(FileId::from(&meta)));
                }
                Body::Private { id, size, .. } => {
                    (self.storage.open_scratch(*id).map_err(failed)?, *size)
                }
                Body::Blob { digest, size } => {
                    // One that only a bucket has is not worth waiting for.
                    let blob = self.storage.cas.open(digest);
                    let failed =
                        |error: CasError| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
                    (blob.map_err(failed)?, *size)
                }
                Body::Inline(bytes) => return write(to, mode, bytes).map_err(failed),
                Body::Stored { .. } => {
                    return write(to, mode, &self.stored_bytes(node)?).map_err(failed);
                }
                _ => return Err(Errno::EINVAL),
            };
            (source, mode)
        };
        let (from, size) = source;
        let copied = made(to, mode).and_then(|file| copy_all(&from, &file, size));
        copied.map_err(failed)?;
        Ok(None)
    }

    /// Makes a directory with files in it, all in one commit. EEXIST when there is something of that name,
    /// EBUSY when somebody still writes to a file at the deadline.
    pub fn adopt_directory(
        &self,
        parent: Ino,
        name: &[u8],
        files: &[Coming<'_>],
        deadline: Instant,
        caller: Caller,
    ) -> FsResult<()> {
        let mut linked = Linked::new(&self.storage);
        let (mut outputs, mut links) = (Vec::new(), Vec::new());
        for file in files {
            match file {
                Coming::Made(made) => outputs.push(self.link_in(made, deadline, &mut linked)?),
                Coming::Link { name, ino } => links.push((name.as_slice(), *ino)),
            }
        }
        self.wait_for_the_clock();
        self.bind_directory(parent, name, outputs, &links, caller)?;
        linked.keep();
        self.renamed(parent, [name]);
        self.changed(links.iter().map(|(_, ino)| *ino));
        Ok(())
    }

    fn bind_directory(
        &self,
        parent: Ino,
        name: &[u8],
        outputs: Vec<Bound>,
        links: &[(&[u8], Ino)],
        caller: Caller,
    ) -> FsResult<()> {
        let _structure = self.structure.lock();
        let parent = self.node(parent)?;
        let mut parent_state = parent.state.lock();
        if live_directory(&parent_state)?.get(name).is_some() {
            return Err(Errno::EEXIST);
        }
        let change = self.storage.epochs.change();
        let make = |new: NewNode, above: &Attributes| {
            Ok(new_node(
                self.allocate_ino()?,
                new,
                caller,
                above,
                change.epoch,
            ))
        };
        let mut batch = self.storage.index.batch();
        let directory = make(
            NewNode::directory(parent.ino, 0o755),
            &parent_state.attributes,
        )?;
        let mut directory_state = directory.state.lock();
        let now = directory_state.attributes.mtime;
        let mut nodes = vec![Arc::clone(&directory)];
        for output in outputs {
            let new = NewNode {
                kind: Kind::File,
                mode: output.perm.into(),
                rdev: 0,
                body: output.body,
            };
            let node = make(new, &directory_state.attributes)?;
            let state = node.state.lock();
            self.stamp(&state);
            self.put(&mut batch, &node, &state, &state.attributes)?;
            drop(state);
            batch.put_dentry(self.id, directory.ino, &output.name, node.ino);
            insert(&mut directory_state, &output.name, node.ino);
            nodes.push(node);
        }
        let mut linked: BTreeMap<Ino, (Arc<Node>, u32)> = BTreeMap::new();
        for (name, ino) in links {
            let node = self.node(*ino)?;
            linked.entry(*ino).or_insert((node, 0)).1 += 1;
            batch.put_dentry(self.id, directory.ino, name, *ino);
            insert(&mut directory_state, name, *ino);
        }
        // Locked until the commit is done, or a change made meanwhile would be overwritten.
        let mut states: Vec<(MutexGuard<'_, State>, Attributes)> = Vec::new();
        for (node, names) in linked.values() {
            let state = node.state.lock();
            let mut attributes = state.attributes.clone();
            if node.kind != Kind::File || attributes.nlink == 0 {
                return Err(Errno::ENOENT);
            }
            attributes.nlink = attributes.nlink.checked_add(*names).ok_or(Errno::EMLINK)?;
            attributes.ctime = now;
            self.put(&mut batch, node, &state, &attributes)?;
            states.push((state, attributes));
        }
        self.put(
            &mut batch,
            &directory,
            &directory_state,
            &directory_state.attributes,
        )?;
        batch.put_dentry(self.id, parent.ino, name, directory.ino);
        let parent_attributes = renamed_in(&parent_state, now, 1);
        self.put(&mut batch, &parent, &parent_state, &parent_attributes)?;
        batch.commit().map_err(|error| index_failed(&error))?;

        parent_state.attributes = parent_attributes;
        for (mut state, attributes) in states {
            state.attributes = attributes;
        }
        insert(&mut parent_state, name, directory.ino);
        drop(directory_state);
        let mut known = self.nodes.write();
        for node in nodes {
            known.insert(node);
        }
        Ok(())
    }

    /// Removes a directory that holds files alone, and tells the kernel.
    pub fn remove_directory(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        let directory = self.child(parent, name)?.ino;
        let files = self.list(directory, 0, usize::MAX)?;
        for file in &files {
            self.unlink(directory, &file.name)?;
        }
        self.rmdir(parent, name)?;
        self.renamed(parent, [name]);
        self.changed(files.iter().map(|file| file.ino));
        Ok(())
    }

    /// Removes a file, and tells the kernel.
    pub fn remove_file(&self, parent: Ino, name: &[u8]) -> FsResult<()> {
        let file = self.child(parent, name)?.ino;
        self.unlink(parent, name)?;
        self.renamed(parent, [name]);
        self.changed([file]);
        Ok(())
    }

    /// Tells the kernel that files have other attributes than it was told.
    fn changed(&self, files: impl IntoIterator<Item = Ino>) {
        if let Some(kernel) = self.invalidate.get() {
            for file in files {
                kernel.attributes(file);
            }
        }
    }
}

fn insert(state: &mut State, name: &[u8], ino: Ino) {
    if let Some(directory) = state.directory_mut() {
        directory.insert(name, ino);
    }
}

fn write<T>(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<Option<T>> {
    made(path, mode)?.write_all(bytes)?;
    Ok(None)
}

/// A file that was not there.
fn made(path: &Path, mode: u32) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    // Whatever the mask.
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}
