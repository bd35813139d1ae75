//! Compilers that write to a directory of the store: who has one, and what incremental state they leave.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::{Must, Project, Sandbox, processes};

/// How many compilers have a directory.
pub fn compilers(sandbox: &Sandbox) -> usize {
    let directories = fs::read_dir(sandbox.store().join("aside"));
    directories.map_or(0, Iterator::count)
}

/// The daemon takes a directory away when it has told the wrapper to end.
pub fn assert_none_left(sandbox: &Sandbox) {
    let gone = || compilers(sandbox) == 0;
    assert!(processes::wait_for(Duration::from_secs(20), gone));
}

/// Looks again and again while something is done.
pub fn looking<R>(mut look: impl FnMut() + Send, work: impl FnOnce() -> R) -> R {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                look();
                thread::sleep(Duration::from_millis(5));
            }
        });
        let _over = Over(&over);
        work()
    })
}

/// The objects of the sessions of a crate, by session: name and inode.
pub fn sessions(project: &Project, of: &str) -> Vec<BTreeSet<(String, u64)>> {
    let mut sessions = Vec::new();
    let crates = fs::read_dir(project.target().join("debug/incremental")).must("list");
    for entry in crates.map(|entry| entry.must("a crate")) {
        if !entry.file_name().to_string_lossy().starts_with(of) {
            continue;
        }
        let mut rows: Vec<_> = fs::read_dir(entry.path())
            .must("list")
            .map(|row| row.must("a session").path())
            .filter(|path| path.is_dir())
            .collect();
        rows.sort();
        for session in rows {
            let files = fs::read_dir(session).must("list");
            let object = |entry: std::io::Result<fs::DirEntry>| {
                let entry = entry.must("a file");
                let name = entry.file_name().to_string_lossy().into_owned();
                let inode = fs::metadata(entry.path()).must("stat").ino();
                let is_object = Path::new(&name).extension().is_some_and(|kind| kind == "o");
                is_object.then_some((name, inode))
            };
            sessions.push(files.filter_map(object).collect());
        }
    }
    sessions
}
