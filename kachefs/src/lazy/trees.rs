//! Published trees: sent by name, listed, fetched, taken back.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use remote::signed::Trust;
use remote::{Body, Kind, Object, ObjectName, Put, Remote, RemoteError, TreeName};
use store::{ActionKey, Place, Tree};

use super::connection::Connection;
use super::reliance::{list_all, new_id, put_lease};
use super::sending::ensure_recent;
use super::{containers, facts, kept_unseen};
use crate::clock;
use crate::storage::Storage;

/// A tree in the remote, seen from outside.
#[derive(Clone, Debug)]
pub struct Published {
    /// Its name.
    pub name: TreeName,
    /// What of it is no blob, in bytes.
    pub size: u64,
    /// Milliseconds since the epoch when it was published, by the clock of the remote.
    pub published_ms: u64,
}

/// What was sent for a tree.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Names in the tree.
    pub names: u64,
    /// Bytes of blobs it names.
    pub bytes: u64,
    /// Blobs that were not in the remote.
    pub blobs_sent: u64,
}

impl Storage {
    /// The remote, for a command that cannot do without.
    pub fn the_remote(&self) -> Result<Arc<Connection>> {
        let none = "the store has no remote (kachefs remote set)";
        self.lazy.connection().context(none)
    }

    /// The same to write to.
    pub fn the_writable_remote(&self) -> Result<Arc<Connection>> {
        let connection = self.the_remote()?;
        if connection.config.read_only {
            bail!("{} is only read here", connection.place());
        }
        Ok(connection)
    }

    /// Sends a tree: its blobs, those the remote lacks, and then the tree under its name, in the place
    /// of one that has it.
    pub fn publish_tree(&self, name: &TreeName, mut tree: Tree) -> Result<Sent> {
        let connection = self.the_writable_remote()?;
        let began_ms = clock::now_ms();
        let blobs: HashSet<_> = tree.blobs().collect();
        let blobs: Vec<_> = blobs.into_iter().collect();
        let (blobs_sent, reliances) = self.send_blobs(&connection, &blobs)?;
        tree.packed = self.places_in_packs(&connection, blobs.iter().copied())?;
        let origins: HashSet<ActionKey> = tree
            .inodes
            .iter()
            .filter_map(|inode| inode.origin)
            .collect();
        for key in origins {
            // What only others say is not said in our name.
            if let Some(entry) = self.index.action(&key)?
                && (connection.vouches() || !self.is_learned(&connection, &key, &entry)?)
            {
                tree.actions.push((key, entry));
            }
        }
        let object = facts::write_tree(name, &tree, connection.key.as_ref())?;
        if object.len() as u64 > facts::LARGEST {
            bail!("the tree has too many names to be published");
        }
        let sent = Sent {
            names: tree.names.len() as u64,
            bytes: blobs.iter().map(|(_, size)| size).sum(),
            blobs_sent,
        };
        let (object_name, body) = (ObjectName::tree(name), Body::Bytes(object.into()));
        ensure_recent(&connection, began_ms)?;
        connection.send(async |remote| {
            leave_lease(&*remote, connection.config.grace, name).await?;
            remote.put(&object_name, body, Put::Replace).await
        })?;
        // The leases are not given back: another who replaces the tree at this moment does not leave one on it.
        drop(reliances);
        Ok(sent)
    }

    /// A published tree, whose blobs are known from now on.
    pub fn published_tree(&self, name: &TreeName) -> Result<Tree> {
        let connection = self.the_remote()?;
        let object_name = ObjectName::tree(name);
        let began_ms = clock::now_ms();
        let object =
            connection.call(async |remote| remote.get(&object_name, None, facts::LARGEST).await)?;
        let object = object.with_context(|| format!("no tree {name} is published"))?;
        let tree = facts::read_tree(name, &object, connection.trust())
            .with_context(|| format!("tree {name}"))?;
        let mut batch = self.index.batch();
        let packed: HashMap<_, _> = tree.packed.iter().copied().collect();
        for (digest, size) in tree.blobs() {
            if self.cas.has(&digest, size) {
                continue;
            }
            let place = packed.get(&digest).copied().unwrap_or(Place::Own);
            let said = kept_unseen(size, place, began_ms);
            let kept = self.index.as_said(connection.id, &digest, said)?;
            batch.put_kept(connection.id, &digest, &kept)?;
        }
        for (key, entry) in &tree.actions {
            if self.index.action(key)?.is_none() {
                batch.put_action(key, entry)?;
                let kept = kept_unseen(0, Place::Own, began_ms);
                batch.put_kept(connection.id, &entry.kept_as(key)?, &kept)?;
            }
        }
        batch.commit()?;
        Ok(tree)
    }

