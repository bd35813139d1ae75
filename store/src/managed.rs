//! Which targets are managed: mounted once by a person, and to come back by themselves until that
//! person unmounts them.
//!
//! One small file for each directory that holds managed targets, named by the digest of the
//! directory's path. So a compiler wrapper learns in a few microseconds, and without any daemon,
//! whether a target near it should be mounted. The daemon writes them; `kachefs unmount` does where
//! no daemon runs. Nothing here mounts anything or looks into a target.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::codec::{Record, decode, encode};
use crate::digest::Digest;
use crate::quarantine::{Quarantine, Thing};

/// Links followed on the way to a mountpoint, as the kernel does (`path_resolution(7)`).
const MAX_LINKS: usize = 40;

/// The managed targets of one store.
#[derive(Clone, Debug)]
pub struct Managed {
    directory: PathBuf,
}

/// The managed targets in one directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManagedRecord {
    /// The targets, in the order they came.
    pub targets: Vec<ManagedTarget>,
}

/// One managed target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManagedTarget {
    /// Its mountpoint: an absolute path without symbolic links.
    pub path: Vec<u8>,
    /// The directory it is in, as it was when the target was mounted.
    pub parent: Identity,
}

/// Tells a directory from another one that takes its place later. Device numbers are left out:
/// they differ from boot to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Inode number.
    pub ino: u64,
    /// When it was made, in nanoseconds since the epoch; 0 where the file system does not say.
    pub born: u64,
}

impl Record for ManagedRecord {
    const NAME: &'static str = "managed targets";
    const VERSION: u8 = 1;
}

impl Identity {
    fn of(directory: &Path) -> io::Result<Self> {
        let meta = fs::metadata(directory)?;
        let born = meta
            .created()
            .ok()
            .and_then(|born| born.duration_since(UNIX_EPOCH).ok())
            .and_then(|born| u64::try_from(born.as_nanos()).ok());
        Ok(Self {
            ino: meta.ino(),
            born: born.unwrap_or(0),
        })
    }
}

impl ManagedTarget {
    /// The mountpoint.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(std::ffi::OsString::from_vec(self.path.clone()))
    }

    /// Whether the target would still be in the directory it was in: not so when that was removed
    /// and made anew, for what the view holds was built from other sources.
    pub fn is_in_place(&self) -> bool {
        Identity::of(parent(&self.path())).is_ok_and(|now| now == self.parent)
    }
}

