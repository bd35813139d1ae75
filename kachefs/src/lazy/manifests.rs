//! Build manifests: all the results of a build in one object, so that a machine that has none of them
//! learns them with one request.
//!
//! A build is the actions one cargo process asks for. When it is gone and everything it made is
//! uploaded, its results are added to the manifest of its fingerprint: of the lockfile, the toolchain
//! and the profile, which a checkout of the same project has in common with this one. What has been
//! there longest goes first when there are too many.
//!
//! A result whose blobs a collection has removed (`gc`) stays out of the manifest, although this store has
//! sent it: it is sent again first, where its blobs are here.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use remote::signed::Trust;
use remote::{Body, ObjectName, Put, Remote, RemoteError};
use store::{
    ActionEntry, ActionKey, BuildManifest, Digest, Fact, IndexError, InvocationDigest, Upload,
};

use super::connection::Connection;
use super::containers::{self, Container};
use super::facts;
use super::not_encoded;
use super::prefetch;
use super::reliance::{Reliance, is_old};
use super::sending::ensure_recent;
use crate::clock;
use crate::storage::Storage;

/// Results in a manifest: those of a large workspace, with several sets of flags.
const RESULTS: usize = 16 * 1024;

/// Fingerprints whose manifests are remembered.
const REMEMBERED: usize = 64;

/// One result of a build.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// The invocation it is a result of.
    pub invocation: InvocationDigest,
    /// The input record that led to it, as [`store::record_digest`] has it.
    pub record: Digest,
    /// The key, and the key it is bound under where it is bound to paths.
    pub keys: Vec<ActionKey>,
}

/// A process whose actions are a build: its number, and when it started.
pub type Process = (u32, Option<u64>);

/// Builds under way, and what manifests are known to hold.
#[derive(Default)]
pub struct OpenBuilds {
    open: Mutex<HashMap<Process, HashMap<Digest, HashSet<Part>>>>,
    published: Mutex<HashMap<Digest, Known>>,
}

/// A manifest as it was last seen.
struct Known {
    keys: HashSet<ActionKey>,
    /// When it was written, or seen not to be old.
    renewed: Option<Instant>,
}

impl OpenBuilds {
    /// Notes a result that a build has used or made.
    pub fn note(&self, process: Process, fingerprint: Digest, part: Part) {
        let mut open = self.open.lock();
        let builds = open.entry(process).or_default();
        builds.entry(fingerprint).or_default().insert(part);
    }

    /// The fingerprint of the first thing a process asked for, if it has asked for anything.
    pub fn fingerprint(&self, process: Process) -> Option<Digest> {
        let open = self.open.lock();
        open.get(&process)?.keys().next().copied()
    }

    /// Notes what a manifest holds; `renewed` when it was written here just now.
    pub(super) fn published(&self, fingerprint: Digest, facts: &[Fact], renewed: bool) {
        let mut published = self.published.lock();
        if published.len() >= REMEMBERED {
            published.clear();
        }
        let known = Known {
            keys: keys(facts).collect(),
            renewed: renewed.then(Instant::now),
        };
        published.insert(fingerprint, known);
    }

    /// Whether there is a build whose process is gone.
    pub(super) fn has_ended(&self) -> bool {
        let open = self.open.lock();
        let mut builds = open.iter().filter(|(_, builds)| !builds.is_empty());
        builds.any(|(process, _)| !is_running(*process))
    }

    /// The builds whose processes are gone.
    fn take_ended(&self) -> HashMap<Digest, HashSet<Part>> {
        let mut ended: HashMap<Digest, HashSet<Part>> = HashMap::new();
        let mut open = self.open.lock();
        open.retain(|(pid, started), builds| {
            let is_there = is_running((*pid, *started));
            if !is_there {
                for (fingerprint, parts) in std::mem::take(builds) {
                    ended.entry(fingerprint).or_default().extend(parts);
                }
            }
            is_there
        });
        ended
    }

