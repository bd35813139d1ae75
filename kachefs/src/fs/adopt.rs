//! Takes over files that compilers made elsewhere in the store.
//!
//! They get their names in a view as the outputs of a hit do, all in one commit, and are private files
//! from then on as if they had been written there. Where they were they stay, as other names of the same
//! bytes: whoever dies on the way has taken nothing from anybody. What has yet other names is copied, for
//! what a private file holds may be written to, or sealed.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use store::{Ino, ScratchId};
use wrapper::lease;

use super::data::copy_all;
use super::node::Body;
use super::outputs::Bound;
use super::view::{Caller, View, is_sparse};
use super::{Errno, FsResult, INLINE_MAX, errno};
use crate::storage::Storage;

/// Makes what a file is to hold of what it holds.
pub type Edit<'a> = dyn Fn(&[u8]) -> Vec<u8> + 'a;

/// A file that is to be taken over, on the file system of the store.
pub struct Adopted<'a> {
    /// Its name in the view.
    pub name: Vec<u8>,
    /// Where it is.
    pub path: PathBuf,
    /// If it is to hold something else than now.
    pub edit: Option<&'a Edit<'a>>,
}

impl View {
    /// Gives files their names in a directory, all of them or none; where they are, only their modes may
    /// change. EBUSY when somebody still writes to one at the deadline.
    pub fn adopt(
        &self,
        directory: Ino,
        files: &[Adopted<'_>],
        deadline: Instant,
        caller: Caller,
    ) -> FsResult<()> {
        let mut linked = Linked::new(&self.storage);
        let outputs = files
            .iter()
            .map(|file| self.link_in(file, deadline, &mut linked))
            .collect::<FsResult<Vec<Bound>>>()?;
        self.bind(directory, outputs, None, caller, |_| ())?;
        linked.keep();
        Ok(())
    }

    pub(super) fn link_in(
        &self,
        file: &Adopted<'_>,
        deadline: Instant,
        linked: &mut Linked<'_>,
    ) -> FsResult<Bound> {
        let failed = |error: io::Error| errno(&error);
        let open = || {
            // Whatever has that name: a link leads elsewhere, and a pipe would be waited for.
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&file.path)
        };
        let opened = open().or_else(|error| self.storage.again(error, open));
        let mut opened = opened.map_err(failed)?;
        if !opened.metadata().map_err(failed)?.is_file() {
            return Err(Errno::EINVAL);
        }
        if !lease::wait_unwritten(&opened, deadline) {
            return Err(Errno::EBUSY);
        }
        let meta = opened.metadata().map_err(failed)?;
        let size = meta.len();
        let mut text = None;
        if file.edit.is_some() || size <= INLINE_MAX as u64 {
            let mut bytes = Vec::new();
            opened.read_to_end(&mut bytes).map_err(failed)?;
            text = Some(match file.edit {
                Some(edit) => edit(&bytes),
                None => bytes,
            });
        }
        let body = match text {
            Some(text) if text.len() <= INLINE_MAX => Body::Inline(text),
            Some(text) => {
                let id = linked.write(&text).map_err(failed)?;
                private(id, text.len() as u64, false)
            }
            None if meta.nlink() > 1 => {
                private(linked.copy(&opened, size).map_err(failed)?, size, false)
            }
            None => {
                let id = linked.link(&file.path).map_err(failed)?;
                // One that nobody may write looks sealed. The rest is for whoever places it in our stead.
                let own = Permissions::from_mode(meta.mode() & 0o777 | 0o600);
                opened.set_permissions(own).map_err(failed)?;
                private(id, size, is_sparse(&meta))
            }
        };
        let perm = meta.permissions().mode() & 0o7777;
        Ok(Bound {
            name: file.name.clone(),
            perm: u16::try_from(perm).map_err(|_| Errno::EINVAL)?,
            body,
        })
    }
}

/// What a private file holds that nobody writes past us.
fn private(id: ScratchId, size: u64, sparse: bool) -> Body {
    Body::Private {
        id,
        size,
        sparse,
        passthrough: false,
    }
}

/// Private files that nothing names yet; they go with this.
pub(super) struct Linked<'a> {
    storage: &'a Storage,
    ids: Vec<ScratchId>,
}

impl<'a> Linked<'a> {
    pub(super) fn new(storage: &'a Storage) -> Self {
        Self {
            storage,
            ids: Vec::new(),
        }
    }

    /// They have names now.
    pub(super) fn keep(mut self) {
        self.ids.clear();
    }

    fn write(&mut self, text: &[u8]) -> io::Result<ScratchId> {
        let (id, mut file) = self.storage.new_scratch()?;
        self.ids.push(id);
        file.write_all(text)?;
        Ok(id)
    }

    fn copy(&mut self, from: &File, size: u64) -> io::Result<ScratchId> {
        let (id, file) = self.storage.new_scratch()?;
        self.ids.push(id);
        copy_all(from, &file, size)?;
        Ok(id)
    }

    fn link(&mut self, path: &Path) -> io::Result<ScratchId> {
        let id = self.storage.next_scratch()?;
        fs::hard_link(path, self.storage.dir.scratch_file(id))?;
        self.ids.push(id);
        Ok(id)
    }
}

impl Drop for Linked<'_> {
    fn drop(&mut self) {
        for id in &self.ids {
            self.storage.remove_scratch(*id);
        }
    }
}
