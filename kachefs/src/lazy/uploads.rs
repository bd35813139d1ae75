//! Uploads: what was made here goes to the remote, in the background and in the order it was made.
//!
//! A result is noted in the commit that stores it, so no crash forgets it. A round takes the oldest
//! notes, sends the blobs the remote is not known to hold (small ones in packs), then the results that
//! name them, and only then forgets the notes: a remote never names what it does not hold, and what was
//! sent twice is the same. A remote that does not answer is tried again later.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use parking_lot::{Condvar, Mutex};
use remote::pack::Packer;
use remote::{Body, ObjectName, Put, Remote, RemoteError, blob};
use serde::{Deserialize, Serialize};
use store::{
    ActionEntry, ActionKey, Batch, Counter, Digest, Fact, IndexError, InputRecord,
    InvocationDigest, Kept, Place, ScratchId, Upload, UploadId,
};
use tokio::task::JoinSet;

use super::connection::{Connection, Unavailable};
use super::facts::{self, Results};
use super::kept_now;
use super::secrets::Search;
use crate::clock;
use crate::storage::Storage;

/// Blobs of less bytes go into packs, and packs grow to so many.
const SMALL: u64 = 64 << 10;
const PACK: u64 = 4 << 20;

/// Results of a round, and bytes of large blobs in it.
const ROUND: usize = 128;
const ROUND_BYTES: u64 = 256 << 20;

/// Objects under way at once.
const AT_ONCE: usize = 8;

/// How long a result waits for others, to share packs with them.
const GATHER: Duration = Duration::from_secs(1);

/// How long until a remote that failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// For how long a blob that was seen in the remote is taken to be there: less than its garbage
/// collection leaves alone what nothing names.
const SEEN: Duration = Duration::from_hours(24);

/// What waits to be sent.
pub struct Queue {
    next: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Something was noted, or somebody wants it sent now.
    wanted: bool,
    hurry: bool,
    /// Rounds ended, and why the last one failed.
    rounds: u64,
    failure: Option<String>,
    is_passing: bool,
}

/// How far uploads are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pushed {
    /// Results that are still to be sent.
    pub left: u64,
    /// How often that was tried.
    pub rounds: u64,
    /// Why the last try failed.
    pub failure: Option<String>,
    /// Whether another one may not.
    pub is_passing: bool,
}

