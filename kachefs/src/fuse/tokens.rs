//! The name every directory answers to without listing it: a symbolic link to its daemon, by which
//! the wrapper finds who serves a target.

use fuser::{FileAttr, INodeNo};
use store::{Ino, Kind};
use wrapper::protocol::Token;

use super::Adapter;
use super::convert::attr;
use crate::fs::FsResult;

/// Inode numbers with this bit are the tokens of the directories without it.
const TOKEN_BIT: u64 = 1 << 62;

pub(super) fn token_of(ino: INodeNo) -> Option<Ino> {
    (ino.0 & TOKEN_BIT != 0).then_some(Ino(ino.0 & !TOKEN_BIT))
}

impl Adapter {
    pub(super) fn token(&self, directory: Ino) -> Vec<u8> {
        let token = Token {
            view: self.view.id.0,
            directory: directory.0,
            socket: self.socket.clone(),
        };
        token.encode()
    }

    /// The token of a directory looks like a symbolic link.
    pub(super) fn token_entry(&self, directory: Ino) -> FsResult<FileAttr> {
        let mut entry = self.view.getattr(directory)?;
        entry.kind = Kind::Symlink;
        entry.ino = Ino(directory.0 | TOKEN_BIT);
        entry.size = self.token(directory).len() as u64;
        entry.blocks = 0;
        entry.attributes.perm = 0o777;
        entry.attributes.nlink = 1;
        Ok(attr(&entry))
    }
}
