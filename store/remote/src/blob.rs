//! How a blob is kept in a remote: in frames, each of which can be fetched and verified alone.
//!
//! ```text
//! offset  bytes
//! 0       4        `kfb1`
//! 4       8        length of the blob, little endian
//! 12      4 * n    length of each frame as it is kept, little endian; the highest bit: not compressed
//! ...     32 * n   BLAKE3 chaining value of each frame; none where there is one frame
//! ...     frames   zstd (RFC 8878), or the bytes themselves
//! ```
//!
//! A frame holds [`FRAME`] bytes of the blob, the last one what is left. BLAKE3 is a tree over chunks of
//! 1 KiB, and a frame a whole subtree of it, so the chaining values of all frames merge to the digest
//! that names the blob (BLAKE3 paper, section 2.1): a header that does is as good as the digest, and
//! each frame is then held against its own value. Nobody has to believe what a remote says: a length
//! that is not true leads to a frame that is not, and no frame unpacks to more than was asked for.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len};
use blake3::hazmat::{merge_subtrees_non_root, merge_subtrees_root};
use store::Digest;

/// Bytes of a blob in one frame.
pub const FRAME: u64 = 256 << 10;

/// No blob is larger: what S3 takes in one piece (S3 User Guide, "Uploading objects").
pub const LARGEST: u64 = 5 << 30;

const MAGIC: &[u8; 4] = b"kfb1";

/// Magic and length.
const FIXED: usize = 12;

/// Marks the length of a frame that is kept as it is.
const PLAIN: u32 = 1 << 31;

/// Compression that does not keep a build waiting: about 500 MB/s, and half of the size of an rlib.
const LEVEL: i32 = 1;

/// Bytes that are not what the name of a blob promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Fewer bytes than there should be.
    #[error("cut short")]
    Short,
    /// Not the first bytes of a blob that is so long.
    #[error("not the header of this blob")]
    Header,
    /// The chaining values do not merge to the digest.
    #[error("the header is not that of the digest")]
    Digest,
    /// A frame that does not unpack, or to something else.
    #[error("frame {0} is damaged")]
    Frame(u64),
    /// A length that no blob has.
    #[error("{0} bytes are too many")]
    Size(u64),
}

/// Which bytes of a blob are in which frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    size: u64,
}

impl Frames {
    /// The frames of a blob of this length.
    pub fn of(size: u64) -> Result<Self, Damage> {
        if size > LARGEST {
            return Err(Damage::Size(size));
        }
        Ok(Self { size })
    }

    /// Length of the blob in bytes.
    pub fn size(self) -> u64 {
        self.size
    }

    /// How many there are.
    pub fn count(self) -> u64 {
        self.size.div_ceil(FRAME)
    }

    /// Length of the header in bytes.
    pub fn header_len(self) -> u64 {
        FIXED as u64 + self.count() * 4 + self.chaining_values() * blake3::OUT_LEN as u64
    }

    /// The bytes of the blob that a frame holds.
    pub fn bytes(self, frame: u64) -> Range<u64> {
        let start = frame * FRAME;
        start..(start + FRAME).min(self.size)
    }

    /// The frames that hold these bytes of the blob.
    pub fn holding(self, bytes: Range<u64>) -> Range<u64> {
        let end = bytes.end.min(self.size);
        if bytes.start >= end {
            return 0..0;
        }
        bytes.start / FRAME..end.div_ceil(FRAME)
    }

    fn chaining_values(self) -> u64 {
        match self.count() {
            0 | 1 => 0,
            count => count,
        }
    }
}

/// What a remote says of a blob's frames, found to be true of the digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    digest: Digest,
    frames: Frames,
    /// Where each frame starts in the object, and where the last one ends.
    starts: Vec<u64>,
    plain: Vec<bool>,
    values: Vec<ChainingValue>,
}

