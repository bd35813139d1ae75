//! Sending blobs: small ones in packs, large ones as objects of their own, and none that a remote holds
//! and will go on to hold.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use remote::pack::{self, Packer};
use remote::{Body, ObjectName, Put, Remote, RemoteError, Written, blob};
use store::{Digest, IndexError, Kept, Place, ScratchId};
use tokio::task::JoinSet;

use super::connection::{Connection, Haste};
use super::containers::Container;
use super::reliance::Reliance;
use super::{Gone, kept_now, kept_unseen, not_encoded};
use crate::clock;
use crate::storage::Storage;

/// Blobs of less bytes go into packs, and packs grow to so many.
pub(super) const SMALL: u64 = 64 << 10;
const PACK: u64 = 4 << 20;

/// Bytes that are sent before more is gathered.
const ENOUGH: u64 = 256 << 20;

/// Objects under way at once.
const AT_ONCE: usize = 8;

/// What a store knows of a blob in a remote.
enum Standing {
    /// It is there, and stays for a while.
    Fresh,
    /// It was there once, or somebody says so.
    Known(Place),
    /// Nothing.
    Unknown,
}

/// Blobs on their way, and what is known of the remote when they have arrived.
#[derive(Default)]
pub(super) struct Objects {
    puts: Vec<(ObjectName, Body, Put)>,
    kept: Vec<(Digest, Kept)>,
    /// The pack being filled.
    packer: Packer,
    /// What is in all of it, or counted on.
    blobs: HashSet<Digest>,
    /// What is there already, as far as anybody knows, with what of it is counted on.
    relied: BTreeMap<Container, Vec<(Digest, u64)>>,
    /// Files that are sent and then removed.
    files: Vec<ScratchId>,
    bytes: u64,
}

impl Storage {
    /// Whether a remote holds a blob that was written to it lately, so that nobody removes it.
    pub(super) fn is_fresh(
        &self,
        connection: &Connection,
        digest: &Digest,
        size: u64,
    ) -> Result<bool, IndexError> {
        let standing = self.standing(connection, digest, size)?;
        Ok(matches!(standing, Standing::Fresh))
    }

    fn standing(
        &self,
        connection: &Connection,
        digest: &Digest,
        size: u64,
    ) -> Result<Standing, IndexError> {
        let kept = self.index.kept(connection.id, digest)?;
        let kept = kept.filter(|kept| kept.size == size);
        let kept = kept.filter(|kept| !self.lazy.is_gone(digest, &kept.place));
        Ok(match kept {
            Some(kept) if connection.is_recent(kept.seen_ms) => Standing::Fresh,
            Some(kept) => Standing::Known(kept.place),
            None => Standing::Unknown,
        })
    }

    /// Adds a blob to what is sent, or counted on.
    pub(super) fn add_blob(
        &self,
        connection: &Connection,
        digest: Digest,
        size: u64,
        objects: &mut Objects,
    ) -> Result<()> {
        match self.standing(connection, &digest, size)? {
            Standing::Fresh => {}
            Standing::Known(place) => objects.rely(Container::of(&digest, &place), digest, size),
            Standing::Unknown => self.add_bytes(digest, size, objects)?,
        }
        objects.blobs.insert(digest);
        Ok(())
    }

    fn add_bytes(&self, digest: Digest, size: u64, objects: &mut Objects) -> Result<()> {
        let file = self.cas.open(&digest)?;
        if size >= SMALL {
            // One that is not as it should be is left to those who remove things.
            let is_taken = self.lazy.is_gone(&digest, &Place::Own);
            self.add_large(digest, size, &file, is_taken, objects)?;
        } else {
            objects.packer.add(digest, size, file)?;
            if objects.packer.len() >= PACK {
                objects.seal()?;
            }
        }
        Ok(())
    }

