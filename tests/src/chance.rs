//! Numbers nobody foresees, and everybody can have again: each run prints its seed.
//!
//! Used by tests that do things at random. Good enough to choose with, for nothing else.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Must;
use crate::command::own_env;

/// A sequence of numbers that follows from its seed (xorshift64*).
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Default for Chance {
    fn default() -> Self {
        Self::new()
    }
}

impl Chance {
    /// The sequence of a seed.
    pub fn of(seed: u64) -> Self {
        // Neighbouring seeds must not give neighbouring sequences, and zero gives none.
        let mut chance = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            chance.number();
        }
        chance
    }

    /// The sequence of this run's seed.
    #[track_caller]
    pub fn new() -> Self {
        Self::of(Self::seed())
    }

    /// The seed of this run: `$KACHEFS_TEST_SEED`, else one nobody foresees. Printed.
    #[track_caller]
    pub fn seed() -> u64 {
        let given = own_env("KACHEFS_TEST_SEED").map(|seed| {
            let seed = seed.to_str().and_then(|seed| seed.parse().ok());
            seed.must("KACHEFS_TEST_SEED is a number")
        });
        let seed = given.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let nanos = now.map_or(1, |now| now.subsec_nanos());
            u64::from(nanos) << 20 | u64::from(std::process::id())
        });
        eprintln!("KACHEFS_TEST_SEED={seed}");
        seed
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end.max(1)).must("a small number");
        usize::try_from(self.number() % end).must("smaller")
    }

    /// True `percent` times in a hundred.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// Between 0 and 1.
    pub fn part(&mut self) -> f64 {
        f64::from(u32::try_from(self.number() >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }

    /// A time up to `longest`.
    pub fn pause(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.part())
    }

    /// One of several; `None` of none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len().max(1)))
    }

    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_again_and_another_does_not() {
        let taken = |seed| {
            let mut chance = Chance::of(seed);
            (0..50).map(|_| chance.number()).collect::<Vec<_>>()
        };
        assert_eq!(taken(7), taken(7));
        assert_ne!(taken(7), taken(8));
        assert_ne!(taken(0), taken(1));
    }

    #[test]
    fn choices_reach_everything() {
        let mut chance = Chance::of(1);
        let mut seen = [0_u32; 10];
        for _ in 0..10_000 {
            seen[chance.below(10)] += 1;
            assert!((0.0..=1.0).contains(&chance.part()));
        }
        assert!(
            seen.iter().all(|times| (700..1300).contains(times)),
            "{seen:?}"
        );
        assert_eq!(chance.bytes(13).len(), 13);
    }
}
