//! Which accesses are worth noting.

use serde::{Deserialize, Serialize};

/// Directories whose files need no notes, by the beginnings of their paths.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// Known as a whole, or never different: reading there tells nothing new.
    pub known: Vec<Vec<u8>>,
    /// Directories in those that are not known all the same; what of them is known is named again.
    pub unknown: Vec<Vec<u8>>,
    /// The program's own: it may read, make and change there what it likes.
    pub own: Vec<Vec<u8>>,
    /// Names of sockets: what is said there is nobody's input.
    pub unnoted: Vec<Vec<u8>>,
    /// The program's arguments are not its caller's: that somebody reads them (proc(5), `/proc/pid/cmdline`) is noted.
    pub arguments: bool,
}

impl Scope {
    /// Whether a path lies in what is known.
    pub fn knows(&self, path: &[u8]) -> bool {
        // The innermost of the directories it lies in decides.
        let innermost = |directories: &[Vec<u8>]| {
            let around = directories.iter();
            let around = around.filter(|directory| is_within(path, directory));
            around.map(Vec::len).max()
        };
        innermost(&self.known) > innermost(&self.unknown)
    }

    /// Whether a path lies in what is the program's own.
    pub fn owns(&self, path: &[u8]) -> bool {
        self.own.iter().any(|directory| is_within(path, directory))
    }
}

/// Whether a path leads into a directory, or is it, and `..` does not lead out again.
fn is_within(path: &[u8], directory: &[u8]) -> bool {
    let Some(rest) = path.strip_prefix(directory) else {
        return false;
    };
    if !rest.is_empty() && !rest.starts_with(b"/") {
        return false;
    }
    let mut depth = 0_usize;
    for part in rest.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => match depth.checked_sub(1) {
                Some(less) => depth = less,
                None => return false,
            },
            _ => depth += 1,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::{Scope, is_within};

    #[test]
    fn only_whole_names_and_no_way_out() {
        let within = |path: &str| is_within(path.as_bytes(), b"/a/b");
        assert!(within("/a/b"));
        assert!(within("/a/b/c/../d"));
        assert!(within("/a/b/c/.."));
        assert!(!within("/a/bc"));
        assert!(!within("/a/b/.."));
        assert!(!within("/a/b/c/../../d"));
    }

    #[test]
    fn what_is_known_may_hold_what_is_not() {
        let scope = Scope {
            known: vec![b"/a".to_vec(), b"/a/lib/x".to_vec()],
            unknown: vec![b"/a/lib".to_vec()],
            ..Scope::default()
        };
        assert!(scope.knows(b"/a/b"));
        assert!(!scope.knows(b"/a/lib/y"));
        assert!(scope.knows(b"/a/lib/x/y"));
        assert!(!scope.knows(b"/b"));
    }
}
