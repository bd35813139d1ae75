//! Whether a path led elsewhere while a compiler ran.
//!
//! A directory renamed into place, or a symbolic link replaced, leaves the times of the files
//! behind it as they were. A rename stamps the renamed inode's ctime, and the directory it
//! happens in; a new entry stamps the directory alone. So a component has been swapped only where
//! both changed. Never follows a link by itself and never looks into a view. `record` calls it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use store::Timestamp;

use super::files::changed_at;

/// Links on the way of one path, as the kernel counts them (`path_resolution(7)`).
const MOST_LINKS: u32 = 40;

/// One look at all paths of a compile: every component is asked about once.
pub(super) struct Swapped<'a> {
    started: Timestamp,
    in_view: &'a dyn Fn(&Path) -> bool,
    seen: HashMap<PathBuf, Seen>,
}

#[derive(Clone)]
struct Seen {
    changed: bool,
    link: Option<PathBuf>,
}

impl<'a> Swapped<'a> {
    /// For a compile that began then.
    pub(super) fn since(started: Timestamp, in_view: &'a dyn Fn(&Path) -> bool) -> Self {
        Self {
            started,
            in_view,
            seen: HashMap::new(),
        }
    }

    /// Whether some component of an absolute path may have been another one since the start.
    pub(super) fn on_the_way_to(&mut self, path: &Path) -> io::Result<bool> {
        let mut at = PathBuf::from("/");
        let mut todo = reversed(path);
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                at.pop();
                continue;
            }
            let next = at.join(&name);
            // A view's inodes are never asked for through its mount.
            if (self.in_view)(&next) {
                return Ok(false);
            }
            let seen = self.look(&next)?;
            if seen.changed && self.look(&at)?.changed {
                return Ok(true);
            }
            let Some(target) = seen.link else {
                at = next;
                continue;
            };
            links += 1;
            if links > MOST_LINKS {
                return Err(io::Error::other("too many links"));
            }
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            todo.extend(reversed(&target));
        }
        Ok(false)
    }

    fn look(&mut self, path: &Path) -> io::Result<Seen> {
        if let Some(seen) = self.seen.get(path) {
            return Ok(seen.clone());
        }
        let meta = fs::symlink_metadata(path)?;
        let link = meta.is_symlink().then(|| fs::read_link(path)).transpose()?;
        let changed = changed_at(&meta) >= self.started;
        let seen = Seen { changed, link };
        self.seen.insert(path.to_owned(), seen.clone());
        Ok(seen)
    }
}

/// The components of a path, the last one first; what stands for "here" is left out.
fn reversed(path: &Path) -> Vec<OsString> {
    let names = path.components().rev();
    names
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use std::os::unix::fs::symlink;

    fn swapped(path: &Path, started: Timestamp) -> bool {
        Swapped::since(started, &|_| false)
            .on_the_way_to(path)
            .expect("looks")
    }

    /// A moment by the kernel's clock that no change before or after shares.
    fn moment() -> Timestamp {
        let pause = std::time::Duration::from_millis(30);
        std::thread::sleep(pause);
        let now = clock::now();
        std::thread::sleep(pause);
        now
    }

    #[test]
    fn new_entries_beside_the_way_do_not_matter() {
        let dir = tempfile::tempdir().expect("tempdir");
        let deep = dir.path().join("package/src/deep");
        fs::create_dir_all(&deep).expect("mkdir");
        let file = deep.join("f");
        fs::write(&file, "f").expect("writes");
        let started = moment();
        fs::write(deep.join("g"), "g").expect("writes");
        fs::create_dir(dir.path().join("package/target")).expect("mkdir");
        assert!(!swapped(&file, started));
    }

    #[test]
    fn renamed_directories_and_replaced_links_do() {
        let dir = tempfile::tempdir().expect("tempdir");
        // A level below: others make directories beside the temporary one.
        let at = |name: &str| dir.path().join("here").join(name);
        for name in ["one/src", "two/src"] {
            fs::create_dir_all(at(name)).expect("mkdir");
            fs::write(at(name).join("f"), name).expect("writes");
        }
        symlink("one/src", at("link")).expect("links");
        let started = moment();
        assert!(!swapped(&at("link/../src/f"), started));
        symlink("two/src", at("next")).expect("links");
        fs::rename(at("next"), at("link")).expect("renames");
        assert!(swapped(&at("link/f"), started));
        assert!(!swapped(&at("one/src/f"), started));
        fs::rename(at("one"), at("old")).expect("renames");
        fs::rename(at("two"), at("one")).expect("renames");
        fs::write(at("one/more"), "").expect("writes");
        assert!(swapped(&at("one/src/f"), started));
    }
}
