//! Listing a directory: `.` and `..`, which no directory holds, then its names in batches, until the
//! reply is full.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use fuser::{FileAttr, INodeNo, ReplyDirectory, ReplyDirectoryPlus};
use store::Ino;

use super::convert::attr;
use super::{Adapter, GENERATION, ttl};
use crate::fs::FsResult;

/// Names read from a directory at a time.
const LIST_BATCH: usize = 256;

/// One row on its way into a reply.
struct Row<'a> {
    attr: FileAttr,
    cookie: u64,
    name: &'a OsStr,
}

impl Adapter {
    /// Fills a listing of names.
    pub(super) fn fill(
        &self,
        directory: Ino,
        offset: u64,
        reply: &mut ReplyDirectory,
    ) -> FsResult<()> {
        self.list(directory, offset, |row| {
            reply.add(INodeNo(row.attr.ino.0), row.cookie, row.attr.kind, row.name)
        })
    }

    /// Fills a listing of names with what each means, as if each had been looked up.
    pub(super) fn fill_plus(
        &self,
        directory: Ino,
        offset: u64,
        reply: &mut ReplyDirectoryPlus,
    ) -> FsResult<()> {
        self.list(directory, offset, |row| {
            let is_dots = row.name == "." || row.name == "..";
            // The kernel takes a reference to every inode listed this way, dots excepted.
            let attr = if is_dots {
                Ok(row.attr)
            } else {
                self.view
                    .lookup(directory, row.name.as_bytes())
                    .map(|entry| attr(&entry))
            };
            let Ok(attr) = attr else { return false };
            let ttl = ttl(row.name);
            let full = reply.add(attr.ino, row.cookie, row.name, ttl, &attr, GENERATION);
            if full && !is_dots {
                self.view.forget(Ino(attr.ino.0), 1);
            }
            full
        })
    }

    /// Shows `add` the rows after `cookie` until it says that the reply is full.
    fn list(
        &self,
        directory: Ino,
        mut cookie: u64,
        mut add: impl FnMut(Row<'_>) -> bool,
    ) -> FsResult<()> {
        let dots = [(1, ".", directory), (2, "..", self.view.parent(directory)?)];
        for (dot, name, ino) in dots {
            if cookie < dot {
                let attr = attr(&self.view.getattr(ino)?);
                if add(Row {
                    attr,
                    cookie: dot,
                    name: OsStr::new(name),
                }) {
                    return Ok(());
                }
                cookie = dot;
            }
        }
        loop {
            let rows = self.view.list(directory, cookie, LIST_BATCH)?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            cookie = last.cookie;
            for row in &rows {
                // Removed since it was listed: not an entry any more.
                let Ok(entry) = self.view.getattr(row.ino) else {
                    continue;
                };
                let name = OsStr::from_bytes(&row.name);
                if add(Row {
                    attr: attr(&entry),
                    cookie: row.cookie,
                    name,
                }) {
                    return Ok(());
                }
            }
        }
    }
}
