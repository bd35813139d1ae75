//! The invocation digest and the action key.
//!
//! Pure functions from facts to digests. Whoever calls them brings every fact: a forgotten one is
//! a wrong hit, so the facts are struct fields without defaults, and a new one does not compile
//! until every caller supplies it. `docs/cache-key.md` explains each to a user.

use store::{ActionKey, Digest, Hasher, InvocationDigest, Observation, Root, RootSet};

use crate::mode::Mode;
use crate::roots::Roots;

/// Grows with every change of what is hashed below, and of what counts as an input or binds a result
/// to its paths: what was stored under a weaker key is never met again.
pub(crate) const KEY_FORMAT: u64 = 5;

/// What is known of an action before a source is read. Texts are templates.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// Content of the compiler and its libraries.
    pub compiler: Digest,
    /// Content of the linker, CRT and libc, for actions that run a linker.
    pub linker: Option<Digest>,
    /// The processor, for actions told to use whatever it offers.
    pub cpu: Option<Digest>,
    /// Arguments, in order.
    pub arguments: Vec<Vec<u8>>,
    /// The crate root.
    pub source: Vec<u8>,
    /// Whether the working directory is remapped; packages below `$CARGO_HOME` do without.
    pub remaps_cwd: bool,
    /// How far its results travel.
    pub mode: Mode,
}

impl Invocation {
    /// The digest under which input records are found.
    pub fn digest(&self) -> InvocationDigest {
        let mut hasher = Hasher::new("kachefs invocation");
        hasher.number(KEY_FORMAT).digest(&self.compiler);
        for optional in [&self.linker, &self.cpu] {
            match optional {
                Some(digest) => hasher.number(1).digest(digest),
                None => hasher.number(0),
            };
        }
        hasher
            .number(u64::from(self.remaps_cwd))
            .number(self.mode as u64);
        hasher
            .field(&self.source)
            .number(self.arguments.len() as u64);
        for argument in &self.arguments {
            hasher.field(argument);
        }
        InvocationDigest(hasher.finish())
    }
}

/// What is known of a build script's run before it is known what it reads. Texts are templates.
#[derive(Clone, Debug)]
pub struct ScriptInvocation {
    /// Content of the script.
    pub script: Digest,
    /// Content of the compiler cargo names to it.
    pub compiler: Digest,
    /// The processor: what it can do, a script may ask it itself.
    pub processor: Digest,
    /// Its arguments.
    pub arguments: Vec<Vec<u8>>,
    /// Its working directory.
    pub cwd: Vec<u8>,
    /// Its environment, sorted.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// The mask its files are made with.
    pub umask: u32,
    /// How far its results travel.
    pub mode: Mode,
}

impl ScriptInvocation {
    /// The digest under which input records are found.
    pub fn digest(&self) -> InvocationDigest {
        let mut hasher = Hasher::new("kachefs script invocation");
        hasher
            .number(KEY_FORMAT)
            .digest(&self.script)
            .digest(&self.compiler)
            .digest(&self.processor)
            .number(self.umask.into())
            .number(self.mode as u64)
            .field(&self.cwd)
            .number(self.arguments.len() as u64);
        for argument in &self.arguments {
            hasher.field(argument);
        }
        hasher.number(self.environment.len() as u64);
        for (name, value) in &self.environment {
            hasher.field(name).field(value);
        }
        InvocationDigest(hasher.finish())
    }
}

/// The key of a build script's run that read this.
pub fn script_key(invocation: &InvocationDigest, observed: &[(Observation, Digest)]) -> ActionKey {
    let mut hasher = Hasher::new("kachefs script action");
    hasher.number(KEY_FORMAT).digest(&invocation.0);
    add_observed(&mut hasher, observed);
    ActionKey(hasher.finish())
}

/// What an action reads besides its sources. Known before the compiler runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependencies {
    /// Externs in order: `options:name`, file name, content.
    pub externs: Vec<(String, String, Digest)>,
    /// Every crate of the dependency closure: file stem and content of what this action reads of
    /// it (the rlib or proc macro where a linker runs, else the rmeta). Sorted by stem.
    pub closure: Vec<(String, Digest)>,
    /// Files and directories named by flags: path template and content (for a directory, of the
    /// libraries in it).
    pub named: Vec<(Vec<u8>, Digest)>,
    /// The same for directories that are only searched for libraries to put into an rlib. They count
    /// where nobody saw what was looked for in them.
    pub searched: Vec<(Vec<u8>, Digest)>,
    /// Environment that is keyed without rustc reporting it: name, value template.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Dependencies {
    /// The file stems of the crates in the closure, sorted.
    pub fn stems(&self) -> impl Iterator<Item = &str> {
        self.closure.iter().map(|(stem, _)| stem.as_str())
    }

    /// What is not the same in another look at them, in words.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self == other {
            return None;
        }
        let crates = |of: &Self| -> Vec<_> {
            let direct = of.externs.iter();
            let direct = direct.map(|(name, _, digest)| (name.clone(), *digest));
            direct.chain(of.closure.iter().cloned()).collect()
        };
        let (before, after) = (crates(self), crates(other));
        let gone = before.iter().find(|one| !after.contains(one));
        let come = after.iter().find(|one| !before.contains(one));
        let part = match gone.or(come) {
            Some((name, _)) => format!("dependency {name}"),
            None => "a file that a flag names".to_owned(),
        };
        Some(part)
    }
}

