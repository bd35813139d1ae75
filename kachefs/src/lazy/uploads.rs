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
    ActionEntry, ActionKey, Batch, Counter, Digest, Fact, IndexError, InputRecord,
    InvocationDigest, Place, Upload, UploadId,
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
    /// Nothing: it holds what must not leave the machine. With what would say that it is there.
    HeldBack(Option<Digest>),
    /// Nothing: it is not wanted.
    Nothing,
}

impl Storage {
    /// Notes a result that is to be uploaded, with the commit that stores it.
    pub fn note_upload(&self, batch: &mut Batch<'_>, upload: &Upload) -> Result<(), IndexError> {
        let id = self.lazy.queue.next_id();
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
        if self.index.uploads(1)?.is_empty() && !self.lazy.builds.has_ended() {
            return Ok(());
        }
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
        let (mut held_back, mut held_rows) = (0, Vec::new());
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
                Ok(Gathered::HeldBack(row)) => {
                    held_back += 1;
                    held_rows.extend(row);
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
        // It may be there, sent when something else was secret: nothing goes on to name it.
        for row in &held_rows {
            batch.delete_kept(connection.id, row);
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

    /// What the action cache holds under the keys of an upload, if it is still what was noted: what has taken
    /// its place has a note of its own, and other secrets. Before the result there may only be where to find it.
    fn entries_of(&self, upload: &Upload) -> Result<Vec<(ActionKey, ActionEntry)>, IndexError> {
        let Some((key, pointers)) = upload.keys.split_last() else {
            return Ok(Vec::new());
        };
        let Some(result) = self.index.action(key)? else {
            return Ok(Vec::new());
        };
        if upload
            .result
            .is_some_and(|noted| Some(noted) != result.digest().ok())
        {
            return Ok(Vec::new());
        }
        let mut entries = Vec::new();
        for key in pointers {
            let entry = self.index.action(key)?;
            let entry = entry.filter(|entry| matches!(entry, ActionEntry::PathBound(_)));
            entries.extend(entry.map(|entry| (*key, entry)));
        }
        entries.push((*key, result));
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
        // It was made for another remote, or is not there any more.
        if upload.remote != connection.id || entries.is_empty() {
            return Ok(Gathered::Nothing);
        }
        let held_back = || -> Result<Gathered> {
            let row = entries.last().map(|(key, entry)| entry.kept_as(key));
            Ok(Gathered::HeldBack(row.transpose()?))
        };
        let search = Search::new(&upload.secrets)?;
        let texts = [
            store::codec::encode(&upload.record)?,
            postcard::to_allocvec(&entries)?,
        ];
        if texts.iter().map(Vec::len).sum::<usize>() > facts::LARGEST_RESULT {
            tracing::warn!(invocation = ?upload.invocation, "a result says too much to be sent");
            return Ok(Gathered::Nothing);
        }
        if texts.iter().any(|text| search.finds(text)) {
            tracing::info!(invocation = ?upload.invocation, "a result names what must not leave this machine");
            return held_back();
        }
        let mut wanted = Vec::new();
        for (digest, size) in entries.iter().flat_map(|(_, entry)| entry.blobs()) {
            if objects.hold(&digest) || self.is_fresh(connection, &digest, size)? {
                continue;
            }
            let file = self.cas.open(&digest)?;
            if search.finds_in(&file)? {
                tracing::info!(%digest, "a result holds what must not leave this machine");
                return held_back();
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
        let mut batch = self.index.batch();
        for (key, entry) in wanted.iter().flat_map(|wanted| &wanted.entries) {
            let kept = kept_now(0, Place::Own);
            batch.put_kept(connection.id, &entry.kept_as(key)?, &kept)?;
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
    let is_readable = |object: &[u8]| Results::parse(object).is_some();
    let mut there = remote.get(name, None, facts::LARGEST).await?;
    if there.is_some() {
        is_old = reliance::is_old(&**remote, connection, name).await?;
        // Behind that look: what is read is no older than it says.
        there = facts::get_to_replace(&**remote, name, is_readable).await?;
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
    use store::RootSet;

    use super::super::testing;
    use super::*;

    const SECRET: &[u8] = b"sesame-sesame";

    fn key(name: &str) -> ActionKey {
        ActionKey(Digest::of(name.as_bytes()))
    }

    /// A result under the last of these keys, and a note that it is to be sent.
    fn note(
        storage: &Storage,
        connection: &Connection,
        keys: &[ActionKey],
        stdout: &[u8],
        secrets: &[&[u8]],
    ) -> ActionEntry {
        let entry = testing::result(Vec::new(), stdout.to_vec());
        let upload = Upload {
            remote: connection.id,
            invocation: InvocationDigest(Digest::of(b"invocation")),
            record: testing::record(),
            keys: keys.to_vec(),
            secrets: secrets.iter().map(|secret| secret.to_vec()).collect(),
            result: Some(entry.digest().expect("a digest")),
        };
        let mut batch = storage.index.batch();
        let key = keys.last().expect("a key");
        batch.put_action(key, &entry).expect("puts");
        storage.note_upload(&mut batch, &upload).expect("notes");
        batch.commit().expect("commits");
        entry
    }

    /// The results the remote holds.
    fn sent(connection: &Connection) -> Vec<Fact> {
        let invocation = InvocationDigest(Digest::of(b"invocation"));
        let name = ObjectName::action(&invocation);
        let get = connection.call(async |remote| remote.get(&name, None, facts::LARGEST).await);
        let object = get.expect("answers");
        object.map_or_else(Vec::new, |object| {
            Results::read(&object).open(&invocation, connection.trust())
        })
    }

    #[test]
    fn what_is_held_back_is_not_known_to_be_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let key = key("key");
        let entry = note(&storage, &connection, &[key], SECRET, &[SECRET]);
        // It was sent when that was no secret.
        let row = entry.kept_as(&key).expect("a digest");
        let mut batch = storage.index.batch();
        let put = batch.put_kept(connection.id, &row, &kept_now(0, Place::Own));
        put.expect("puts");
        batch.commit().expect("commits");
        storage.upload_to(&connection).expect("holds it back");
        assert_eq!(storage.index.upload_count().expect("reads"), 0);
        let kept = storage.index.kept(connection.id, &row).expect("reads");
        assert_eq!(kept, None);
        assert!(sent(&connection).is_empty());
    }

    /// In either order: what was sent before may be noted to be sent again at any time.
    #[test]
    fn what_has_taken_the_place_of_a_result_is_searched_for_its_own_secrets() {
        for is_first in [true, false] {
            let dir = tempfile::tempdir().expect("a directory");
            let (storage, connection) = testing::store(dir.path());
            let keys = [key("key")];
            let harmless = || note(&storage, &connection, &keys, b"harmless", &[]);
            let telling = || note(&storage, &connection, &keys, SECRET, &[SECRET]);
            if is_first {
                harmless();
                telling();
            } else {
                telling();
                harmless();
            }
            storage.upload_to(&connection).expect("sends");
            let sent = sent(&connection);
            assert_eq!(sent.len(), usize::from(!is_first), "{sent:?}");
            assert_eq!(storage.index.upload_count().expect("reads"), 0);
        }
    }

    #[test]
    fn nothing_is_sent_wherever_the_remote_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let away = async |_| {
            Err::<(), _>(RemoteError::TimedOut {
                place: "here".to_owned(),
                limit: Duration::from_secs(1),
            })
        };
        connection.send(away).expect_err("is away");
        assert!(connection.sends_nothing());
        storage.upload_to(&connection).expect("has nothing to send");
        note(&storage, &connection, &[key("key")], b"harmless", &[]);
        storage.upload_to(&connection).expect_err("sends nothing");
    }

    #[test]
    fn a_result_of_another_build_does_not_go_with_this_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let (plain, bound) = (key("key"), key("bound"));
        note(&storage, &connection, &[plain], SECRET, &[SECRET]);
        note(&storage, &connection, &[plain, bound], b"harmless", &[]);
        storage.upload_to(&connection).expect("sends");
        let sent = sent(&connection);
        let keys: Vec<_> = sent.iter().flat_map(|fact| &fact.entries).collect();
        assert_eq!(keys.len(), 1);
        assert_eq!(keys[0].0, bound);
    }

    #[test]
    fn where_a_result_is_found_goes_with_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let (plain, bound) = (key("key"), key("bound"));
        let mut batch = storage.index.batch();
        let pointer = ActionEntry::PathBound(RootSet::all());
        batch.put_action(&plain, &pointer).expect("puts");
        batch.commit().expect("commits");
        let result = note(&storage, &connection, &[plain, bound], b"harmless", &[]);
        storage.upload_to(&connection).expect("sends");
        let sent = sent(&connection);
        assert_eq!(sent[0].entries, [(plain, pointer), (bound, result)]);
    }
}
