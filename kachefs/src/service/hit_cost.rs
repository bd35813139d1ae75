//! What hits cost on this side of the socket: from the request to the answer, without the time spent
//! waiting for another process that compiles the same.
//!
//! A histogram over the life of the daemon, for `kachefs stats`. The store does not keep it: a cost is
//! this machine's, and this daemon's.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use parking_lot::Mutex;

/// The longest cost told apart from longer ones.
const LONGEST_US: u64 = 60_000_000;

/// Digits that count.
const DIGITS: u8 = 2;

/// Every hit's cost since the daemon started.
pub struct HitCost(Mutex<Histogram<u64>>);

/// What of it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percentiles {
    /// Half of the hits cost no more microseconds than this.
    pub p50: u64,
    /// Of a hundred hits, one costs more.
    pub p99: u64,
    /// How many hits there were.
    pub count: u64,
}

impl HitCost {
    /// Counts one hit.
    pub fn add(&self, cost: Duration) {
        self.0.lock().saturating_record(micros(cost));
    }

    /// What hits have cost so far.
    pub fn percentiles(&self) -> Percentiles {
        percentiles(&self.0.lock())
    }
}

impl Default for HitCost {
    fn default() -> Self {
        Self(Mutex::new(empty()))
    }
}

/// The percentiles of some costs, in microseconds.
pub fn percentiles_of(costs: impl IntoIterator<Item = u64>) -> Percentiles {
    let mut histogram = empty();
    for cost in costs {
        histogram.saturating_record(cost);
    }
    percentiles(&histogram)
}

fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_US, DIGITS).expect("the bounds are valid")
}

fn percentiles(histogram: &Histogram<u64>) -> Percentiles {
    Percentiles {
        p50: histogram.value_at_quantile(0.5),
        p99: histogram.value_at_quantile(0.99),
        count: histogram.len(),
    }
}

/// Whole microseconds.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Measures one answer.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    asked: Instant,
    waited: Duration,
}

impl Stopwatch {
    /// Begins now.
    pub fn start() -> Self {
        Self {
            asked: Instant::now(),
            waited: Duration::ZERO,
        }
    }

    /// How long ago the question was asked.
    pub fn elapsed(&self) -> Duration {
        self.asked.elapsed()
    }

    /// Leaves out the time that `wait` takes.
    pub fn without<T>(&mut self, wait: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let value = wait();
        self.waited += began.elapsed();
        value
    }

    /// What the answer has cost so far.
    pub fn cost(&self) -> Duration {
        self.elapsed().saturating_sub(self.waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_hundred() {
        let percentiles = percentiles_of(1..=100);
        assert_eq!(
            percentiles,
            Percentiles {
                p50: 50,
                p99: 99,
                count: 100
            }
        );
        let none = percentiles_of([]);
        assert_eq!((none.p50, none.p99, none.count), (0, 0, 0));
    }

    #[test]
    fn no_cost_is_too_much() {
        let cost = HitCost::default();
        cost.add(Duration::from_hours(100));
        assert_eq!(cost.percentiles().count, 1);
        assert!(cost.percentiles().p50 >= LONGEST_US / 2);
    }

    #[test]
    fn waiting_costs_nothing() {
        let mut watch = Stopwatch::start();
        watch.without(|| std::thread::sleep(Duration::from_millis(20)));
        assert!(watch.elapsed() >= Duration::from_millis(20));
        assert!(watch.cost() < Duration::from_millis(20));
    }
}
