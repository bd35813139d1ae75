//! Sending blobs: small ones in packs, large ones as objects of their own, and none that a remote was
//! seen to hold.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use remote::pack::Packer;
use remote::{Body, ObjectName, Put, Remote, RemoteError, blob};
use store::{Digest, IndexError, Kept, Place, ScratchId};
use tokio::task::JoinSet;

use super::connection::Connection;
use super::{kept_now, not_encoded};
use crate::clock;
use crate::storage::Storage;

/// Blobs of less bytes go into packs, and packs grow to so many.
const SMALL: u64 = 64 << 10;
const PACK: u64 = 4 << 20;

/// Bytes that are sent before more is gathered.
const ENOUGH: u64 = 256 << 20;

/// Objects under way at once.
const AT_ONCE: usize = 8;

/// For how long a blob that was seen in the remote is taken to be there.
const SEEN: Duration = Duration::from_hours(24);

/// Blobs on their way, and what is known of the remote when they have arrived.
#[derive(Default)]
pub(super) struct Objects {
    puts: Vec<(ObjectName, Body, Put)>,
    kept: Vec<(Digest, Kept)>,
    /// The pack being filled.
    packer: Packer,
    /// What is in all of it.
    blobs: HashSet<Digest>,
    /// Files that are sent and then removed.
    files: Vec<ScratchId>,
    bytes: u64,
}

impl Storage {
    /// Whether a remote was seen to hold a blob lately.
    pub(super) fn is_sent(
        &self,
        connection: &Connection,
        digest: &Digest,
        size: u64,
    ) -> Result<bool, IndexError> {
        let kept = self.index.kept(connection.id, digest)?;
        Ok(kept.is_some_and(|kept| {
            let age = clock::now_ms().saturating_sub(kept.seen_ms);
            kept.size == size && Duration::from_millis(age) < SEEN
        }))
    }

    /// Adds a blob to what is sent.
    pub(super) fn add_blob(&self, digest: Digest, size: u64, objects: &mut Objects) -> Result<()> {
        let file = self.cas.open(&digest)?;
        if size >= SMALL {
            self.add_large(digest, size, &file, objects)?;
        } else {
            objects.packer.add(digest, size, file)?;
            if objects.packer.len() >= PACK {
                objects.seal()?;
            }
        }
        objects.blobs.insert(digest);
        Ok(())
    }

    /// Sends the blobs that a remote is not known to hold. Returns how many those were.
    pub(super) fn send_blobs(
        &self,
        connection: &Connection,
        blobs: &[(Digest, u64)],
    ) -> Result<u64> {
        let mut sent = 0;
        let mut left = blobs.iter().peekable();
        while left.peek().is_some() {
            let mut objects = Objects::default();
            let mut gather = || {
                for (digest, size) in left.by_ref() {
                    if !self.is_sent(connection, digest, *size)? {
                        self.fault(digest, *size)?;
                        self.add_blob(*digest, *size, &mut objects)?;
                        sent += 1;
                    }
                    if objects.are_enough() {
                        break;
                    }
                }
                Ok(())
            };
            let gathered = gather();
            self.sent(objects, |objects| {
                gathered.and_then(|()| self.put_blobs(connection, objects))
            })?;
        }
        Ok(sent)
    }

    /// Sends what was gathered; nothing of it stays behind, whatever comes of that.
    pub(super) fn sent(
        &self,
        mut objects: Objects,
        send: impl FnOnce(&Objects) -> Result<()>,
    ) -> Result<()> {
        let sealed = objects.seal();
        let sent = sealed.and_then(|()| send(&objects));
        for id in objects.files {
            self.remove_scratch(id);
        }
        sent
    }

    fn add_large(
        &self,
        digest: Digest,
        size: u64,
        file: &std::fs::File,
        objects: &mut Objects,
    ) -> Result<()> {
        let (id, into) = self.new_scratch()?;
        objects.files.push(id);
        let found = blob::pack(file, size, &into)?;
        ensure!(found == digest, "blob {digest} is damaged");
        objects.bytes += into.metadata()?.len();
        let path: PathBuf = self.dir.scratch_file(id);
        let name = ObjectName::blob(&digest);
        let mode = if self.lazy.is_gone(&digest) {
            Put::Replace
        } else {
            Put::IfAbsent
        };
        objects.puts.push((name, Body::File(path), mode));
        objects.kept.push((digest, kept_now(size, Place::Own)));
        Ok(())
    }

    /// Puts blobs into a remote, and notes that they are there.
    pub(super) fn put_blobs(&self, connection: &Connection, objects: &Objects) -> Result<()> {
        let puts = objects.puts.clone();
        connection
            .send(async |remote| put_all(remote, puts).await)
            .context("blobs")?;
        let mut batch = self.index.batch();
        for (digest, kept) in &objects.kept {
            self.lazy.gone.lock().pop(digest);
            batch.put_kept(connection.id, digest, kept)?;
        }
        batch.commit()?;
        Ok(())
    }

    /// Which of these blobs a remote holds in packs, and where.
    pub(super) fn places_in_packs(
        &self,
        connection: &Connection,
        blobs: impl IntoIterator<Item = (Digest, u64)>,
    ) -> Result<Vec<(Digest, Place)>, IndexError> {
        let mut places = Vec::new();
        for (digest, _) in blobs {
            let kept = self.index.kept(connection.id, &digest)?;
            if let Some(place @ Place::Pack { .. }) = kept.map(|kept| kept.place) {
                places.push((digest, place));
            }
        }
        Ok(places)
    }
}

impl Objects {
    /// Whether a blob is among them.
    pub(super) fn hold(&self, digest: &Digest) -> bool {
        self.blobs.contains(digest)
    }

    /// Whether it is time to send them.
    pub(super) fn are_enough(&self) -> bool {
        self.bytes > ENOUGH
    }

    /// Ends the pack being filled.
    fn seal(&mut self) -> Result<()> {
        let packer = std::mem::take(&mut self.packer);
        if packer.is_empty() {
            return Ok(());
        }
        let (object, pack, index) = packer.finish()?;
        self.bytes += object.len() as u64;
        let places = index.iter().map(|packed| {
            let kept = kept_now(packed.size, packed.place(pack));
            (packed.digest, kept)
        });
        self.kept.extend(places);
        let name = ObjectName::pack(&pack);
        self.puts.push((name, Body::Bytes(object), Put::Replace));
        Ok(())
    }
}

async fn put_all(
    remote: Arc<dyn Remote>,
    objects: Vec<(ObjectName, Body, Put)>,
) -> Result<(), RemoteError> {
    at_once(objects, |(name, body, mode)| {
        let remote = Arc::clone(&remote);
        async move { remote.put(&name, body, mode).await.map(drop) }
    })
    .await
}

/// Does something for each, some at a time. The first error ends it.
pub(super) async fn at_once<T, F>(items: Vec<T>, work: impl Fn(T) -> F) -> Result<(), RemoteError>
where
    F: Future<Output = Result<(), RemoteError>> + Send + 'static,
{
    let mut items = items.into_iter();
    let mut under_way = JoinSet::new();
    loop {
        while under_way.len() < AT_ONCE
            && let Some(item) = items.next()
        {
            under_way.spawn(work(item));
        }
        match under_way.join_next().await {
            None => return Ok(()),
            Some(Ok(result)) => result?,
            Some(Err(error)) => return Err(not_encoded(std::io::Error::other(error))),
        }
    }
}
