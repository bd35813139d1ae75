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
use super::{Gc, GcError, KEPT, age};
use crate::remote_config::LONGEST_GRACE;

/// An object that was written again so soon after it was read may show the same time.
const TICK: Duration = Duration::from_secs(2);

/// What is needed.
pub(super) struct Marked {
    /// The longest grace of all who hold a lease, and of who collects.
    pub(super) grace: Duration,
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
    /// Of a lease: the grace of who has written it.
    grace: Duration,
    containers: Vec<Container>,
    invocations: Vec<InvocationDigest>,
}

impl Marked {
    /// Nothing, for who has that grace.
    pub(super) fn new(grace: Duration) -> Self {
        Self {
            grace,
            containers: HashSet::new(),
            invocations: HashSet::new(),
            read: HashMap::new(),
            ended: Vec::new(),
        }
    }

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
    /// Leases first: one that is given back was on what something names that is there by then, and they
    /// say which grace to keep to. Results last: which of them are kept depends on the manifests.
    pub(super) async fn look(&mut self, gc: &Gc<'_>, now: SystemTime) -> Result<(), GcError> {
        self.ended.clear();
        let mut unreadable = Vec::new();
        for kind in [Kind::Leases, Kind::Trees, Kind::Builds, Kind::Actions] {
            let mut wanted = Vec::new();
            for object in list_all(&**gc.remote, kind).await? {
                if !self.is_kept(gc, kind, &object, now) {
                    self.ended.push(object);
                } else if self.is_unread(&object, now) {
                    wanted.push(object);
                }
            }
            unreadable.extend(self.read_all(gc, wanted, now).await?);
        }
        if unreadable.is_empty() {
            Ok(())
        } else {
            unreadable.sort_unstable();
            Err(GcError::Unreadable(unreadable))
        }
    }

    fn is_kept(&self, gc: &Gc<'_>, kind: Kind, object: &Object, now: SystemTime) -> bool {
        match kind {
            // How long a lease lasts it says itself.
            Kind::Leases | Kind::Trees => true,
            _ => {
                age(now, object) < gc.keep.max(KEPT * self.grace)
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

    /// Reads some; returns the names of those that cannot be read.
    async fn read_all(
        &mut self,
        gc: &Gc<'_>,
        objects: Vec<Object>,
        now: SystemTime,
    ) -> Result<Vec<ObjectName>, GcError> {
        let read = at_once(objects, |object| {
            let remote = Arc::clone(gc.remote);
            async move { read(&*remote, object).await }
        });
        let mut unreadable = Vec::new();
        for named in read.await? {
            match named {
                Some(Ok(named)) => self.take(gc, named, now),
                // A lease of nobody knows whom has ended with our grace.
                Some(Err(object)) if is_lease(&object) && age(now, &object) >= gc.grace => {}
                Some(Err(object)) => unreadable.push(object.name),
                None => {}
            }
        }
        Ok(unreadable)
    }

    fn take(&mut self, gc: &Gc<'_>, named: Named, now: SystemTime) {
        let lasts = gc.grace.max(named.grace);
        if !is_lease(&named.object) || age(now, &named.object) < lasts {
            self.grace = self.grace.max(named.grace);
            self.containers.extend(named.containers);
            self.invocations.extend(named.invocations);
        }
        self.read.insert(named.object.name.clone(), named.object);
    }
}

fn is_lease(object: &Object) -> bool {
    object.name.kind() == Some(Kind::Leases)
}

/// What an object names; `None` where it is gone by now, itself where that cannot be read.
async fn read(
    remote: &dyn Remote,
    object: Object,
) -> Result<Option<Result<Named, Object>>, RemoteError> {
    let bytes = match remote.get(&object.name, None, facts::LARGEST).await {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(None),
        Err(RemoteError::TooLarge { .. }) => return Ok(Some(Err(object))),
        Err(error) => return Err(error),
    };
    let listed = object.clone();
    // It is work, and others wait for the network.
    let named = tokio::task::spawn_blocking(move || named(object, &bytes)).await;
    Ok(Some(named.unwrap_or_default().ok_or(listed)))
}

/// Whoever has signed it: others may trust them.
fn named(object: Object, bytes: &Bytes) -> Option<Named> {
    let everybody = &Trust::Everybody;
    let (mut grace, mut invocations) = (Duration::ZERO, Vec::new());
    let containers = match object.name.kind()? {
        Kind::Leases => {
            let list = containers::read(bytes)?;
            // Nobody has a longer one, whatever it says.
            grace = Duration::from_millis(list.grace_ms).min(LONGEST_GRACE);
            list.containers
        }
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
        grace,
        containers,
        invocations,
    })
}
