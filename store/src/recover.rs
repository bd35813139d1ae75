//! Opens the index whatever state its files are in, and says what became of the facts.
//!
//! An index that RocksDB cannot read is followed up to where its log is damaged, else repaired, else
//! moved to the quarantine, and a new one is made. What RocksDB would read for ever is mended before.
//! The index of a kachefs with a later schema is moved there as well, and never removed. Only what is no fault of the contents is an error: a disk that is
//! full, read-only or broken, another process that has the index open. Called by the daemon.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rocksdb::{DB, DBRecoveryMode};

use crate::index::{Index, IndexError, db_options};
use crate::layout::StoreDir;
use crate::log_types::{self, End};
use crate::mark::Mark;
use crate::mend::{Mended, mend};
use crate::quarantine::{Quarantine, Thing};
use crate::view::ViewId;

/// What became of the facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// There was no index.
    New,
    /// It was read to the end.
    Whole,
    /// The log ends in something that cannot be read: the facts are those of some earlier moment, or
    /// the last one was being written when its writer died.
    RolledBack,
    /// It was read to the end, which is not as far as it once was: something is missing, and not only
    /// the newest facts. The views are gone, as after a repair.
    Incomplete,
    /// RocksDB has put together what it could read. Newer facts may be lost and older ones be back.
    /// An action is true by itself, a view only as a whole: the views are gone.
    Repaired,
    /// It could not be read, or belongs to another kachefs, and was moved away: nothing is known.
    Replaced,
}

/// An opened index.
pub struct Recovered {
    /// The index.
    pub index: Index,
    /// What became of it.
    pub history: History,
    /// Where the log ends, if it does not end in order.
    pub torn: Option<String>,
    /// What else was damaged and what was done about it, one sentence each.
    pub findings: Vec<String>,
    /// Views whose names or inodes are not what they were.
    pub mended: BTreeSet<ViewId>,
    /// Whether private files may have lost what named them, also where nothing was rolled back.
    pub forgot_inodes: bool,
    /// Where those files belong.
    pub quarantine: Quarantine,
}

/// Opens the index of a store, making it where there is none.
pub fn open(store: &StoreDir, quarantine: &Quarantine) -> Result<Recovered, IndexError> {
    let mut recovery = Recovery {
        path: store.index(),
        quarantine: quarantine.clone(),
        findings: Vec::new(),
        mark: Mark::read(&store.mark()).map_or(0, |mark| mark.sequence),
    };
    let recovered = recovery.run()?;
    // The old one says nothing about an index that has lost something. If a new one cannot be left,
    // its views are given up once more.
    let _ = recovered.index.leave_mark(store, false);
    Ok(recovered)
}

struct Recovery {
    path: PathBuf,
    quarantine: Quarantine,
    findings: Vec<String>,
    /// A commit it held.
    mark: u64,
}

impl Recovery {
    fn run(&mut self) -> Result<Recovered, IndexError> {
        if !has_facts(&self.path) {
            return match self.attempt(DBRecoveryMode::PointInTime, History::New) {
                Err(error) if error.is_damage() => self.replace(&error),
                result => result,
            };
        }
        self.mend_logs();
        if self.mend_current() {
            for (mode, history) in [
                (DBRecoveryMode::AbsoluteConsistency, History::Whole),
                (DBRecoveryMode::PointInTime, History::RolledBack),
            ] {
                match self.attempt(mode, history) {
                    Err(error) if error.is_damage() => self.found(&error),
                    Err(error @ IndexError::Schema { .. }) => return self.move_foreign(&error),
                    result => return result,
                }
            }
        }
        match self.repair() {
            Err(error) if error.is_damage() => self.replace(&error),
            Err(error @ IndexError::Schema { .. }) => self.move_foreign(&error),
            result => result,
        }
    }

    fn found(&mut self, error: &IndexError) {
        let text = error.to_string();
        if self.findings.last() != Some(&text) {
            self.findings.push(text);
        }
    }

