//! Single flight: of several processes about to compile the same, one does.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use store::ActionKey;

/// Actions being compiled.
#[derive(Default)]
pub struct Flights {
    active: Mutex<HashMap<ActionKey, Arc<Landing>>>,
}

#[derive(Default)]
struct Landing {
    landed: Mutex<bool>,
    signal: Condvar,
}

/// The right to compile one action. Dropped when the outcome is recorded, or when the process
/// that had it is gone.
pub struct Flight {
    flights: Arc<Flights>,
    key: ActionKey,
    landing: Arc<Landing>,
}

/// Someone else's compile, to wait for.
pub struct Boarding(Arc<Landing>);

impl Flights {
    /// Takes off, or finds the one who has.
    pub fn take_off(self: &Arc<Self>, key: ActionKey) -> Result<Flight, Boarding> {
        let mut active = self.active.lock();
        if let Some(landing) = active.get(&key) {
            return Err(Boarding(Arc::clone(landing)));
        }
        let landing = Arc::new(Landing::default());
        active.insert(key, Arc::clone(&landing));
        Ok(Flight {
            flights: Arc::clone(self),
            key,
            landing,
        })
    }
}

impl Boarding {
    /// Waits until the other compile is over; `false` when it is not after `patience`.
    pub fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut landed = self.0.landed.lock();
        while !*landed {
            if self.0.signal.wait_until(&mut landed, deadline).timed_out() {
                return *landed;
            }
        }
        true
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.flights.active.lock().remove(&self.key);
        *self.landing.landed.lock() = true;
        self.landing.signal.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::Digest;

    #[test]
    fn one_flies_and_the_rest_wait() {
        let flights = Arc::new(Flights::default());
        let key = ActionKey(Digest::of(b"k"));
        let flight = flights.take_off(key).ok().expect("first");
        let boarding = flights.take_off(key).err().expect("second waits");
        assert!(!boarding.wait(Duration::from_millis(5)));
        assert!(flights.take_off(ActionKey(Digest::of(b"other"))).is_ok());
        let waiter = std::thread::spawn(move || boarding.wait(Duration::from_secs(20)));
        drop(flight);
        assert!(waiter.join().expect("joins"));
        assert!(flights.take_off(key).is_ok());
    }
}
