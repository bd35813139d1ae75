//! How far the index had come a moment ago, in a file beside it.
//!
//! RocksDB does not notice when a manifest or a log ends early between two of its records, and what is
//! left may be no moment in time. The mark tells: an index that is behind it has lost something. A mark
//! counts for as long as the machine runs, and for ever when it was left after a sync: a power cut takes
//! commits back in order, and is no damage. Written by the daemon now and then; read by `recover`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::boot::this_boot;
use crate::codec::{Record, decode, encode};

/// What is in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The number of a commit that the index held.
    pub(crate) sequence: u64,
    /// The boot of the machine in which it did.
    boot: Vec<u8>,
    /// Whether the commit was on the disk.
    synced: bool,
}

impl Record for Mark {
    const NAME: &'static str = "mark";
    const VERSION: u8 = 1;
}

impl Mark {
    /// The mark at `path`, if it says anything about an index opened now.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        // One that does not decode says nothing.
        let mark: Self = decode(&fs::read(path).ok()?).ok()?;
        (mark.synced || this_boot().is_some_and(|boot| boot.as_bytes() == mark.boot))
            .then_some(mark)
    }

    /// Leaves a mark; `synced` says that the index is on the disk up to there.
    pub(crate) fn leave(path: &Path, sequence: u64, synced: bool) -> io::Result<()> {
        let mark = Self {
            sequence,
            boot: this_boot().unwrap_or_default().into_bytes(),
            synced,
        };
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&encode(&mark).map_err(io::Error::other)?)?;
        if synced {
            file.sync_all()?;
        }
        fs::rename(temporary, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_fixed() {
        let mark = Mark {
            sequence: 300,
            boot: b"b".to_vec(),
            synced: true,
        };
        let bytes = encode(&mark).expect("encodes");
        assert_eq!(bytes, [1, 0xac, 2, 1, b'b', 1]);
        assert_eq!(decode::<Mark>(&bytes).expect("decodes"), mark);
    }

    #[test]
    fn a_mark_of_another_boot_counts_only_when_it_was_synced() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("mark");
        assert_eq!(Mark::read(&path), None);
        for synced in [false, true] {
            Mark::leave(&path, 7, synced).expect("writes");
            assert_eq!(Mark::read(&path).expect("this boot").sequence, 7);
            let other = Mark {
                sequence: 7,
                boot: b"another".to_vec(),
                synced,
            };
            fs::write(&path, encode(&other).expect("encodes")).expect("writes");
            assert_eq!(Mark::read(&path).is_some(), synced);
        }
        fs::write(&path, "garbage").expect("writes");
        assert_eq!(Mark::read(&path), None);
    }
}