/// What an action reads as its input record tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Path template and content, in the order of the record.
    pub files: Vec<(Vec<u8>, Digest)>,
    /// Name and value template (`None`: not set) of reported variables, in order.
    pub environment: Vec<(String, Option<Vec<u8>>)>,
    /// What else it was seen to look at, and what is there; `None` where it could not be watched.
    pub observed: Option<Vec<(Observation, Digest)>>,
    /// The whole package directory, for units whose proc macros could not be watched and may have
    /// read any of it.
    pub package: Option<Digest>,
}

/// The key of the action that is all of this.
pub fn action_key(
    invocation: &InvocationDigest,
    dependencies: &Dependencies,
    sources: &Sources,
) -> ActionKey {
    let mut hasher = Hasher::new("kachefs action");
    hasher.number(KEY_FORMAT).digest(&invocation.0);
    hasher.number(dependencies.externs.len() as u64);
    for (name, file, digest) in &dependencies.externs {
        hasher
            .field(name.as_bytes())
            .field(file.as_bytes())
            .digest(digest);
    }
    hasher.number(dependencies.closure.len() as u64);
    for (stem, digest) in &dependencies.closure {
        hasher.field(stem.as_bytes()).digest(digest);
    }
    hasher.number(dependencies.named.len() as u64);
    for (path, digest) in &dependencies.named {
        hasher.field(path).digest(digest);
    }
    let searched = match &sources.observed {
        Some(_) => [].as_slice(),
        None => &dependencies.searched,
    };
    hasher.number(searched.len() as u64);
    for (path, digest) in searched {
        hasher.field(path).digest(digest);
    }
    hasher.number(dependencies.environment.len() as u64);
    for (name, value) in &dependencies.environment {
        hasher.field(name).field(value);
    }
    hasher.number(sources.files.len() as u64);
    for (path, digest) in &sources.files {
        hasher.field(path).digest(digest);
    }
    hasher.number(sources.environment.len() as u64);
    for (name, value) in &sources.environment {
        hasher.field(name.as_bytes());
        match value {
            Some(value) => hasher.number(1).field(value),
            None => hasher.number(0),
        };
    }
    match &sources.observed {
        Some(observed) => {
            hasher.number(1);
            add_observed(&mut hasher, observed);
        }
        None => drop(hasher.number(0)),
    }
    match &sources.package {
        Some(digest) => hasher.number(1).digest(digest),
        None => hasher.number(0),
    };
    ActionKey(hasher.finish())
}

pub(crate) fn add_observed(hasher: &mut Hasher, observed: &[(Observation, Digest)]) {
    hasher.number(observed.len() as u64);
    for (observation, digest) in observed {
        hasher
            .field(&observation.path)
            .number(observation.look as u64)
            .digest(digest);
    }
}

