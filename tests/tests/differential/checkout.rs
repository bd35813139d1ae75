//! A world on the disk: writes what changed and nothing else, as git does, so that times move where
//! contents do and only there.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use harness::Must;

use crate::render::{Entry, Picture, render};
use crate::world::World;

/// The target directory of plain cargo, beside the view.
pub const PLAIN: &str = "plain-target";

/// A directory that shows a world.
pub struct Checkout {
    pub root: PathBuf,
    picture: Picture,
    world: World,
}

impl Checkout {
    /// Writes a world to a new directory.
    #[track_caller]
    pub fn new(root: PathBuf, world: &World) -> Self {
        fs::create_dir_all(&root).must(root.display());
        let picture = render(world);
        write_all(&root, &Picture::new(), &picture);
        Self {
            root,
            picture,
            world: world.clone(),
        }
    }

    /// The same world elsewhere.
    #[track_caller]
    pub fn copy(&self, root: PathBuf) -> Self {
        let copy = Self::new(root, &self.world);
        let lock = self.root.join("Cargo.lock");
        if lock.exists() {
            fs::copy(&lock, copy.root.join("Cargo.lock")).must(lock.display());
        }
        copy
    }

    /// Makes the directory show another world.
    #[track_caller]
    pub fn show(&mut self, world: &World) {
        self.move_packages(world);
        let picture = render(world);
        let mut emptied = BTreeSet::new();
        for (name, old) in &self.picture {
            if picture.get(name) != Some(old) {
                let path = self.root.join(name);
                if let Entry::Link(_) = old {
                    // Cargo remembers where the link led, and looks at the time of that.
                    touch(&path);
                }
                fs::remove_file(&path).must(path.display());
                emptied.extend(path.parent().map(Path::to_owned));
            }
        }
        write_all(&self.root, &self.picture, &picture);
        for dir in emptied {
            // From the inside out; the first that holds something ends it.
            let mut dirs = dir.ancestors().take_while(|dir| *dir != self.root);
            while dirs.next().is_some_and(|dir| fs::remove_dir(dir).is_ok()) {}
        }
        for name in self.to_touch(world) {
            touch(&self.root.join(name));
        }
        self.picture = picture;
        self.world = world.clone();
    }

    /// Moves the directories of packages that have a new place, with the times of their files.
    #[track_caller]
    fn move_packages(&mut self, world: &World) {
        for krate in &world.crates {
            let Some(old) = self.world.krate(&krate.name) else {
                continue;
            };
            let (from, to) = (self.root.join(&old.dir), self.root.join(&krate.dir));
            if from == to || to.exists() {
                continue;
            }
            let parent = to.parent().must("a directory");
            fs::create_dir_all(parent).must(parent.display());
            fs::rename(&from, &to).must(to.display());
            let parent = from.parent().must("a directory");
            // Stays while other packages are there.
            let _ = fs::remove_dir(parent);
            let prefix = format!("{}/", old.dir);
            let renamed = |name: String| match name.strip_prefix(&prefix) {
                Some(rest) => format!("{}/{rest}", krate.dir),
                None => name,
            };
            let picture = std::mem::take(&mut self.picture);
            let moved = picture
                .into_iter()
                .map(|(name, entry)| (renamed(name), entry));
            self.picture = moved.collect();
        }
    }

    /// The sources to touch because something they depend on changed that cargo does not look at.
    fn to_touch(&self, world: &World) -> Vec<String> {
        let mut names = Vec::new();
        for krate in &world.crates {
            let Some(old) = self.world.krate(&krate.name) else {
                continue;
            };
            if self.world.unseen_by_script(old) != world.unseen_by_script(krate) {
                names.extend(
                    krate
                        .script
                        .as_ref()
                        .map(|_| format!("{}/build.rs", krate.dir)),
                );
            }
            for target in &krate.targets {
                let then = old.targets.iter().find(|old| old.name == target.name);
                let then = then.map(|target| self.world.unseen_by_target(old, target));
                if then != Some(world.unseen_by_target(krate, target)) {
                    names.push(format!("{}/{}", krate.dir, target.root()));
                }
            }
        }
        names
    }

    /// Gives every file of a package the time of now.
    #[track_caller]
    pub fn touch_package(&self, name: &str) {
        let Some(krate) = self.world.krate(name) else {
            return;
        };
        let prefix = format!("{}/", krate.dir);
        for (name, entry) in &self.picture {
            if name.starts_with(&prefix) && matches!(entry, Entry::Text(_)) {
                touch(&self.root.join(name));
            }
        }
    }

    /// The view.
    pub fn target(&self) -> PathBuf {
        self.root.join("target")
    }

    /// The plain target directory.
    pub fn plain(&self) -> PathBuf {
        self.root.join(PLAIN)
    }
}

/// Writes what is new, links when all they may lead to is there.
#[track_caller]
fn write_all(root: &Path, old: &Picture, new: &Picture) {
    let changed = new
        .iter()
        .filter(|(name, entry)| old.get(*name) != Some(entry));
    let (links, texts): (Vec<_>, Vec<_>) =
        changed.partition(|(_, entry)| matches!(entry, Entry::Link(_)));
    for (name, entry) in texts.into_iter().chain(links) {
        write(&root.join(name), entry);
    }
}

#[track_caller]
fn write(path: &Path, entry: &Entry) {
    let parent = path.parent().must("a directory");
    fs::create_dir_all(parent).must(parent.display());
    match entry {
        Entry::Text(text) => fs::write(path, text).must(path.display()),
        Entry::Link(to) => {
            symlink(to, path).must(path.display());
            // Cargo looks at the time of what the link leads to, and that did not change.
            touch(path);
        }
    }
}

#[track_caller]
fn touch(path: &Path) {
    let file = File::open(path).must(path.display());
    file.set_modified(SystemTime::now()).must(path.display());
}
