//! The key of one C compile: facts to digests, as for the other actions.

use store::{ActionKey, Digest, Hasher, InvocationDigest, Observation};

use crate::key::{KEY_FORMAT, add_observed};

/// What is known of a compile before it is known what it reads. Paths are those of this checkout, but
/// for the working directory: what an argument makes of its path cannot be told from the object.
#[derive(Clone, Debug)]
pub struct CcInvocation {
    /// The processor.
    pub processor: Digest,
    /// Content of the compiler's driver; what the driver runs is seen.
    pub compiler: Digest,
    /// Where the driver is, which decides where it looks for the rest.
    pub program: Vec<u8>,
    /// Where it was found, by whatever link.
    pub found: Vec<u8>,
    /// What it was called, which may decide its language.
    pub name: Vec<u8>,
    /// Arguments, in order, but where the outputs go.
    pub arguments: Vec<Vec<u8>>,
    /// The object's name, without the way there.
    pub object: Vec<u8>,
    /// Working directory, a template.
    pub cwd: Vec<u8>,
    /// What it reads of its environment, sorted.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
}

impl CcInvocation {
    /// The digest under which input records are found.
    pub fn digest(&self) -> InvocationDigest {
        let mut hasher = Hasher::new("kachefs C invocation");
        hasher
            .number(KEY_FORMAT)
            .digest(&self.processor)
            .digest(&self.compiler)
            .field(&self.program)
            .field(&self.found)
            .field(&self.name)
            .field(&self.object)
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

/// That something observed is like something observed before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alike {
    /// The place of that among the observations.
    pub first: u64,
    /// In which way.
    pub kind: Likeness,
}

/// How two paths are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likeness {
    /// Like nothing before it.
    None,
    /// The same file or directory.
    Same,
    /// Of the same content and time, by which gcc tells files.
    Twin,
}

/// The key of a compile that read this. `alike` says which of it are one file by several names, and
/// which may be taken for it: compilers look into a directory once, and include a file once.
pub fn cc_key(
    invocation: &InvocationDigest,
    observed: &[(Observation, Digest)],
    alike: &[Alike],
) -> ActionKey {
    let mut hasher = Hasher::new("kachefs C action");
    hasher.number(KEY_FORMAT).digest(&invocation.0);
    add_observed(&mut hasher, observed);
    hasher.number(alike.len() as u64);
    for Alike { first, kind } in alike {
        hasher.number(*first).number(*kind as u64);
    }
    ActionKey(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::Look;

    fn invocation() -> CcInvocation {
        CcInvocation {
            processor: Digest::of(b"cpu"),
            compiler: Digest::of(b"gcc"),
            program: b"/usr/bin/gcc".to_vec(),
            found: b"/usr/bin/cc".to_vec(),
            name: b"cc".to_vec(),
            arguments: vec![b"-O2".to_vec(), b"a.c".to_vec()],
            object: b"a.o".to_vec(),
            cwd: b"\0C\0".to_vec(),
            environment: vec![(b"LANG".to_vec(), b"C".to_vec())],
        }
    }

    #[test]
    fn every_fact_matters() {
        let mut keys = std::collections::HashSet::new();
        let base = invocation();
        let other = || b"other".to_vec();
        let changed = [
            base.clone(),
            CcInvocation {
                processor: Digest::of(b"x"),
                ..base.clone()
            },
            CcInvocation {
                compiler: Digest::of(b"x"),
                ..base.clone()
            },
            CcInvocation {
                program: other(),
                ..base.clone()
            },
            CcInvocation {
                found: other(),
                ..base.clone()
            },
            CcInvocation {
                name: other(),
                ..base.clone()
            },
            CcInvocation {
                arguments: vec![b"a.c".to_vec(), b"-O2".to_vec()],
                ..base.clone()
            },
            CcInvocation {
                object: other(),
                ..base.clone()
            },
            CcInvocation {
                cwd: other(),
                ..base.clone()
            },
            CcInvocation {
                environment: Vec::new(),
                ..base.clone()
            },
        ];
        for invocation in &changed {
            assert!(
                keys.insert(cc_key(&invocation.digest(), &[], &[])),
                "{invocation:?}"
            );
        }
        for (look, seen) in [(Look::Open, "a"), (Look::Open, "b"), (Look::Status, "a")] {
            let observation = Observation {
                path: b"/usr/include/x.h".to_vec(),
                look,
            };
            let observed = [(observation, Digest::of(seen.as_bytes()))];
            assert!(
                keys.insert(cc_key(&base.digest(), &observed, &[])),
                "{look:?} {seen}"
            );
        }
        for kind in [Likeness::None, Likeness::Same, Likeness::Twin] {
            for first in [0, 1] {
                let key = cc_key(&base.digest(), &[], &[Alike { first, kind }]);
                assert!(keys.insert(key), "{first} {kind:?}");
            }
        }
    }
}
