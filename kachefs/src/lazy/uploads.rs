//! Uploads: what was made here goes to the remote, in the background and in the order it was made.
//!
//! A result is noted in the commit that stores it, so no crash forgets it. A round takes the oldest
//! notes, sends the blobs the remote is not known to hold (small ones in packs), then the results that
//! name them, and only then forgets the notes: a remote never names what it does not hold, and what was
//! sent twice is the same. A remote that does not answer is tried again later.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use remote::{Body, ObjectName, Put, Remote, RemoteError};
use store::{
    ActionEntry, ActionKey, Batch, Counter, Fact, IndexError, InputRecord, InvocationDigest, Place,
    Upload, UploadId,
};

use super::connection::{Connection, Unavailable};
use super::containers;
use super::facts::{self, Results};
use super::reliance::{self, Reliance};
use super::secrets::Search;
use super::sending::{Objects, at_once, ensure_recent};
use super::{kept_now, not_encoded};
use crate::clock;
use crate::storage::Storage;

/// Results of a round.
const ROUND: usize = 128;

/// How long until a remote that failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// A result, with what is to be sent of it.
struct Wanted {
    id: UploadId,
    upload: Upload,
    entries: Vec<(ActionKey, ActionEntry)>,
}

/// What is to be sent of a result.
enum Gathered {
    /// This, and the blobs it names.
    Entries(Vec<(ActionKey, ActionEntry)>),
    /// Nothing: it holds what must not leave the machine.
    HeldBack,
    /// Nothing: it is not wanted.
    Nothing,
}

impl Storage {
    /// Notes a result that is to be uploaded, with the commit that stores it.
    pub fn note_upload(&self, batch: &mut Batch<'_>, upload: &Upload) -> Result<(), IndexError> {
        let id = self.lazy.queue.next_id();
        batch.put_upload(id, upload)?;
        // Nobody has searched it yet: what was sent under its key may have been another.
        for key in &upload.keys {
            batch.delete_kept(upload.remote, &key.0);
        }
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
                Err(error) if most > 1 && is_of_one_result(&error) => most = 1,
                Err(error) if is_of_one_result(&error) => self.give_up_oldest(&error)?,
                Err(error) => return Err(error),
            }
        }
        self.publish_builds(connection)
    }

    /// Sends the oldest results. Returns how many there were.
    fn upload_round(&self, connection: &Arc<Connection>, most: usize) -> Result<usize> {
        let began_ms = clock::now_ms();
        let noted = self.index.uploads(most)?;
        let count = noted.len();
        if count == 0 {
            return Ok(0);
        }
        let mut wanted = Vec::new();
        let mut done = Vec::new();
        let mut objects = Objects::default();
        let (mut held_back, mut held_keys) = (0, Vec::new());
        for (id, upload) in noted {
            // The rest of it is for the next round.
            if objects.are_enough() {
                break;
            }
            match self.gather(connection, &upload, &mut objects) {
                Ok(Gathered::Entries(entries)) => wanted.push(Wanted {
                    id,
                    upload,
                    entries,
                }),
                Ok(Gathered::HeldBack) => {
                    held_back += 1;
                    held_keys.extend(upload.keys);
                    done.push(id);
                }
                Ok(Gathered::Nothing) => done.push(id),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "a result is not uploaded");
                    done.push(id);
                }
            }
        }
        self.sent(objects, |objects| {
            self.send(connection, objects, &wanted, began_ms)
        })?;
        done.extend(wanted.iter().map(|wanted| wanted.id));
        let mut batch = self.index.batch();
        for id in &done {
            batch.delete_upload(*id);
        }
        // An upload that was under way when it was noted may have said so.
        for key in &held_keys {
            batch.delete_kept(connection.id, &key.0);
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

    /// Adds the blobs of a result to what is sent, if the result may be.
    fn gather(
        &self,
        connection: &Connection,
        upload: &Upload,
        objects: &mut Objects,
    ) -> Result<Gathered> {
        let entries = self.entries_of(upload)?;
        // It was made for another remote, or is not there any more: what is there has its own note.
        if upload.remote != connection.id || entries.is_empty() {
            return Ok(Gathered::Nothing);
        }
        let now = entries.last().map(|(_, entry)| entry.digest());
        if upload.result.is_some() && upload.result != now.transpose()? {
            return Ok(Gathered::Nothing);
        }
        let search = Search::new(&upload.secrets)?;
        let texts = [
            store::codec::encode(&upload.record)?,
            postcard::to_allocvec(&entries)?,
        ];
        if texts.iter().any(|text| search.finds(text)) {
            tracing::info!(invocation = ?upload.invocation, "a result names what must not leave this machine");
            return Ok(Gathered::HeldBack);
        }
        let mut wanted = Vec::new();
        for (digest, size) in entries.iter().flat_map(|(_, entry)| entry.blobs()) {
            if objects.hold(&digest) || self.is_fresh(connection, &digest, size)? {
                continue;
            }
            let file = self.cas.open(&digest)?;
            if search.finds_in(&file)? {
                tracing::info!(%digest, "a result holds what must not leave this machine");
                return Ok(Gathered::HeldBack);
            }
            wanted.push((digest, size));
        }
        for (digest, size) in wanted {
            self.add_blob(connection, digest, size, objects)?;
        }
        Ok(Gathered::Entries(entries))
    }

    /// Sends blobs, and then the results that name them.
    fn send(
        &self,
        connection: &Arc<Connection>,
        objects: &Objects,
        wanted: &[Wanted],
        began_ms: u64,
    ) -> Result<()> {
        let (_, reliance) = self.put_blobs(connection, objects)?;
        let named = self.name(connection, wanted, began_ms);
        reliance.give_back(connection);
        named
    }

    /// Sends results whose blobs are there.
    fn name(&self, connection: &Arc<Connection>, wanted: &[Wanted], began_ms: u64) -> Result<()> {
        let facts = wanted
            .iter()
            .map(|wanted| {
                let Upload {
                    invocation, record, ..
                } = &wanted.upload;
                self.fact(connection, *invocation, record.clone(), &wanted.entries)
            })
            .collect::<Result<Vec<_>, _>>()?;
        ensure_recent(connection, began_ms)?;
        connection
            .send(async |remote| put_facts(remote, connection, facts).await)
            .context("results")?;
        let named = wanted.iter().flat_map(|wanted| &wanted.entries);
        Ok(self.note_named(connection, named)?)
    }

    /// Notes that results are in the remote, but for those that others have taken the place of: these have
    /// not been searched, and nothing must name them. Only here and by who notes an upload, in one commit with
    /// the result, that is changed.
    fn note_named<'a>(
        &self,
        connection: &Connection,
        named: impl Iterator<Item = &'a (ActionKey, ActionEntry)> + Clone,
    ) -> Result<(), IndexError> {
        let mut batch = self.index.batch();
        for (key, _) in named.clone() {
            batch.put_kept(connection.id, &key.0, &kept_now(0, Place::Own))?;
        }
        batch.commit()?;
        let mut batch = self.index.batch();
        for (key, entry) in named {
            if self.index.action(key)?.as_ref() != Some(entry) {
                batch.delete_kept(connection.id, &key.0);
            }
        }
        batch.commit()
    }

    /// A result, with where its blobs are in a remote.
    pub(super) fn fact(
        &self,
        connection: &Connection,
        invocation: InvocationDigest,
        record: InputRecord,
        entries: &[(ActionKey, ActionEntry)],
    ) -> Result<Fact, IndexError> {
        let blobs = entries.iter().flat_map(|(_, entry)| entry.blobs());
        let packed = self.places_in_packs(connection, blobs)?;
        Ok(Fact {
            invocation,
            record,
            entries: entries.to_vec(),
            packed,
        })
    }
}