impl Header {
    /// Reads the first bytes of an object that is to hold this blob.
    ///
    /// `bytes` may be more than the header. Lengths of frames are believed until a frame is read.
    pub fn read(bytes: &[u8], digest: Digest, size: u64) -> Result<Self, Damage> {
        let frames = Frames::of(size)?;
        let length = usize::try_from(frames.header_len()).map_err(|_| Damage::Size(size))?;
        let header = bytes.get(..length).ok_or(Damage::Short)?;
        let (fixed, rest) = header.split_at(FIXED);
        if fixed[..4] != MAGIC[..] || fixed[4..] != size.to_le_bytes() {
            return Err(Damage::Header);
        }
        let (lengths, values) = rest.split_at(rest.len() - values_len(frames));
        let mut header = Self {
            digest,
            frames,
            starts: vec![length as u64],
            plain: Vec::new(),
            values: values.as_chunks().0.to_vec(),
        };
        let mut start = length as u64;
        for (index, length) in lengths.as_chunks().0.iter().enumerate() {
            let kept = u32::from_le_bytes(*length);
            let most = most_kept(frames.bytes(index as u64));
            let (plain, kept) = (kept & PLAIN != 0, u64::from(kept & !PLAIN));
            if kept > most {
                return Err(Damage::Header);
            }
            start += kept;
            header.starts.push(start);
            header.plain.push(plain);
        }
        let is_of_digest = match frames.count() {
            0 => digest == Digest::of(b""),
            // The one frame is held against the digest itself.
            1 => true,
            _ => merged(frames, &header.values) == digest,
        };
        if is_of_digest {
            Ok(header)
        } else {
            Err(Damage::Digest)
        }
    }

    /// Which bytes of which frames.
    pub fn frames(&self) -> Frames {
        self.frames
    }

    /// The length of the whole object.
    pub fn object_len(&self) -> u64 {
        self.starts.last().copied().unwrap_or_default()
    }

    /// Where these frames are in the object.
    pub fn kept(&self, frames: Range<u64>) -> Range<u64> {
        let at = |frame: u64| {
            let index = usize::try_from(frame).unwrap_or(usize::MAX);
            self.starts.get(index).copied().unwrap_or(self.object_len())
        };
        at(frames.start)..at(frames.end)
    }

    /// The bytes of the blob in a frame, of which `kept` is what the object holds.
    pub fn unpack(&self, frame: u64, kept: &[u8]) -> Result<Vec<u8>, Damage> {
        let damaged = Damage::Frame(frame);
        let index = usize::try_from(frame).map_err(|_| damaged)?;
        let plain = *self.plain.get(index).ok_or(damaged)?;
        let range = self.frames.bytes(frame);
        let length = usize::try_from(range.end - range.start).map_err(|_| damaged)?;
        let bytes = if plain {
            kept.to_vec()
        } else {
            // Unpacks no more than this, whatever the frame says of itself.
            zstd::bulk::decompress(kept, length).map_err(|_| damaged)?
        };
        if bytes.len() != length {
            return Err(damaged);
        }
        let is_right = match self.values.get(index) {
            Some(value) => chaining_value(range.start, &bytes) == *value,
            None => Digest::of(&bytes) == self.digest,
        };
        if is_right { Ok(bytes) } else { Err(damaged) }
    }
}

/// The whole blob of which `object` is all that is kept.
pub fn unpack(object: &[u8], digest: Digest, size: u64) -> Result<Vec<u8>, Damage> {
    let header = Header::read(object, digest, size)?;
    let mut blob = Vec::new();
    for frame in 0..header.frames.count() {
        let kept = header.kept(frame..frame + 1);
        let kept = usize::try_from(kept.start)
            .ok()
            .zip(usize::try_from(kept.end).ok());
        let kept = kept
            .and_then(|(start, end)| object.get(start..end))
            .ok_or(Damage::Short)?;
        blob.extend(header.unpack(frame, kept)?);
    }
    Ok(blob)
}