/// The key of a result whose outputs hold the literal paths of the roots in `set`.
pub fn bound_key(key: &ActionKey, set: RootSet, roots: &Roots) -> ActionKey {
    let mut hasher = Hasher::new("kachefs path-bound action");
    hasher.digest(&key.0);
    for root in Root::ALL {
        if set.contains(root) {
            hasher
                .number(root as u64)
                .field(roots.path(root).as_bytes());
        }
    }
    ActionKey(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::Look;

    fn invocation() -> Invocation {
        Invocation {
            compiler: Digest::of(b"rustc"),
            linker: None,
            cpu: None,
            arguments: vec![b"--crate-name=a".to_vec()],
            source: b"src/lib.rs".to_vec(),
            remaps_cwd: true,
            mode: Mode::Portable,
        }
    }

    fn dependencies() -> Dependencies {
        Dependencies {
            externs: vec![("b".into(), "libb-1.rmeta".into(), Digest::of(b"b"))],
            closure: vec![("b-1".into(), Digest::of(b"b"))],
            named: vec![(b"\0V\0/out".to_vec(), Digest::of(b"n"))],
            searched: vec![(b"\0V\0/lib".to_vec(), Digest::of(b"l"))],
            environment: vec![(b"RUSTC_BOOTSTRAP".to_vec(), b"1".to_vec())],
        }
    }

    fn sources() -> Sources {
        Sources {
            files: vec![(b"src/lib.rs".to_vec(), Digest::of(b"s"))],
            environment: vec![("E".into(), None)],
            observed: None,
            package: None,
        }
    }

    #[test]
    fn every_fact_matters() {
        let mut keys = std::collections::HashSet::new();
        let mut add = |i: &Invocation, d: &Dependencies, s: &Sources| {
            assert!(
                keys.insert(action_key(&i.digest(), d, s)),
                "{i:?} {d:?} {s:?}"
            );
        };
        let (i, d, s) = (invocation(), dependencies(), sources());
        add(&i, &d, &s);
        let other = Digest::of(b"other");
        add(
            &Invocation {
                compiler: other,
                ..i.clone()
            },
            &d,
            &s,
        );
        add(
            &Invocation {
                linker: Some(other),
                ..i.clone()
            },
            &d,
            &s,
        );
        add(
            &Invocation {
                cpu: Some(other),
                ..i.clone()
            },
            &d,
            &s,
        );
        add(
            &Invocation {
                arguments: vec![],
                ..i.clone()
            },
            &d,
            &s,
        );
        add(
            &Invocation {
                source: vec![],
                ..i.clone()
            },
            &d,
            &s,
        );
        add(
            &Invocation {
                remaps_cwd: false,
                ..i.clone()
            },
            &d,
            &s,
        );
        add(
            &Invocation {
                mode: Mode::Exact,
                ..i.clone()
            },
            &d,
            &s,
        );
        add(
            &i,
            &Dependencies {
                externs: vec![],
                ..d.clone()
            },
            &s,
        );
        let moved = vec![("b".into(), "libb-2.rmeta".into(), Digest::of(b"b"))];
        add(
            &i,
            &Dependencies {
                externs: moved,
                ..d.clone()
            },
            &s,
        );
        add(
            &i,
            &Dependencies {
                closure: vec![("b-1".into(), other)],
                ..d.clone()
            },
            &s,
        );
        add(
            &i,
            &Dependencies {
                named: vec![],
                ..d.clone()
            },
            &s,
        );
        add(
            &i,
            &Dependencies {
                searched: vec![],
                ..d.clone()
            },
            &s,
        );
        add(
            &i,
            &Dependencies {
                environment: vec![],
                ..d.clone()
            },
            &s,
        );
        add(
            &i,
            &d,
            &Sources {
                package: Some(other),
                ..s.clone()
            },
        );
        let looked = |look| {
            let path = b"/etc/x".to_vec();
            Some(vec![(Observation { path, look }, other)])
        };
        for observed in [Some(Vec::new()), looked(Look::Open), looked(Look::Link)] {
            add(
                &i,
                &d,
                &Sources {
                    observed,
                    ..s.clone()
                },
            );
        }
        add(
            &i,
            &d,
            &Sources {
                files: vec![(b"src/lib.rs".to_vec(), other)],
                ..s.clone()
            },
        );
        let set = vec![("E".into(), Some(Vec::new()))];
        add(
            &i,
            &d,
            &Sources {
                environment: set,
                ..s.clone()
            },
        );
    }

    #[test]
    fn where_it_was_watched_a_searched_directory_is_what_was_looked_at() {
        let (i, d) = (invocation().digest(), dependencies());
        let other = Dependencies {
            searched: vec![(b"\0V\0/lib".to_vec(), Digest::of(b"other"))],
            ..d.clone()
        };
        let watched = Sources {
            observed: Some(Vec::new()),
            ..sources()
        };
        assert_eq!(
            action_key(&i, &d, &watched),
            action_key(&i, &other, &watched)
        );
        assert_ne!(
            action_key(&i, &d, &sources()),
            action_key(&i, &other, &sources())
        );
    }

    #[test]
    fn bound_keys_hold_only_the_roots_that_bind() {
        let key = action_key(&invocation().digest(), &dependencies(), &sources());
        let here = Roots::new("/a", "/c", "/a/target");
        let there = Roots::new("/b", "/c", "/b/target");
        let mut set = RootSet::default();
        set.insert(Root::CargoHome);
        assert_eq!(bound_key(&key, set, &here), bound_key(&key, set, &there));
        assert_ne!(bound_key(&key, set, &here), key);
        set.insert(Root::Cwd);
        assert_ne!(bound_key(&key, set, &here), bound_key(&key, set, &there));
    }
}