    /// All published trees, in the order of their names.
    pub fn published_trees(&self) -> Result<Vec<Published>> {
        let connection = self.the_remote()?;
        let objects = connection.call(async |remote| list_all(&*remote, Kind::Trees).await)?;
        let published = |object: Object| {
            let since = object.modified.duration_since(std::time::UNIX_EPOCH);
            Some(Published {
                name: object.name.tree_name()?,
                size: object.size,
                published_ms: u64::try_from(since.ok()?.as_millis()).ok()?,
            })
        };
        Ok(objects.into_iter().filter_map(published).collect())
    }

    /// Takes a tree back. Whether there was one.
    pub fn unpublish_tree(&self, name: &TreeName) -> Result<bool> {
        let connection = self.the_writable_remote()?;
        let existed = connection.call(async |remote| {
            let existed = leave_lease(&*remote, connection.config.grace, name).await?;
            remote.delete(&ObjectName::tree(name)).await?;
            Ok(existed)
        })?;
        Ok(existed)
    }
}

/// Leaves a lease on what a tree names that goes: who has it mounted may not be able to write one. Whether
/// there is a tree of this name.
async fn leave_lease(
    remote: &dyn Remote,
    grace: Duration,
    name: &TreeName,
) -> Result<bool, RemoteError> {
    let object_name = ObjectName::tree(name);
    let Some(object) = remote.get(&object_name, None, facts::LARGEST).await? else {
        return Ok(false);
    };
    // One that nobody can read is mounted nowhere.
    if let Ok(tree) = facts::read_tree(name, &object, &Trust::Everybody) {
        let lease = ObjectName::lease(&new_id()?);
        put_lease(remote, &lease, grace, containers::of_tree(&tree)).await?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use remote::signed::SecretKey;
    use store::{Digest, Timestamp, TreeBody, TreeInode};

    use super::super::{kept_now, testing};
    use super::*;

    #[test]
    fn what_only_others_say_is_not_signed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (storage, connection) = testing::store_with(dir.path(), |store| {
            let key = SecretKey::generate().expect("a key");
            key.save(&store.signing_key()).expect("saves");
        });
        assert!(!connection.vouches());
        let mut tree = Tree::default();
        let mut batch = storage.index.batch();
        for (name, kept) in [
            ("ours", Some(kept_now(0, Place::Own))),
            ("theirs", Some(kept_unseen(0, Place::Own, 1))),
            ("not sent yet", None),
        ] {
            let key = ActionKey(Digest::of(name.as_bytes()));
            let entry = testing::result(Vec::new(), name.into());
            batch.put_action(&key, &entry).expect("puts");
            let row = entry.kept_as(&key).expect("a digest");
            let put = kept.map(|kept| batch.put_kept(connection.id, &row, &kept));
            put.transpose().expect("puts");
            tree.names
                .push((name.into(), u32::try_from(tree.inodes.len()).expect("few")));
            tree.inodes.push(TreeInode {
                perm: 0o644,
                mtime: Timestamp::default(),
                body: TreeBody::Inline(Vec::new()),
                origin: Some(key),
            });
        }
        batch.commit().expect("commits");
        let name: TreeName = "main".parse().expect("a name");
        storage.publish_tree(&name, tree).expect("publishes");
        let tree = storage.published_tree(&name).expect("is there");
        let keys: HashSet<_> = tree.actions.iter().map(|(key, _)| *key).collect();
        let expected = ["ours", "not sent yet"].map(|name| ActionKey(Digest::of(name.as_bytes())));
        assert_eq!(keys, HashSet::from(expected));
        // What a tree brings is theirs, too.
        let other = tempfile::tempdir().expect("a directory");
        let (reader, reading) = testing::store(other.path());
        let [from, to] = [dir.path(), other.path()].map(|dir| dir.join("bucket/v1/trees"));
        std::fs::create_dir_all(&to).expect("makes");
        std::fs::copy(from.join("main"), to.join("main")).expect("copies");
        reader.published_tree(&name).expect("is there");
        for (key, entry) in &tree.actions {
            assert!(reader.is_learned(&reading, key, entry).expect("reads"));
        }
    }
}
