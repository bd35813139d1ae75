//! Marking: reads what names blobs, and notes which objects those are in.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use remote::signed::Trust;
use remote::{Kind, Object, ObjectName, Remote, RemoteError};
use store::{Digest, InvocationDigest};

use super::super::containers::{self, Container};
use super::super::facts::{self, Results};
use super::super::reliance::list_all;
use super::super::sending::at_once;
use super::{Gc, GcError, age};

/// An object that was written again so soon after it was read may show the same time.
const TICK: Duration = Duration::from_secs(2);

/// What is needed.
#[derive(Default)]
pub(super) struct Marked {
    containers: HashSet<Container>,
    /// Of results in manifests that are kept: those are kept, too.
    invocations: HashSet<InvocationDigest>,
    /// What was read, as it was listed.
    read: HashMap<ObjectName, Object>,
    /// What names blobs and is not kept, as it was last listed.
    ended: Vec<Object>,
}

/// What an object names.
struct Named {
    object: Object,
    containers: Vec<Container>,
    invocations: Vec<InvocationDigest>,
}

impl Marked {
    /// Whether an object is needed.
    pub(super) fn names(&self, container: &Container) -> bool {
        self.containers.contains(container)
    }

    /// What names blobs and is not kept.
    pub(super) fn ended(&self, kind: Kind) -> Vec<Object> {
        let ended = self.ended.iter();
        let of_kind = ended.filter(|object| object.name.kind() == Some(kind));
        of_kind.cloned().collect()
    }

    /// Reads what names blobs, but for what was read before.
    ///
    /// Leases first: one that is given back was on what something names that is there by then. Results
    /// last: which of them are kept depends on the manifests.
    pub(super) async fn look(&mut self, gc: &Gc<'_>, now: SystemTime) -> Result<(), GcError> {
        self.ended.clear();
        for kind in [Kind::Leases, Kind::Trees, Kind::Builds, Kind::Actions] {
            let mut wanted = Vec::new();
            for object in list_all(&**gc.remote, kind).await? {
                if !self.is_kept(gc, kind, &object, now) {
                    if kind != Kind::Leases {
                        self.ended.push(object);
                    }
                } else if self.is_unread(&object, now) {
                    wanted.push(object);
                }
            }
            self.read_all(gc.remote, wanted).await?;
        }
        Ok(())
    }

    fn is_kept(&self, gc: &Gc<'_>, kind: Kind, object: &Object, now: SystemTime) -> bool {
        let age = age(now, object);
        match kind {
            Kind::Leases => age < gc.grace,
            Kind::Trees => true,
            _ => {
                age < gc.keep
                    || object
                        .name
                        .digest()
                        .is_some_and(|digest| self.is_in_a_build(digest))
            }
        }
    }

    fn is_in_a_build(&self, digest: Digest) -> bool {
        self.invocations.contains(&InvocationDigest(digest))
    }

    fn is_unread(&self, object: &Object, now: SystemTime) -> bool {
        self.read.get(&object.name) != Some(object) || object.modified + TICK > now
    }

    async fn read_all(
        &mut self,
        remote: &Arc<dyn Remote>,
        objects: Vec<Object>,
    ) -> Result<(), GcError> {
        let read = at_once(objects, |object| {
            let remote = Arc::clone(remote);
            async move { read(&*remote, object).await }
        });
        for named in read.await? {
            match named {
                Some(Ok(named)) => {
                    self.containers.extend(named.containers);
                    self.invocations.extend(named.invocations);
                    self.read.insert(named.object.name.clone(), named.object);
                }
                Some(Err(name)) => return Err(GcError::Unreadable(name)),
                None => {}
            }
        }
        Ok(())
    }
}

/// What an object names; `None` where it is gone by now, its name where that cannot be read.
async fn read(
    remote: &dyn Remote,
    object: Object,
) -> Result<Option<Result<Named, ObjectName>>, RemoteError> {
    let name = object.name.clone();
    let Some(bytes) = remote.get(&name, None, facts::LARGEST).await? else {
        return Ok(None);
    };
    // It is work, and others wait for the network.
    let named = tokio::task::spawn_blocking(move || named(object, &bytes)).await;
    Ok(Some(named.unwrap_or_default().ok_or(name)))
}

/// Whoever has signed it: others may trust them.
fn named(object: Object, bytes: &Bytes) -> Option<Named> {
    let everybody = &Trust::Everybody;
    let mut invocations = Vec::new();
    let containers = match object.name.kind()? {
        Kind::Leases => containers::read(bytes)?,
        Kind::Trees => {
            let tree = facts::read_tree(&object.name.tree_name()?, bytes, everybody).ok()?;
            containers::of_tree(&tree)
        }
        Kind::Builds => {
            let manifest = facts::read_build(&object.name.digest()?, bytes, everybody)?;
            invocations.extend(manifest.facts.iter().map(|fact| fact.invocation));
            manifest
                .facts
                .iter()
                .flat_map(containers::of_fact)
                .collect()
        }
        _ => {
            let invocation = InvocationDigest(object.name.digest()?);
            let facts = Results::parse(bytes)?.open_all(&invocation)?;
            facts.iter().flat_map(containers::of_fact).collect()
        }
    };
    Some(Named {
        object,
        containers,
        invocations,
    })
}
