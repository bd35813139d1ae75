//! Sync points: up to where everything in a store is known to be on the disk.
//!
//! Time is cut into epochs, numbered, by the sync points between them; every file of a view carries
//! the epoch its bytes last changed in. What a number means is decided by the daemon, which makes
//! sync points and, after a power cut, drops what changed since the last one. Plain data.

use serde::{Deserialize, Serialize};

use crate::codec::Record;
use crate::view::Timestamp;

/// A stretch of time between two sync points. Records older than epochs are of epoch 0.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The one after it.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The last sync point of a store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SyncPoint {
    /// The boot it was made in, as the kernel names it; `None` where it does not say.
    pub boot: Option<String>,
    /// No later epoch was ever begun.
    pub begun: Epoch,
    /// What changed before this epoch is on the disk.
    pub durable: Epoch,
    /// What got its name in the CAS before this time is on the disk.
    pub since: Timestamp,
    /// Whether the daemon ended in order after it, so that nothing changed since.
    pub ended: bool,
}

impl Record for SyncPoint {
    const NAME: &'static str = "sync point";
    const VERSION: u8 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode};

    #[test]
    fn sync_point_layout_is_fixed() {
        let record = SyncPoint {
            boot: Some("b".into()),
            begun: Epoch(300),
            durable: Epoch(2),
            since: Timestamp { secs: -1, nanos: 5 },
            ended: true,
        };
        let bytes = encode(&record).expect("encodes");
        assert_eq!(
            bytes,
            [1, 1, 1, b'b', 0xac, 2, 2, 1, 5, 1],
            "a changed layout needs a new SyncPoint::VERSION"
        );
        assert_eq!(decode::<SyncPoint>(&bytes).expect("decodes"), record);
    }
}
