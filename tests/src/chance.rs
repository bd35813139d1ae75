//! Numbers nobody foresees, and anybody can have again: with `KACHEFS_TEST_SEED` set to the seed a
//! test printed, the same test makes the same choices.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::command::own_env;

/// A source of numbers (xorshift64).
pub struct Chance(u64);

impl Default for Chance {
    fn default() -> Self {
        Self::new()
    }
}

impl Chance {
    /// A new source; it says its seed on stderr.
    pub fn new() -> Self {
        let given = own_env("KACHEFS_TEST_SEED").and_then(|seed| seed.to_str()?.parse().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanos = now.map_or(1, |now| now.subsec_nanos());
        let made = u64::from(nanos) << 20 | u64::from(std::process::id()) | 1;
        let seed = given.unwrap_or(made);
        eprintln!("seed {seed}");
        Self(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        for (left, by) in [(true, 13), (false, 7), (true, 17)] {
            self.0 ^= if left { self.0 << by } else { self.0 >> by };
        }
        self.0
    }

    /// Between 0 and 1.
    pub fn part(&mut self) -> f64 {
        f64::from(u32::try_from(self.number() >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }

    /// Below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = limit.max(1) as u64;
        usize::try_from((self.number() >> 16) % limit).unwrap_or(0)
    }

    /// A time up to `longest`.
    pub fn pause(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.part())
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() {
            return None;
        }
        from.get(self.below(from.len()))
    }
}