/// Whether it is one of the results that cannot be sent, not the remote that takes none: that one knows
/// no such bucket, say, is mended by whoever configured it.
fn is_of_one_result(error: &anyhow::Error) -> bool {
    let unavailable = error.downcast_ref::<Unavailable>();
    matches!(
        unavailable,
        Some(Unavailable::Remote(RemoteError::TooLarge { .. }))
    )
}

async fn put_facts(
    remote: Arc<dyn Remote>,
    connection: &Arc<Connection>,
    facts: Vec<Fact>,
) -> Result<(), RemoteError> {
    // Results of one invocation are in one object: one after the other.
    let mut by_invocation: HashMap<InvocationDigest, Vec<Fact>> = HashMap::new();
    for fact in facts {
        by_invocation.entry(fact.invocation).or_default().push(fact);
    }
    at_once(
        by_invocation.into_iter().collect(),
        |(invocation, facts)| {
            let (remote, connection) = (Arc::clone(&remote), Arc::clone(connection));
            async move { put_results(&remote, &connection, invocation, &facts).await }
        },
    )
    .await
    .map(drop)
}

/// Adds results of one invocation to those that are there.
async fn put_results(
    remote: &Arc<dyn Remote>,
    connection: &Connection,
    invocation: InvocationDigest,
    facts: &[Fact],
) -> Result<(), RemoteError> {
    let name = &ObjectName::action(&invocation);
    let mut is_old = false;
    let mut there = remote.get(name, None, facts::LARGEST).await?;
    if there.is_some() {
        is_old = reliance::is_old(&**remote, connection, name).await?;
        // Behind that look: what is read is no older than it says.
        there = remote.get(name, None, facts::LARGEST).await?;
    }
    let mut results = there.map_or_else(Results::default, |object| Results::read(&object));
    let mut reliance = Reliance::default();
    // Written again, they would stay another while: only those whose blobs do, too.
    if is_old {
        let known = results.open(&invocation, connection.trust());
        let wanted = known.iter().flat_map(containers::of_fact).collect();
        reliance = Reliance::on(remote, connection.config.grace, &wanted).await?;
        results.retain(&invocation, connection.trust(), |fact| reliance.holds(fact));
    }
    let put = add_results(remote, connection, name, results, facts, is_old).await;
    reliance.end(&**remote).await;
    put
}

