//! Packs: many small blobs in one object, which is one request instead of hundreds.
//!
//! ```text
//! 16 random bytes
//! the objects that keep the blobs (`blob`), one behind the other
//! the index: digest, size, offset and length of each, in postcard
//! the length of the index, u32, little-endian
//! "kfp1"
//! ```
//!
//! A pack is named by the digest of all of it, and no two of them have the same name, whatever is in
//! them: who removes one that nobody needs never removes what somebody has just sent. Who wants a blob knows where it is from the fact that
//! names it, and asks for that range alone; the index is for who has only the pack.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};

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

/// What makes the name of a pack its own, in bytes.
const NONCE: usize = 16;

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
        if self.object.get_ref().is_empty() {
            self.object.write_all(&nonce()?)?;
        }
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
        object.extend(tail(&self.index)?);
        let digest = Digest::of(&object);
        Ok((object.into(), digest, self.index))
    }
}

/// Writes a pack of one blob, which may be large, to an empty file. Returns the name of the pack, and
/// where in it the blob is. What is not what its digest says is an error of
/// [`io::ErrorKind::InvalidData`].
pub fn alone(
    digest: Digest,
    size: u64,
    blob: impl Read,
    mut object: &File,
) -> io::Result<(Digest, Packed)> {
    object.write_all(&nonce()?)?;
    let offset = object.stream_position()?;
    if blob::pack(blob, size, object)? != digest {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let packed = Packed {
        digest,
        size,
        offset,
        length: object.stream_position()? - offset,
    };
    object.write_all(&tail(&[packed])?)?;
    object.seek(SeekFrom::Start(0))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(object)?;
    let name = Digest::from_slice(hasher.finalize().as_bytes());
    let name = name.ok_or_else(|| io::Error::other("a digest of another length"))?;
    Ok((name, packed))
}

fn nonce() -> io::Result<[u8; NONCE]> {
    let mut nonce = [0; NONCE];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

/// What ends a pack.
fn tail(index: &[Packed]) -> io::Result<Vec<u8>> {
    let mut tail = postcard::to_allocvec(index).map_err(io::Error::other)?;
    let length = u32::try_from(tail.len()).map_err(io::Error::other)?;
    tail.extend(length.to_le_bytes());
    tail.extend(MAGIC);
    Ok(tail)
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
    fn no_two_packs_have_the_same_name() {
        assert_ne!(pack(&[b"one"]).1, pack(&[b"one"]).1);
    }

    #[test]
    fn a_pack_of_one_blob_is_a_pack() {
        let blob = vec![3; 600_000];
        let (digest, size) = (Digest::of(&blob), blob.len() as u64);
        let file = tempfile::tempfile().expect("a file");
        let (name, packed) = alone(digest, size, blob.as_slice(), &file).expect("writes");
        let mut object = Vec::new();
        (&file).seek(SeekFrom::Start(0)).expect("seeks");
        (&file).read_to_end(&mut object).expect("reads");
        assert_eq!(name, Digest::of(&object));
        assert_eq!(super::index(&object), Some(vec![packed]));
        let at = |offset: u64| usize::try_from(offset).expect("small");
        let kept = &object[at(packed.offset)..at(packed.offset + packed.length)];
        assert_eq!(blob::unpack(kept, digest, size).expect("unpacks"), blob);
        let file = tempfile::tempfile().expect("a file");
        let other = Digest::of(b"other");
        alone(other, size, blob.as_slice(), &file).expect_err("refused");
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
