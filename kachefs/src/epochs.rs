//! Which epoch a change belongs to, and when all changes of an epoch are complete.
//!
//! A sync point vouches for everything that changed in earlier epochs, so a change must not be
//! counted among those and reach the disk's cache only after the sync point looked. Whoever changes
//! bytes holds a [`Change`] meanwhile; the sync point begins the next epoch, whose changes go on
//! undisturbed, and waits for those of the one before. No lock: a request never waits here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use store::Epoch;

/// Between two looks whether the changes under way are complete.
const PAUSE: Duration = Duration::from_millis(1);

/// The epochs of one store.
pub struct Epochs {
    current: AtomicU64,
    /// Of the current epoch and its neighbour, by the last bit of their number.
    under_way: [AtomicU64; 2],
    begun: [AtomicU64; 2],
}

/// A change of some bytes, under way until dropped.
#[must_use]
pub struct Change<'a> {
    under_way: &'a AtomicU64,
    /// The epoch it belongs to.
    pub epoch: Epoch,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

fn slot(pair: &[AtomicU64; 2], epoch: u64) -> &AtomicU64 {
    &pair[usize::from(epoch % 2 == 1)]
}

impl Epochs {
    /// Begins with this epoch.
    pub fn new(current: Epoch) -> Self {
        Self {
            current: AtomicU64::new(current.0),
            under_way: Default::default(),
            begun: Default::default(),
        }
    }

    /// The epoch changes belong to that begin now.
    pub fn current(&self) -> Epoch {
        Epoch(self.current.load(Ordering::SeqCst))
    }

    /// Begins a change.
    pub fn change(&self) -> Change<'_> {
        loop {
            let epoch = self.current.load(Ordering::SeqCst);
            let under_way = slot(&self.under_way, epoch);
            under_way.fetch_add(1, Ordering::SeqCst);
            if self.current.load(Ordering::SeqCst) == epoch {
                slot(&self.begun, epoch).fetch_add(1, Ordering::Relaxed);
                let epoch = Epoch(epoch);
                return Change { under_way, epoch };
            }
            // The epoch ended in between: nobody may be waiting for this one.
            under_way.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// How many changes the current epoch has seen.
    pub fn changes(&self) -> u64 {
        slot(&self.begun, self.current().0).load(Ordering::Relaxed)
    }

    /// Begins the next epoch and waits until all changes of the last one are complete. One thread
    /// at a time.
    pub fn advance(&self) -> Epoch {
        let last = self.current.load(Ordering::SeqCst);
        // Nobody uses the neighbour: its changes were waited for when the last one began.
        slot(&self.begun, last + 1).store(0, Ordering::Relaxed);
        self.current.store(last + 1, Ordering::SeqCst);
        while slot(&self.under_way, last).load(Ordering::SeqCst) > 0 {
            std::thread::sleep(PAUSE);
        }
        Epoch(last + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn an_epoch_ends_when_its_changes_are_complete() {
        let epochs = Epochs::new(Epoch(7));
        let change = epochs.change();
        assert_eq!(change.epoch, Epoch(7));
        assert_eq!(epochs.changes(), 1);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(epochs.advance(), Epoch(8));
                over.store(true, Ordering::SeqCst);
            });
            while epochs.current() == Epoch(7) {
                std::thread::yield_now();
            }
            // Later changes wait for nobody.
            assert_eq!(epochs.change().epoch, Epoch(8));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!over.load(Ordering::SeqCst), "a change is under way");
            drop(change);
        });
        assert!(over.load(Ordering::SeqCst));
        assert_eq!(epochs.changes(), 1);
        assert_eq!(epochs.advance(), Epoch(9));
        assert_eq!(epochs.changes(), 0);
    }

    #[test]
    fn no_change_outlives_the_wait_for_it() {
        let epochs = Epochs::new(Epoch(1));
        // The newest epoch that is over.
        let over = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let change = epochs.change();
                        for _ in 0..20 {
                            assert!(over.load(Ordering::SeqCst) < change.epoch.0);
                            std::hint::spin_loop();
                        }
                    }
                });
            }
            for _ in 0..200 {
                let begun = epochs.advance();
                over.store(begun.0 - 1, Ordering::SeqCst);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
