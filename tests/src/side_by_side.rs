//! One script run twice, in a view and in a plain directory: both must see the same.
//!
//! The script notes what it sees (results, error numbers, attributes, bytes) in a [`Log`]; the logs
//! are compared line by line. Afterwards the view must show the same tree to another daemon.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::{Must, Sandbox, Tree, tree};

/// What a script saw, line by line.
#[derive(Default, PartialEq)]
pub struct Log(Vec<String>);

impl Log {
    /// Notes anything.
    pub fn note(&mut self, what: &str, seen: impl std::fmt::Debug) {
        self.0.push(format!("{what}: {seen:?}"));
    }

    /// Notes success or the error number, not the value.
    pub fn result<T>(&mut self, what: &str, result: &io::Result<T>) {
        match result {
            Ok(_) => self.note(what, "ok"),
            Err(error) => self.note(what, error.raw_os_error()),
        }
    }

    /// Notes success or the error number, not the value.
    pub fn errno<T>(&mut self, what: &str, result: &nix::Result<T>) {
        self.note(what, result.as_ref().err());
    }

    /// Notes attributes and bytes of a file.
    #[track_caller]
    pub fn file(&mut self, path: &Path) {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let meta = match fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(error) => return self.note("absent", (name, error.raw_os_error())),
        };
        let links = if meta.is_dir() { 0 } else { meta.nlink() };
        let size = if meta.is_dir() { 0 } else { meta.size() };
        self.note(
            "file",
            (name, meta.mode(), links, size, meta.uid(), meta.gid()),
        );
        if meta.is_file() {
            let bytes = fs::read(path).must(path.display());
            self.note("bytes", (bytes.len(), &bytes[..bytes.len().min(200)]));
        }
    }

    /// Notes everything below a directory.
    #[track_caller]
    pub fn all(&mut self, dir: &Path) {
        for path in tree::walk(dir) {
            self.file(&path);
        }
    }
}

/// Runs `script` in a view and in a directory on the disk; both must see the same.
#[track_caller]
pub fn same(script: impl Fn(&Path, &mut Log)) {
    let sandbox = Sandbox::new();
    let view = sandbox.make_dir("project").join("target");
    sandbox.mount(&view);
    let disk = sandbox.make_dir("disk");
    let [mut seen, mut expected] = [Log::default(), Log::default()];
    script(&disk, &mut expected);
    script(&view, &mut seen);
    assert!(!expected.0.is_empty(), "the script notes something");
    for (seen, expected) in seen.0.iter().zip(&expected.0) {
        assert_eq!(seen, expected, "in the view / on the disk");
    }
    assert_eq!(seen.0.len(), expected.0.len());
    // And the daemon remembers what it did.
    let before = Tree::of(&view);
    sandbox.unmount(&view);
    sandbox.mount(&view);
    before.assert_same(&Tree::of(&view), "after unmount and mount");
}
