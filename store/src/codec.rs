//! How records become bytes: one version byte, then postcard.
//!
//! Every value in the index goes through here. A reader refuses a version it does not know, so a
//! newer kachefs never has its facts misread by an older one. Each record type has a golden-bytes
//! test beside it: a change of layout without a new version byte fails that test. A new version byte needs
//! a new schema of the index: a value of an unknown version is removed as damaged (see `mend`).

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A record type that may be stored: its layout has a version.
pub trait Record: Serialize + DeserializeOwned {
    /// Names the record in error messages.
    const NAME: &'static str;
    /// The layout this code writes.
    const VERSION: u8;

    /// Reads an older layout; `None` when this build does not know it.
    fn decode_older(_version: u8, _body: &[u8]) -> Option<postcard::Result<Self>> {
        None
    }
}

/// Bytes that are not a readable record.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The first byte names a layout this build does not know.
    #[error("{name}: layout version {found}, this kachefs reads version {expected}")]
    Version {
        /// Which record.
        name: &'static str,
        /// The version byte found; `None` when the value is empty.
        found: u8,
        /// The version this build reads.
        expected: u8,
    },
    /// Empty, truncated or damaged bytes.
    #[error("{name}: damaged record: {source}")]
    Damaged {
        /// Which record.
        name: &'static str,
        /// What postcard says.
        source: postcard::Error,
    },
}

/// The stored form of `record`.
pub fn encode<R: Record>(record: &R) -> Result<Vec<u8>, CodecError> {
    postcard::to_extend(record, vec![R::VERSION]).map_err(|source| CodecError::Damaged {
        name: R::NAME,
        source,
    })
}

/// The record stored as `bytes`; trailing bytes are damage.
pub fn decode<R: Record>(bytes: &[u8]) -> Result<R, CodecError> {
    let damaged = |source| CodecError::Damaged {
        name: R::NAME,
        source,
    };
    let (&version, body) = bytes
        .split_first()
        .ok_or_else(|| damaged(postcard::Error::DeserializeUnexpectedEnd))?;
    if version == R::VERSION {
        return whole(body).map_err(damaged);
    }
    match R::decode_older(version, body) {
        Some(older) => older.map_err(damaged),
        None => Err(CodecError::Version {
            name: R::NAME,
            found: version,
            expected: R::VERSION,
        }),
    }
}

/// What all of these bytes mean.
pub(crate) fn whole<T: DeserializeOwned>(body: &[u8]) -> postcard::Result<T> {
    let (value, rest) = postcard::take_from_bytes(body)?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(postcard::Error::DeserializeBadEncoding)
    }
}
