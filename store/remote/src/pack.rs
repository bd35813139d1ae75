//! Packs: many small blobs in one object, which is one request instead of hundreds.
//!
//! ```text
//! the objects that keep the blobs (`blob`), one behind the other
//! the index: digest, size, offset and length of each, in postcard
//! the length of the index, u32, little-endian
//! "kfp1"
//! ```
//!
//! A pack is named by the digest of all of it. Who wants a blob knows where it is from the fact that
//! names it, and asks for that range alone; the index is for who has only the pack.

use std::io::{self, Cursor, Read};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use store::{Digest, Place};

use crate::blob;

const MAGIC: [u8; 4] = *b"kfp1";

/// How long a pack's index is, and its magic.
const TAIL: usize = size_of::<u32>() + MAGIC.len();

/// A blob in a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Packed {
    /// Which blob.
    pub digest: Digest,
    /// Its length in bytes, as a blob.
    pub size: u64,
    /// Where it starts in the pack.
    pub offset: u64,
    /// How many bytes it is there.
    pub length: u64,
}

/// A pack being made, in memory.
#[derive(Default)]
pub struct Packer {
    object: Cursor<Vec<u8>>,
    index: Vec<Packed>,
}

impl Packer {
    /// Adds a blob of `size` bytes. One that is not what its digest says is an error of
    /// [`io::ErrorKind::InvalidData`], and not in the pack.
    pub fn add(&mut self, digest: Digest, size: u64, bytes: impl Read) -> io::Result<()> {
        let offset = self.object.position();
        let packed = blob::pack(bytes, size, &mut self.object);
        let right = match packed {
            Ok(found) if found == digest => Ok(()),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(error) => Err(error),
        };
        if right.is_err() {
            let kept = usize::try_from(offset).unwrap_or(usize::MAX);
            self.object.get_mut().truncate(kept);
            self.object.set_position(offset);
            return right;
        }
        self.index.push(Packed {
            digest,
            size,
            offset,
            length: self.object.position() - offset,
        });
        Ok(())
    }

    /// How many bytes are in it.
    pub fn len(&self) -> u64 {
        self.object.position()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The object, its name, and what is where in it.
    pub fn finish(self) -> io::Result<(Bytes, Digest, Vec<Packed>)> {
        let mut object = self.object.into_inner();
        let start = object.len();
        object = postcard::to_extend(&self.index, object).map_err(io::Error::other)?;
        let length = u32::try_from(object.len() - start).map_err(io::Error::other)?;
        object.extend(length.to_le_bytes());
        object.extend(MAGIC);
        let digest = Digest::of(&object);
        Ok((object.into(), digest, self.index))
    }
}

/// Where a packed blob is, for those who know the name of the pack.
impl Packed {
    /// Its place.
    pub fn place(&self, pack: Digest) -> Place {
        Place::Pack {
            pack,
            offset: self.offset,
            length: self.length,
        }
    }
}

/// What a pack says is in it; `None` where it is no pack, or says what cannot be.
pub fn index(object: &[u8]) -> Option<Vec<Packed>> {
    let (rest, tail) = object.split_at_checked(object.len().checked_sub(TAIL)?)?;
    let (length, magic) = tail.split_first_chunk::<4>()?;
    if magic != MAGIC {
        return None;
    }
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let (blobs, index) = rest.split_at_checked(rest.len().checked_sub(length)?)?;
    let (index, rest) = postcard::take_from_bytes::<Vec<Packed>>(index).ok()?;
    let fits = |packed: &Packed| {
        let end = packed.offset.checked_add(packed.length);
        end.is_some_and(|end| end <= blobs.len() as u64)
    };
    (rest.is_empty() && index.iter().all(fits)).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(blobs: &[&[u8]]) -> (Bytes, Digest, Vec<Packed>) {
        let mut packer = Packer::default();
        for bytes in blobs {
            let added = packer.add(Digest::of(bytes), bytes.len() as u64, *bytes);
            added.expect("added");
        }
        packer.finish().expect("finishes")
    }

    #[test]
    fn each_blob_comes_out_of_its_range() {
        let large = vec![7; 70_000];
        let blobs: [&[u8]; 3] = [b"one", b"", &large];
        let (object, digest, index) = pack(&blobs);
        assert_eq!(digest, Digest::of(&object));
        assert_eq!(super::index(&object).expect("an index"), index);
        for (bytes, packed) in blobs.iter().zip(&index) {
            let start = usize::try_from(packed.offset).expect("small");
            let end = start + usize::try_from(packed.length).expect("small");
            let found = blob::unpack(&object[start..end], Digest::of(bytes), packed.size);
            assert_eq!(found.expect("unpacks"), *bytes);
        }
    }

    #[test]
    fn what_is_not_the_blob_stays_out() {
        let mut packer = Packer::default();
        packer.add(Digest::of(b"a"), 1, &b"a"[..]).expect("added");
        let before = packer.len();
        for (size, bytes) in [(1, &b"b"[..]), (2, &b"a"[..])] {
            packer
                .add(Digest::of(b"a"), size, bytes)
                .expect_err("refused");
            assert_eq!(packer.len(), before);
        }
        packer.add(Digest::of(b"c"), 1, &b"c"[..]).expect("added");
        let (object, _, index) = packer.finish().expect("finishes");
        assert_eq!(index.len(), 2);
        assert_eq!(super::index(&object), Some(index));
    }

    #[test]
    fn no_other_bytes_are_a_pack() {
        let (object, ..) = pack(&[b"one", b"two"]);
        for end in 0..object.len() {
            assert_eq!(index(&object[..end]), None, "{end}");
        }
        let mut beyond = postcard::to_allocvec(&vec![Packed {
            digest: Digest::of(b"x"),
            size: 1,
            offset: u64::MAX,
            length: 2,
        }])
        .expect("encodes");
        let length = u32::try_from(beyond.len()).expect("small");
        beyond.extend(length.to_le_bytes());
        beyond.extend(MAGIC);
        assert_eq!(index(&beyond), None);
    }
}