/// The mountpoint a target means: absolute, symbolic links resolved. Resolves the parent, never
/// the target itself: a dead mount there must not be touched.
pub fn mountpoint(target: &Path) -> io::Result<PathBuf> {
    let mut path = std::path::absolute(target)?;
    // `target` may be a link to a disk with more room.
    for _ in 0..MAX_LINKS {
        let Ok(link) = fs::read_link(&path) else {
            break;
        };
        path = parent(&path).join(link);
    }
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(parent(&path).canonicalize()?.join(name))
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

impl Managed {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Whether anything was ever managed here by the user `uid`. Another user's targets are no
    /// business of this one: the daemon that serves them must be its owner's.
    pub fn belongs_to(&self, uid: u32) -> bool {
        fs::metadata(&self.directory).is_ok_and(|meta| meta.uid() == uid)
    }

    /// Makes a target managed. It is on the disk when this returns.
    pub fn add(&self, target: &Path) -> io::Result<()> {
        let parent = parent(target);
        let new = ManagedTarget {
            path: target.as_os_str().as_bytes().to_vec(),
            parent: Identity::of(parent)?,
        };
        let (mut record, _) = self.read_to_change(parent)?;
        if record.targets.contains(&new) {
            return Ok(());
        }
        record.targets.retain(|known| known.path != new.path);
        record.targets.push(new);
        self.write(parent, &record)
    }

    /// Ends the management of a target; whether it was managed.
    pub fn remove(&self, target: &Path) -> io::Result<bool> {
        let parent = parent(target);
        let (mut record, damaged) = self.read_to_change(parent)?;
        let before = record.targets.len();
        record
            .targets
            .retain(|known| known.path != target.as_os_str().as_bytes());
        if record.targets.len() == before && !damaged {
            return Ok(false);
        }
        if record.targets.is_empty() {
            fs::remove_file(self.file(parent))?;
        } else {
            self.write(parent, &record)?;
        }
        Ok(true)
    }

    /// The managed target at this path.
    pub fn find(&self, target: &Path) -> io::Result<Option<ManagedTarget>> {
        let record = self.read(parent(target))?;
        let wanted = target.as_os_str().as_bytes();
        Ok(record
            .targets
            .into_iter()
            .find(|known| known.path == wanted))
    }

    /// The managed targets in a directory.
    pub fn in_directory(&self, directory: &Path) -> io::Result<Vec<ManagedTarget>> {
        Ok(self.read(directory)?.targets)
    }

    /// Moves the files that do not decode to the quarantine; one sentence for each.
    pub fn mend(&self, quarantine: &Quarantine) -> io::Result<Vec<String>> {
        let mut findings = Vec::new();
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(findings),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let Err(error) = read_record(&path) else {
                continue;
            };
            if error.kind() == io::ErrorKind::InvalidData && path.extension().is_none() {
                quarantine.take(Thing::Managed, &path)?;
                findings.push(error.to_string());
            }
        }
        Ok(findings)
    }

    /// Every managed target, by path, outer ones first, and one error for each file that cannot
    /// be read.
    pub fn all(&self) -> io::Result<(Vec<ManagedTarget>, Vec<io::Error>)> {
        let mut all = Vec::new();
        let mut damaged = Vec::new();
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((all, damaged)),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            // A file that was being written when its writer died.
            if path.extension().is_some() {
                continue;
            }
            match read_record(&path) {
                Ok(record) => all.extend(record.targets),
                Err(error) => damaged.push(error),
            }
        }
        all.sort_by(|a, b| a.path.cmp(&b.path));
        Ok((all, damaged))
    }

    fn file(&self, directory: &Path) -> PathBuf {
        let digest = Digest::of(directory.as_os_str().as_bytes());
        self.directory.join(digest.to_string())
    }

    fn read(&self, directory: &Path) -> io::Result<ManagedRecord> {
        read_record(&self.file(directory))
    }

    /// A damaged file must not keep a target from being managed, or managed for ever: it counts as
    /// empty, and the second value says so.
    fn read_to_change(&self, directory: &Path) -> io::Result<(ManagedRecord, bool)> {
        match self.read(directory) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Ok((ManagedRecord::default(), true))
            }
            read => Ok((read?, false)),
        }
    }

    /// Writes beside and renames: a crash leaves the old file or the new one.
    fn write(&self, directory: &Path, record: &ManagedRecord) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)?;
        let file = self.file(directory);
        let temporary = file.with_extension("new");
        let mut new = File::create(&temporary)?;
        new.write_all(&encode(record).map_err(io::Error::other)?)?;
        new.sync_all()?;
        fs::rename(&temporary, &file)?;
        File::open(&self.directory)?.sync_all()
    }
}

