//! Names of objects in a remote.
//!
//! ```text
//! v1/blobs/xx/<digest>     a blob, in frames (`blob`)
//! v1/packs/<digest>        many small blobs in one object
//! v1/actions/xx/<digest>   the signed results of one invocation
//! v1/builds/<fingerprint>  the signed results of one build
//! v1/trees/<name>          a signed published tree
//! v1/leases/<id>           objects that somebody uses
//! v1/condemned/<id>        objects that `kachefs remote gc` is about to remove
//! v1/check/<id>            written and removed by `kachefs remote check`
//! ```
//!
//! `xx` are the first two characters of what follows. A name is only ever made of digests and of names
//! that were checked; what a listing shows is read by the same rules, and left out where it does not obey.

use std::fmt;
use std::str::FromStr;

use store::{Digest, InvocationDigest};

/// What every name starts with: the layout.
pub(crate) const LAYOUT: &str = "v1";

/// Longest name of a tree.
const LONGEST: usize = 128;

/// The name of an object, relative to the prefix of its remote.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectName(String);

/// The kinds of objects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Blobs.
    Blobs,
    /// Packs of small blobs.
    Packs,
    /// Action results.
    Actions,
    /// Build manifests.
    Builds,
    /// Published trees.
    Trees,
    /// Leases.
    Leases,
    /// What is about to be removed.
    Condemned,
    /// What a check leaves for a moment.
    Check,
}

impl Kind {
    pub(crate) const ALL: [Self; 8] = [
        Self::Blobs,
        Self::Packs,
        Self::Actions,
        Self::Builds,
        Self::Trees,
        Self::Leases,
        Self::Condemned,
        Self::Check,
    ];

    fn directory(self) -> &'static str {
        match self {
            Self::Blobs => "blobs",
            Self::Packs => "packs",
            Self::Actions => "actions",
            Self::Builds => "builds",
            Self::Trees => "trees",
            Self::Leases => "leases",
            Self::Condemned => "condemned",
            Self::Check => "check",
        }
    }

    /// What the names of all objects of this kind start with.
    pub fn prefix(self) -> String {
        format!("{LAYOUT}/{}/", self.directory())
    }
}

/// Not the name of an object.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not the name of an object: {0:?}")]
pub struct NameError(pub String);

impl ObjectName {
    /// Of a blob.
    pub fn blob(digest: &Digest) -> Self {
        Self::spread(Kind::Blobs, digest)
    }

    /// Of a pack.
    pub fn pack(digest: &Digest) -> Self {
        Self(format!("{}{digest}", Kind::Packs.prefix()))
    }

    /// Of the results of an invocation.
    pub fn action(invocation: &InvocationDigest) -> Self {
        Self::spread(Kind::Actions, &invocation.0)
    }

    /// Of a build manifest, by its fingerprint.
    pub fn build(fingerprint: &Digest) -> Self {
        Self(format!("{}{fingerprint}", Kind::Builds.prefix()))
    }

    /// Of a published tree.
    pub fn tree(name: &TreeName) -> Self {
        Self(format!("{}{}", Kind::Trees.prefix(), name.0))
    }

    /// Of a lease.
    pub fn lease(id: &Digest) -> Self {
        Self(format!("{}{id}", Kind::Leases.prefix()))
    }

    /// Of a list of what is about to be removed.
    pub fn condemned(id: &Digest) -> Self {
        Self(format!("{}{id}", Kind::Condemned.prefix()))
    }

    /// Of what a check writes.
    pub fn check(id: &Digest) -> Self {
        Self(format!("{}{id}", Kind::Check.prefix()))
    }

    fn spread(kind: Kind, digest: &Digest) -> Self {
        let hex = digest.hex();
        Self(format!("{}{}/{hex}", kind.prefix(), &hex[..2]))
    }

    /// As it is spelled in the remote, below the prefix.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What kind of object it is of.
    pub fn kind(&self) -> Option<Kind> {
        let is_of = |kind: &Kind| self.0.starts_with(&kind.prefix());
        Kind::ALL.into_iter().find(is_of)
    }