/// Writes the object that keeps a blob of `size` bytes, from where `object` stands. Returns the digest of
/// what was read. [`io::ErrorKind::UnexpectedEof`] where `blob` has fewer bytes.
pub fn pack(mut blob: impl Read, size: u64, mut object: impl Write + Seek) -> io::Result<Digest> {
    let frames = Frames::of(size).map_err(io::Error::other)?;
    let start = object.stream_position()?;
    object.seek(SeekFrom::Start(start + frames.header_len()))?;
    let mut header = [&MAGIC[..], &size.to_le_bytes()].concat();
    let (mut values, mut whole) = (Vec::new(), blake3::Hasher::new());
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    let mut bytes = Vec::new();
    for frame in 0..frames.count() {
        let range = frames.bytes(frame);
        bytes.resize(
            usize::try_from(range.end - range.start).map_err(io::Error::other)?,
            0,
        );
        blob.read_exact(&mut bytes)?;
        whole.update(&bytes);
        values.push(chaining_value(range.start, &bytes));
        let compressed = compressor.compress(&bytes)?;
        let (kept, flag) = if compressed.len() < bytes.len() {
            (&compressed, 0)
        } else {
            (&bytes, PLAIN)
        };
        let length = u32::try_from(kept.len()).map_err(io::Error::other)?;
        header.extend((length | flag).to_le_bytes());
        object.write_all(kept)?;
    }
    if frames.chaining_values() > 0 {
        header.extend(values.as_flattened());
    }
    object.seek(SeekFrom::Start(start))?;
    object.write_all(&header)?;
    object.seek(SeekFrom::End(0))?;
    let digest = Digest::from_slice(whole.finalize().as_bytes());
    digest.ok_or_else(|| io::Error::other("a digest of another length"))
}

fn values_len(frames: Frames) -> usize {
    usize::try_from(frames.chaining_values()).unwrap_or(usize::MAX) * blake3::OUT_LEN
}

/// What is not smaller when compressed is kept as it is.
fn most_kept(bytes: Range<u64>) -> u64 {
    bytes.end - bytes.start
}

fn chaining_value(offset: u64, bytes: &[u8]) -> ChainingValue {
    blake3::Hasher::new()
        .set_input_offset(offset)
        .update(bytes)
        .finalize_non_root()
}

/// The digest of the blob whose frames have these chaining values; there are two at least.
fn merged(frames: Frames, values: &[ChainingValue]) -> Digest {
    let (left, right) = halves(frames.size, values);
    let hash = merge_subtrees_root(&left, &right, Mode::Hash);
    Digest::from_slice(hash.as_bytes()).unwrap_or_else(|| Digest::of(b""))
}

fn halves(size: u64, values: &[ChainingValue]) -> (ChainingValue, ChainingValue) {
    let left = left_subtree_len(size);
    let count = usize::try_from(left / FRAME).unwrap_or(usize::MAX);
    let (first, second) = values.split_at(count);
    (subtree(left, first), subtree(size - left, second))
}

