//! BLAKE3-256 digests: the names of blobs, actions and everything else that is content-addressed.
//!
//! Never a bare byte array outside this file: a [`Digest`] can only be made by hashing bytes or
//! by parsing what an earlier hash printed.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// BLAKE3-256 of some bytes (<https://github.com/BLAKE3-team/BLAKE3-specs>).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest([u8; Digest::LEN]);

impl Digest {
    /// Bytes of a digest.
    pub const LEN: usize = 32;

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The raw bytes, for use inside a database key.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// A digest read back from a database key; `None` when the length is not [`Self::LEN`].
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Lower-case hexadecimal, 64 characters.
    pub fn hex(&self) -> String {
        blake3::Hash::from(self.0).to_hex().to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({}…)", &self.hex()[..12])
    }
}

/// A text that is not 64 hexadecimal characters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a digest: {0:?} (64 hexadecimal characters expected)")]
pub struct ParseDigestError(pub String);

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        blake3::Hash::from_hex(text)
            .map(|hash| Self(*hash.as_bytes()))
            .map_err(|_| ParseDigestError(text.to_owned()))
    }
}

/// Hashes a sequence of labelled fields without ambiguity: every field is preceded by its length,
/// so no two different sequences hash alike.
#[derive(Clone)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// A hasher for one purpose; different `context` strings give unrelated digests.
    pub fn new(context: &str) -> Self {
        let mut hasher = Self(blake3::Hasher::new());
        hasher.field(context.as_bytes());
        hasher
    }

    /// Adds one field.
    pub fn field(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds a digest as a field.
    pub fn digest(&mut self, digest: &Digest) -> &mut Self {
        self.field(&digest.0)
    }

    /// Adds a number as a field.
    pub fn number(&mut self, number: u64) -> &mut Self {
        self.field(&number.to_le_bytes())
    }

    /// The digest of all fields so far.
    pub fn finish(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

/// Bytes read at a time when a file is hashed: large enough for BLAKE3's widest SIMD path.
pub(crate) const CHUNK: usize = 256 * 1024;

/// Reads `reader` to its end, hashing the bytes and showing each chunk to `each`.
/// Returns the digest and the number of bytes.
pub fn hash_reader(
    mut reader: impl Read,
    mut each: impl FnMut(&[u8]),
) -> io::Result<(Digest, u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = Buffer::take();
    let Buffer(buffer) = &mut buffer;
    let mut total = 0;
    loop {
        let n = match reader.read(buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..n]);
        each(&buffer[..n]);
        total += n as u64;
    }
    Ok((Digest(*hasher.finalize().as_bytes()), total))
}

thread_local! {
    /// Kept, because to fill a new one with zeroes takes longer than to hash a source file.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Room for a chunk, which goes back to its thread.
struct Buffer(Vec<u8>);

impl Buffer {
    fn take() -> Self {
        // A thread that ends has none any more.
        let mut buffer = BUFFER.try_with(Cell::take).unwrap_or_default();
        buffer.resize(CHUNK, 0);
        Self(buffer)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        let _ = BUFFER.try_with(|kept| kept.set(buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips() {
        let digest = Digest::of(b"abc");
        assert_eq!(
            digest.hex(),
            "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
        );
        assert_eq!(digest.hex().parse(), Ok(digest));
        assert!("xyz".parse::<Digest>().is_err());
    }

    #[test]
    fn fields_do_not_run_together() {
        let one = Hasher::new("t").field(b"ab").field(b"c").finish();
        let two = Hasher::new("t").field(b"a").field(b"bc").finish();
        assert_ne!(one, two);
        assert_ne!(Hasher::new("u").field(b"ab").field(b"c").finish(), one);
    }

    #[test]
    fn reader_and_slice_agree() {
        let bytes: Vec<u8> = (0..CHUNK * 2 + 17).map(|i| i.to_le_bytes()[0]).collect();
        // The second is shorter than what the first has left in the buffer, and one is read within another.
        for bytes in [&bytes[..], b"short", b""] {
            let mut seen = Vec::new();
            let hashed = hash_reader(bytes, |chunk| {
                seen.extend_from_slice(chunk);
                let within = hash_reader(&b"another"[..], |_| ()).expect("reads");
                assert_eq!(within, (Digest::of(b"another"), 7));
            });
            let expected = (Digest::of(bytes), bytes.len() as u64);
            assert_eq!((hashed.expect("reads"), &seen[..]), (expected, bytes));
        }
    }
}