    /// Takes back what could not be published.
    fn give_back(&self, builds: HashMap<Digest, HashSet<Part>>) {
        let mut open = self.open.lock();
        // A process that is nowhere is gone.
        let again = open.entry((0, None)).or_default();
        for (fingerprint, parts) in builds {
            again.entry(fingerprint).or_default().extend(parts);
        }
    }

    /// Whether a manifest is known to hold all of these.
    fn hold(&self, fingerprint: &Digest, mut keys: impl Iterator<Item = ActionKey>) -> bool {
        let published = self.published.lock();
        let known = published.get(fingerprint);
        known.is_some_and(|known| keys.all(|key| known.keys.contains(&key)))
    }

    /// Whether a manifest was not old when it was last seen, less than that ago.
    fn is_renewed(&self, fingerprint: &Digest, ago: Duration) -> bool {
        let published = self.published.lock();
        let renewed = published.get(fingerprint).and_then(|known| known.renewed);
        renewed.is_some_and(|renewed| renewed.elapsed() < ago)
    }

    fn is_not_old(&self, fingerprint: &Digest) {
        if let Some(known) = self.published.lock().get_mut(fingerprint) {
            known.renewed = Some(Instant::now());
        }
    }
}

/// Whether a build's process is still there.
pub(super) fn is_running((pid, started): Process) -> bool {
    started.is_some() && crate::service::builds::started(pid) == started
}

fn keys(facts: &[Fact]) -> impl Iterator<Item = ActionKey> {
    facts
        .iter()
        .filter_map(|fact| fact.entries.last().map(|(key, _)| *key))
}

impl Storage {
    /// Adds the results of builds that have ended to their manifests.
    pub(super) fn publish_builds(&self, connection: &Arc<Connection>) -> Result<()> {
        let mut ended = self.lazy.builds.take_ended();
        while let Some(fingerprint) = ended.keys().next().copied() {
            let parts = ended.get(&fingerprint).cloned().unwrap_or_default();
            let published = self.publish_build(connection, fingerprint, &parts);
            if let Err(error) = published {
                self.lazy.builds.give_back(ended);
                return Err(error).context("build manifest");
            }
            ended.remove(&fingerprint);
        }
        Ok(())
    }

    fn publish_build(
        &self,
        connection: &Connection,
        fingerprint: Digest,
        parts: &HashSet<Part>,
    ) -> Result<()> {
        let mut facts = Vec::new();
        for part in parts {
            facts.extend(self.uploaded(connection, part)?);
        }
        if facts.is_empty() {
            return Ok(());
        }
        let builds = &self.lazy.builds;
        let reads = self.lazy.prefetch.new_reads(&fingerprint);
        let has_all = reads.is_empty() && builds.hold(&fingerprint, keys(&facts));
        if has_all && !self.ages(connection, &fingerprint)? {
            return Ok(());
        }
        facts.sort_by_key(|fact| fact.invocation);
        let doubtful = self.doubtful(connection, &facts)?;
        let ours = BuildManifest { facts, reads };
        let merged = connection
            .send(async |remote| merge(&remote, connection, &fingerprint, ours, doubtful).await)?;
        let lost = merged.without.len();
        tracing::debug!(%fingerprint, results = merged.facts.len(), lost, "build manifest");
        builds.published(fingerprint, &merged.facts, true);
        self.lazy.prefetch.learned(fingerprint, &merged.reads);
        self.lazy.prefetch.told(&fingerprint);
        if self.send_results_again(connection, &merged)? {
            let parts = HashMap::from([(fingerprint, parts.clone())]);
            builds.give_back(parts);
        }
        Ok(())
    }

