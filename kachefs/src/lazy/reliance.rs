//! Counting on objects that are in a remote already, while `kachefs remote gc` may run somewhere.
//!
//! Garbage collection leaves alone what was written less than a grace ago, so a pack that was just sent is
//! safe until something names it. What has been there longer may be about to be removed, and with it a blob
//! that was just sent under the same name. Who counts on either writes a lease first, and then looks for
//! what is condemned; who removes it writes first what is condemned, and then looks for leases. Whatever
//! the order, one of them sees the other: no clock and no lock takes part, only that a remote shows what
//! was written before. What is condemned, or gone, is sent again, in a pack, whose name is new.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use remote::{Body, Kind, Object, ObjectName, Put, Remote, RemoteError};
use store::{Digest, Fact};

use super::connection::Connection;
use super::containers::{self, Container};
use super::sending::at_once;
use super::{facts, not_encoded};

/// A lease on objects, until what names them is there.
#[derive(Default)]
pub(super) struct Reliance {
    lease: Option<ObjectName>,
    /// Those of them that are not there, or not for long.
    pub(super) lost: HashSet<Container>,
}

impl Reliance {
    /// Takes a lease on objects, and looks which of them are lost.
    pub(super) async fn on(
        remote: &Arc<dyn Remote>,
        grace: Duration,
        wanted: &BTreeSet<Container>,
    ) -> Result<Self, RemoteError> {
        if wanted.is_empty() {
            return Ok(Self::default());
        }
        let lease = ObjectName::lease(&new_id()?);
        put_lease(&**remote, &lease, grace, wanted.iter().copied()).await?;
        let reliance = Self {
            lease: Some(lease),
            lost: HashSet::new(),
        };
        match lost_of(remote, wanted).await {
            Ok(lost) => Ok(Self { lost, ..reliance }),
            Err(error) => {
                reliance.end(&**remote).await;
                Err(error)
            }
        }
    }

    /// Whether everything that a result names stays.
    pub(super) fn holds(&self, fact: &Fact) -> bool {
        let mut containers = containers::of_fact(fact).into_iter();
        !containers.any(|container| self.lost.contains(&container))
    }

    /// Gives the lease back: what names the objects is there. One that stays behind ends with the grace.
    pub(super) async fn end(self, remote: &dyn Remote) {
        if let Some(lease) = self.lease
            && let Err(error) = remote.delete(&lease).await
        {
            tracing::debug!(%error, %lease, "a lease stays behind");
        }
    }

    /// The same for who waits for it.
    pub(super) fn give_back(self, connection: &Connection) {
        let ended = connection.send(async |remote| {
            self.end(&*remote).await;
            Ok(())
        });
        if let Err(error) = ended {
            tracing::debug!(%error, "a lease stays behind");
        }
    }
}

/// Which of these are not there, or not for long.
async fn lost_of(
    remote: &Arc<dyn Remote>,
    wanted: &BTreeSet<Container>,
) -> Result<HashSet<Container>, RemoteError> {
    let mut lost = match condemned(&**remote).await? {
        Some(condemned) => wanted.intersection(&condemned).copied().collect(),
        // Of a later kachefs: any of them, then.
        None => wanted.iter().copied().collect::<HashSet<_>>(),
    };
    let doubtful: Vec<_> = wanted
        .iter()
        .filter(|container| !lost.contains(container))
        .copied()
        .collect();
    lost.extend(absent(remote, doubtful).await?);
    Ok(lost)
}

/// Which of these are not there.
pub(super) async fn absent(
    remote: &Arc<dyn Remote>,
    containers: Vec<Container>,
) -> Result<Vec<Container>, RemoteError> {
    let looked = at_once(containers, |container| {
        let remote = Arc::clone(remote);
        async move { Ok((container, remote.head(&container.name()).await?.is_some())) }
    });
    let gone = looked.await?.into_iter().filter(|(_, is_there)| !is_there);
    Ok(gone.map(|(container, _)| container).collect())
}

/// Writes a lease, of who has that grace.
pub(super) async fn put_lease(
    remote: &dyn Remote,
    name: &ObjectName,
    grace: Duration,
    containers: impl IntoIterator<Item = Container>,
) -> Result<(), RemoteError> {
    let object = containers::write(grace, containers).map_err(not_encoded)?;
    let body = Body::Bytes(object.into());
    remote.put(name, body, Put::Replace).await.map(drop)
}

/// What is about to be removed; `None` where that cannot be read.
pub(super) async fn condemned(
    remote: &dyn Remote,
) -> Result<Option<BTreeSet<Container>>, RemoteError> {
    let mut all = BTreeSet::new();
    for object in list_all(remote, Kind::Condemned).await? {
        let Some(list) = remote.get(&object.name, None, facts::LARGEST).await? else {
            // All of it is removed by now.
            continue;
        };
        match containers::read(&list) {
            Some(list) => all.extend(list.containers),
            None => return Ok(None),
        }
    }
    Ok(Some(all))
}

/// Whether an object was written more than a grace ago: garbage collection may come to remove it, and
/// what it names. A clock that is wrong by less than two graces does no harm: nothing that names blobs is
/// removed before the third.
pub(super) async fn is_old(
    remote: &dyn Remote,
    connection: &Connection,
    name: &ObjectName,
) -> Result<bool, RemoteError> {
    let object = remote.head(name).await?;
    let age = object.map(|object| SystemTime::now().duration_since(object.modified));
    Ok(match age {
        Some(Ok(age)) => age > connection.config.grace,
        // Written in the future.
        Some(Err(_)) => false,
        None => true,
    })
}

/// All objects of a kind, in the order of their names.
pub(super) async fn list_all(remote: &dyn Remote, kind: Kind) -> Result<Vec<Object>, RemoteError> {
    let mut all: Vec<Object> = Vec::new();
    loop {
        let after = all.last().map(|object| &object.name);
        let page = remote.list(kind, after).await?;
        if page.is_empty() {
            return Ok(all);
        }
        all.extend(page);
    }
}

/// A name nobody else has.
pub(super) fn new_id() -> Result<Digest, RemoteError> {
    let mut id = [0; Digest::LEN];
    getrandom::fill(&mut id).map_err(|error| not_encoded(std::io::Error::other(error)))?;
    Ok(Digest::of(&id))
}