    /// The tree it names, if it is of that kind.
    pub fn tree_name(&self) -> Option<TreeName> {
        self.0.strip_prefix(&Kind::Trees.prefix())?.parse().ok()
    }

    /// What it names, if it is of a kind that has digests for names.
    pub fn digest(&self) -> Option<Digest> {
        self.0.rsplit('/').next()?.parse().ok()
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ObjectName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let no_name = || NameError(text.to_owned());
        let kind = Self(text.to_owned()).kind().ok_or_else(no_name)?;
        let rest: Vec<&str> = text[kind.prefix().len()..].split('/').collect();
        let digest = |text: &str| text.parse().map_err(|_| no_name());
        let name = match (kind, rest.as_slice()) {
            (Kind::Blobs, [_, hex]) => Self::blob(&digest(hex)?),
            (Kind::Actions, [_, hex]) => Self::action(&InvocationDigest(digest(hex)?)),
            (Kind::Packs, [hex]) => Self::pack(&digest(hex)?),
            (Kind::Builds, [hex]) => Self::build(&digest(hex)?),
            (Kind::Check, [hex]) => Self::check(&digest(hex)?),
            (Kind::Leases, [hex]) => Self::lease(&digest(hex)?),
            (Kind::Condemned, [hex]) => Self::condemned(&digest(hex)?),
            (Kind::Trees, [name]) => Self::tree(&name.parse()?),
            _ => return Err(no_name()),
        };
        // Another spelling of it is another object.
        if name.0 == text {
            Ok(name)
        } else {
            Err(no_name())
        }
    }
}

/// The name somebody gives a published tree: letters, digits, `.`, `_` and `-`, no `.` first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TreeName(String);

impl TreeName {
    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TreeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TreeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_name = !text.is_empty()
            && text.len() <= LONGEST
            && !text.starts_with('.')
            && text.bytes().all(allowed);
        is_name
            .then(|| Self(text.to_owned()))
            .ok_or_else(|| NameError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let digest = Digest::of(b"x");
        let tree: TreeName = "ci-main_1.2".parse().expect("a name");
        for name in [
            ObjectName::blob(&digest),
            ObjectName::pack(&digest),
            ObjectName::action(&InvocationDigest(digest)),
            ObjectName::build(&digest),
            ObjectName::tree(&tree),
            ObjectName::lease(&digest),
            ObjectName::condemned(&digest),
            ObjectName::check(&digest),
        ] {
            assert_eq!(name.as_str().parse(), Ok(name.clone()));
        }
        let hex = digest.hex();
        let name = ObjectName::blob(&digest);
        assert_eq!(name.as_str(), format!("v1/blobs/{}/{hex}", &hex[..2]));
        assert_eq!(name.digest(), Some(digest));
        assert_eq!(name.kind(), Some(Kind::Blobs));
    }

    #[test]
    fn hostile_names_are_none() {
        let hex = Digest::of(b"x").hex();
        let upper = hex.to_uppercase();
        for text in [
            String::new(),
            "v1".into(),
            "v1/blobs/".into(),
            format!("v1/blobs/{hex}"),
            format!("v1/blobs/00/{hex}"),
            format!("v1/blobs/{}/{upper}", &hex[..2]),
            format!("v1/blobs/{}/{hex}/x", &hex[..2]),
            format!("v2/blobs/{}/{hex}", &hex[..2]),
            format!("/v1/packs/{hex}"),
            format!("v1/packs/../packs/{hex}"),
            "v1/trees/..".into(),
            "v1/trees/.hidden".into(),
            "v1/trees/a/b".into(),
            "v1/trees/a b".into(),
            "v1/trees/a\0".into(),
            format!("v1/trees/{}", "a".repeat(129)),
            format!("v1/leases/../{hex}"),
        ] {
            assert!(text.parse::<ObjectName>().is_err(), "{text}");
        }
    }
}
