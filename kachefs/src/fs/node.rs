//! One inode in memory: attributes, content pointer, and who has it open.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use store::{
    ActionKey, Attributes, Content, Digest, Epoch, Ino, InodeRecord, Kind, ScratchId, Timestamp,
};

use super::durability::Held;

/// Where the bytes or names of an inode are.
#[derive(Debug)]
pub enum Body {
    /// Names.
    Directory(Directory),
    /// The target of a symbolic link.
    Link(Vec<u8>),
    /// A small file.
    Inline(Vec<u8>),
    /// An immutable blob. Never written: a write copies up first.
    Blob {
        /// Its name.
        digest: Digest,
        /// Its length.
        size: u64,
    },
    /// A private backing file.
    Private {
        /// Which.
        id: ScratchId,
        /// Its length, followed through every write.
        size: u64,
        /// Whether it may have holes, so that only the disk knows how many blocks it takes.
        sparse: bool,
        /// Whether the kernel may write to the file without asking: then length and times are
        /// the file's own (see `fs::passthrough`).
        passthrough: bool,
    },
    /// FIFOs, sockets, devices.
    Special,
}

/// The names of a directory. Each name has a cookie made from the name alone, so a listing can go
/// on where it stopped however the directory changed meanwhile, and in another daemon too.
#[derive(Debug, Default)]
pub struct Directory {
    /// The directory that holds this one; itself for the root.
    pub parent: Option<Ino>,
    by_name: HashMap<Arc<[u8]>, (Ino, u64)>,
    by_cookie: BTreeMap<u64, Arc<[u8]>>,
}

/// Cookies 1 and 2 are `.` and `..`.
const FIRST_COOKIE: u64 = 3;
/// Cookies travel as `off_t`, which has a sign.
const LAST_COOKIE: u64 = i64::MAX as u64;

/// The cookie a name has wherever no other name took it first.
fn cookie_of(name: &[u8]) -> u64 {
    let digest = Digest::of(name);
    let first = digest.as_bytes().iter().take(8);
    let number = first.fold(0, |number, byte| number << 8 | u64::from(*byte));
    (number & LAST_COOKIE).max(FIRST_COOKIE)
}

impl Directory {
    /// An empty directory in `parent`.
    pub fn new(parent: Ino) -> Self {
        Self {
            parent: Some(parent),
            ..Self::default()
        }
    }

    /// The inode `name` names.
    pub fn get(&self, name: &[u8]) -> Option<Ino> {
        self.by_name.get(name).map(|(ino, _)| *ino)
    }

    /// Gives `ino` the name, instead of what had it.
    pub fn insert(&mut self, name: &[u8], ino: Ino) {
        self.remove(name);
        let mut cookie = cookie_of(name);
        // Two names of one cookie are a matter of theory: 100,000 names meet once in a billion
        // directories. The second takes the next free one.
        while self.by_cookie.contains_key(&cookie) {
            cookie = if cookie == LAST_COOKIE {
                FIRST_COOKIE
            } else {
                cookie + 1
            };
        }
        let name: Arc<[u8]> = name.into();
        self.by_cookie.insert(cookie, Arc::clone(&name));
        self.by_name.insert(name, (ino, cookie));
    }

    /// Takes the name away.
    pub fn remove(&mut self, name: &[u8]) -> Option<Ino> {
        let (ino, cookie) = self.by_name.remove(name)?;
        self.by_cookie.remove(&cookie);
        Some(ino)
    }

    /// Whether there are no names.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Names after `cookie`, in order of their cookies.
    pub fn after(&self, cookie: u64) -> impl Iterator<Item = (u64, &Arc<[u8]>, Ino)> {
        self.by_cookie
            .range(cookie.saturating_add(1)..)
            .filter_map(|(cookie, name)| {
                self.by_name.get(name).map(|(ino, _)| (*cookie, name, *ino))
            })
    }
}

/// Tells one state of a backing file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Length in bytes.
    pub size: u64,
    /// Last change of the bytes.
    pub mtime: Timestamp,
}

/// Everything that changes about an inode.
#[derive(Debug)]
pub struct State {
    /// What `stat` shows.
    pub attributes: Attributes,
    /// Bytes or names.
    pub body: Body,
    /// The action whose output the content is.
    pub origin: Option<ActionKey>,
    /// Users inside the daemon that need the content whatever becomes of the names.
    pub pins: u32,
    /// Grows with every change of the bytes.
    pub generation: u64,
    /// Digest of the bytes at some generation.
    pub digest: Option<(u64, Digest)>,
    /// What a passthrough file was when its bytes were first read through the daemon.
    pub first_read: Option<Stamp>,
    /// Whether the stored record is behind and the view knows.
    pub dirty: bool,
    /// The epoch the bytes last changed in.
    pub changed: Epoch,
    /// Whether somebody has ever synced the file.
    pub fsynced: bool,
    /// The backing whose name is known to be on the disk.
    pub named: Option<Held>,
}