    /// Makes sure that a remote holds blobs, and goes on to until the leases are given back that this
    /// returns, with how many blobs were sent.
    pub(super) fn send_blobs(
        &self,
        connection: &Connection,
        blobs: &[(Digest, u64)],
    ) -> Result<(u64, Vec<Reliance>)> {
        let (mut sent, mut reliances) = (0, Vec::new());
        let mut left = blobs.iter().peekable();
        while left.peek().is_some() {
            let mut objects = Objects::default();
            let mut gather = || {
                for (digest, size) in left.by_ref() {
                    self.add_blob(connection, *digest, *size, &mut objects)?;
                    if objects.are_enough() {
                        break;
                    }
                }
                Ok(())
            };
            let gathered: Result<()> = gather();
            let put = self.sent(objects, |objects| {
                gathered?;
                self.put_blobs(connection, objects)
            });
            match put {
                Ok((count, reliance)) => {
                    sent += count;
                    reliances.push(reliance);
                }
                Err(error) => {
                    let give_back = |reliance: Reliance| reliance.give_back(connection);
                    reliances.into_iter().for_each(give_back);
                    return Err(error);
                }
            }
        }
        Ok((sent, reliances))
    }

    /// Sends what was gathered; nothing of it stays behind, whatever comes of that.
    pub(super) fn sent<T>(
        &self,
        mut objects: Objects,
        send: impl FnOnce(&Objects) -> Result<T>,
    ) -> Result<T> {
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
        is_taken: bool,
        objects: &mut Objects,
    ) -> Result<()> {
        let (id, into) = self.new_scratch()?;
        objects.files.push(id);
        let (name, place, mode) = if is_taken {
            let (pack, packed) = pack::alone(digest, size, file, &into)?;
            (ObjectName::pack(&pack), packed.place(pack), Put::Replace)
        } else {
            let found = blob::pack(file, size, &into)?;
            ensure!(found == digest, "blob {digest} is damaged");
            (ObjectName::blob(&digest), Place::Own, Put::IfAbsent)
        };
        objects.bytes += into.metadata()?.len();
        let path: PathBuf = self.dir.scratch_file(id);
        objects.puts.push((name, Body::File(path), mode));
        objects.kept.push((digest, kept_now(size, place)));
        Ok(())
    }

    /// Puts blobs into a remote, notes that they are there, and takes a lease on those that were there
    /// before. Returns how many were sent.
    pub(super) fn put_blobs(
        &self,
        connection: &Connection,
        objects: &Objects,
    ) -> Result<(u64, Reliance)> {
        let mut relied = objects.relied.clone();
        let new = self.put_new(connection, objects)?;
        let sent = new.len() as u64;
        // What is new has a name that another may just be removing, who has seen what was there before.
        for (digest, kept) in &objects.kept {
            if kept.place == Place::Own {
                relied.insert(Container::Blob(*digest), vec![(*digest, kept.size)]);
            }
        }
        let wanted = relied.keys().copied().collect();
        let reliance = connection
            .send(async |remote| Reliance::on(&remote, connection.config.grace, &wanted).await)
            .context("blobs that are there")?;
        match self.make_sure(connection, &new, &relied, &reliance) {
            Ok(again) => Ok((sent + again, reliance)),
            Err(error) => {
                reliance.give_back(connection);
                Err(error)
            }
        }
    }

    /// Notes what is new and stays, and sends again what is lost. Returns how many blobs that were.
    fn make_sure(
        &self,
        connection: &Connection,
        new: &[(Digest, Kept)],
        relied: &BTreeMap<Container, Vec<(Digest, u64)>>,
        reliance: &Reliance,
    ) -> Result<u64> {
        let mut batch = self.index.batch();
        for (digest, kept) in new {
            if !reliance.lost.contains(&Container::of(digest, &kept.place)) {
                batch.put_kept(connection.id, digest, kept)?;
            }
        }
        batch.commit()?;
        let lost = reliance.lost.iter().filter_map(|lost| relied.get(lost));
        let lost: Vec<_> = lost.flatten().copied().collect();
        if !lost.is_empty() {
            self.send_again(connection, &lost)?;
        }
        Ok(lost.len() as u64)
    }

    /// Puts what is new, and notes where it is. Returns the blobs that nobody had put there before: they are
    /// fresh, once they are known to stay.
    fn put_new(&self, connection: &Connection, objects: &Objects) -> Result<Vec<(Digest, Kept)>> {
        let puts = objects.puts.clone();
        let existed = connection
            .send(async |remote| put_all(remote, puts).await)
            .context("blobs")?;
        let mut new = Vec::new();
        let mut batch = self.index.batch();
        for (digest, kept) in &objects.kept {
            let unseen = kept_unseen(kept.size, kept.place, kept.known_ms);
            batch.put_kept(connection.id, digest, &unseen)?;
            if !existed.contains(&Container::of(digest, &kept.place).name()) {
                new.push((*digest, *kept));
            }
        }
        batch.commit()?;
        Ok(new)
    }

