//! The lease of a store: on the objects in its remote that its views show and this machine does not have.
//!
//! It is written again long before it ends with the grace, for as long as anything is missing here. Then what
//! is condemned is looked at, as in `reliance`: it is fetched while it is there. Who may only read a remote
//! has none: what is published is needed as long as it is, and a grace longer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use remote::ObjectName;
use store::Digest;

use super::connection::{Connection, Unavailable};
use super::containers::Container;
use super::faults::FaultError;
use super::reliance::{condemned, new_id, put_lease};
use crate::clock;
use crate::storage::Storage;

/// It is written so many times within a grace.
const WITHIN: u32 = 3;

/// How long until a remote that did not take it, or has lost something, is asked again, at most.
pub const AGAIN: Duration = Duration::from_mins(1);

/// Blobs that are fetched together: when one is gone, those behind it in the same share are not fetched.
const AT_ONCE: usize = 16;

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
}

impl Leases {
    /// Something is shown that was not, or is not any more.
    pub fn wake(&self) {
        *self.changed.lock() = true;
        self.wakes.notify_all();
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
        let mut missing: BTreeMap<Container, Vec<_>> = BTreeMap::new();
        for (digest, size) in shown {
            if !self.cas.has(&digest, size)
                && let Some((_, kept)) = self.kept(&digest, size)
            {
                let container = Container::of(&digest, &kept.place);
                missing.entry(container).or_default().push((digest, size));
            }
        }
        let written = self.write_lease(&connection, missing.keys().copied().collect());
        let written = written.map_err(FaultError::from);
        match written.and_then(|()| self.bring_condemned(&connection, &missing)) {
            Ok(()) => period,
            Err(error) => {
                tracing::debug!(%error, "nobody knows whether what is shown stays");
                period.min(AGAIN)
            }
        }
    }

    /// Fetches what is about to be removed, while it is there: who removes it may have looked for leases
    /// before there was one on it. What is gone by then, others find out about (`faults`).
    fn bring_condemned(
        &self,
        connection: &Connection,
        missing: &BTreeMap<Container, Vec<(Digest, u64)>>,
    ) -> Result<(), FaultError> {
        if missing.is_empty() {
            return Ok(());
        }
        let condemned = connection.send(async |remote| condemned(&*remote).await)?;
        // Of a later kachefs: it may be anything, and fetching all is no answer to that.
        let condemned = condemned.unwrap_or_default();
        let blobs = missing
            .iter()
            .filter(|(container, _)| condemned.contains(container));
        let blobs: Vec<_> = blobs.flat_map(|(_, blobs)| blobs).copied().collect();
        if !blobs.is_empty() {
            tracing::info!(blobs = blobs.len(), "fetching what is about to be removed");
        }
        for some in blobs.chunks(AT_ONCE) {
            // Who reads waits for that, and it is done before anything else next time.
            if self.lazy.looks.is_wanted() {
                break;
            }
            match self.bring_all(some) {
                Ok(()) | Err(FaultError::Gone(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
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
                self.lazy.looks.want();
                leases.wake();
            }
        } else if before.is_some() {
            connection.send(async |remote| remote.delete(name).await)?;
            *leases.written.lock() = None;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use remote::{Body, Kind, Put};

    use super::super::{containers, testing};
    use super::*;
    use crate::remote_config::GRACE;

    #[test]
    fn what_is_condemned_is_fetched_while_it_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let blobs = testing::elsewhere(dir.path(), &storage, &connection).map(|(blob, _)| blob);
        let list = ObjectName::condemned(&Digest::of(b"list"));
        let object = containers::write(GRACE, [Container::Blob(blobs[0].0)]).expect("writes");
        let put = async |remote: std::sync::Arc<dyn remote::Remote>| {
            let body = Body::Bytes(object.into());
            remote.put(&list, body, Put::Replace).await
        };
        connection.send(put).expect("puts");
        assert_eq!(storage.renew_lease(blobs), GRACE / WITHIN);
        assert_eq!(testing::objects(dir.path(), Kind::Leases).len(), 1);
        let is_here = blobs.map(|(digest, size)| storage.cas.has(&digest, size));
        assert_eq!(is_here, [true, false]);
    }
}
