//! Somebody who reads everything in a target while it is built, as editors and indexers do. Sees
//! no error but that of a name that has gone.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::World;
use crate::watchdog::{BUILD, CALLS, Hand};

/// Between two names: a reader, not a race for the two processors builds need.
const PAUSE: Duration = Duration::from_millis(2);

/// Reads until the time is over.
pub fn play(world: &World, hand: &Hand, target: &Path) {
    while !world.is_over() {
        walk(world, hand, target);
        thread::sleep(Duration::from_millis(100));
    }
}

fn walk(world: &World, hand: &Hand, dir: &Path) {
    let list = || -> io::Result<Vec<_>> { fs::read_dir(dir)?.collect() };
    let entries = hand.during("list while it is built", CALLS, list);
    let Some(entries) = there("list", dir, entries) else {
        return;
    };
    for entry in entries {
        if world.is_over() {
            return;
        }
        let path = entry.path();
        let kind = hand.during("stat while it is built", CALLS, || {
            fs::symlink_metadata(&path).map(|meta| meta.file_type())
        });
        let Some(kind) = there("stat", &path, kind) else {
            continue;
        };
        if kind.is_dir() {
            walk(world, hand, &path);
        } else if kind.is_file() {
            // A compiler may take its time.
            hand.during("read while it is built", BUILD, || read(world, &path));
        }
        thread::sleep(PAUSE);
    }
}

fn read(world: &World, path: &Path) {
    let Some(mut file) = there("open", path, open(world, path)) else {
        return;
    };
    let mut bytes = Vec::new();
    if there("read", path, file.read_to_end(&mut bytes)).is_some() {
        world.did("files read while built");
    }
}

/// Opens a file. Some kernels refuse while a compiler has it open for writing (see
/// `docs/semantics.md`, "Not promised"): that ends with the compiler.
fn open(world: &World, path: &Path) -> io::Result<File> {
    loop {
        match File::open(path) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => {
                world.did("opens refused while a compiler writes");
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

#[track_caller]
fn there<T>(what: &str, path: &Path, result: io::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => panic!("{what} {}: {error}", path.display()),
    }
}
