//! Objects that hold blobs, and lists of them: what somebody uses, and what is about to be removed.

use std::time::Duration;

use remote::{Kind, ObjectName};
use serde::{Deserialize, Serialize};
use store::codec::{Record, decode, encode};
use store::{ActionEntry, Digest, Fact, Place, Tree};

use super::facts;

/// An object that holds blobs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Container {
    /// One of its own, which has the name of the blob.
    Blob(Digest),
    /// A pack of this name.
    Pack(Digest),
}

impl Container {
    /// The one that holds a blob at a place.
    pub fn of(digest: &Digest, place: &Place) -> Self {
        match place {
            Place::Own => Self::Blob(*digest),
            Place::Pack { pack, .. } => Self::Pack(*pack),
        }
    }

    /// The one of this name; `None` for objects of other kinds.
    pub fn named(name: &ObjectName) -> Option<Self> {
        match name.kind()? {
            Kind::Blobs => name.digest().map(Self::Blob),
            Kind::Packs => name.digest().map(Self::Pack),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(&self) -> ObjectName {
        match self {
            Self::Blob(digest) => ObjectName::blob(digest),
            Self::Pack(pack) => ObjectName::pack(pack),
        }
    }
}

/// What a result names.
pub fn of_fact(fact: &Fact) -> Vec<Container> {
    let blobs = fact
        .entries
        .iter()
        .flat_map(|(_, entry)| ActionEntry::blobs(entry));
    of_blobs(blobs, &fact.packed)
}

/// What a tree names.
pub fn of_tree(tree: &Tree) -> Vec<Container> {
    of_blobs(tree.blobs(), &tree.packed)
}

fn of_blobs(
    blobs: impl Iterator<Item = (Digest, u64)>,
    packed: &[(Digest, Place)],
) -> Vec<Container> {
    let packed: std::collections::HashMap<_, _> = packed.iter().copied().collect();
    let container =
        |(digest, _)| Container::of(&digest, packed.get(&digest).unwrap_or(&Place::Own));
    blobs.map(container).collect()
}

/// A list of objects.
#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct List {
    /// The grace of who has written it, in milliseconds; 0 where it did not say.
    pub grace_ms: u64,
    /// The objects.
    pub containers: Vec<Container>,
}

impl Record for List {
    const NAME: &'static str = "list of objects";
    const VERSION: u8 = 2;

    fn decode_older(version: u8, body: &[u8]) -> Option<postcard::Result<Self>> {
        let convert = |(containers, rest): (_, &[u8])| match rest {
            [] => Ok(Self {
                grace_ms: 0,
                containers,
            }),
            _ => Err(postcard::Error::DeserializeBadEncoding),
        };
        (version == 1).then(|| postcard::take_from_bytes(body).and_then(convert))
    }
}

/// The object that holds a list, of who has that grace.
pub fn write(
    grace: Duration,
    containers: impl IntoIterator<Item = Container>,
) -> std::io::Result<Vec<u8>> {
    let list = List {
        grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        containers: containers.into_iter().collect(),
    };
    facts::pack(&encode(&list).map_err(std::io::Error::other)?)
}

/// The list that an object holds; `None` where it holds none, or one of a later kachefs.
pub fn read(object: &[u8]) -> Option<List> {
    decode(&facts::unpack(object, facts::LARGEST_UNPACKED)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_they_were_written() {
        let digest = Digest::of(b"x");
        let list = [Container::Blob(digest), Container::Pack(digest)];
        let object = write(Duration::from_secs(2), list).expect("writes");
        let expected = |grace_ms| {
            let containers = list.to_vec();
            Some(List {
                grace_ms,
                containers,
            })
        };
        assert_eq!(read(&object), expected(2000));
        for end in 0..object.len() {
            assert_eq!(read(&object[..end]), None, "{end}");
        }
        for container in list {
            assert_eq!(Container::named(&container.name()), Some(container));
        }
        assert_eq!(Container::named(&ObjectName::build(&digest)), None);
        // As they were before they had a grace.
        let mut older = vec![1, 2, 0];
        older.extend_from_slice(digest.as_bytes());
        older.push(1);
        older.extend_from_slice(digest.as_bytes());
        let pack = |bytes: &[u8]| facts::pack(bytes).expect("packs");
        assert_eq!(read(&pack(&older)), expected(0));
        older.push(0);
        assert_eq!(read(&pack(&older)), None);
    }

    #[test]
    fn a_result_names_packs_where_its_blobs_are_in_them() {
        let (digest, pack) = (Digest::of(b"x"), Digest::of(b"p"));
        let place = Place::Pack {
            pack,
            offset: 1,
            length: 2,
        };
        let blobs = [(digest, 1), (pack, 2)];
        let found = of_blobs(blobs.into_iter(), &[(digest, place)]);
        assert_eq!(found, [Container::Pack(pack), Container::Blob(pack)]);
    }
}