    /// Notes results that are not in the remote any more, to be sent again, where all of their blobs are
    /// here. Of the others it is forgotten that they are there: the next build makes them. Whether any is
    /// to be sent.
    fn send_results_again(
        &self,
        connection: &Connection,
        merged: &Merged,
    ) -> Result<bool, IndexError> {
        let named: HashSet<ActionKey> = keys(&merged.facts).collect();
        let mut batch = self.index.batch();
        let mut is_sent = false;
        for fact in &merged.without {
            let blobs = fact.entries.iter().flat_map(|(_, entry)| entry.blobs());
            let missing = blobs.filter(|(digest, size)| !self.cas.has(digest, *size));
            let missing: Vec<_> = missing.collect();
            for (digest, _) in &missing {
                if let Some(kept) = self.index.kept(connection.id, digest)?
                    && merged.lost.contains(&Container::of(digest, &kept.place))
                {
                    self.lazy.note_absent(digest, kept.place);
                    batch.put_lost(connection.id, digest, &kept)?;
                    // What views show of it, too.
                    self.lazy.lost_something();
                }
            }
            // Another store has sent it again.
            if keys(std::slice::from_ref(fact)).all(|key| named.contains(&key)) {
                continue;
            }
            if missing.is_empty() {
                is_sent = true;
                let result = fact.entries.last().map(|(_, entry)| entry.digest());
                let upload = Upload {
                    remote: connection.id,
                    invocation: fact.invocation,
                    record: fact.record.clone(),
                    keys: fact.entries.iter().map(|(key, _)| *key).collect(),
                    // They were looked for before it was first sent.
                    secrets: Vec::new(),
                    result: result.transpose()?,
                };
                self.note_upload(&mut batch, &upload)?;
            }
            for (key, entry) in &fact.entries {
                batch.delete_kept(connection.id, &entry.kept_as(key)?);
            }
        }
        batch.commit()?;
        Ok(is_sent)
    }

    /// Whether a manifest is so old that it has to be written again to stay: it is in use.
    fn ages(&self, connection: &Connection, fingerprint: &Digest) -> Result<bool> {
        let builds = &self.lazy.builds;
        if builds.is_renewed(fingerprint, connection.config.grace / 2) {
            return Ok(false);
        }
        let name = ObjectName::build(fingerprint);
        let is_old = connection.send(async |remote| is_old(&*remote, connection, &name).await)?;
        if !is_old {
            builds.is_not_old(fingerprint);
        }
        Ok(is_old)
    }

    /// What results name that may not stay for long.
    fn doubtful(
        &self,
        connection: &Connection,
        facts: &[Fact],
    ) -> Result<BTreeSet<Container>, IndexError> {
        let mut doubtful: BTreeSet<_> = facts.iter().flat_map(containers::of_fact).collect();
        let entries = facts.iter().flat_map(|fact| &fact.entries);
        for (digest, size) in entries.flat_map(|(_, entry)| entry.blobs()) {
            if self.is_fresh(connection, &digest, size)?
                && let Some(kept) = self.index.kept(connection.id, &digest)?
            {
                doubtful.remove(&Container::of(&digest, &kept.place));
            }
        }
        Ok(doubtful)
    }

    /// Whether what the action cache has under a key is known from others alone.
    pub(super) fn is_learned(
        &self,
        connection: &Connection,
        key: &ActionKey,
        entry: &ActionEntry,
    ) -> Result<bool, IndexError> {
        let kept = self.index.kept(connection.id, &entry.kept_as(key)?)?;
        Ok(kept.is_some_and(|kept| kept.seen_ms == 0))
    }

    /// Whether a remote holds what the action cache has under a key, as far as we may pass it on.
    fn is_there(
        &self,
        connection: &Connection,
        key: &ActionKey,
        entry: &ActionEntry,
    ) -> Result<bool, IndexError> {
        let kept = self.index.kept(connection.id, &entry.kept_as(key)?)?;
        Ok(kept.is_some_and(|kept| kept.seen_ms > 0 || connection.vouches()))
    }

    /// A result as others learn it, if it is in the remote: what stays here stays out of manifests, too.
    fn uploaded(&self, connection: &Connection, part: &Part) -> Result<Option<Fact>, IndexError> {
        let mut entries = Vec::new();
        for key in &part.keys {
            match self.index.action(key)? {
                Some(entry) if self.is_there(connection, key, &entry)? => {
                    entries.push((*key, entry));
                }
                _ => return Ok(None),
            }
        }
        let Some(record) = self.index.record(&part.invocation, &part.record)? else {
            return Ok(None);
        };
        let fact = self.fact(connection, part.invocation, record, &entries)?;
        Ok(Some(fact))
    }
}

