//! The surroundings of the roots, and whether a run explored them.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use store::{Root, RootSet};
use wrapper::environment;
use wrapper::roots::Roots;
use wrapper::trace::Scope;

/// The directories above the roots. A run that looks for something there, one level after the
/// other, would look in other directories elsewhere.
pub(super) struct Ways {
    /// Roots, and directories above and around them.
    roots: Vec<(Option<Root>, PathBuf)>,
    /// Where each name was looked for.
    names: HashMap<Vec<u8>, Vec<PathBuf>>,
    /// Directories that the environment names.
    given: HashSet<PathBuf>,
}

impl Ways {
    pub(super) fn new(roots: &Roots, scope: &Scope, environment: &[(Vec<u8>, Vec<u8>)]) -> Self {
        // What is not keyed excuses nothing.
        let values = environment::keyed_for_script(environment)
            .into_iter()
            .flat_map(|(_, value)| value.split(|byte| *byte == b':'));
        let given = values
            .map(|value| Path::new(OsStr::from_bytes(value)).components().collect())
            .filter(|path: &PathBuf| path.is_absolute());
        let own = Root::OF_CHECKOUT
            .into_iter()
            .map(|root| (Some(root), PathBuf::from(roots.path(root))));
        let known = scope.known.iter().chain(&scope.own);
        let known = known.map(|path| (None, PathBuf::from(OsStr::from_bytes(path))));
        let roots = own.chain(known).filter(|(_, path)| path.is_absolute());
        Self {
            roots: roots.collect(),
            names: HashMap::new(),
            given: given.collect(),
        }
    }

    /// Whether a path is a root or a directory above one.
    pub(super) fn leads_to_root(&self, path: &Path) -> bool {
        self.roots.iter().any(|(_, root)| root.starts_with(path))
    }

    pub(super) fn note(&mut self, path: &Path) {
        if self.given.contains(path) {
            return;
        }
        if let (Some(name), Some(parent)) = (path.file_name(), path.parent()) {
            let places = self.names.entry(name.as_bytes().to_vec()).or_default();
            places.push(parent.to_owned());
        }
    }

    /// Roots above which something was looked for.
    pub(super) fn explored(&self) -> RootSet {
        let mut set = RootSet::default();
        let path_of = |root| {
            let found = self.roots.iter().find(|(is, _)| *is == Some(root));
            found.map_or(Path::new("/"), |(_, path)| path.as_path())
        };
        let cwd = path_of(Root::Cwd);
        // `$CARGO_HOME` is where it is, whoever asks.
        for root in [Root::Cwd, Root::View] {
            let path = path_of(root);
            let explored = self.names.values().any(|places| {
                let has = |wanted: &dyn Fn(&Path) -> bool| places.iter().any(|place| wanted(place));
                let above = |place: &Path| path.starts_with(place) && path != place;
                let further_down = has(&|place| place.starts_with(path));
                // In the root of all, as everywhere, are places of the system; what the environment
                // names is where it is; unless the name was looked for further down as well.
                let near = has(&|place| {
                    above(place)
                        && !place.starts_with(cwd)
                        && place != Path::new("/")
                        && (further_down
                            || path.parent() == Some(place)
                            || !self.given.contains(place))
                });
                let shallow = path.parent() == Some(Path::new("/")) && places.len() > 1;
                // The way up from a target leads through the checkout only where it lies in it.
                let upwards = has(&above) && further_down;
                near || upwards || (shallow && has(&above))
            });
            if explored {
                set.insert(root);
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explored(paths: &[&str]) -> RootSet {
        let roots = Roots::new("/home/ann/ws", "/home/ann/.cargo", "/home/ann/ws/target");
        let environment = [(b"HOME".to_vec(), b"/home/ann".to_vec())];
        let mut ways = Ways::new(&roots, &Scope::default(), &environment);
        for path in paths {
            ways.note(Path::new(path));
        }
        ways.explored()
    }

    #[test]
    fn what_is_looked_for_above_a_root_binds_to_it() {
        let mut both = RootSet::default();
        both.insert(Root::Cwd);
        both.insert(Root::View);
        assert_eq!(explored(&["/home/x.toml"]), both);
        let mut cwd = RootSet::default();
        cwd.insert(Root::Cwd);
        assert_eq!(explored(&["/home/ann/ws/.git", "/home/ann/.git"]), cwd);
        let up_from_the_target = ["/home/ann/ws/target/debug/.git", "/home/ann/ws/.git"];
        let mut view = RootSet::default();
        view.insert(Root::View);
        assert_eq!(explored(&up_from_the_target), view);
    }

    #[test]
    fn what_lies_in_the_checkout_or_the_system_does_not_bind() {
        let none = RootSet::default();
        assert_eq!(explored(&["/home/ann/ws/Cargo.toml"]), none);
        assert_eq!(
            explored(&["/home/ann/.cargo/config.toml", "/etc/x", "/x"]),
            none
        );
        assert_eq!(explored(&["/usr/bin/cc", "/opt/bin/cc"]), none);
        assert_eq!(explored(&["/opt/home/.gitconfig"]), none);
    }

    #[test]
    fn ways_to_roots() {
        let roots = Roots::new("/home/ann/ws", "/c", "/t");
        let scope = Scope {
            known: vec![b"/opt/rust".to_vec()],
            ..Scope::default()
        };
        let ways = Ways::new(&roots, &scope, &[]);
        for path in ["/home", "/home/ann/ws", "/opt", "/t"] {
            assert!(ways.leads_to_root(Path::new(path)), "{path}");
        }
        for path in ["/home/bob", "/home/ann/ws/a", "/opt/other"] {
            assert!(!ways.leads_to_root(Path::new(path)), "{path}");
        }
    }
}
