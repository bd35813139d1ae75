//! Texts that make an object depend on when it was made: `__DATE__`, `__TIME__`, `__TIMESTAMP__`.
//!
//! Whoever includes one that only names them is not cached either: whether they are used, the
//! preprocessor alone knows. (A text that pastes such a name together is not found.)

use std::fs::{self, File};
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::path::Path;

use lru::LruCache;
use parking_lot::Mutex;
use store::Digest;

use super::super::files::FileDigests;

/// Texts that are remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not zero");

/// Nobody includes a larger one; it counts as depending on the clock.
const LARGEST_TEXT: u64 = 64 << 20;

/// What programs and libraries begin with.
const MAGIC: &[u8] = b"\x7fELF";

const NAMES: [&[u8]; 3] = [b"DATE__", b"TIME__", b"TIMESTAMP__"];

/// Knows texts by their digests.
pub struct Dates(Mutex<LruCache<Digest, bool>>);

impl Default for Dates {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REMEMBERED)))
    }
}

impl Dates {
    /// Whether a file on the disk names the clock. Programs and libraries do not count.
    pub(super) fn in_file(&self, files: &FileDigests, path: &Path) -> io::Result<bool> {
        let meta = fs::metadata(path)?;
        if !meta.is_file() {
            return Ok(false);
        }
        let digest = files.known_file(path, &meta)?;
        if let Some(known) = self.0.lock().get(&digest) {
            return Ok(*known);
        }
        let file = File::open(path)?;
        let mut text = Vec::new();
        let mut first = file.take(MAGIC.len() as u64);
        first.read_to_end(&mut text)?;
        let found = if text == MAGIC {
            false
        } else if meta.len() > LARGEST_TEXT {
            true
        } else {
            first.into_inner().read_to_end(&mut text)?;
            // What was read may be newer than the digest: then it is no answer for that.
            let found = in_text(&text);
            if Digest::of(&text) != digest {
                return Ok(found);
            }
            found
        };
        self.0.lock().put(digest, found);
        Ok(found)
    }
}

/// Whether a text names the clock.
pub(super) fn in_text(text: &[u8]) -> bool {
    if text.starts_with(MAGIC) {
        return false;
    }
    let mut rest = text;
    while let Some(at) = rest.windows(2).position(|pair| pair == b"__") {
        rest = &rest[at + 1..];
        if NAMES.iter().any(|name| rest[1..].starts_with(name)) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::in_text;

    #[test]
    fn finds_the_names() {
        for text in [
            "x = __DATE__;",
            "__TIME__",
            "a\n___TIMESTAMP__",
            "__STDC__ __DATE__",
        ] {
            assert!(in_text(text.as_bytes()), "{text}");
        }
        for text in [
            "",
            "__",
            "__DATE_",
            "DATE__",
            "__FILE__",
            "\x7fELF __DATE__",
        ] {
            assert!(!in_text(text.as_bytes()), "{text}");
        }
    }
}
