//! Files of tens of megabytes: written in pieces of any size, changed, copied, and read back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use harness::{Chance, Must};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::World;
use crate::watchdog::{CALLS, Hand};

const SMALLEST: usize = 4 << 20;
const RANGE: usize = 36 << 20;
/// Largest piece written or read at once.
const PIECE: usize = 3 << 20;

/// Plays until the time is over.
pub fn play(world: &World, hand: &Hand, dir: &Path, chance: &mut Chance) {
    fs::create_dir_all(dir).must("mkdir");
    let (path, copy) = (dir.join("large"), dir.join("copy"));
    while !world.is_over() {
        let count = SMALLEST + chance.below(RANGE);
        let mut bytes = chance.bytes(count);
        let step = |what: &str, work: &mut dyn FnMut() -> io::Result<()>| {
            hand.during(what, CALLS, work)
                .must(format!("{what} {} bytes", bytes.len()));
        };
        step("write a large file", &mut || write(&path, &bytes, chance));
        step("read it", &mut || check(&path, &bytes, chance));
        step("copy it", &mut || fs::copy(&path, &copy).map(drop));
        step("read the copy", &mut || check(&copy, &bytes, chance));
        hand.during("change it", CALLS, || change(&path, &mut bytes, chance))
            .must("change");
        hand.during("read what changed", CALLS, || check(&path, &bytes, chance))
            .must("read");
        hand.during("unlink while open", CALLS, || {
            unlink_open(&path, &bytes, chance)
        })
        .must("unlink");
        world.did("large files");
    }
    fs::remove_dir_all(dir).must("remove");
}

fn write(path: &Path, bytes: &[u8], chance: &mut Chance) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(1 + chance.below(PIECE)));
        file.write_all(piece)?;
        rest = after;
    }
    if chance.percent(20) {
        file.sync_all()?;
    }
    Ok(())
}

/// Reads in pieces and compares; half of the time past the page cache.
fn check(path: &Path, expected: &[u8], chance: &mut Chance) -> io::Result<()> {
    compare(&File::open(path)?, expected, chance)
}

fn compare(mut file: &File, expected: &[u8], chance: &mut Chance) -> io::Result<()> {
    if chance.percent(50) {
        posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    loop {
        let room = 1 + chance.below(PIECE);
        let count = file.read(&mut buffer[..room])?;
        if count == 0 {
            break;
        }
        let same = expected.get(at..at + count) == Some(&buffer[..count]);
        assert!(same, "bytes {at} to {} differ", at + count);
        at += count;
    }
    assert_eq!(at, expected.len(), "length");
    Ok(())
}

fn change(path: &Path, bytes: &mut Vec<u8>, chance: &mut Chance) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    for _ in 0..8 {
        let at = chance.below(bytes.len());
        let count = chance.below((bytes.len() - at).min(PIECE)) + 1;
        let count = count.min(bytes.len() - at);
        let data = chance.bytes(count);
        file.write_all_at(&data, at as u64)?;
        bytes[at..at + count].copy_from_slice(&data);
    }
    let size = chance.below(bytes.len()) + bytes.len() / 2;
    file.set_len(size as u64)?;
    bytes.resize(size, 0);
    Ok(())
}

fn unlink_open(path: &Path, bytes: &[u8], chance: &mut Chance) -> io::Result<()> {
    let file = File::open(path)?;
    fs::remove_file(path)?;
    compare(&file, bytes, chance)
}