fn subtree(size: u64, values: &[ChainingValue]) -> ChainingValue {
    match values {
        [value] => *value,
        values => {
            let (left, right) = halves(size, values);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn packed(blob: &[u8]) -> (Vec<u8>, Digest) {
        let mut object = Cursor::new(Vec::new());
        let digest = pack(blob, blob.len() as u64, &mut object).expect("packs");
        (object.into_inner(), digest)
    }

    /// Bytes of which some compress and some do not.
    fn blob(size: usize, seed: u8) -> Vec<u8> {
        let mut noise = blake3::Hasher::new().update(&[seed]).finalize_xof();
        let mut bytes = vec![0; size];
        noise.fill(&mut bytes);
        for (index, byte) in bytes.iter_mut().enumerate() {
            if index / 100_000 % 2 == 0 {
                *byte = seed;
            }
        }
        bytes
    }

    const F: usize = 256 << 10;

    #[test]
    fn what_is_packed_comes_back() {
        for size in [
            0,
            1,
            1024,
            1025,
            F - 1,
            F,
            F + 1,
            2 * F,
            3 * F + 1,
            5 * F,
            8 * F,
            9 * F + 7,
        ] {
            let blob = blob(size, 3);
            let (object, digest) = packed(&blob);
            assert_eq!(digest, Digest::of(&blob), "{size}");
            assert_eq!(
                unpack(&object, digest, size as u64).as_ref(),
                Ok(&blob),
                "{size}"
            );
            let header = Header::read(&object, digest, size as u64).expect("reads");
            assert_eq!(header.object_len(), object.len() as u64);
        }
    }

    #[test]
    fn a_range_needs_only_its_frames() {
        let blob = blob(7 * F + 5, 9);
        let (object, digest) = packed(&blob);
        let frames = Frames::of(blob.len() as u64).expect("small");
        let start = &object[..usize::try_from(frames.header_len()).expect("fits")];
        let header = Header::read(start, digest, blob.len() as u64).expect("reads");
        let wanted = (2 * F - 1) as u64..(3 * F) as u64;
        assert_eq!(frames.holding(wanted), 1..3);
        for frame in 1..3 {
            let kept = header.kept(frame..frame + 1);
            let kept = &object[usize::try_from(kept.start).expect("fits")..]
                [..usize::try_from(kept.end - kept.start).expect("fits")];
            let at = usize::try_from(frame * FRAME).expect("fits");
            assert_eq!(header.unpack(frame, kept).as_deref(), Ok(&blob[at..at + F]));
        }
        assert_eq!(frames.holding(blob.len() as u64..u64::MAX), 0..0);
        assert_eq!(frames.holding(7 * FRAME + 4..u64::MAX), 7..8);
    }

    #[test]
    fn the_bytes_of_another_blob_are_refused() {
        for size in [10, 3 * F] {
            let (object, _) = packed(&blob(size, 1));
            let (_, wanted) = packed(&blob(size, 2));
            assert!(unpack(&object, wanted, size as u64).is_err());
        }
        let (empty, _) = packed(b"");
        assert_eq!(unpack(&empty, Digest::of(b"x"), 0), Err(Damage::Digest));
    }

    #[test]
    fn nothing_unpacks_to_more_than_its_size() {
        // Some kilobytes that are 64 MiB, where less than the size of one frame belongs.
        let size = 200_000_u64;
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], LEVEL).expect("compresses");
        let length = u32::try_from(bomb.len()).expect("fits");
        assert!(u64::from(length) < size);
        let mut object = [&MAGIC[..], &size.to_le_bytes(), &length.to_le_bytes()].concat();
        object.extend(&bomb);
        let digest = Digest::of(&vec![0; 200_000]);
        assert_eq!(unpack(&object, digest, size), Err(Damage::Frame(0)));
        let object = [&MAGIC[..], &u64::MAX.to_le_bytes()].concat();
        assert_eq!(
            unpack(&object, digest, u64::MAX),
            Err(Damage::Size(u64::MAX))
        );
    }

    /// Other machines read what is written today.
    #[test]
    fn the_layout_is_fixed() {
        let (object, digest) = packed(b"abc");
        let mut golden = b"kfb1".to_vec();
        golden.extend([3, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0x80]);
        golden.extend(b"abc");
        assert_eq!(object, golden);
        assert_eq!(digest, Digest::of(b"abc"));
        let blob = vec![7; F + 1];
        let (object, _) = packed(&blob);
        let values = [
            chaining_value(0, &blob[..F]),
            chaining_value(FRAME, &blob[F..]),
        ];
        assert_eq!(&object[4..12], (F as u64 + 1).to_le_bytes());
        assert_eq!(&object[20..84], values.as_flattened());
        assert_eq!(
            object[84 - 68..84 - 64],
            [1, 0, 0, 0x80],
            "a plain frame of one byte"
        );
    }

    #[test]
    fn what_is_shorter_than_said_is_an_error() {
        let error = pack(&b"abc"[..], 4, Cursor::new(Vec::new())).expect_err("too short");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_flipped_bit_gets_through(size in 0..3 * F, seed: u8, at: prop::sample::Index, bit in 0..8_u8) {
            let blob = blob(size, seed);
            let (mut object, digest) = packed(&blob);
            let at = at.index(object.len());
            object[at] ^= 1_u8 << bit;
            // zstd has bits that mean nothing; whatever comes back is the blob.
            if let Ok(bytes) = unpack(&object, digest, size as u64) {
                prop_assert_eq!(bytes, blob);
            }
        }

        #[test]
        fn no_cut_object_is_read(size in 1..3 * F, seed: u8, at: prop::sample::Index) {
            let blob = blob(size, seed);
            let (mut object, digest) = packed(&blob);
            object.truncate(at.index(object.len()));
            prop_assert!(unpack(&object, digest, size as u64).is_err());
        }
    }
}
