//! Finds the records of an opened index that say nothing, and removes them, so that everything else
//! is served.
//!
//! Reads the whole index once: a block that its checksum disproves is an error, and a matter for
//! `recover`. A value that does not decode goes, its bytes are kept in the quarantine. An inode whose
//! record goes loses its names, a directory what is below it too, and a name that leads nowhere goes:
//! cargo makes such files again. Called by `recover`, before anybody has seen the index.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use rocksdb::{IteratorMode, WriteBatch};

use crate::action::{ActionEntry, InputRecord};
use crate::builds::{BuildRecord, KeptRequest, LoggedAction, Parts};
use crate::codec::{Record, decode, encode};
use crate::digest::Digest;
use crate::index::{
    ACTIONS, BUILDS, COUNTERS_KEY, Counters, DENTRIES, EXCHANGES_KEY, FILES, INODES, Index,
    IndexError, KEPT, META, PARTS, RECORDS, REQUESTS, SCRATCH_KEY, SYNC_POINT_KEY, UPLOADS, VIEWS,
    dentry_key, inode_key,
};
use crate::quarantine::Quarantine;
use crate::shared::{Kept, Upload};
use crate::sync_point::{Epoch, SyncPoint};
use crate::view::{
    Attributes, Content, DentryRecord, Exchanges, FileMemo, Ino, InodeRecord, Kind, Timestamp,
    ViewId, ViewRecord,
};

/// What was wrong.
#[derive(Debug, Default)]
pub(crate) struct Mended {
    /// One sentence for each thing removed.
    pub(crate) findings: Vec<String>,
    /// Views whose inodes or names are not what they were.
    pub(crate) views: BTreeSet<ViewId>,
    /// Whether private files may have lost what named them.
    pub(crate) forgot_inodes: bool,
}

/// Directories and other inodes of one view.
type Kinds = HashMap<Ino, bool>;

/// Mends what can be mended.
pub(crate) fn mend(index: &Index, quarantine: &Quarantine) -> Result<Mended, IndexError> {
    let mut mend = Mend {
        index,
        quarantine,
        batch: WriteBatch::default(),
        mended: Mended::default(),
    };
    mend.meta()?;
    let views = mend.views()?;
    let mut kinds = mend.inodes(&views)?;
    mend.names(&kinds)?;
    mend.facts()?;
    mend.builds()?;
    mend.shared()?;
    for view in &views {
        if !kinds.entry(*view).or_default().contains_key(&Ino::ROOT) {
            mend.make_root(*view)?;
        }
    }
    mend.write()?;
    for view in mend.mended.views.clone() {
        if views.contains(&view) {
            mend.prune(view)?;
        }
    }
    mend.write()?;
    Ok(mend.mended)
}

struct Mend<'a> {
    index: &'a Index,
    quarantine: &'a Quarantine,
    batch: WriteBatch,
    mended: Mended,
}