impl Queue {
    pub(super) fn new(last: Option<UploadId>) -> Self {
        Self {
            next: AtomicU64::new(last.map_or(0, |last| last.0 + 1)),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn wake(&self, hurry: bool) {
        let mut state = self.state.lock();
        state.wanted = true;
        state.hurry |= hurry;
        self.changed.notify_all();
    }

    /// Waits until there is something to do, and then for more of it.
    fn wait(&self, longest: Duration) {
        let deadline = Instant::now() + longest;
        let mut state = self.state.lock();
        while !state.wanted {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let deadline = Instant::now() + GATHER;
        while !state.hurry {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.wanted = false;
        state.hurry = false;
    }

    fn round_ended(&self, failure: Option<&anyhow::Error>) {
        let unavailable = failure.and_then(|error| error.downcast_ref::<Unavailable>());
        let mut state = self.state.lock();
        state.rounds += 1;
        state.failure = failure.map(|error| format!("{error:#}"));
        state.is_passing = unavailable.is_some_and(Unavailable::is_passing);
        self.changed.notify_all();
    }
}

/// A result, with what is to be sent of it.
struct Wanted {
    id: UploadId,
    upload: Upload,
    entries: Vec<(ActionKey, ActionEntry)>,
}

/// What a round sends before the results, and what is known of the remote when it has arrived.
#[derive(Default)]
struct Objects {
    puts: Vec<(ObjectName, Body, Put)>,
    kept: Vec<(Digest, Kept)>,
    /// Files that are sent and then removed.
    files: Vec<ScratchId>,
    bytes: u64,
}

impl Storage {
    /// Notes a result that is to be uploaded, with the commit that stores it.
    pub fn note_upload(&self, batch: &mut Batch<'_>, upload: &Upload) -> Result<(), IndexError> {
        let id = UploadId(self.lazy.queue.next.fetch_add(1, Ordering::Relaxed));
        batch.put_upload(id, upload)?;
        self.lazy.queue.wake(false);
        Ok(())
    }

    /// Sends what waits, for as long as anybody has the store.
    pub fn upload_now_and_then(self: &Arc<Self>) -> io::Result<()> {
        let storage = Arc::downgrade(self);
        let upload = move || {
            while let Some(storage) = storage.upgrade() {
                storage.upload_all();
                let queue = Arc::clone(&storage.lazy.queue);
                // While it waits, the store may be closed.
                drop(storage);
                queue.wait(AGAIN);
            }
        };
        let thread = thread::Builder::new().name("uploads".into()).spawn(upload);
        thread.map(drop)
    }

    fn upload_all(&self) {
        let sent = match self.lazy.writable() {
            Some(connection) => self.upload_to(&connection),
            None => Ok(()),
        };
        let failure = sent.err();
        if let Some(error) = &failure {
            let error = format!("{error:#}");
            tracing::debug!(error, "uploads wait");
        }
        self.lazy.queue.round_ended(failure.as_ref());
    }

    fn upload_to(&self, connection: &Arc<Connection>) -> Result<()> {
        // Packing is work, too.
        if connection.sends_nothing() {
            return Err(Unavailable::LeftAlone.into());
        }
        let mut most = ROUND;
        loop {
            match self.upload_round(connection, most) {
                Ok(0) => break,
                Ok(_) => {}
                // One of them, perhaps; the others need not wait for it.
                Err(error) if most > 1 && is_refused(&error) => most = 1,
                Err(error) if is_refused(&error) => self.give_up_oldest(&error)?,
                Err(error) => return Err(error),
            }
        }
        self.publish_builds(connection)
    }

    /// Sends the oldest results. Returns how many there were.
    fn upload_round(&self, connection: &Arc<Connection>, most: usize) -> Result<usize> {
        let noted = self.index.uploads(most)?;
        let count = noted.len();
        if count == 0 {
            return Ok(0);
        }
        let mut wanted = Vec::new();
        let mut done = Vec::new();
        let mut objects = Objects::default();
        let mut packer = Packer::default();
        let mut looked_at = HashSet::new();
        let mut held_back = 0;
        for (id, upload) in noted {
            // The rest of it is for the next round.
            if objects.bytes > ROUND_BYTES {
                break;
            }
            let entries = self.entries_of(&upload)?;
            if upload.remote != connection.id {
                // It was made for another.
                done.push(id);
                continue;
            }
            let sendable = self.gather(
                connection,
                &upload,
                &entries,
                &mut looked_at,
                &mut packer,
                &mut objects,
            );
            match sendable {
                Ok(true) => wanted.push(Wanted {
                    id,
                    upload,
                    entries,
                }),
                // It stays here.
                Ok(false) => {
                    held_back += 1;
                    done.push(id);
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "a result is not uploaded");
                    done.push(id);
                }
            }
        }
        let sent = objects
            .pack(packer)
            .and_then(|()| self.send(connection, &objects, &wanted));
        for id in std::mem::take(&mut objects.files) {
            self.remove_scratch(id);
        }
        sent?;
        done.extend(wanted.iter().map(|wanted| wanted.id));
        let mut batch = self.index.batch();
        for id in &done {
            batch.delete_upload(*id);
        }
        let counted = [
            (Counter::ResultsUploaded, wanted.len() as u64),
            (Counter::ResultsHeldBack, held_back),
        ];
        batch.count(&counted, None);
        batch.commit()?;
        Ok(count)
    }

    /// Forgets the upload that the remote will not have.
    fn give_up_oldest(&self, error: &anyhow::Error) -> Result<()> {
        let error = format!("{error:#}");
        tracing::error!(error, "a result is not uploaded");
        let mut batch = self.index.batch();
        for (id, _) in self.index.uploads(1)? {
            batch.delete_upload(id);
        }
        Ok(batch.commit()?)
    }

    /// What the action cache holds under the keys of an upload, by now.
    fn entries_of(&self, upload: &Upload) -> Result<Vec<(ActionKey, ActionEntry)>, IndexError> {
        let mut entries = Vec::new();
        for key in &upload.keys {
            if let Some(entry) = self.index.action(key)? {
                entries.push((*key, entry));
            }
        }
        Ok(entries)
    }

    /// Adds the blobs of a result to what is sent. Whether the result may be.
    fn gather(
        &self,
        connection: &Connection,
        upload: &Upload,
        entries: &[(ActionKey, ActionEntry)],
        looked_at: &mut HashSet<Digest>,
        packer: &mut Packer,
        objects: &mut Objects,
    ) -> Result<bool> {
        let search = Search::new(&upload.secrets)?;
        let texts = [
            store::codec::encode(&upload.record)?,
            postcard::to_allocvec(entries)?,
        ];
        if entries.is_empty() {
            return Ok(false);
        }
        if texts.iter().any(|text| search.finds(text)) {
            tracing::info!(invocation = ?upload.invocation, "a result names what must not leave this machine");
            return Ok(false);
        }
        let mut wanted = Vec::new();
        for (digest, size) in entries.iter().flat_map(|(_, entry)| entry.blobs()) {
            if looked_at.contains(&digest) || self.is_sent(connection, &digest, size)? {
                continue;
            }
            let file = self.cas.open(&digest)?;
            if search.finds_in(&file)? {
                tracing::info!(%digest, "a result holds what must not leave this machine");
                return Ok(false);
            }
            wanted.push((digest, size));
        }
        for (digest, size) in wanted {
            self.add(digest, size, packer, objects)?;
            looked_at.insert(digest);
        }
        Ok(true)
    }

    /// Whether a remote was seen to hold a blob lately.
    fn is_sent(
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

    fn add(
        &self,
        digest: Digest,
        size: u64,
        packer: &mut Packer,
        objects: &mut Objects,
    ) -> Result<()> {
        let file = self.cas.open(&digest)?;
        if size >= SMALL {
            return self.add_large(digest, size, &file, objects);
        }
        packer.add(digest, size, file)?;
        if packer.len() >= PACK {
            objects.pack(std::mem::take(packer))?;
        }
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
            let mut packer = Packer::default();
            let mut gather = || {
                for (digest, size) in left.by_ref() {
                    if !self.is_sent(connection, digest, *size)? {
                        self.fault(digest, *size)?;
                        self.add(*digest, *size, &mut packer, &mut objects)?;
                        sent += 1;
                    }
                    if objects.bytes > ROUND_BYTES {
                        break;
                    }
                }
                Ok(())
            };
            let gathered = gather();
            let done = gathered
                .and_then(|()| objects.pack(packer))
                .and_then(|()| self.put_blobs(connection, &objects));
            for id in objects.files {
                self.remove_scratch(id);
            }
            done?;
        }
        Ok(sent)
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
        anyhow::ensure!(found == digest, "blob {digest} is damaged");
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

    /// Sends blobs, and then the results that name them.
    fn send(
        &self,
        connection: &Arc<Connection>,
        objects: &Objects,
        wanted: &[Wanted],
    ) -> Result<()> {
        self.put_blobs(connection, objects)?;
        let facts = wanted
            .iter()
            .map(|wanted| {
                let Upload {
                    invocation, record, ..
                } = &wanted.upload;
                self.fact(connection, *invocation, record.clone(), &wanted.entries)
            })
            .collect::<Result<Vec<_>, _>>()?;
        connection
            .send(async |remote| put_facts(remote, connection, facts).await)
            .context("results")?;
        let mut batch = self.index.batch();
        for (key, _) in wanted.iter().flat_map(|wanted| &wanted.entries) {
            batch.put_kept(connection.id, &key.0, &kept_now(0, Place::Own))?;
        }
        batch.commit()?;
        Ok(())
    }

    fn put_blobs(&self, connection: &Connection, objects: &Objects) -> Result<()> {
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

    /// A result, with where its blobs are in a remote.
    pub(super) fn fact(
        &self,
        connection: &Connection,
        invocation: InvocationDigest,
        record: InputRecord,
        entries: &[(ActionKey, ActionEntry)],
    ) -> Result<Fact, IndexError> {
        let mut packed = Vec::new();
        for (digest, _) in entries.iter().flat_map(|(_, entry)| entry.blobs()) {
            let kept = self.index.kept(connection.id, &digest)?;
            if let Some(place @ Place::Pack { .. }) = kept.map(|kept| kept.place) {
                packed.push((digest, place));
            }
        }
        Ok(Fact {
            invocation,
            record,
            entries: entries.to_vec(),
            packed,
        })
    }

    /// Has everything sent that waits, now. Returns how far that is.
    pub fn push(&self) -> Result<Pushed, IndexError> {
        let queue = &self.lazy.queue;
        queue.wake(true);
        let left = self.index.upload_count()?;
        let state = queue.state.lock();
        Ok(Pushed {
            left,
            rounds: state.rounds,
            failure: state.failure.clone(),
            is_passing: state.is_passing,
        })
    }

    /// How many results wait to be sent.
    pub fn waiting_uploads(&self) -> Result<u64, IndexError> {
        self.index.upload_count()
    }
}

impl Objects {
    /// Adds a pack.
    fn pack(&mut self, packer: Packer) -> Result<()> {
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

/// Whether a remote that answers does not take what it was sent, and will not.
fn is_refused(error: &anyhow::Error) -> bool {
    let unavailable = error.downcast_ref::<Unavailable>();
    matches!(
        unavailable,
        Some(Unavailable::Remote(
            RemoteError::Refused { .. } | RemoteError::TooLarge { .. }
        ))
    )
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

async fn put_facts(
    remote: Arc<dyn Remote>,
    connection: &Arc<Connection>,
    facts: Vec<Fact>,
) -> Result<(), RemoteError> {
    // Results of one invocation are in one object: one after the other.
    let mut by_name: HashMap<ObjectName, Vec<Fact>> = HashMap::new();
    for fact in facts {
        let name = ObjectName::action(&fact.invocation);
        by_name.entry(name).or_default().push(fact);
    }
    at_once(by_name.into_iter().collect(), |(name, facts)| {
        let (remote, connection) = (Arc::clone(&remote), Arc::clone(connection));
        async move { put_results(&*remote, &connection, &name, &facts).await }
    })
    .await
}

/// Adds results of one invocation to those that are there.
async fn put_results(
    remote: &dyn Remote,
    connection: &Connection,
    name: &ObjectName,
    facts: &[Fact],
) -> Result<(), RemoteError> {
    let there = remote.get(name, None, facts::LARGEST).await?;
    let mut results = there.map_or_else(Results::default, |object| Results::read(&object));
    let mut is_new = false;
    for fact in facts {
        if !results.hold(fact, connection.trust()) {
            let added = results.add(fact, connection.key.as_ref(), connection.trust());
            added.map_err(not_encoded)?;
            is_new = true;
        }
    }
    if is_new {
        let object = results.write().map_err(not_encoded)?;
        remote
            .put(name, Body::Bytes(object.into()), Put::Replace)
            .await?;
    }
    Ok(())
}

pub(super) fn not_encoded(source: io::Error) -> RemoteError {
    RemoteError::Io {
        path: "results".to_owned(),
        source,
    }
}

/// Does something for each, some at a time. The first error ends it.
async fn at_once<T, F>(items: Vec<T>, work: impl Fn(T) -> F) -> Result<(), RemoteError>
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
            Some(Err(error)) => return Err(not_encoded(io::Error::other(error))),
        }
    }
}
