//! What `kachefs stats --json` counts, as typed values that can be subtracted.

use std::collections::BTreeMap;
use std::ops::Sub;

use serde_json::Value;

use crate::Must;

/// The counters of one moment, or, subtracted, of what lay between two moments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Actions answered from the store.
    pub hits: u64,
    /// Actions that ran the compiler and could be stored.
    pub misses: u64,
    /// Actions that are never stored.
    pub uncacheable: u64,
    /// Compiler runs that failed.
    pub failed: u64,
    /// Runs of build scripts answered from the store.
    pub script_hits: u64,
    /// Build scripts that ran.
    pub script_misses: u64,
    /// Objects of C compilers answered from the store.
    pub cc_hits: u64,
    /// C compiles that ran.
    pub cc_misses: u64,
    /// Why actions were uncacheable.
    pub reasons: BTreeMap<String, u64>,
    /// Bytes of blobs bound into views by hits.
    pub bytes_referenced: u64,
    /// Bytes taken into the store.
    pub bytes_ingested: u64,
    /// Bytes the store added to the disk.
    pub bytes_stored: u64,
    /// Blobs in the store.
    pub blobs: u64,
}

impl Counters {
    /// Reads the counters; a name the contract promises and the JSON lacks fails the test.
    #[track_caller]
    pub fn from_json(stats: &Value) -> Self {
        let number = |pointer: &str| {
            let value = stats.pointer(pointer).and_then(Value::as_u64);
            value.must(format!(
                "stats --json has no number at {pointer}: {stats:#}"
            ))
        };
        let reasons = stats
            .pointer("/actions/uncacheable_reasons")
            .and_then(Value::as_object);
        let reasons = reasons.must(format!("no /actions/uncacheable_reasons in {stats:#}"));
        Self {
            hits: number("/actions/hits"),
            misses: number("/actions/misses"),
            uncacheable: number("/actions/uncacheable"),
            failed: number("/actions/failed"),
            script_hits: number("/scripts/hits"),
            script_misses: number("/scripts/misses"),
            cc_hits: number("/cc/hits"),
            cc_misses: number("/cc/misses"),
            reasons: reasons
                .iter()
                .map(|(name, count)| (name.clone(), count.as_u64().must("a reason is a count")))
                .collect(),
            bytes_referenced: number("/bytes/referenced"),
            bytes_ingested: number("/bytes/ingested"),
            bytes_stored: number("/bytes/stored"),
            blobs: number("/blobs/count"),
        }
    }

    /// The test fails unless every cacheable action hit, and there were `units` of them.
    #[track_caller]
    pub fn assert_all_hit(&self, units: u64) {
        assert_eq!(
            (self.hits, self.misses),
            (units, 0),
            "hits and misses, of {units}: {self:?}"
        );
    }

    /// The test fails unless nothing missed and something hit.
    #[track_caller]
    pub fn assert_no_miss(&self) {
        assert_eq!(self.misses, 0, "no miss: {self:?}");
        assert!(self.hits > 0, "at least one hit: {self:?}");
    }

    /// The reasons that were counted.
    pub fn reason_names(&self) -> Vec<&str> {
        self.reasons
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(name, _)| &**name)
            .collect()
    }
}

impl Sub<&Counters> for Counters {
    type Output = Counters;

    /// What happened after `earlier`. Counters never fall, except blobs, which stop at zero.
    #[track_caller]
    fn sub(self, earlier: &Counters) -> Counters {
        let less = |now: u64, then: u64| {
            now.checked_sub(then)
                .must(format!("a counter fell from {then} to {now}"))
        };
        Counters {
            hits: less(self.hits, earlier.hits),
            misses: less(self.misses, earlier.misses),
            uncacheable: less(self.uncacheable, earlier.uncacheable),
            failed: less(self.failed, earlier.failed),
            script_hits: less(self.script_hits, earlier.script_hits),
            script_misses: less(self.script_misses, earlier.script_misses),
            cc_hits: less(self.cc_hits, earlier.cc_hits),
            cc_misses: less(self.cc_misses, earlier.cc_misses),
            reasons: self
                .reasons
                .into_iter()
                .map(|(name, now)| {
                    let then = earlier.reasons.get(&name).copied().unwrap_or(0);
                    let delta = less(now, then);
                    (name, delta)
                })
                .collect(),
            bytes_referenced: less(self.bytes_referenced, earlier.bytes_referenced),
            bytes_ingested: less(self.bytes_ingested, earlier.bytes_ingested),
            bytes_stored: less(self.bytes_stored, earlier.bytes_stored),
            blobs: self.blobs.saturating_sub(earlier.blobs),
        }
    }
}
