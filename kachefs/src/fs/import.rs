//! Takes over what is already in a target directory when a view is mounted there.
//!
//! Every file is first named in the view (small ones copied into the index, large ones
//! hard-linked into the scratch area, or copied where that is another file system), then made
//! durable, and only then removed from the directory. A crash in between loses nothing: the next
//! mount imports again, and what is already there is replaced by itself.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use store::{Ino, Kind, Timestamp};

use super::data::Changes;
use super::names::NewNode;
use super::node::{Body, Directory};
use super::view::{Caller, View};
use super::{Errno, INLINE_MAX};

/// How much was taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Files, links and special files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Moves everything in `directory` into the root of `view`. What the view already has under the
/// same names is replaced: the directory is what was used last.
pub fn import(view: &View, directory: &Path) -> Result<Imported> {
    let mut import = Import {
        view,
        links: HashMap::new(),
        done: Imported::default(),
        device: None,
    };
    let empty = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .next()
        .is_none();
    if empty {
        return Ok(import.done);
    }
    import.device = Some(fs::metadata(directory)?.dev());
    import.directory(directory, Ino::ROOT)?;
    view.storage.index.sync()?;
    // Copies and links are durable before the originals go.
    nix::unistd::syncfs(fs::File::open(view.storage.dir.root())?)?;
    remove_contents(directory)
        .with_context(|| format!("imported, but cannot empty {}", directory.display()))?;
    Ok(import.done)
}

struct Import<'a> {
    view: &'a View,
    /// Inodes by `(dev, ino)` of files with several names.
    links: HashMap<(u64, u64), Ino>,
    done: Imported,
    device: Option<u64>,
}

impl Import<'_> {
    fn directory(&mut self, path: &Path, ino: Ino) -> Result<()> {
        for entry in
            fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?
        {
            let entry = entry?;
            let path = entry.path();
            self.entry(&path, ino, entry.file_name().as_bytes())
                .with_context(|| format!("cannot import {}", path.display()))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, parent: Ino, name: &[u8]) -> Result<()> {
        let meta = fs::symlink_metadata(path)?;
        if self.device != Some(meta.dev()) {
            bail!("another file system is mounted there");
        }
        if meta.is_dir() {
            let ino = self.subdirectory(&meta, parent, name)?;
            self.directory(path, ino)?;
            return self.dress(ino, &meta);
        }
        self.clear(parent, name)?;
        self.done.files += 1;
        let key = (meta.dev(), meta.ino());
        if let Some(ino) = self.links.get(&key) {
            self.view.link(*ino, parent, name)?;
            self.view.forget(*ino, 1);
            return Ok(());
        }
        let new = self.content(path, &meta)?;
        let ino = self.create(parent, name, new, &meta)?;
        if meta.nlink() > 1 {
            self.links.insert(key, ino);
        }
        self.dress(ino, &meta)
    }

    fn content(&mut self, path: &Path, meta: &Metadata) -> Result<NewNode> {
        let kind = meta.file_type();
        let (kind, body) = if kind.is_symlink() {
            let target = fs::read_link(path)?;
            (
                Kind::Symlink,
                Body::Link(target.as_os_str().as_bytes().to_vec()),
            )
        } else if kind.is_file() {
            self.done.bytes += meta.len();
            (Kind::File, self.bytes(path, meta)?)
        } else if kind.is_fifo() {
            (Kind::Fifo, Body::Special)
        } else if kind.is_socket() {
            (Kind::Socket, Body::Special)
        } else if kind.is_char_device() {
            (Kind::CharDevice, Body::Special)
        } else {
            (Kind::BlockDevice, Body::Special)
        };
        let rdev = u32::try_from(meta.rdev()).unwrap_or(0);
        Ok(NewNode {
            kind,
            mode: meta.mode(),
            rdev,
            body,
        })
    }

    fn bytes(&self, path: &Path, meta: &Metadata) -> Result<Body> {
        if meta.len() <= INLINE_MAX as u64 {
            return Ok(Body::Inline(fs::read(path)?));
        }
        let (id, file) = self.view.storage.new_scratch()?;
        let scratch = self.view.storage.dir.scratch_file(id);
        fs::remove_file(&scratch)?;
        match fs::hard_link(path, &scratch) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                drop(file);
                fs::copy(path, &scratch)?;
                fs::File::open(&scratch)?.sync_all()?;
            }
            linked => linked?,
        }
        Ok(Body::Private {
            id,
            size: meta.len(),
        })
    }

    fn subdirectory(&self, meta: &Metadata, parent: Ino, name: &[u8]) -> Result<Ino> {
        match self.view.child(parent, name) {
            Ok(node) if node.kind == Kind::Dir => return Ok(node.ino),
            Ok(_) => self.clear(parent, name)?,
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let body = Body::Directory(Directory::new(parent));
        self.create(
            parent,
            name,
            NewNode {
                kind: Kind::Dir,
                mode: meta.mode(),
                rdev: 0,
                body,
            },
            meta,
        )
    }

    fn create(&self, parent: Ino, name: &[u8], new: NewNode, meta: &Metadata) -> Result<Ino> {
        let owner = Caller {
            uid: meta.uid(),
            gid: meta.gid(),
        };
        let (_, entry) = self.view.create_node(parent, name, new, owner)?;
        // The kernel knows nothing of it yet.
        self.view.forget(entry.ino, 1);
        Ok(entry.ino)
    }

    /// Takes away what the view has under a name.
    fn clear(&self, parent: Ino, name: &[u8]) -> Result<()> {
        match self.view.child(parent, name) {
            Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(node) if node.kind == Kind::Dir => {
                for row in self.view.list(node.ino, 0, usize::MAX)? {
                    self.clear(node.ino, &row.name)?;
                }
                Ok(self.view.rmdir(parent, name)?)
            }
            Ok(_) => Ok(self.view.unlink(parent, name)?),
        }
    }

    fn dress(&self, ino: Ino, meta: &Metadata) -> Result<()> {
        let time = |secs, nanos| Timestamp {
            secs,
            nanos: u32::try_from(nanos).unwrap_or(0),
        };
        self.view.setattr(
            ino,
            Changes {
                perm: u16::try_from(meta.mode() & 0o7777).ok(),
                uid: Some(meta.uid()),
                gid: Some(meta.gid()),
                size: None,
                atime: Some(time(meta.atime(), meta.atime_nsec())),
                mtime: Some(time(meta.mtime(), meta.mtime_nsec())),
            },
        )?;
        Ok(())
    }
}

fn remove_contents(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
