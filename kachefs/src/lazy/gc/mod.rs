//! Garbage collection of a remote: what nothing names is removed.
//!
//! Needed is what published trees name, leases, build manifests and results. A manifest or a result nobody
//! has written for long is not kept itself; one that is in use is written again (`manifests`). `mark`
//! reads what names something. Then what is not named, and older than the grace, is *condemned*: written
//! down where everybody sees it, and what names something is read once more, for somebody may have
//! begun to count on it meanwhile (`reliance`). Only then it is removed, first what names blobs, then
//! blobs.
//!
//! What names something but cannot be read may be of a later kachefs: nothing is removed then.

mod mark;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use remote::{Body, Kind, Object, ObjectName, Put, Remote, RemoteError};
use serde::Serialize;

use self::mark::Marked;
use super::containers::{self, Container};
use super::not_encoded;
use super::reliance::{list_all, new_id};
use super::sending::at_once;
use crate::clock;

/// This many graces a result is kept at least: who uses one again writes it after the first.
pub const KEPT: u32 = 3;

/// Objects that are removed between two looks whether what is condemned is still to be seen.
const BATCH: usize = 512;

/// Objects that an error names.
const SHOWN: usize = 10;

/// Why nothing, or no more, was removed.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// The remote does not do as it should.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// Something that names blobs cannot be read.
    #[error("{} damaged, or of a later kachefs: nothing is removed", are(.0))]
    Unreadable(Vec<ObjectName>),
}

/// The names, or as many of them as anybody wants to read, and a verb.
fn are(names: &[ObjectName]) -> String {
    let shown: Vec<_> = names.iter().take(SHOWN).map(ObjectName::as_str).collect();
    let shown = shown.join(", ");
    match names.len() {
        1 => format!("{shown} is"),
        ..=SHOWN => format!("{shown} are"),
        all => format!("{shown} and {} more are", all - SHOWN),
    }
}

/// What to collect.
pub struct Gc<'a> {
    /// Where.
    pub remote: &'a Arc<dyn Remote>,
    /// How long what nothing names is left alone.
    pub grace: Duration,
    /// How long results and manifests are kept that nobody writes again.
    pub keep: Duration,
    /// Whether to look only.
    pub dry_run: bool,
    /// Told what is being done.
    pub say: &'a (dyn Fn(&str) + Sync),
}

/// Objects of one kind.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Count {
    /// How many.
    pub objects: u64,
    /// Their lengths together, in bytes.
    pub bytes: u64,
}

/// What was found.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Collected {
    /// What was removed, or would be, by kind.
    pub removed: BTreeMap<&'static str, Count>,
    /// What holds blobs and stays.
    pub kept: Count,
    /// The grace that was kept to, in milliseconds: the longest of all who hold a lease, and our own.
    pub grace_ms: u64,
    /// Whether it was ended before everything was removed, because it took so long.
    pub cut_short: bool,
}

impl Count {
    fn add(&mut self, object: &Object) {
        self.objects += 1;
        self.bytes += object.size;
    }
}

impl Gc<'_> {
    /// Removes what is not needed.
    pub async fn collect(&self) -> Result<Collected, GcError> {
        let remote = &**self.remote;
        let now = clock(remote).await?;
        (self.say)("listing blobs");
        let there = self.containers().await?;
        let mut marked = Marked::new(self.grace);
        (self.say)("reading what names them");
        marked.look(self, now).await?;
        let is_garbage = |(container, object): &(&Container, &Object)| {
            age(now, object) > marked.grace && !marked.names(container)
        };
        let condemned: BTreeSet<_> = there.iter().filter(is_garbage).map(|(c, _)| *c).collect();
        let mut run = Run {
            gc: self,
            list: None,
            until: clock::since_boot() + self.grace / 2,
            collected: Collected::default(),
        };
        if self.dry_run {
            run.remove_all(&there, &condemned, &marked, now).await?;
            run.remove_unfinished(&marked, now).await?;
            return Ok(run.collected);
        }
        if !condemned.is_empty() {
            let list = ObjectName::condemned(&new_id()?);
            let object =
                containers::write(self.grace, condemned.iter().copied()).map_err(not_encoded)?;
            let body = Body::Bytes(object.into());
            remote.put(&list, body, Put::Replace).await?;
            run.list = Some(list);
        }
        // Somebody may have begun to count on some of it before they could see that.
        marked.look(self, now).await?;
        (self.say)("removing");
        // Where that fails, something may still be on its way: what is condemned stays so for a grace.
        run.remove_all(&there, &condemned, &marked, now).await?;
        if let Some(list) = &run.list {
            remote.delete(list).await?;
        }
        run.remove_unfinished(&marked, now).await?;
        Ok(run.collected)
    }

    async fn containers(&self) -> Result<BTreeMap<Container, Object>, RemoteError> {
        let mut all = BTreeMap::new();
        for kind in [Kind::Blobs, Kind::Packs] {
            let objects = list_all(&**self.remote, kind).await?.into_iter();
            all.extend(
                objects.filter_map(|object| Some((Container::named(&object.name)?, object))),
            );
        }
        Ok(all)
    }
}

/// One collection, once it is known what is needed.
struct Run<'a> {
    gc: &'a Gc<'a>,
    /// Where others see what is condemned.
    list: Option<ObjectName>,
    /// Behind this time since boot nothing is removed: others may not see it any more.
    until: Duration,
    collected: Collected,
}