    fn attempt(&mut self, mode: DBRecoveryMode, history: History) -> Result<Recovered, IndexError> {
        let index = Index::open_with(&self.path, mode)?;
        let mut history = history;
        let at = index.opened_at();
        if at < self.mark && matches!(history, History::New | History::Whole) {
            self.findings.push(format!(
                "{}: at commit {at}, and it was at {}; all views are empty",
                self.path.display(),
                self.mark
            ));
            history = History::Incomplete;
        }
        if matches!(history, History::Incomplete | History::Repaired) {
            index.forget_views()?;
        }
        // Why the log was not read as one that is whole.
        let torn = (history == History::RolledBack)
            .then(|| self.findings.pop())
            .flatten();
        let Mended {
            findings,
            views,
            forgot_inodes,
        } = mend(&index, &self.quarantine)?;
        self.findings.extend(findings);
        Ok(Recovered {
            index,
            history,
            torn,
            findings: std::mem::take(&mut self.findings),
            mended: views,
            forgot_inodes: forgot_inodes
                || !matches!(history, History::Whole | History::RolledBack),
            quarantine: self.quarantine.clone(),
        })
    }

    /// Mends what RocksDB would stumble over without a word. What cannot be read is left to it.
    fn mend_logs(&mut self) {
        let (current, newest) = (newest_manifest(&self.path), newest_log(&self.path));
        let logs = names(&self.path).into_iter();
        for name in logs.filter(|name| is_log(name) || manifest_number(name).is_some()) {
            let path = self.path.join(&name);
            let is_newest = [&current, &newest].contains(&&Some(name));
            let end = if is_newest {
                End::MayBeLost
            } else {
                End::IsThere
            };
            let text = match log_types::mend(&path, end) {
                Ok(None) => continue,
                Ok(Some(at)) => format!("at {at} is not the type that was written, replaced"),
                Err(error) => error.to_string(),
            };
            self.findings.push(format!("{}: {text}", path.display()));
        }
    }

    /// Makes `CURRENT` name the newest manifest, where it names none; whether there is one. RocksDB
    /// takes a directory without `CURRENT` for an empty one, and clears it.
    fn mend_current(&mut self) -> bool {
        let current = self.path.join("CURRENT");
        let named = fs::read_to_string(&current).unwrap_or_default();
        let is_sound = named
            .strip_suffix('\n')
            .is_some_and(|name| manifest_number(name).is_some() && self.path.join(name).is_file());
        if is_sound {
            return true;
        }
        let Some(newest) = newest_manifest(&self.path) else {
            let text = format!("{}: no manifest", self.path.display());
            self.findings.push(text);
            return false;
        };
        let text = format!("{}: does not name {newest}, mended", current.display());
        self.findings.push(text);
        let temporary = self.path.join("000000.dbtmp");
        let written = fs::File::create(&temporary)
            .and_then(|mut file| {
                file.write_all(format!("{newest}\n").as_bytes())?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&temporary, &current));
        if let Err(error) = written {
            self.findings
                .push(format!("{}: {error}", current.display()));
        }
        true
    }

    fn repair(&mut self) -> Result<Recovered, IndexError> {
        let path = self.path.clone();
        let failed = |source| IndexError::Db {
            path: path.clone(),
            source,
        };
        DB::repair(&db_options(), &path).map_err(failed)?;
        self.findings
            .push(format!("{}: repaired; all views are empty", path.display()));
        // What it could not use.
        let lost = path.join("lost");
        if lost.exists()
            && let Err(error) = self.quarantine.take(Thing::Index, &lost)
        {
            let text = format!("cannot move {} away: {error}", lost.display());
            self.findings.push(text);
        }
        self.attempt(DBRecoveryMode::PointInTime, History::Repaired)
    }

