//! A remote that counts what goes to it and comes from it, and is sent no more than it may be.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use remote::{Body, Kind, Object, ObjectName, Put, Remote, RemoteError, Written};
use serde::{Deserialize, Serialize};

use super::pace::Pace;

/// What went over the wire since the daemon started.
#[derive(Debug, Default)]
pub struct Traffic {
    requests: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

/// The same as numbers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TrafficNow {
    /// Calls made.
    pub requests: u64,
    /// Bytes of objects received.
    pub bytes_received: u64,
    /// Bytes of objects sent.
    pub bytes_sent: u64,
}

impl Traffic {
    /// The numbers now.
    pub fn now(&self) -> TrafficNow {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        TrafficNow {
            requests: get(&self.requests),
            bytes_received: get(&self.received),
            bytes_sent: get(&self.sent),
        }
    }

    fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts calls of a remote.
pub struct Counted {
    /// Who is called.
    pub remote: Arc<dyn Remote>,
    /// Where it is counted.
    pub traffic: Arc<Traffic>,
    /// How fast it may be sent to.
    pub pace: Option<Arc<Pace>>,
}

#[async_trait]
impl Remote for Counted {
    async fn get(
        &self,
        name: &ObjectName,
        range: Option<Range<u64>>,
        most: u64,
    ) -> Result<Option<Bytes>, RemoteError> {
        self.traffic.request();
        let found = self.remote.get(name, range, most).await?;
        let length = found.as_ref().map_or(0, Bytes::len) as u64;
        self.traffic.received.fetch_add(length, Ordering::Relaxed);
        Ok(found)
    }

    async fn put(&self, name: &ObjectName, body: Body, mode: Put) -> Result<Written, RemoteError> {
        self.traffic.request();
        let length = match &body {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File(path) => std::fs::metadata(path).map_or(0, |meta| meta.len()),
        };
        if let Some(pace) = &self.pace {
            pace.wait(length).await;
        }
        let written = self.remote.put(name, body, mode).await?;
        self.traffic.sent.fetch_add(length, Ordering::Relaxed);
        Ok(written)
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError> {
        self.traffic.request();
        self.remote.head(name).await
    }

    async fn list(
        &self,
        kind: Kind,
        after: Option<&ObjectName>,
    ) -> Result<Vec<Object>, RemoteError> {
        self.traffic.request();
        self.remote.list(kind, after).await
    }

    async fn delete(&self, name: &ObjectName) -> Result<(), RemoteError> {
        self.traffic.request();
        self.remote.delete(name).await
    }
}