/// Writes results with those that are new, if any is or they are to stay.
async fn add_results(
    remote: &Arc<dyn Remote>,
    connection: &Connection,
    name: &ObjectName,
    mut results: Results,
    facts: &[Fact],
    is_old: bool,
) -> Result<(), RemoteError> {
    let mut is_new = is_old;
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

#[cfg(test)]
mod tests {
    use store::Digest;

    use super::super::testing;
    use super::*;

    #[test]
    fn what_is_held_back_is_not_known_to_be_there() {
        const SECRET: &[u8] = b"sesame-sesame";
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let key = ActionKey(Digest::of(b"key"));
        let upload = Upload {
            remote: connection.id,
            invocation: InvocationDigest(Digest::of(b"invocation")),
            record: InputRecord {
                sources: Vec::new(),
                env: Vec::new(),
                observed: None,
                created_ms: 1,
            },
            keys: vec![key],
            secrets: vec![SECRET.to_vec()],
            result: None,
        };
        // Another result was sent under the same key: before this one was noted, or meanwhile.
        let sent = || {
            let mut batch = storage.index.batch();
            let kept = kept_now(0, Place::Own);
            let put = batch.put_kept(connection.id, &key.0, &kept);
            put.expect("puts");
            batch.commit().expect("commits");
        };
        let is_known = || {
            let kept = storage.index.kept(connection.id, &key.0);
            kept.expect("reads").is_some()
        };
        sent();
        let mut batch = storage.index.batch();
        let entry = testing::result(Vec::new(), SECRET.to_vec());
        batch.put_action(&key, &entry).expect("puts");
        storage.note_upload(&mut batch, &upload).expect("notes");
        batch.commit().expect("commits");
        assert!(!is_known());
        sent();
        storage.upload_to(&connection).expect("holds it back");
        assert_eq!(storage.index.upload_count().expect("reads"), 0);
        assert!(!is_known());
    }

    #[test]
    fn what_has_taken_the_place_of_a_result_is_searched_for_its_own_secrets() {
        const SECRET: &[u8] = b"sesame-sesame";
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let key = ActionKey(Digest::of(b"key"));
        let note = |stdout: &[u8], secrets: Vec<Vec<u8>>| {
            let entry = testing::result(Vec::new(), stdout.to_vec());
            let upload = Upload {
                remote: connection.id,
                invocation: InvocationDigest(Digest::of(b"invocation")),
                record: InputRecord {
                    sources: Vec::new(),
                    env: Vec::new(),
                    observed: None,
                    created_ms: 1,
                },
                keys: vec![key],
                secrets,
                result: Some(entry.digest().expect("a digest")),
            };
            let mut batch = storage.index.batch();
            batch.put_action(&key, &entry).expect("puts");
            storage.note_upload(&mut batch, &upload).expect("notes");
            batch.commit().expect("commits");
        };
        // In either order: what was sent before may be noted to be sent again at any time.
        note(b"harmless", Vec::new());
        note(SECRET, vec![SECRET.to_vec()]);
        storage.upload_to(&connection).expect("sends nothing");
        let results = dir
            .path()
            .join("bucket")
            .join(remote::Kind::Actions.prefix());
        assert!(!results.exists(), "something was sent");
        assert_eq!(storage.index.upload_count().expect("reads"), 0);
    }

    #[test]
    fn what_took_the_place_of_a_result_while_it_was_sent_is_not_known_to_be_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let key = ActionKey(Digest::of(b"key"));
        let entry = |text: &str| testing::result(Vec::new(), text.as_bytes().to_vec());
        let is_known = || {
            let kept = storage.index.kept(connection.id, &key.0);
            kept.expect("reads").is_some()
        };
        for (there, expected) in [("sent", true), ("other", false)] {
            let mut batch = storage.index.batch();
            batch.put_action(&key, &entry(there)).expect("puts");
            batch.commit().expect("commits");
            let named = [(key, entry("sent"))];
            let noted = storage.note_named(&connection, named.iter());
            noted.expect("notes");
            assert_eq!(is_known(), expected);
        }
    }
}
