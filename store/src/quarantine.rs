//! The quarantine: what was found damaged, moved out of the way instead of removed.
//!
//! ```text
//! quarantine/<seconds>-<pid>/records         values that do not decode: family, key, value, in hex
//! quarantine/<seconds>-<pid>/index/          an index that could not be read, or what its repair left
//! quarantine/<seconds>-<pid>/blobs/<hex>     blobs whose bytes are not those of their name
//! quarantine/<seconds>-<pid>/scratch/<id>    private files that no index names any more
//! quarantine/<seconds>-<pid>/managed/<hex>   files of `managed/` that do not decode
//! quarantine/<seconds>-<pid>-schema-<n>/     the index of another kachefs, and its private files
//! ```
//!
//! One directory for each process that found something, named by when it first did. Nothing here is
//! ever read again, so all of it may be deleted at any time. Each daemon that starts removes what is
//! older than [`KEPT`] or beyond the newest [`MOST`]; what belongs to another kachefs stays until a
//! person deletes it. Called by whoever opens the index, the CAS and the daemon.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::layout::StoreDir;

/// How long things are kept.
pub const KEPT: Duration = Duration::from_hours(14 * 24);

/// As many directories are kept, damaged disk or not.
pub const MOST: usize = 16;

/// In the names of directories that are never removed.
const FOREIGN: &str = "-schema-";

/// What kind of thing is moved away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thing {
    /// The index, or a part of it.
    Index,
    /// A blob.
    Blob,
    /// A private backing file.
    Scratch,
    /// A file that names managed targets.
    Managed,
}

/// Where this process puts what it finds damaged.
#[derive(Clone, Debug)]
pub struct Quarantine {
    root: PathBuf,
    suffix: String,
}

/// How much is in a quarantine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Files.
    pub files: u64,
    /// What they take on the disk, in bytes.
    pub bytes: u64,
}

impl Thing {
    fn directory(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::Blob => "blobs",
            Self::Scratch => "scratch",
            Self::Managed => "managed",
        }
    }
}

impl Quarantine {
    /// The quarantine of a store. Touches nothing.
    pub fn new(store: &StoreDir) -> Self {
        Self {
            root: store.quarantine(),
            suffix: String::new(),
        }
    }

    /// The same, for what belongs to a kachefs with another schema.
    #[must_use]
    pub fn of_schema(&self, schema: &str) -> Self {
        let plain = schema.chars().filter(char::is_ascii_alphanumeric);
        let name: String = plain.take(16).collect();
        Self {
            root: self.root.clone(),
            suffix: format!("{FOREIGN}{name}"),
        }
    }

    /// Moves a file or directory of the store here; returns where it is now.
    pub fn take(&self, thing: Thing, path: &Path) -> io::Result<PathBuf> {
        let mut place = self.incident();
        if thing != Thing::Index {
            place.push(thing.directory());
        }
        make(&place)?;
        let name = match thing {
            Thing::Index => thing.directory().into(),
            _ => path.file_name().unwrap_or_default().to_owned(),
        };
        for number in 1..u32::MAX {
            let mut name = name.clone();
            if number > 1 {
                name.push(format!("-{number}"));
            }
            let free = place.join(name);
            if fs::symlink_metadata(&free).is_ok() {
                continue;
            }
            fs::rename(path, &free)?;
            return Ok(free);
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Keeps the raw bytes of a value that does not decode.
    pub fn note(&self, family: &str, key: &[u8], value: &[u8]) -> io::Result<()> {
        let place = self.incident();
        make(&place)?;
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(place.join("records"))?;
        writeln!(file, "{family} {} {}", hex(key), hex(value))
    }

    /// Removes what has been here for long, or is too much; nothing of another kachefs.
    pub fn clean(&self) -> io::Result<()> {
        let now = seconds_now();
        let mut known: Vec<(u64, PathBuf)> = Vec::new();
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let since = name.split('-').next().and_then(|text| text.parse().ok());
            if let (Some(since), false) = (since, name.contains(FOREIGN)) {
                known.push((since, entry.path()));
            }
        }
        known.sort_by(|a, b| b.cmp(a));
        for (number, (since, path)) in known.into_iter().enumerate() {
            if number >= MOST || since + KEPT.as_secs() < now {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }

    /// How much is here.
    pub fn contents(&self) -> io::Result<Contents> {
        let mut contents = Contents::default();
        let mut pending = vec![self.root.clone()];
        while let Some(directory) = pending.pop() {
            let entries = match fs::read_dir(&directory) {
                // Somebody may be deleting it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    pending.push(entry.path());
                } else {
                    contents.files += 1;
                    contents.bytes += meta.blocks() * 512;
                }
            }
        }
        Ok(contents)
    }

    /// The directory of this process.
    fn incident(&self) -> PathBuf {
        static NAME: OnceLock<String> = OnceLock::new();
        let name = NAME.get_or_init(|| format!("{}-{}", seconds_now(), std::process::id()));
        self.root.join(format!("{name}{}", self.suffix))
    }
}

fn seconds_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

fn make(directory: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quarantine() -> (tempfile::TempDir, Quarantine) {
        let dir = tempfile::tempdir().expect("tempdir");
        let quarantine = Quarantine::new(&StoreDir::new(dir.path()));
        (dir, quarantine)
    }

    #[test]
    fn things_of_one_name_do_not_replace_each_other() {
        let (dir, quarantine) = quarantine();
        assert_eq!(quarantine.contents().expect("counts"), Contents::default());
        let path = dir.path().join("beef");
        for text in ["one", "two"] {
            fs::write(&path, text).expect("writes");
            let now = quarantine.take(Thing::Blob, &path).expect("moves");
            assert_eq!(fs::read_to_string(now).expect("reads"), text);
            assert!(!path.exists());
        }
        quarantine
            .note("views", b"\x01", b"\xff\x00")
            .expect("notes");
        let records = fs::read_to_string(quarantine.incident().join("records"));
        assert_eq!(records.expect("reads"), "views 01 ff00\n");
        assert_eq!(quarantine.contents().expect("counts").files, 3);
    }

    #[test]
    fn what_is_old_goes_and_what_is_foreign_stays() {
        let (dir, quarantine) = quarantine();
        quarantine.clean().expect("nothing to clean");
        let root = dir.path().join("quarantine");
        let now = seconds_now();
        let make = |name: String| {
            fs::create_dir_all(root.join(&name).join("blobs")).expect("mkdir");
            name
        };
        let old = make(format!("{}-7", now - KEPT.as_secs() - 1));
        let foreign = make("5-7-schema-99".to_owned());
        let kept: Vec<_> = (0..MOST as u64)
            .map(|age| make(format!("{}-8", now - age)))
            .collect();
        let beyond = make(format!("{}-8", now - 100));
        quarantine.clean().expect("cleans");
        for (name, stays) in [(&old, false), (&beyond, false), (&foreign, true)] {
            assert_eq!(root.join(name).exists(), stays, "{name}");
        }
        assert!(kept.iter().all(|name| root.join(name).exists()));
    }
}
