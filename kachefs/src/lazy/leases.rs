//! The lease of a store: on the objects in its remote that its views show and this machine does not have.
//!
//! It is written again long before it ends with the grace, for as long as anything is missing here. Who
//! may only read a remote has none: what is published is needed as long as it is, and a grace longer.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use remote::ObjectName;
use store::Digest;

use super::connection::{Connection, Unavailable};
use super::containers::Container;
use super::reliance::{new_id, put_lease};
use crate::clock;
use crate::storage::Storage;

/// It is written so many times within a grace.
const WITHIN: u32 = 3;

/// How long until a remote that did not take it is asked again, at most.
const AGAIN: Duration = Duration::from_mins(1);

/// How often somebody looks whether there is a remote at all.
const IDLE: Duration = Duration::from_mins(10);

/// When the lease is written next, and what it is called.
#[derive(Default)]
pub struct Leases {
    /// Another in each process: one that is left behind ends.
    name: OnceLock<ObjectName>,
    /// When it was written, since boot; `None` while it is not there.
    written: Mutex<Option<Duration>>,
    changed: Mutex<bool>,
    wakes: Condvar,
    /// Whether something was found to be gone.
    doubt: AtomicBool,
}

impl Leases {
    /// Something is shown that was not, or is not any more.
    pub fn wake(&self) {
        *self.changed.lock() = true;
        self.wakes.notify_all();
    }

    /// Something is gone that should be there: more may be.
    pub fn doubt(&self) {
        self.doubt.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Whether anything was gone since this was last asked.
    pub fn take_doubt(&self) -> bool {
        self.doubt.swap(false, Ordering::Relaxed)
    }

    /// Waits until it is time, or something changed. A machine that was asleep finds out within a minute.
    pub fn wait(&self, longest: Duration) {
        let deadline = clock::since_boot() + longest;
        let mut changed = self.changed.lock();
        while !*changed {
            let left = deadline.saturating_sub(clock::since_boot());
            if left.is_zero() {
                break;
            }
            self.wakes.wait_for(&mut changed, left.min(AGAIN));
        }
        *changed = false;
    }

    fn name(&self) -> Result<&ObjectName, Unavailable> {
        if let Some(name) = self.name.get() {
            return Ok(name);
        }
        let name = ObjectName::lease(&new_id()?);
        Ok(self.name.get_or_init(|| name))
    }
}

impl Storage {
    /// Writes the lease on what of these blobs is not here. Returns how long it lasts.
    pub fn renew_lease(&self, shown: impl IntoIterator<Item = (Digest, u64)>) -> Duration {
        let Some(connection) = self.lazy.writable() else {
            return IDLE;
        };
        let period = connection.config.grace / WITHIN;
        let missing = shown.into_iter().filter_map(|(digest, size)| {
            let is_here = self.cas.has(&digest, size);
            let kept = (!is_here).then(|| self.kept(&digest, size)).flatten();
            kept.map(|(_, kept)| Container::of(&digest, &kept.place))
        });
        match self.write_lease(&connection, missing.collect()) {
            Ok(()) => period,
            Err(error) => {
                tracing::debug!(%error, "the lease is not written");
                period.min(AGAIN)
            }
        }
    }

    fn write_lease(
        &self,
        connection: &Connection,
        missing: BTreeSet<Container>,
    ) -> Result<(), Unavailable> {
        let leases = &self.lazy.leases;
        let name = leases.name()?;
        let before = *leases.written.lock();
        if !missing.is_empty() {
            tracing::debug!(objects = missing.len(), %name, "lease");
            let grace = connection.config.grace;
            connection.send(async |remote| put_lease(&*remote, name, grace, missing).await)?;
            let now = clock::since_boot();
            *leases.written.lock() = Some(now);
            // One that had ended by now kept nobody from removing what it was on.
            if before.is_some_and(|before| now.saturating_sub(before) > connection.config.grace / 2)
            {
                leases.doubt();
            }
        } else if before.is_some() {
            connection.send(async |remote| remote.delete(name).await)?;
            *leases.written.lock() = None;
        }
        Ok(())
    }
}