    /// Starts anew.
    fn replace(&mut self, why: &IndexError) -> Result<Recovered, IndexError> {
        self.findings.push(why.to_string());
        let moved = self.quarantine.take(Thing::Index, &self.path);
        self.start_anew(moved)
    }

    fn move_foreign(&mut self, why: &IndexError) -> Result<Recovered, IndexError> {
        self.findings.push(why.to_string());
        if let IndexError::Schema { found, .. } = why {
            self.quarantine = self.quarantine.of_schema(found);
        }
        let moved = self.quarantine.take(Thing::Index, &self.path);
        self.start_anew(moved)
    }

    fn start_anew(&mut self, moved: io::Result<PathBuf>) -> Result<Recovered, IndexError> {
        let moved = moved.map_err(|source| IndexError::Move {
            path: self.path.clone(),
            source,
        })?;
        self.findings.push(format!(
            "the index is now in {}; all views are empty and nothing is known",
            moved.display()
        ));
        let mut recovered = self.attempt(DBRecoveryMode::PointInTime, History::Replaced)?;
        recovered.forgot_inodes = true;
        Ok(recovered)
    }
}

/// Whether RocksDB has been here.
fn has_facts(index: &Path) -> bool {
    names(index).iter().any(|name| {
        name == "CURRENT"
            || manifest_number(name).is_some()
            || is_log(name)
            || has_ending(name, "sst")
    })
}

fn is_log(name: &str) -> bool {
    has_ending(name, "log")
}

fn has_ending(name: &str, ending: &str) -> bool {
    Path::new(name)
        .extension()
        .is_some_and(|found| found == ending)
}

fn newest_manifest(index: &Path) -> Option<String> {
    newest(index, manifest_number)
}

fn newest_log(index: &Path) -> Option<String> {
    newest(index, |name| name.strip_suffix(".log")?.parse().ok())
}

fn newest(index: &Path, number: impl Fn(&str) -> Option<u64>) -> Option<String> {
    names(index)
        .into_iter()
        .filter_map(|name| Some((number(&name)?, name)))
        .max()
        .map(|(_, name)| name)
}

fn manifest_number(name: &str) -> Option<u64> {
    name.strip_prefix("MANIFEST-")?.parse().ok()
}

