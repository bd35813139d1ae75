//! Directories that a compiler is told to write to.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What goes into a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// What is made.
    Outputs,
    /// What the next compile may go on from.
    Incremental,
}

/// A directory that an argument names.
#[derive(Debug, PartialEq, Eq)]
pub struct Named<'a> {
    /// Which argument.
    pub at: usize,
    /// What goes there.
    pub written: Written,
    /// What stands before the path in the same argument.
    start: &'a [u8],
    /// The path, as given.
    pub path: &'a OsStr,
}

impl Named<'_> {
    /// Which argument to replace by which, for the compiler to write to another directory.
    pub fn with(&self, path: &Path) -> (usize, OsString) {
        let mut argument = OsStr::from_bytes(self.start).to_owned();
        argument.push(path);
        (self.at, argument)
    }
}

/// The directories that arguments name, in order: `--out-dir` and `-C incremental`, in all their spellings.
pub fn named_in<'a>(arguments: impl IntoIterator<Item = &'a OsStr>) -> Vec<Named<'a>> {
    const OUT_DIR: &[u8] = b"--out-dir";
    const INCREMENTAL: &[u8] = b"incremental=";
    let mut last: &[u8] = b"";
    let mut found = Vec::new();
    for (at, argument) in arguments.into_iter().enumerate() {
        let argument = argument.as_bytes();
        // How much of the argument stands before a value of `-C`.
        let option = match last {
            b"-C" | b"--codegen" => Some(0),
            _ => [&b"-C"[..], b"--codegen="]
                .into_iter()
                .find_map(|option| argument.starts_with(option).then_some(option.len())),
        };
        let incremental = option
            .filter(|length| argument[*length..].starts_with(INCREMENTAL))
            .map(|length| (Written::Incremental, length + INCREMENTAL.len()));
        let outputs = || match argument.strip_prefix(OUT_DIR) {
            _ if last == OUT_DIR => Some((Written::Outputs, 0)),
            Some([b'=', ..]) => Some((Written::Outputs, OUT_DIR.len() + 1)),
            _ => None,
        };
        if let Some((written, start)) = incremental.or_else(outputs) {
            let (start, path) = argument.split_at(start);
            found.push(Named {
                at,
                written,
                start,
                path: OsStr::from_bytes(path),
            });
        }
        last = argument;
    }
    found
}

/// The directory for what is made.
pub fn out_dir(arguments: &[OsString]) -> Option<&Path> {
    let named = named_in(arguments.iter().map(OsString::as_os_str));
    let outputs = named
        .into_iter()
        .find(|named| named.written == Written::Outputs);
    outputs.map(|named| Path::new(named.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(arguments: &str) -> Vec<(usize, Written, &str)> {
        let named = named_in(arguments.split(' ').map(OsStr::new));
        let found = named.into_iter().map(|named| {
            let path = named.path.to_str().expect("text");
            (named.at, named.written, path)
        });
        found.collect()
    }

    #[test]
    fn every_spelling_is_found() {
        use Written::{Incremental, Outputs};
        assert_eq!(found("rustc --out-dir /t"), [(2, Outputs, "/t")]);
        assert_eq!(found("--out-dir=/t x"), [(0, Outputs, "/t")]);
        assert_eq!(found("-C incremental=/i x"), [(1, Incremental, "/i")]);
        assert_eq!(found("--codegen incremental=/i"), [(1, Incremental, "/i")]);
        assert_eq!(
            found("-Cincremental=/i --out-dir /t --codegen=incremental=/j"),
            [
                (0, Incremental, "/i"),
                (2, Outputs, "/t"),
                (3, Incremental, "/j")
            ]
        );
        for none in [
            "rustc -vV",
            "--out-dir",
            "--out-directory=/t",
            "-C opt-level=1 incremental=/i",
            "-Cincremental",
        ] {
            assert_eq!(found(none), [], "{none}");
        }
    }

    #[test]
    fn another_path_takes_the_place_of_the_one_named() {
        let arguments = ["-Cincremental=/i", "--out-dir", "/t"].map(OsStr::new);
        let named = named_in(arguments);
        let with = named.iter().map(|named| named.with(Path::new("/s")));
        assert_eq!(
            with.collect::<Vec<_>>(),
            [(0, "-Cincremental=/s".into()), (2, "/s".into())]
        );
    }
}