impl Run<'_> {
    /// Removes what names blobs and is not kept, and then what no longer is named.
    async fn remove_all(
        &mut self,
        there: &BTreeMap<Container, Object>,
        condemned: &BTreeSet<Container>,
        marked: &Marked,
        now: SystemTime,
    ) -> Result<(), RemoteError> {
        let grace_ms = marked.grace.as_millis();
        self.collected.grace_ms = u64::try_from(grace_ms).unwrap_or(u64::MAX);
        for (kind, what) in [
            (Kind::Builds, "build manifests"),
            (Kind::Actions, "results"),
        ] {
            let unchanged = self.unchanged(marked.ended(kind)).await?;
            self.remove(what, unchanged).await?;
        }
        // The second look may have met with a longer grace.
        let is_left = |container: &Container, object: &Object| {
            condemned.contains(container)
                && !marked.names(container)
                && age(now, object) > marked.grace
        };
        for (container, object) in there {
            if !is_left(container, object) {
                self.collected.kept.add(object);
            }
        }
        let garbage = |is_wanted: fn(&Container) -> bool| {
            let objects = there
                .iter()
                .filter(move |(container, _)| is_wanted(container));
            let objects = objects.filter(|(container, object)| is_left(container, object));
            objects
                .map(|(_, object)| object.clone())
                .collect::<Vec<_>>()
        };
        let blobs = garbage(|container| matches!(container, Container::Blob(_)));
        let packs = garbage(|container| matches!(container, Container::Pack(_)));
        self.remove("blobs", blobs).await?;
        self.remove("packs", packs).await?;
        // What somebody left who did not come to an end.
        for (kind, what) in [
            (Kind::Leases, "leases"),
            (Kind::Condemned, "lists"),
            (Kind::Check, "checks"),
        ] {
            let all = list_all(&**self.gc.remote, kind).await?.into_iter();
            let old = all.filter(|object| age(now, object) > marked.grace);
            self.remove(what, old.collect()).await?;
        }
        Ok(())
    }

    /// Removes what is no object yet, and nobody has written to for a grace.
    async fn remove_unfinished(
        &mut self,
        marked: &Marked,
        now: SystemTime,
    ) -> Result<(), RemoteError> {
        let Some(before) = now.checked_sub(marked.grace) else {
            return Ok(());
        };
        let unfinished = self.gc.remote.unfinished(before, !self.gc.dry_run).await?;
        if !unfinished.is_empty() {
            let count = Count {
                objects: unfinished.len() as u64,
                bytes: unfinished.iter().sum(),
            };
            self.collected.removed.insert("unfinished writes", count);
        }
        Ok(())
    }

    /// Those that nobody has written since they were listed. Between this look and the removal somebody
    /// may: then others do not hit, and nothing is wrong.
    async fn unchanged(&self, listed: Vec<Object>) -> Result<Vec<Object>, RemoteError> {
        if self.gc.dry_run {
            return Ok(listed);
        }
        let looked = at_once(listed, |object| {
            let remote = Arc::clone(self.gc.remote);
            async move {
                let found = remote.head(&object.name).await?;
                Ok(found.filter(|found| found.modified == object.modified))
            }
        });
        Ok(looked.await?.into_iter().flatten().collect())
    }

    async fn remove(
        &mut self,
        what: &'static str,
        objects: Vec<Object>,
    ) -> Result<(), RemoteError> {
        for batch in objects.chunks(BATCH) {
            let removed = self.remove_some(batch).await?;
            let count = self.collected.removed.entry(what).or_default();
            for object in &removed {
                count.add(object);
            }
            if removed.len() < batch.len() {
                self.collected.cut_short = true;
                break;
            }
        }
        Ok(())
    }

    async fn remove_some(&self, objects: &[Object]) -> Result<Vec<Object>, RemoteError> {
        if self.gc.dry_run {
            return Ok(objects.to_vec());
        }
        let is_seen = match &self.list {
            Some(list) => self.gc.remote.head(list).await?.is_some(),
            None => true,
        };
        let late = Arc::new(AtomicBool::new(!is_seen));
        let removed = at_once(objects.to_vec(), |object| {
            let (remote, late, until) = (Arc::clone(self.gc.remote), Arc::clone(&late), self.until);
            async move {
                if late.load(Ordering::Relaxed) || clock::since_boot() > until {
                    late.store(true, Ordering::Relaxed);
                    return Ok(None);
                }
                remote.delete(&object.name).await?;
                Ok(Some(object))
            }
        });
        Ok(removed.await?.into_iter().flatten().collect())
    }
}

/// The time by the clock of the remote.
async fn clock(remote: &dyn Remote) -> Result<SystemTime, RemoteError> {
    let name = ObjectName::check(&new_id()?);
    let body = Body::Bytes(bytes::Bytes::new());
    remote.put(&name, body, Put::Replace).await?;
    let written = remote.head(&name).await;
    remote.delete(&name).await?;
    let missing = || RemoteError::Io {
        path: name.to_string(),
        source: std::io::ErrorKind::NotFound.into(),
    };
    Ok(written?.ok_or_else(missing)?.modified)
}

fn age(now: SystemTime, object: &Object) -> Duration {
    now.duration_since(object.modified).unwrap_or_default()
}
