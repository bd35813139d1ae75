//! How fast something is sent, on average: an object goes as fast as it can, and the next one waits until
//! both together took as long as they may.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// A limit.
#[derive(Debug)]
pub struct Pace {
    /// Bytes per second.
    limit: u64,
    /// When the next object may go.
    next: Mutex<Option<Instant>>,
}

impl Pace {
    /// So many bytes per second, one at least.
    pub fn new(limit: u64) -> Self {
        Self {
            limit: limit.max(1),
            next: Mutex::new(None),
        }
    }

    /// Waits until an object of so many bytes may go.
    pub async fn wait(&self, bytes: u64) {
        let takes = Duration::from_millis(bytes.saturating_mul(1000) / self.limit);
        let starts = {
            let mut next = self.next.lock();
            let now = Instant::now();
            let starts = next.map_or(now, |next| next.max(now));
            *next = Some(starts + takes);
            starts
        };
        tokio::time::sleep_until(starts).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn together_they_take_their_time() {
        let pace = Pace::new(100_000);
        let began = Instant::now();
        // The first one goes at once, the last one behind both others.
        pace.wait(10_000).await;
        tokio::join!(pace.wait(20_000), pace.wait(1));
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(300), "{took:?}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }

    #[tokio::test]
    async fn what_was_not_used_is_not_saved() {
        let pace = Pace::new(100_000);
        pace.wait(1000).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let later = Instant::now();
        pace.wait(20_000).await;
        pace.wait(1).await;
        assert!(later.elapsed() >= Duration::from_millis(200));
    }
}