fn names(index: &Path) -> Vec<String> {
    let entries = fs::read_dir(index).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{INODES, META, VIEWS, inode_key};
    use crate::sync_point::Epoch;
    use crate::view::{Attributes, Content, Ino, InodeRecord, Kind, Timestamp, ViewRecord};

    const VIEW: ViewId = ViewId(1);

    fn record(kind: Kind, nlink: u32) -> InodeRecord {
        let time = Timestamp::default();
        InodeRecord {
            kind,
            attributes: Attributes {
                perm: 0o644,
                uid: 0,
                gid: 0,
                nlink,
                rdev: 0,
                atime: time,
                mtime: time,
                ctime: time,
            },
            content: Content::None,
            origin: None,
            changed: Epoch::default(),
            fsynced: false,
        }
    }

    /// `/2/3` and `/4`, directories but for 3, and a second name of 3 at the root.
    fn store() -> (tempfile::TempDir, StoreDir, Quarantine) {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path());
        store.create().expect("creates");
        let quarantine = Quarantine::new(&store);
        let opened = open(&store, &quarantine).expect("opens");
        assert_eq!(opened.history, History::New);
        let mut batch = opened.index.batch();
        let view = ViewRecord {
            path: b"/t".to_vec(),
            mounted: true,
            next_ino: 100,
        };
        batch.put_view(VIEW, &view).expect("puts");
        for (ino, kind, nlink) in [
            (1, Kind::Dir, 4),
            (2, Kind::Dir, 2),
            (3, Kind::File, 2),
            (4, Kind::Dir, 2),
        ] {
            let record = record(kind, nlink);
            batch.put_inode(VIEW, Ino(ino), &record).expect("puts");
        }
        for (parent, name, ino) in [(1, "two", 2), (2, "three", 3), (1, "four", 4), (1, "3", 3)] {
            batch.put_dentry(VIEW, Ino(parent), name.as_bytes(), Ino(ino));
        }
        batch.commit().expect("commits");
        (dir, store, quarantine)
    }

    fn names(index: &Index) -> Vec<String> {
        let names = index.dentries(VIEW).expect("reads").into_iter();
        names
            .map(|name| String::from_utf8(name.name).expect("text"))
            .collect()
    }

    fn links(index: &Index) -> Vec<(u64, u32)> {
        let inodes = index.inodes(VIEW).expect("reads").into_iter();
        inodes
            .map(|(ino, record)| (ino.0, record.attributes.nlink))
            .collect()
    }

    fn again(store: &StoreDir, quarantine: &Quarantine) -> Recovered {
        let opened = open(store, quarantine).expect("opens");
        assert_eq!(opened.history, History::Whole);
        opened
    }

    #[test]
    fn what_is_whole_stays_as_it_is() {
        let (_dir, store, quarantine) = store();
        let opened = again(&store, &quarantine);
        assert!(opened.findings.is_empty() && opened.mended.is_empty());
        assert!(!opened.forgot_inodes);
        assert_eq!(names(&opened.index), ["3", "four", "two", "three"]);
        assert_eq!(links(&opened.index), [(1, 4), (2, 2), (3, 2), (4, 2)]);
    }

    #[test]
    fn a_directory_that_does_not_decode_goes_with_what_only_it_names() {
        let (_dir, store, quarantine) = store();
        {
            let index = again(&store, &quarantine).index;
            let key = inode_key(VIEW, Ino(2));
            let put = index.db.put_cf(index.family(INODES), key, b"\xff");
            put.expect("puts");
        }
        let opened = again(&store, &quarantine);
        assert_eq!(opened.mended, BTreeSet::from([VIEW]));
        assert!(opened.forgot_inodes);
        assert!(opened.findings.iter().any(|text| text.contains("#2")));
        assert_eq!(names(&opened.index), ["3", "four"]);
        assert_eq!(links(&opened.index), [(1, 3), (3, 1), (4, 2)]);
        assert_eq!(quarantine.contents().expect("counts").files, 1);
        drop(opened);
        assert!(again(&store, &quarantine).findings.is_empty(), "told once");
    }

    #[test]
    fn a_root_that_does_not_decode_is_made_again() {
        let (_dir, store, quarantine) = store();
        {
            let index = again(&store, &quarantine).index;
            let key = inode_key(VIEW, Ino::ROOT);
            let put = index.db.put_cf(index.family(INODES), key, b"");
            put.expect("puts");
        }
        let opened = again(&store, &quarantine);
        assert_eq!(names(&opened.index), ["3", "four", "two", "three"]);
        assert_eq!(links(&opened.index), [(1, 4), (2, 2), (3, 2), (4, 2)]);
    }

    #[test]
    fn a_view_that_does_not_decode_takes_its_inodes_along() {
        let (_dir, store, quarantine) = store();
        {
            let index = again(&store, &quarantine).index;
            let put = index
                .db
                .put_cf(index.family(VIEWS), VIEW.0.to_be_bytes(), b"\x07");
            put.expect("puts");
        }
        let opened = again(&store, &quarantine);
        assert!(opened.forgot_inodes && opened.mended.contains(&VIEW));
        assert!(opened.index.views().expect("reads").is_empty());
        assert!(names(&opened.index).is_empty() && links(&opened.index).is_empty());
    }

    #[test]
    fn an_index_behind_its_mark_has_no_views() {
        let (_dir, store, quarantine) = store();
        Mark::leave(&store.mark(), 1_000_000, true).expect("leaves");
        let opened = open(&store, &quarantine).expect("opens");
        assert_eq!(opened.history, History::Incomplete);
        assert!(opened.forgot_inodes);
        assert!(
            opened.findings[0].contains("1000000"),
            "{:?}",
            opened.findings
        );
        assert!(opened.index.views().expect("reads").is_empty());
        drop(opened);
        assert!(again(&store, &quarantine).findings.is_empty(), "told once");
    }

    #[test]
    fn a_later_schema_is_moved_away() {
        let (_dir, store, quarantine) = store();
        {
            let index = again(&store, &quarantine).index;
            let put = index
                .db
                .put_cf(index.family(META), b"schema", 99_u32.to_be_bytes());
            put.expect("puts");
        }
        let opened = open(&store, &quarantine).expect("opens");
        assert_eq!(opened.history, History::Replaced);
        assert!(opened.findings[0].contains("schema 99"));
        assert!(opened.index.views().expect("reads").is_empty());
    }

    #[test]
    fn a_family_nobody_knows_belongs_to_a_later_schema() {
        let (_dir, store, quarantine) = store();
        {
            let mut index = again(&store, &quarantine).index;
            let made = index.db.create_cf("later", &rocksdb::Options::default());
            made.expect("makes");
        }
        let opened = open(&store, &quarantine).expect("opens");
        assert_eq!(opened.history, History::Replaced);
        assert!(
            opened.findings[0].contains("schema later"),
            "{:?}",
            opened.findings
        );
    }

    /// RocksDB reads a log for ever in which a record has the type of recycled logs, and gives up what
    /// follows one that seems to begin another.
    #[test]
    fn a_damaged_type_is_neither_endless_nor_a_loss() {
        for kind in [0, 2, 4, 5, 8, 11, 131, 200] {
            let (_dir, store, quarantine) = store();
            let files = super::names(&store.index()).into_iter();
            let mut spoiled = 0;
            for name in files.filter(|name| is_log(name) || manifest_number(name).is_some()) {
                let path = store.index().join(name);
                let mut bytes = fs::read(&path).expect("reads");
                let Some([_, _, _, _, low, high, ..]) = bytes.first_chunk::<7>() else {
                    continue;
                };
                let second = 7 + usize::from(u16::from_le_bytes([*low, *high]));
                if let Some(at) = bytes.get_mut(second + 6) {
                    *at = kind;
                    spoiled += 1;
                }
                fs::write(&path, bytes).expect("writes");
            }
            assert!(spoiled > 1);
            let (tell, told) = std::sync::mpsc::channel();
            std::thread::spawn({
                let (store, quarantine) = (store.clone(), quarantine.clone());
                move || drop(tell.send(Box::new(open(&store, &quarantine))))
            });
            let opened = told.recv_timeout(std::time::Duration::from_mins(1));
            let opened = opened.expect("ends").expect("opens");
            assert_eq!(opened.findings.len(), spoiled, "{:?}", opened.findings);
            assert_eq!(opened.history, History::Whole, "type {kind}");
            assert_eq!(names(&opened.index), ["3", "four", "two", "three"]);
        }
    }

    #[test]
    fn an_index_in_use_or_out_of_reach_is_no_damage() {
        let (_dir, store, quarantine) = store();
        let opened = again(&store, &quarantine);
        let error = open(&store, &quarantine).err().expect("in use");
        assert!(!error.is_damage(), "{error}");
        drop(opened);
        again(&store, &quarantine);
    }

    #[test]
    fn no_current_is_no_empty_index() {
        for text in [None, Some(""), Some("MANIFEST-999999\n"), Some("garbage")] {
            let (_dir, store, quarantine) = store();
            let current = store.index().join("CURRENT");
            fs::remove_file(&current).expect("removes");
            if let Some(text) = text {
                fs::write(&current, text).expect("writes");
            }
            let opened = again(&store, &quarantine);
            assert_eq!(names(&opened.index).len(), 4, "{text:?}");
            assert_eq!(opened.findings.len(), 1);
        }
    }
}
