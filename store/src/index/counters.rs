//! Counters: in memory, and stored with the batch that counts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Index;
use crate::codec::Record;

/// What is counted over the life of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Numbers by counter.
    pub numbers: BTreeMap<Counter, u64>,
    /// Actions not cached, by the name of the reason.
    pub uncacheable: BTreeMap<String, u64>,
}

impl Record for Counters {
    const NAME: &'static str = "counters";
    const VERSION: u8 = 1;
}

/// One thing that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Counter {
    /// Actions served without running a compiler.
    Hits,
    /// Cacheable actions that ran.
    Misses,
    /// Cacheable actions that ran and failed.
    Failed,
    /// Bytes that hits referred to.
    BytesReferenced,
    /// Bytes new to the CAS.
    BytesStored,
    /// Bytes hashed on the way into the CAS, whether new or not.
    BytesIngested,
    /// Milliseconds of compiling that hits spared.
    SavedMs,
    /// Build scripts served without running them.
    ScriptHits,
    /// Build scripts that ran and could have been served.
    ScriptMisses,
    /// Objects of C compilers served without running them.
    CcHits,
    /// C compiles that ran and could have been served.
    CcMisses,
    /// Results sent to a remote.
    ResultsUploaded,
    /// Results that hold what must not leave the machine.
    ResultsHeldBack,
    /// Blobs fetched from a remote.
    Faults,
    /// Their bytes, as blobs.
    BytesFaulted,
    /// Of these, blobs that nobody had asked for yet.
    Prefetched,
    /// Their bytes.
    BytesPrefetched,
    /// Of these, blobs that somebody read.
    PrefetchedRead,
    /// Their bytes.
    BytesPrefetchedRead,
    /// Actions that ran again because what they had made was lost.
    Recomputed,
}

impl Index {
    /// Everything counted so far.
    pub fn counters(&self) -> Counters {
        self.counters.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_survive_reopening() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("index");
        {
            let index = Index::open(&path).expect("opens");
            let mut batch = index.batch();
            batch.count(&[(Counter::Hits, 2)], Some("unknown-flag"));
            batch.commit().expect("commits");
        }
        let counters = Index::open(&path).expect("opens").counters();
        assert_eq!(counters.numbers[&Counter::Hits], 2);
        assert_eq!(counters.uncacheable["unknown-flag"], 1);
    }
}
