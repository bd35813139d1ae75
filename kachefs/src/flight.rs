//! Single flight: of several about to do the same, one does, and the others wait for it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// What is being done, by what tells one from another.
pub struct Flights<K> {
    active: Mutex<HashMap<K, Arc<Landing>>>,
}

impl<K> Default for Flights<K> {
    fn default() -> Self {
        Self {
            active: Mutex::default(),
        }
    }
}

#[derive(Default)]
struct Landing {
    landed: Mutex<bool>,
    signal: Condvar,
}

/// The right to do one thing. Dropped when it is done, or when whoever had it is gone.
pub struct Flight<K: Eq + Hash> {
    flights: Arc<Flights<K>>,
    key: K,
    landing: Arc<Landing>,
}

/// Someone else's flight, to wait for.
pub struct Boarding(Arc<Landing>);

impl<K: Clone + Eq + Hash> Flights<K> {
    /// Takes off, or finds the one who has.
    pub fn take_off(self: &Arc<Self>, key: K) -> Result<Flight<K>, Boarding> {
        let mut active = self.active.lock();
        if let Some(landing) = active.get(&key) {
            return Err(Boarding(Arc::clone(landing)));
        }
        let landing = Arc::new(Landing::default());
        active.insert(key.clone(), Arc::clone(&landing));
        Ok(Flight {
            flights: Arc::clone(self),
            key,
            landing,
        })
    }
}

impl Boarding {
    /// Waits until the other one has landed; `false` when it is not after `patience`.
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

impl<K: Eq + Hash> Drop for Flight<K> {
    fn drop(&mut self) {
        self.flights.active.lock().remove(&self.key);
        *self.landing.landed.lock() = true;
        self.landing.signal.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flies_and_the_rest_wait() {
        let flights = Arc::new(Flights::default());
        let key = "k";
        let flight = flights.take_off(key).ok().expect("first");
        let boarding = flights.take_off(key).err().expect("second waits");
        assert!(!boarding.wait(Duration::from_millis(5)));
        assert!(flights.take_off("other").is_ok());
        let waiter = std::thread::spawn(move || boarding.wait(Duration::from_secs(20)));
        drop(flight);
        assert!(waiter.join().expect("joins"));
        assert!(flights.take_off(key).is_ok());
    }
}
