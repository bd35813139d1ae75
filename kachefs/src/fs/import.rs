//! Takes over what is already in a target directory when a view is mounted there.
//!
//! The mount is there already: nothing is moved that could not be shown again. Every file is first
//! named in the view (small ones copied into the index, large ones hard-linked into the scratch area, or
//! copied where that is another file system), then made durable, and only then removed from the
//! directory. A crash in between loses nothing: the next mount imports again, and what is already there
//! is replaced by itself.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use store::{Ino, Kind, Timestamp};

use super::data::Changes;
use super::directory::Directory;
use super::names::NewNode;
use super::node::Body;
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

/// Moves everything in `directory`, which is called `name` and may lie below a mount, into the root
/// of `view`. What the view already has under the same names is replaced: the directory is what was
/// used last. `vouch` makes a sync point.
pub fn import(
    view: &View,
    directory: &File,
    name: &Path,
    vouch: impl FnOnce() -> Result<()>,
) -> Result<Imported> {
    // Leads to the directory itself, not to what is mounted on it (proc(5), "/proc/pid/fd").
    let root = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let mut import = Import {
        view,
        root: &root,
        name,
        device: directory.metadata()?.dev(),
        inside: HashMap::new(),
        links: HashMap::new(),
        taken: Vec::new(),
        adopted: Vec::new(),
        done: Imported::default(),
    };
    import.count_links(&root)?;
    import.directory(&root, Ino::ROOT)?;
    if import.taken.is_empty() {
        return Ok(import.done);
    }
    // Copies and links are durable before the originals go, and known to be.
    vouch()?;
    import.remove_originals();
    Ok(import.done)
}

/// A file on the disk, by device and inode number.
type FileId = (u64, u64);

struct Import<'a> {
    view: &'a View,
    /// How the directory is reached.
    root: &'a Path,
    /// What it is called.
    name: &'a Path,
    device: u64,
    /// How many names below the directory each file with several names has.
    inside: HashMap<FileId, u64>,
    /// Inodes of files met before.
    links: HashMap<FileId, Ino>,
    /// What is in the view now, directories after what they hold.
    taken: Vec<(PathBuf, bool)>,
    /// Private files that still share their inode with an original.
    adopted: Vec<PathBuf>,
    done: Imported,
}

impl Import<'_> {
    /// For messages: a path as its owner knows it.
    fn cannot(&self, what: &str, path: &Path) -> String {
        let rest = path.strip_prefix(self.root).unwrap_or(path);
        format!("cannot {what} {}", self.name.join(rest).display())
    }

    fn count_links(&mut self, path: &Path) -> Result<()> {
        for entry in fs::read_dir(path).with_context(|| self.cannot("list", path))? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                self.count_links(&entry.path())?;
            } else if meta.nlink() > 1 {
                *self.inside.entry((meta.dev(), meta.ino())).or_default() += 1;
            }
        }
        Ok(())
    }

    fn directory(&mut self, path: &Path, ino: Ino) -> Result<()> {
        for entry in fs::read_dir(path).with_context(|| self.cannot("list", path))? {
            let entry = entry?;
            let path = entry.path();
            self.entry(&path, ino, entry.file_name().as_bytes())
                .with_context(|| self.cannot("import", &path))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, parent: Ino, name: &[u8]) -> Result<()> {
        let meta = fs::symlink_metadata(path)?;
        if self.device != meta.dev() {
            bail!("another file system is mounted there");
        }
        if meta.is_dir() {
            let ino = self.subdirectory(&meta, parent, name)?;
            self.directory(path, ino)?;
            self.taken.push((path.to_owned(), true));
            return self.dress(ino, &meta);
        }
        self.clear(parent, name)?;
        self.taken.push((path.to_owned(), false));
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

    fn bytes(&mut self, path: &Path, meta: &Metadata) -> Result<Body> {
        if meta.len() <= INLINE_MAX as u64 {
            return Ok(Body::Inline(fs::read(path)?));
        }
        let (id, mut file) = self.view.storage.new_scratch()?;
        let scratch = self.view.storage.dir.scratch_file(id);
        // A file that is also named outside stays what it is there: it is copied.
        let names = self
            .inside
            .get(&(meta.dev(), meta.ino()))
            .copied()
            .unwrap_or(1);
        if names == meta.nlink() && adopt(path, &scratch)? {
            self.adopted.push(scratch);
        } else {
            io::copy(&mut File::open(path)?, &mut file)?;
            file.sync_all()?;
        }
        Ok(Body::Private {
            id,
            size: meta.len(),
            sparse: super::view::is_sparse(meta),
            passthrough: false,
        })
    }

    /// Removes what is in the view now, and nothing that came since. What cannot be removed stays
    /// under the mount and is met again by the next import.
    fn remove_originals(&self) {
        for (path, is_dir) in &self.taken {
            let removed = if *is_dir {
                fs::remove_dir(path)
            } else {
                fs::remove_file(path)
            };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), %error, "imported, but not removed");
            }
        }
        for scratch in &self.adopted {
            // Ours alone now; an original that was read-only must not look sealed.
            if let Err(error) = fs::set_permissions(scratch, fs::Permissions::from_mode(0o600)) {
                tracing::warn!(path = %scratch.display(), %error, "cannot make writable");
            }
        }
    }

    fn subdirectory(&self, meta: &Metadata, parent: Ino, name: &[u8]) -> Result<Ino> {
        match self.view.child(parent, name) {
            Ok(node) if node.kind == Kind::Dir => return Ok(node.ino),
            Ok(_) => self.clear(parent, name)?,
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let body = Body::Directory(Box::new(Directory::new(parent)));
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

/// Gives the original a name in the scratch area instead of the empty file that is there;
/// `false` when that is another file system.
fn adopt(path: &Path, scratch: &Path) -> Result<bool> {
    let linked = scratch.with_extension("import");
    match fs::hard_link(path, &linked) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => return Ok(false),
        // Protected hard links (proc(5), "protected_hardlinks"): not ours to link.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
        result => result?,
    }
    fs::rename(&linked, scratch)?;
    Ok(true)
}