impl Mend<'_> {
    fn write(&mut self) -> Result<(), IndexError> {
        let batch = std::mem::take(&mut self.batch);
        let written = self.index.db.write(batch);
        written.map_err(|source| self.index.db_error(source))
    }

    fn each(
        &mut self,
        family: &'static str,
        mut look: impl FnMut(&mut Self, &[u8], &[u8]),
    ) -> Result<(), IndexError> {
        let index = self.index;
        for row in index
            .db
            .iterator_cf(index.family(family), IteratorMode::Start)
        {
            let (key, value) = row.map_err(|source| index.db_error(source))?;
            look(self, &key, &value);
        }
        Ok(())
    }

    /// Removes a value that says nothing.
    fn remove(&mut self, family: &'static str, key: &[u8], value: &[u8], what: &str) {
        let kept = self.quarantine.note(family, key, value);
        let kept = kept.map_or_else(|error| format!(" (not kept: {error})"), |()| String::new());
        self.mended.findings.push(format!("{what}: removed{kept}"));
        self.batch.delete_cf(self.index.family(family), key);
    }

    fn check<R: Record>(&mut self, family: &'static str, key: &[u8], value: &[u8], what: &str) {
        if let Err(error) = decode::<R>(value) {
            self.remove(family, key, value, &format!("{what}: {error}"));
        }
    }

    /// Keys that later versions add are none of our business.
    fn meta(&mut self) -> Result<(), IndexError> {
        self.each(META, |mend, key, value| {
            if key == COUNTERS_KEY {
                mend.check::<Counters>(META, key, value, "counters");
            } else if key.starts_with(EXCHANGES_KEY) {
                mend.check::<Exchanges>(META, key, value, "exchanges of a view");
            } else if key == SYNC_POINT_KEY {
                mend.check::<SyncPoint>(META, key, value, "sync point");
            } else if key == SCRATCH_KEY && value.len() != 8 {
                mend.remove(META, key, value, "next scratch id: damaged");
            }
        })
    }

    fn views(&mut self) -> Result<BTreeSet<ViewId>, IndexError> {
        let mut known = BTreeSet::new();
        self.each(VIEWS, |mend, key, value| {
            let id = key.try_into().map(|id| ViewId(u32::from_be_bytes(id)));
            match (id, decode::<ViewRecord>(value)) {
                (Ok(id), Ok(_)) => {
                    known.insert(id);
                }
                (Ok(id), Err(error)) => {
                    mend.mended.views.insert(id);
                    mend.mended.forgot_inodes = true;
                    mend.remove(VIEWS, key, value, &format!("view {}: {error}", id.0));
                }
                (Err(_), _) => mend.remove(VIEWS, key, value, "a view with a malformed key"),
            }
        })?;
        Ok(known)
    }

    fn inodes(&mut self, views: &BTreeSet<ViewId>) -> Result<HashMap<ViewId, Kinds>, IndexError> {
        let mut kinds: HashMap<ViewId, Kinds> = HashMap::new();
        let mut forgotten: BTreeMap<ViewId, u64> = BTreeMap::new();
        self.each(INODES, |mend, key, value| {
            let Some((view, ino)) = split(key) else {
                return mend.remove(INODES, key, value, "an inode with a malformed key");
            };
            if !views.contains(&view) {
                // The view's own record is gone: nobody can mount it.
                mend.batch.delete_cf(mend.index.family(INODES), key);
                *forgotten.entry(view).or_default() += 1;
                return;
            }
            match decode::<InodeRecord>(value) {
                Ok(record) => {
                    let view = kinds.entry(view).or_default();
                    view.insert(ino, record.kind == Kind::Dir);
                }
                Err(error) => {
                    mend.mended.views.insert(view);
                    mend.mended.forgot_inodes = true;
                    let what = format!("view {}, inode {ino:?}: {error}", view.0);
                    mend.remove(INODES, key, value, &what);
                }
            }
        })?;
        for (view, count) in forgotten {
            self.mended.forgot_inodes = true;
            self.mended.views.insert(view);
            let text = format!("view {} has no record: {count} inodes removed", view.0);
            self.mended.findings.push(text);
        }
        Ok(kinds)
    }

    fn names(&mut self, kinds: &HashMap<ViewId, Kinds>) -> Result<(), IndexError> {
        self.each(DENTRIES, |mend, key, value| {
            let parts = key.split_at_checked(12);
            let parts = parts.and_then(|(head, name)| Some((split(head)?, name)));
            let Some(((view, parent), name)) = parts else {
                return mend.remove(DENTRIES, key, value, "a name with a malformed key");
            };
            let child = value.try_into().map(|child| Ino(u64::from_be_bytes(child)));
            let Some(known) = kinds.get(&view) else {
                mend.batch.delete_cf(mend.index.family(DENTRIES), key);
                return;
            };
            let shown = String::from_utf8_lossy(name);
            let found = child.is_ok_and(|child| known.contains_key(&child));
            let problem = match (known.get(&parent), found) {
                (Some(true), true) => return,
                // The root can be made again, and its names are found through it.
                (None, true) if parent == Ino::ROOT => return,
                (Some(true), false) => "leads to no inode",
                (Some(false), _) => "is in what is no directory",
                (None, _) => "is in a directory that is gone",
            };
            mend.mended.views.insert(view);
            let what = format!("view {}, name {shown:?} {problem}", view.0);
            mend.remove(DENTRIES, key, value, &what);
        })
    }

    fn facts(&mut self) -> Result<(), IndexError> {
        self.each(ACTIONS, |mend, key, value| {
            mend.check::<ActionEntry>(ACTIONS, key, value, &shown("action", key));
        })?;
        self.each(RECORDS, |mend, key, value| {
            mend.check::<InputRecord>(RECORDS, key, value, &shown("input record", key));
        })?;
        self.each(FILES, |mend, key, value| {
            let what = format!("digest of {}", String::from_utf8_lossy(key));
            mend.check::<FileMemo>(FILES, key, value, &what);
        })
    }

    /// What only people are told.
    fn builds(&mut self) -> Result<(), IndexError> {
        self.each(BUILDS, |mend, key, value| match key.len() {
            13 => mend.check::<BuildRecord>(BUILDS, key, value, "build"),
            17 => mend.check::<LoggedAction>(BUILDS, key, value, "action of a build"),
            _ => mend.remove(BUILDS, key, value, "a build with a malformed key"),
        })?;
        self.each(REQUESTS, |mend, key, value| {
            mend.check::<KeptRequest>(REQUESTS, key, value, "request of a build");
        })?;
        self.each(PARTS, |mend, key, value| {
            mend.check::<Parts>(PARTS, key, value, &shown("parts of", key));
        })
    }

    fn shared(&mut self) -> Result<(), IndexError> {
        self.each(KEPT, |mend, key, value| {
            mend.check::<Kept>(KEPT, key, value, "place of a blob in a remote");
        })?;
        self.each(UPLOADS, |mend, key, value| {
            mend.check::<Upload>(UPLOADS, key, value, "upload");
        })
    }

    /// A directory for names whose own record is gone.
    fn make_root(&mut self, view: ViewId) -> Result<(), IndexError> {
        let now = Timestamp::default();
        let record = InodeRecord {
            kind: Kind::Dir,
            attributes: Attributes {
                perm: 0o755,
                uid: nix::unistd::geteuid().as_raw(),
                gid: nix::unistd::getegid().as_raw(),
                nlink: 2,
                rdev: 0,
                atime: now,
                mtime: now,
                ctime: now,
            },
            content: Content::None,
            origin: None,
            changed: Epoch::default(),
            fsynced: false,
        };
        self.mended.views.insert(view);
        let text = format!("view {} had no root directory: made anew", view.0);
        self.mended.findings.push(text);
        let key = inode_key(view, Ino::ROOT);
        self.batch
            .put_cf(self.index.family(INODES), key, encode(&record)?);
        Ok(())
    }

    /// Removes what cannot be reached from the root any more, and counts the names of the rest.
    fn prune(&mut self, view: ViewId) -> Result<(), IndexError> {
        let inodes: HashMap<Ino, InodeRecord> = self.index.inodes(view)?.into_iter().collect();
        let names = self.index.dentries(view)?;
        let mut below: HashMap<Ino, Vec<&DentryRecord>> = HashMap::new();
        for name in &names {
            below.entry(name.parent).or_default().push(name);
        }
        let mut links: HashMap<Ino, u32> = HashMap::from([(Ino::ROOT, 2)]);
        let mut kept: HashSet<(Ino, &[u8])> = HashSet::new();
        let mut pending = vec![Ino::ROOT];
        while let Some(directory) = pending.pop() {
            for name in below.remove(&directory).unwrap_or_default() {
                let is_directory = inodes
                    .get(&name.ino)
                    .is_some_and(|record| record.kind == Kind::Dir);
                kept.insert((name.parent, &name.name));
                if is_directory {
                    *links.entry(directory).or_default() += 1;
                    links.entry(name.ino).or_insert(2);
                    pending.push(name.ino);
                } else {
                    *links.entry(name.ino).or_default() += 1;
                }
            }
        }
        let mut removed = 0_u64;
        for name in &names {
            if !kept.contains(&(name.parent, name.name.as_slice())) {
                let key = dentry_key(view, name.parent, &name.name);
                self.batch.delete_cf(self.index.family(DENTRIES), key);
                removed += 1;
            }
        }
        for (ino, mut record) in inodes {
            let key = inode_key(view, ino);
            let known = record.attributes.nlink;
            match links.get(&ino) {
                Some(count) if *count == known => {}
                Some(count) => {
                    record.attributes.nlink = *count;
                    let record = encode(&record)?;
                    self.batch.put_cf(self.index.family(INODES), key, record);
                }
                // Unlinked while open.
                None if known == 0 => {}
                None => {
                    self.batch.delete_cf(self.index.family(INODES), key);
                    self.mended.forgot_inodes = true;
                }
            }
        }
        if removed > 0 {
            let text = format!(
                "view {}: {removed} names below what is gone removed",
                view.0
            );
            self.mended.findings.push(text);
        }
        Ok(())
    }
}

/// View and inode of a key.
fn split(key: &[u8]) -> Option<(ViewId, Ino)> {
    let (view, ino) = key.split_first_chunk::<4>()?;
    let ino = ino.try_into().ok()?;
    Some((
        ViewId(u32::from_be_bytes(*view)),
        Ino(u64::from_be_bytes(ino)),
    ))
}

fn shown(what: &str, key: &[u8]) -> String {
    let digest = key.get(..Digest::LEN).and_then(Digest::from_slice);
    digest.map_or_else(|| what.to_owned(), |digest| format!("{what} {digest}"))
}
