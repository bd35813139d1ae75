//! Makes RocksDB find what is wrong in its logs and manifests, instead of reading for ever or past it.
//!
//! Both are rows of blocks of 32 KiB, and a block is a row of records behind a header each: checksum (4
//! bytes), length (2), type (1) (RocksDB, `db/log_format.h`). A type of recycled logs in a log that did
//! not begin with one stops the reader without a word (`Reader::ReadPhysicalRecord` of 11.8.1 says
//! `kBadRecord` and stays where it is, and `ReadRecord` asks once more): one flipped bit, and the start
//! of the daemon has no end. A header of zeros makes it skip the rest of the block, and go on.
//!
//! The checksum covers type and payload. A record whose type alone is damaged tells by it which of the
//! four it was, and is whole again. One in which more is damaged is given a type that the reader looks
//! at, whereupon it finds that the checksum is wrong. What agrees with its checksum was written so, by a
//! later kachefs perhaps that compresses its logs, and stays. (Records of recycled logs have another
//! header, and are taken for damage: the default is not to recycle.) Called by `recover`.

use std::fs::OpenOptions;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crc_fast::CrcAlgorithm::Crc32Iscsi;

const BLOCK: usize = 32 << 10;

/// Where the type stands in a header.
const TYPE: usize = 6;

/// A whole record, or the first, a middle, the last piece of one.
const TYPES: RangeInclusive<u8> = 1..=4;

/// Whether a file may end in zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It is written now: so it ends when a power cut took its last bytes.
    MayBeLost,
    /// Another one follows it, and what it held came before.
    IsThere,
}

/// A type that is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wrong {
    at: u64,
    right: u8,
}

/// Replaces the types that cannot be what was written, and returns where the first one stood.
pub(crate) fn mend(path: &Path, end: End) -> io::Result<Option<u64>> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let mut block = vec![0; BLOCK];
    let mut found = Vec::new();
    let mut last = 0;
    for start in (0..size).step_by(BLOCK) {
        let left = usize::try_from(size - start).unwrap_or(BLOCK);
        let block = &mut block[..left.min(BLOCK)];
        file.read_exact_at(block, start)?;
        found.extend(wrong_types(block).map(|(at, right)| Wrong {
            at: start + at as u64,
            right,
        }));
        if let Some(at) = block.iter().rposition(|byte| *byte != 0) {
            last = start + at as u64;
        }
    }
    if end == End::MayBeLost {
        found.retain(|wrong| wrong.at <= last);
    }
    for wrong in &found {
        file.write_all_at(&[wrong.right], wrong.at)?;
    }
    if !found.is_empty() {
        file.sync_data()?;
    }
    Ok(found.first().map(|wrong| wrong.at))
}

/// Where in a block there are types that are wrong, and what to replace them by. Behind a record whose
/// length is damaged they may be no types at all, which does no harm: the reader gives up the block there.
fn wrong_types(block: &[u8]) -> impl Iterator<Item = (usize, u8)> {
    let mut rest = block;
    std::iter::from_fn(move || {
        loop {
            let [a, b, c, d, low, high, kind, payload @ ..] = rest else {
                return None;
            };
            let length = usize::from(u16::from_le_bytes([*low, *high]));
            let at = block.len() - rest.len() + TYPE;
            let checksum = u32::from_le_bytes([*a, *b, *c, *d]);
            let right = right_type(checksum, *kind, payload.get(..length));
            // The reader skips what follows a header of zeros.
            let is_over = (*kind, length) == (0, 0);
            rest = payload
                .get(length..)
                .filter(|_| !is_over)
                .unwrap_or_default();
            if right != *kind {
                return Some((at, right));
            }
        }
    })
}

/// The type a record had when its checksum was taken: `kind`, where that is as good as any.
fn right_type(checksum: u32, kind: u8, payload: Option<&[u8]>) -> u8 {
    let was = |kind: &u8| payload.is_some_and(|payload| masked(*kind, payload) == checksum);
    if was(&kind) {
        return kind;
    }
    let readable = TYPES.contains(&kind).then_some(kind);
    TYPES
        .into_iter()
        .find(|kind| was(kind))
        .or(readable)
        .unwrap_or(*TYPES.start())
}

/// The checksum as it stands in a header: CRC-32C, turned and moved (`crc32c::Mask`), as a checksum of
/// data that holds checksums is a weak one.
fn masked(kind: u8, payload: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(Crc32Iscsi);
    digest.update(&[kind]);
    digest.update(payload);
    // Of 64 bits it has 32.
    let crc = u32::try_from(digest.finalize()).unwrap_or_default();
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn mended(bytes: &[u8], end: End) -> (Vec<u8>, Option<u64>) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("000001.log");
        fs::write(&path, bytes).expect("writes");
        let first = mend(&path, end).expect("mends");
        (fs::read(&path).expect("reads"), first)
    }

    fn record(kind: u8, length: usize) -> Vec<u8> {
        let payload = vec![5; length];
        let [low, high] = u16::try_from(length).expect("short").to_le_bytes();
        let header = [
            &masked(kind, &payload).to_le_bytes()[..],
            &[low, high, kind],
        ]
        .concat();
        [header, payload].concat()
    }

    /// A record that became one of another type.
    fn turned(from: u8, to: u8, length: usize) -> Vec<u8> {
        let mut record = record(from, length);
        record[TYPE] = to;
        record
    }

    #[test]
    fn a_type_becomes_again_what_it_was() {
        let sound = [record(1, 3), record(2, 0), record(4, 40)].concat();
        assert_eq!(mended(&sound, End::IsThere), (sound.clone(), None));
        let wrong = [record(1, 3), turned(2, 7, 0), turned(4, 3, 40)].concat();
        assert_eq!(mended(&wrong, End::IsThere), (sound, Some(16)));
    }

    #[test]
    fn what_agrees_with_its_checksum_was_written_so() {
        let later = [record(9, 4), record(130, 8), record(10, 20)].concat();
        assert_eq!(mended(&later, End::IsThere), (later.clone(), None));
    }

    #[test]
    fn what_else_is_damaged_is_shown_to_the_reader() {
        let damaged = |from, to| {
            let mut record = turned(from, to, 9);
            record[8] = 0;
            record
        };
        assert_eq!(mended(&damaged(2, 2), End::IsThere), (damaged(2, 2), None));
        assert_eq!(
            mended(&damaged(2, 66), End::IsThere),
            (damaged(2, 1), Some(6))
        );
    }

    #[test]
    fn a_block_may_end_in_less_than_a_header() {
        let full = record(2, BLOCK - 7 - 6);
        let blocks = |last| [full.clone(), vec![0; 6], turned(4, last, 1)].concat();
        assert_eq!(mended(&blocks(4), End::IsThere), (blocks(4), None));
        assert_eq!(
            mended(&blocks(8), End::IsThere),
            (blocks(4), Some(BLOCK as u64 + 6))
        );
    }

    #[test]
    fn zeros_are_damage_where_something_follows() {
        let ended = [record(1, 3), vec![0; 3 * BLOCK]].concat();
        assert_eq!(mended(&ended, End::MayBeLost), (ended.clone(), None));
        assert_eq!(mended(&ended, End::IsThere).1, Some(16));
        let hole = [vec![0; 2 * BLOCK], record(1, 3)].concat();
        let (bytes, first) = mended(&hole, End::MayBeLost);
        assert_eq!(first, Some(6));
        let changed = (0..hole.len()).filter(|at| bytes[*at] != hole[*at]);
        assert_eq!(changed.collect::<Vec<_>>(), [6, BLOCK + 6]);
    }
}