/// What came of adding results to a manifest.
struct Merged {
    /// All that it holds now.
    facts: Vec<Fact>,
    /// What builds like it have read, as it says now.
    reads: Vec<Digest>,
    /// Those of ours that are not what the remote holds any more.
    without: Vec<Fact>,
    /// What they name that is gone, or not there for long.
    lost: HashSet<Container>,
}

/// Adds results to those that a manifest holds, but for those whose blobs are gone.
async fn merge(
    remote: &Arc<dyn Remote>,
    connection: &Connection,
    fingerprint: &Digest,
    ours: BuildManifest,
    mut doubtful: BTreeSet<Container>,
) -> Result<Merged, RemoteError> {
    let began_ms = clock::now_ms();
    let name = ObjectName::build(fingerprint);
    // First: what is read then is no older than this says.
    let is_old = is_old(&**remote, connection, &name).await?;
    let read = |object: &[u8], trust: &Trust| facts::read_build(fingerprint, object, trust);
    let is_readable = |object: &[u8]| read(object, &Trust::Everybody).is_some();
    let there = facts::get_to_replace(&**remote, &name, is_readable).await?;
    let there = there.and_then(|object| read(&object, connection.trust()));
    let others = there.filter(|_| connection.vouches());
    let others = others.unwrap_or_default();
    let named = others.facts.iter().flat_map(containers::of_fact);
    if is_old {
        doubtful.extend(named);
    } else {
        // What is in it stays with it.
        named.for_each(|container| {
            doubtful.remove(&container);
        });
    }
    let reliance = Reliance::on(remote, connection.config.grace, &doubtful).await?;
    // First: one that another has sent again takes the place of ours.
    let (facts, without) = ours
        .facts
        .into_iter()
        .partition(|fact| reliance.holds(fact));
    let ours = BuildManifest { facts, ..ours };
    let mut manifest = together(ours, others);
    manifest.facts.retain(|fact| reliance.holds(fact));
    let object = loop {
        match facts::write_build(fingerprint, &manifest, connection.key.as_ref()) {
            Ok(object) if object.len() as u64 <= facts::LARGEST => break object,
            Err(error)
                if error.kind() != io::ErrorKind::FileTooLarge || manifest.facts.is_empty() =>
            {
                return Err(not_encoded(error));
            }
            Ok(_) | Err(_) => manifest.facts.truncate(manifest.facts.len() / 2),
        }
    };
    let written = match ensure_recent(connection, began_ms) {
        Ok(()) => {
            let body = Body::Bytes(object.into());
            remote.put(&name, body, Put::Replace).await.map(drop)
        }
        error => error,
    };
    let lost = reliance.lost.clone();
    reliance.end(&**remote).await;
    written.map(|()| Merged {
        facts: manifest.facts,
        reads: manifest.reads,
        without,
        lost,
    })
}

/// Our results, and behind them those of others, each once and not too many.
fn together(mut manifest: BuildManifest, others: BuildManifest) -> BuildManifest {
    let own: HashSet<ActionKey> = keys(&manifest.facts).collect();
    let is_other = |fact: &Fact| !keys(std::slice::from_ref(fact)).any(|key| own.contains(&key));
    let others_facts = others.facts.into_iter().filter(is_other);
    manifest.facts.extend(others_facts);
    let mut of_invocation: HashMap<InvocationDigest, usize> = HashMap::new();
    manifest.facts.retain(|fact| {
        let count = of_invocation.entry(fact.invocation).or_default();
        *count += 1;
        *count <= facts::RESULTS
    });
    manifest.facts.truncate(RESULTS);
    let entries = manifest.facts.iter().flat_map(|fact| &fact.entries);
    let named = entries.flat_map(|(_, entry)| entry.blobs());
    let named: HashSet<_> = named.map(|(digest, _)| digest).collect();
    let is_named = |digest: &Digest| named.contains(digest);
    manifest.reads = prefetch::once_each(manifest.reads, others.reads, is_named);
    manifest
}

#[cfg(test)]
mod tests {
    use remote::Kind;
    use store::{Kept, Output, OutputContent, Place, record_digest};

    use super::super::testing;
    use super::*;

