//! Makes RocksDB find what is wrong in its logs and manifests, instead of reading for ever or past it.
//!
//! Both are rows of blocks of 32 KiB, and a block is a row of records behind a header each: checksum (4
//! bytes), length (2), type (1) (RocksDB, `db/log_format.h`). A type of recycled logs in a log that did
//! not begin with one stops the reader without a word (`Reader::ReadPhysicalRecord` of 11.8.1 says
//! `kBadRecord` and stays where it is, and `ReadRecord` asks once more): one flipped bit, and the start
//! of the daemon has no end. A header of zeros makes it skip the rest of the block, and go on.
//!
//! Here no log is recycled or compressed. So there are four types, and any other one is damage. It is
//! replaced by that of a whole record, as nearly all are. The checksum covers the type: if it was one and
//! nothing else was damaged it is sound again, and otherwise the reader says that it is not. Called by
//! `recover`.

use std::fs::OpenOptions;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: usize = 32 << 10;

/// Where the type stands in a header.
const TYPE: usize = 6;

/// A whole record, or the first, a middle, the last piece of one.
const TYPES: RangeInclusive<u8> = 1..=4;

/// Replaces the types that no kachefs writes, and returns where the first one stood.
///
/// Zeros up to the end are no damage: so ends a file whose last bytes a power cut took.
pub(crate) fn mend(path: &Path) -> io::Result<Option<u64>> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let mut block = vec![0; BLOCK];
    let mut found = Vec::new();
    let mut end = 0;
    for start in (0..size).step_by(BLOCK) {
        let left = usize::try_from(size - start).unwrap_or(BLOCK);
        let block = &mut block[..left.min(BLOCK)];
        file.read_exact_at(block, start)?;
        found.extend(wrong_types(block).iter().map(|at| start + *at as u64));
        if let Some(last) = block.iter().rposition(|byte| *byte != 0) {
            end = start + last as u64;
        }
    }
    found.retain(|at| *at <= end);
    for at in &found {
        file.write_all_at(&[*TYPES.start()], *at)?;
    }
    if !found.is_empty() {
        file.sync_data()?;
    }
    Ok(found.first().copied())
}

/// Where in a block there are types that are none. Behind a record whose length is damaged they may be
/// no types at all, which does no harm: the reader gives up the block there.
fn wrong_types(block: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut rest = block;
    while let [_, _, _, _, low, high, kind, payload @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        if !TYPES.contains(kind) {
            found.push(block.len() - rest.len() + TYPE);
            if (*kind, length) == (0, 0) {
                break;
            }
        }
        rest = payload.get(length..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn mended(bytes: &[u8]) -> (Vec<u8>, Option<u64>) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("000001.log");
        fs::write(&path, bytes).expect("writes");
        let first = mend(&path).expect("mends");
        (fs::read(&path).expect("reads"), first)
    }

    fn record(kind: u8, length: usize) -> Vec<u8> {
        let [low, high] = u16::try_from(length).expect("short").to_le_bytes();
        [&[9, 9, 9, 9, low, high, kind][..], &vec![5; length]].concat()
    }

    #[test]
    fn only_types_are_changed() {
        let sound = [record(1, 3), record(2, 0), record(4, 40)].concat();
        assert_eq!(mended(&sound), (sound.clone(), None));
        let wrong = [record(1, 3), record(7, 0), record(131, 40)].concat();
        let right = [record(1, 3), record(1, 0), record(1, 40)].concat();
        assert_eq!(mended(&wrong), (right, Some(16)));
    }

    #[test]
    fn a_block_may_end_in_less_than_a_header() {
        let full = |kind| record(kind, BLOCK - 7 - 6);
        let blocks = |last| [full(2), vec![0; 6], record(last, 1)].concat();
        assert_eq!(mended(&blocks(4)), (blocks(4), None));
        assert_eq!(mended(&blocks(8)), (blocks(1), Some(BLOCK as u64 + 6)));
    }

    #[test]
    fn zeros_are_damage_only_where_something_follows() {
        let ended = [record(1, 3), vec![0; 3 * BLOCK]].concat();
        assert_eq!(mended(&ended), (ended.clone(), None));
        let hole = [vec![0; 2 * BLOCK], record(1, 3)].concat();
        let (bytes, first) = mended(&hole);
        assert_eq!(first, Some(6));
        let changed = (0..hole.len()).filter(|at| bytes[*at] != hole[*at]);
        assert_eq!(changed.collect::<Vec<_>>(), [6, BLOCK + 6]);
    }
}