/// One inode.
#[derive(Debug)]
pub struct Node {
    /// Its number.
    pub ino: Ino,
    /// Its kind, which never changes.
    pub kind: Kind,
    /// All the rest.
    pub state: Mutex<State>,
    /// References the kernel holds to the node id. An open file holds one. [`UNKNOWN`] and more:
    /// an earlier daemon gave out some, how many went with it.
    pub lookups: AtomicU64,
}

/// Added to the references of a node taken over from an earlier daemon.
pub const UNKNOWN: u64 = 1 << 62;

impl Node {
    /// A node nobody refers to, whose bytes last changed in `changed`.
    pub fn new(
        ino: Ino,
        kind: Kind,
        attributes: Attributes,
        body: Body,
        origin: Option<ActionKey>,
        changed: Epoch,
    ) -> Arc<Self> {
        let state = State {
            attributes,
            body,
            origin,
            pins: 0,
            generation: 0,
            digest: None,
            first_read: None,
            dirty: false,
            changed,
            fsynced: false,
            named: None,
        };
        Arc::new(Self {
            ino,
            kind,
            state: Mutex::new(state),
            lookups: AtomicU64::new(0),
        })
    }
}

impl State {
    /// Length in bytes as `stat` shows it.
    pub fn size(&self) -> u64 {
        match &self.body {
            Body::Directory(_) => 4096,
            Body::Link(target) => target.len() as u64,
            Body::Inline(bytes) => bytes.len() as u64,
            Body::Blob { size, .. } | Body::Private { size, .. } => *size,
            Body::Special => 0,
        }
    }

    /// The stored form, with `attributes` in place of the current ones.
    pub fn record_with(&self, kind: Kind, attributes: &Attributes) -> InodeRecord {
        let content = match &self.body {
            Body::Directory(_) | Body::Special => Content::None,
            Body::Link(target) => Content::Link(target.clone()),
            Body::Inline(bytes) => Content::Inline(bytes.clone()),
            Body::Blob { digest, size } => Content::Blob {
                digest: *digest,
                size: *size,
            },
            Body::Private { id, .. } => Content::Private(*id),
        };
        InodeRecord {
            kind,
            attributes: attributes.clone(),
            content,
            origin: self.origin,
            changed: self.changed,
            fsynced: self.fsynced,
        }
    }

    /// The stored form.
    pub fn record(&self, kind: Kind) -> InodeRecord {
        self.record_with(kind, &self.attributes)
    }

    /// Notes that the bytes change now.
    pub fn touch_content(&mut self, now: Timestamp) {
        self.generation += 1;
        self.digest = None;
        self.origin = None;
        self.attributes.mtime = now;
        self.attributes.ctime = now;
    }

    /// The names, when this is a directory.
    pub fn directory(&self) -> Option<&Directory> {
        match &self.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// The names, when this is a directory.
    pub fn directory_mut(&mut self) -> Option<&mut Directory> {
        match &mut self.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Directory, cookie: u64) -> Vec<Vec<u8>> {
        let after = directory.after(cookie);
        after.map(|(_, name, _)| name.to_vec()).collect()
    }

    #[test]
    fn a_listing_survives_changes() {
        let mut directory = Directory::new(Ino::ROOT);
        for index in 0..100_u64 {
            directory.insert(format!("name {index}").as_bytes(), Ino(index + 10));
        }
        let rows: Vec<_> = directory
            .after(0)
            .map(|(cookie, name, ino)| (cookie, name.to_vec(), ino))
            .collect();
        let (seen, rest) = rows.split_at(50);
        // Half of what was seen and of what was not goes; one of each comes back.
        for (index, (_, name, _)) in rows.iter().enumerate().filter(|(i, _)| i % 2 == 0) {
            directory.remove(name);
            if index == 2 || index == 98 {
                directory.insert(name, Ino(1000));
            }
        }
        let stayed = rest.iter().enumerate();
        let stayed = stayed.filter(|(index, _)| index % 2 == 1 || *index == 48);
        let expected: Vec<_> = stayed.map(|(_, (_, name, _))| name.clone()).collect();
        assert_eq!(names(&directory, seen[49].0), expected);
    }

    #[test]
    fn a_listing_goes_on_in_another_daemon() {
        let [mut first, mut second] = [Directory::new(Ino::ROOT), Directory::new(Ino::ROOT)];
        let names_of = |index: u64| format!("name {index}").into_bytes();
        for index in 0..100 {
            first.insert(&names_of(index), Ino(index + 10));
            second.insert(&names_of(99 - index), Ino(99 - index + 10));
        }
        let middle = first.after(0).nth(40).map(|(cookie, ..)| cookie);
        let middle = middle.expect("100 names");
        assert_eq!(names(&first, middle), names(&second, middle));
        assert_eq!(names(&first, middle).len(), 59);
    }

    #[test]
    fn cookies_fit_the_kernel() {
        for index in 0..10_000 {
            let cookie = cookie_of(format!("{index}").as_bytes());
            assert!((FIRST_COOKIE..=LAST_COOKIE).contains(&cookie));
        }
    }
}