    const FINGERPRINT: &[u8] = b"fingerprint";

    /// A result that was sent long ago, with its blobs; a build has used it, and has ended.
    fn sent_long_ago(
        storage: &Storage,
        connection: &Connection,
        blobs: &[&[u8]],
    ) -> (ActionKey, Digest) {
        let kept = |size| Kept {
            size,
            place: Place::Own,
            seen_ms: 1,
            known_ms: 1,
        };
        let mut batch = storage.index.batch();
        let mut outputs = Vec::new();
        for bytes in blobs {
            let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
            let row = kept(size);
            batch.put_kept(connection.id, &digest, &row).expect("puts");
            outputs.push(Output {
                name: digest.hex(),
                mode: 0o644,
                content: OutputContent::Blob { digest, size },
            });
        }
        let entry = testing::result(outputs, Vec::new());
        let key = ActionKey(Digest::of(b"key"));
        let invocation = InvocationDigest(Digest::of(b"invocation"));
        let record = testing::record();
        batch.put_action(&key, &entry).expect("puts");
        batch.put_record(&invocation, &record).expect("puts");
        let row = entry.kept_as(&key).expect("a digest");
        let put = batch.put_kept(connection.id, &row, &kept(0));
        put.expect("puts");
        batch.commit().expect("commits");
        let part = Part {
            invocation,
            record: record_digest(&invocation, &record).expect("a digest"),
            keys: vec![key],
        };
        let builds = &storage.lazy.builds;
        builds.note((0, None), Digest::of(FINGERPRINT), part);
        (key, row)
    }

    /// Whether a row says that the remote holds it.
    fn is_kept(storage: &Storage, connection: &Connection, digest: &Digest) -> bool {
        let kept = storage.index.kept(connection.id, digest);
        kept.expect("reads").is_some()
    }

    #[test]
    fn what_a_collection_has_removed_is_sent_again_where_it_is_here() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let blobs: [&[u8]; 2] = [b"one", b"other"];
        let (key, row) = sent_long_ago(&storage, &connection, &blobs);
        for bytes in blobs {
            storage.cas.ingest_bytes(bytes).expect("is here");
        }
        storage.publish_builds(&connection).expect("publishes");
        let uploads = storage.index.uploads(2).expect("reads");
        assert_eq!(uploads.len(), 1);
        assert_eq!(uploads[0].1.keys, [key]);
        // Until it is sent.
        assert!(!is_kept(&storage, &connection, &row));
        let ended = storage.lazy.builds.take_ended();
        assert!(ended.contains_key(&Digest::of(FINGERPRINT)));
    }

    #[test]
    fn what_a_collection_has_removed_is_forgotten_where_it_is_not_here() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let blobs: [&[u8]; 2] = [b"one", b"other"];
        let (_, row) = sent_long_ago(&storage, &connection, &blobs);
        storage.cas.ingest_bytes(blobs[0]).expect("is here");
        storage.publish_builds(&connection).expect("publishes");
        assert_eq!(storage.index.upload_count().expect("reads"), 0);
        assert!(!is_kept(&storage, &connection, &row));
        let gone = Digest::of(blobs[1]);
        assert!(!is_kept(&storage, &connection, &gone));
        assert!(!storage.has(&gone, blobs[1].len() as u64));
        assert!(storage.lazy.builds.take_ended().is_empty());
    }

    #[test]
    fn what_has_taken_the_place_of_a_result_is_not_published() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store(dir.path());
        let (key, _) = sent_long_ago(&storage, &connection, &[b"one"]);
        storage.cas.ingest_bytes(b"one").expect("is here");
        // Made while nothing was sent anywhere, so nobody has searched it.
        let other = testing::result(Vec::new(), b"sesame-sesame".to_vec());
        let mut batch = storage.index.batch();
        batch.put_action(&key, &other).expect("puts");
        batch.commit().expect("commits");
        storage.publish_builds(&connection).expect("publishes");
        assert!(testing::objects(dir.path(), Kind::Builds).is_empty());
        assert_eq!(storage.index.upload_count().expect("reads"), 0);
    }
}