fn read_record(file: &Path) -> io::Result<ManagedRecord> {
    let bytes = match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(ManagedRecord::default());
        }
        bytes => bytes?,
    };
    decode(&bytes).map_err(|error| {
        let text = format!("{}: {error}", file.display());
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_fixed() {
        let record = ManagedRecord {
            targets: vec![ManagedTarget {
                path: b"/t".to_vec(),
                parent: Identity { ino: 300, born: 5 },
            }],
        };
        let bytes = encode(&record).expect("encodes");
        assert_eq!(
            bytes,
            [1, 1, 2, b'/', b't', 0xac, 2, 5],
            "a changed layout needs a new ManagedRecord::VERSION"
        );
        assert_eq!(decode::<ManagedRecord>(&bytes).expect("decodes"), record);
    }

    #[test]
    fn targets_come_and_go() {
        let dir = tempfile::tempdir().expect("tempdir");
        let managed = Managed::new(dir.path().join("managed"));
        let ws = dir.path().join("ws");
        fs::create_dir(&ws).expect("mkdir");
        let (one, two) = (ws.join("one"), ws.join("two"));
        assert!(!managed.remove(&one).expect("reads"));
        assert!(managed.find(&one).expect("reads").is_none());
        assert!(!managed.directory.exists(), "asking makes nothing");
        managed.add(&one).expect("adds");
        managed.add(&two).expect("adds");
        managed.add(&one).expect("adds again");
        let paths = |targets: Vec<ManagedTarget>| -> Vec<PathBuf> {
            targets.iter().map(ManagedTarget::path).collect()
        };
        assert_eq!(
            paths(managed.in_directory(&ws).expect("reads")),
            [one.clone(), two.clone()]
        );
        assert!(managed.remove(&one).expect("removes"));
        let (all, damaged) = managed.all().expect("lists");
        assert_eq!((paths(all), damaged.len()), (vec![two.clone()], 0));
        assert!(managed.remove(&two).expect("removes"));
        assert_eq!(fs::read_dir(&managed.directory).expect("lists").count(), 0);
    }

    #[test]
    fn another_directory_at_the_same_path_is_not_the_same_place() {
        let dir = tempfile::tempdir().expect("tempdir");
        let managed = Managed::new(dir.path().join("managed"));
        let ws = dir.path().join("ws");
        fs::create_dir(&ws).expect("mkdir");
        let target = ws.join("target");
        managed.add(&target).expect("adds");
        let found = managed.find(&target).expect("reads").expect("is there");
        assert!(found.is_in_place());
        fs::remove_dir(&ws).expect("rmdir");
        assert!(!found.is_in_place());
        fs::create_dir(&ws).expect("mkdir");
        assert!(!found.is_in_place());
        managed.add(&target).expect("adds");
        let found = managed.find(&target).expect("reads").expect("is there");
        assert!(found.is_in_place());
    }

    #[test]
    fn a_damaged_file_is_named_and_the_others_are_read() {
        let dir = tempfile::tempdir().expect("tempdir");
        let managed = Managed::new(dir.path().join("managed"));
        managed.add(&dir.path().join("target")).expect("adds");
        fs::write(managed.directory.join("beef"), b"").expect("write");
        let (all, damaged) = managed.all().expect("lists");
        assert_eq!((all.len(), damaged.len()), (1, 1));
        assert!(damaged[0].to_string().contains("beef"), "{}", damaged[0]);

        let store = crate::StoreDir::new(dir.path());
        let quarantine = Quarantine::new(&store);
        let findings = managed.mend(&quarantine).expect("mends");
        assert!(
            findings.len() == 1 && findings[0].contains("beef"),
            "{findings:?}"
        );
        assert_eq!(quarantine.contents().expect("counts").files, 1);
        assert!(managed.mend(&quarantine).expect("mends").is_empty());
        assert_eq!(managed.all().expect("lists").0.len(), 1);

        let file = managed.file(dir.path());
        fs::write(&file, b"\xff").expect("write");
        let target = dir.path().join("target");
        assert!(managed.find(&target).is_err());
        assert!(managed.remove(&target).expect("removes"));
        assert!(!file.exists());
    }

    #[test]
    fn the_mountpoint_is_canonical_but_for_itself() {
        let dir = tempfile::tempdir().expect("tempdir");
        let real = dir.path().canonicalize().expect("canonical");
        fs::create_dir(real.join("ws")).expect("mkdir");
        std::os::unix::fs::symlink(real.join("ws"), real.join("link")).expect("symlink");
        assert_eq!(
            mountpoint(&real.join("link/target")).expect("ok"),
            real.join("ws/target")
        );
        std::os::unix::fs::symlink("../elsewhere", real.join("ws/target")).expect("symlink");
        assert_eq!(
            mountpoint(&real.join("ws/target")).expect("ok"),
            real.join("elsewhere")
        );
        assert!(mountpoint(&real.join("none/target")).is_err());
        assert!(mountpoint(Path::new("/")).is_err());
    }
}