    /// Sends blobs that are not where they were, or not for long. They get another place.
    fn send_again(&self, connection: &Connection, blobs: &[(Digest, u64)]) -> Result<()> {
        let mut objects = Objects::default();
        let mut gather = || {
            for (digest, size) in blobs {
                if !self.cas.has(digest, *size) {
                    self.bring(digest, *size, Haste::Wanted)?;
                }
                self.lazy.note_gone(digest, Place::Own, Gone::Unfit);
                self.add_bytes(*digest, *size, &mut objects)?;
            }
            Ok(())
        };
        let gathered: Result<()> = gather();
        self.sent(objects, |objects| {
            gathered?;
            // Packs, all of them: nobody removes a name that was never there.
            let mut batch = self.index.batch();
            for (digest, kept) in self.put_new(connection, objects)? {
                batch.put_kept(connection.id, &digest, &kept)?;
            }
            batch.commit()?;
            Ok(())
        })
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

    fn rely(&mut self, container: Container, digest: Digest, size: u64) {
        self.relied
            .entry(container)
            .or_default()
            .push((digest, size));
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
        // Nobody else has this name.
        self.puts.push((name, Body::Bytes(object), Put::Replace));
        Ok(())
    }
}

/// Fails where what was found to be fresh at that time, in milliseconds since the epoch, may not be any more:
/// this machine was asleep, or sending took days. It is all sent again, then.
pub(super) fn ensure_recent(connection: &Connection, began_ms: u64) -> Result<(), RemoteError> {
    let age = Duration::from_millis(clock::now_ms().saturating_sub(began_ms));
    if age < connection.recent() {
        return Ok(());
    }
    let why = "it took so long that what was sent may be gone";
    Err(not_encoded(std::io::Error::other(why)))
}

/// Puts objects. Returns the names of those that were there.
async fn put_all(
    remote: Arc<dyn Remote>,
    objects: Vec<(ObjectName, Body, Put)>,
) -> Result<HashSet<ObjectName>, RemoteError> {
    let put = at_once(objects, |(name, body, mode)| {
        let remote = Arc::clone(&remote);
        async move {
            let written = remote.put(&name, body, mode).await?;
            Ok((name, written))
        }
    });
    let existed = put
        .await?
        .into_iter()
        .filter(|(_, written)| *written == Written::Existed);
    Ok(existed.map(|(name, _)| name).collect())
}

/// Does something for each, some at a time; what comes of it is in no order. The first error ends it.
pub(super) async fn at_once<T, R, F>(
    items: Vec<T>,
    work: impl Fn(T) -> F,
) -> Result<Vec<R>, RemoteError>
where
    R: Send + 'static,
    F: Future<Output = Result<R, RemoteError>> + Send + 'static,
{
    let mut items = items.into_iter();
    let mut under_way = JoinSet::new();
    let mut done = Vec::new();
    loop {
        while under_way.len() < AT_ONCE
            && let Some(item) = items.next()
        {
            under_way.spawn(work(item));
        }
        match under_way.join_next().await {
            None => return Ok(done),
            Some(Ok(result)) => done.push(result?),
            Some(Err(error)) => return Err(not_encoded(std::io::Error::other(error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use remote::Kind;

    use super::super::testing;
    use super::*;

    #[test]
    fn what_cannot_be_sent_leaves_no_lease() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        // It was there once, and is nowhere now.
        let blob = (Digest::of(b"bytes"), 5);
        let kept = kept_unseen(blob.1, Place::Own, 1);
        let mut batch = storage.index.batch();
        let put = batch.put_kept(connection.id, &blob.0, &kept);
        put.expect("puts");
        batch.commit().expect("commits");
        assert!(storage.send_blobs(&connection, &[blob]).is_err());
        assert_eq!(testing::objects(dir.path(), Kind::Leases), [""; 0]);
    }
}
