//! Every order in which a collection and a publisher can meet, step by step.

use std::collections::BTreeSet;
use std::fs::{File, FileTimes};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use remote::{DirectoryRemote, Limits, TreeName, Written};
use store::{Digest, Timestamp, Tree, TreeBody, TreeInode};
use tempfile::TempDir;

use super::super::facts;
use super::super::reliance::Reliance;
use super::*;

const GRACE: Duration = Duration::from_hours(72);

/// Something else that is done between two steps of whoever has this remote.
type Meanwhile = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A remote that does something else before one of its calls.
struct Interrupted {
    remote: DirectoryRemote,
    step: AtomicUsize,
    at: usize,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl Interrupted {
    async fn step(&self) {
        if self.step.fetch_add(1, Ordering::SeqCst) == self.at {
            let meanwhile = self.meanwhile.lock().take();
            if let Some(meanwhile) = meanwhile {
                meanwhile().await;
            }
        }
    }
}

#[async_trait]
impl Remote for Interrupted {
    async fn get(
        &self,
        name: &ObjectName,
        range: Option<Range<u64>>,
        most: u64,
    ) -> Result<Option<Bytes>, RemoteError> {
        self.step().await;
        self.remote.get(name, range, most).await
    }

    async fn put(&self, name: &ObjectName, body: Body, mode: Put) -> Result<Written, RemoteError> {
        self.step().await;
        self.remote.put(name, body, mode).await
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError> {
        self.step().await;
        self.remote.head(name).await
    }

    async fn list(
        &self,
        kind: Kind,
        after: Option<&ObjectName>,
    ) -> Result<Vec<Object>, RemoteError> {
        self.step().await;
        self.remote.list(kind, after).await
    }

    async fn delete(&self, name: &ObjectName) -> Result<(), RemoteError> {
        self.step().await;
        self.remote.delete(name).await
    }
}

/// A bucket with one blob that nothing names, written long ago.
fn bucket() -> (TempDir, Container) {
    let dir = tempfile::tempdir().expect("a directory");
    let blob = Container::Blob(Digest::of(b"old"));
    let path = path_of(dir.path(), &blob.name());
    write(&path, b"old", 10 * GRACE);
    (dir, blob)
}

/// Writes a file so long ago.
fn write(path: &Path, bytes: &[u8], ago: Duration) {
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
    std::fs::write(path, bytes).expect("writes");
    let file = File::options().write(true).open(path).expect("opens");
    let times = FileTimes::new().set_modified(SystemTime::now() - ago);
    file.set_times(times).expect("is aged");
}

fn path_of(dir: &Path, name: &ObjectName) -> PathBuf {
    dir.join(name.as_str())
}

fn directory(dir: &Path) -> DirectoryRemote {
    DirectoryRemote::new(dir.to_owned(), Limits::default())
}

fn tree_of(blob: Container) -> Tree {
    let Container::Blob(digest) = blob else {
        panic!("{blob:?} is a pack");
    };
    let body = TreeBody::Blob { digest, size: 3 };
    let inode = TreeInode {
        perm: 0o644,
        mtime: Timestamp::default(),
        body,
        origin: None,
    };
    Tree {
        inodes: vec![inode],
        names: vec![(b"f".to_vec(), 0)],
        ..Tree::default()
    }
}

/// Sends the blob, unless it is there, and publishes a tree of it, unless it is lost by then. Whether it is
/// published.
async fn send_and_publish(remote: Arc<dyn Remote>, blob: Container) -> bool {
    let body = Body::Bytes(Bytes::from_static(b"old"));
    let name = blob.name();
    let put = remote.put(&name, body, Put::IfAbsent);
    put.await.expect("sent");
    publish(remote, blob).await
}

/// Publishes a tree of the blob, unless it is lost. Whether it is published.
async fn publish(remote: Arc<dyn Remote>, blob: Container) -> bool {
    let reliance = Reliance::on(&remote, GRACE, &BTreeSet::from([blob])).await;
    let reliance = reliance.expect("a lease");
    if !reliance.lost.is_empty() {
        return false;
    }
    let name: TreeName = "t".parse().expect("a name");
    let object = facts::write_tree(&name, &tree_of(blob), None).expect("writes");
    let name = ObjectName::tree(&name);
    let put = remote.put(&name, Body::Bytes(object.into()), Put::Replace);
    put.await.expect("published");
    reliance.end(&*remote).await;
    true
}

fn gc(remote: &Arc<dyn Remote>) -> Gc<'_> {
    Gc {
        remote,
        grace: GRACE,
        keep: KEPT * GRACE,
        dry_run: false,
        say: &|_| {},
    }
}

async fn collect(remote: Arc<dyn Remote>) -> Collected {
    gc(&remote).collect().await.expect("collects")
}

fn interrupted(dir: &Path, at: usize, meanwhile: Meanwhile) -> Arc<Interrupted> {
    Arc::new(Interrupted {
        remote: directory(dir),
        step: AtomicUsize::new(0),
        at,
        meanwhile: Mutex::new(Some(meanwhile)),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_names_goes() {
    let (dir, blob) = bucket();
    let collected = collect(Arc::new(directory(dir.path()))).await;
    assert_eq!(collected.removed["blobs"].objects, 1);
    assert!(!path_of(dir.path(), &blob.name()).exists());
    assert!(!publish(Arc::new(directory(dir.path())), blob).await);
}

/// Has somebody publish at each step of a collection; what they publish has to be there in the end.
async fn at_every_step<P>(publish: impl Fn(Arc<dyn Remote>, Container) -> P)
where
    P: Future<Output = bool> + Send + 'static,
{
    let (mut kept, mut lost) = (0, 0);
    for at in 0.. {
        let (dir, blob) = bucket();
        let published = Arc::new(Mutex::new(None));
        let outcome = Arc::clone(&published);
        let publishing = publish(Arc::new(directory(dir.path())), blob);
        let meanwhile: Meanwhile = Box::new(move || {
            Box::pin(async move {
                let published = publishing.await;
                *outcome.lock() = Some(published);
            })
        });
        let remote = interrupted(dir.path(), at, meanwhile);
        collect(Arc::clone(&remote) as Arc<dyn Remote>).await;
        let is_there = path_of(dir.path(), &blob.name()).exists();
        match *published.lock() {
            Some(true) => {
                kept += 1;
                assert!(is_there, "published at step {at}, and removed");
            }
            Some(false) => lost += 1,
            // It had fewer steps.
            None => break,
        }
    }
    assert!(kept > 5 && lost > 1, "{kept} kept, {lost} lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_at_any_step_of_a_collection() {
    at_every_step(publish).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_collection_and_a_sender_at_any_step_of_a_collection() {
    at_every_step(|remote, blob| async move {
        collect(Arc::clone(&remote)).await;
        send_and_publish(remote, blob).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_whose_list_was_removed_stops() {
    let (mut removed, mut stopped) = (0, 0);
    for at in 0.. {
        let (dir, blob) = bucket();
        let ran = Arc::new(Mutex::new(false));
        let (has_run, place) = (Arc::clone(&ran), dir.path().to_owned());
        let meanwhile: Meanwhile = Box::new(move || {
            Box::pin(async move {
                *has_run.lock() = true;
                // Another one, for which it is old.
                let _ = std::fs::remove_dir_all(place.join(Kind::Condemned.prefix()));
            })
        });
        let remote = interrupted(dir.path(), at, meanwhile);
        let collected = collect(Arc::clone(&remote) as Arc<dyn Remote>).await;
        if !*ran.lock() {
            break;
        }
        let is_there = path_of(dir.path(), &blob.name()).exists();
        assert_eq!(is_there, collected.cut_short, "at step {at}");
        removed += u32::from(!is_there);
        stopped += u32::from(is_there);
    }
    assert!(
        removed > 5 && stopped > 2,
        "{removed} removed, {stopped} stopped"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_at_any_step_of_a_publisher() {
    let (mut kept, mut lost) = (0, 0);
    for at in 0.. {
        let (dir, blob) = bucket();
        let ran = Arc::new(Mutex::new(false));
        let (has_run, place) = (Arc::clone(&ran), dir.path().to_owned());
        let meanwhile: Meanwhile = Box::new(move || {
            Box::pin(async move {
                collect(Arc::new(directory(&place))).await;
                *has_run.lock() = true;
            })
        });
        let remote = interrupted(dir.path(), at, meanwhile);
        let published = publish(Arc::clone(&remote) as Arc<dyn Remote>, blob).await;
        if !*ran.lock() {
            break;
        }
        if published {
            kept += 1;
            let is_there = path_of(dir.path(), &blob.name()).exists();
            assert!(is_there, "removed at step {at}, and published");
        } else {
            lost += 1;
        }
    }
    assert!(kept > 2 && lost > 0, "{kept} kept, {lost} lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_a_later_kachefs_condemns_everything() {
    let (dir, blob) = bucket();
    let list = path_of(dir.path(), &ObjectName::condemned(&Digest::of(b"l")));
    write(&list, b"later", Duration::ZERO);
    assert!(!publish(Arc::new(directory(dir.path())), blob).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_cannot_be_read_is_named_and_nothing_removed() {
    let (dir, blob) = bucket();
    let lease = ObjectName::lease(&Digest::of(b"l"));
    let trees = (10..30).map(|n| ObjectName::tree(&format!("t{n}").parse().expect("a name")));
    let names: Vec<_> = std::iter::once(lease).chain(trees).collect();
    for (count, more) in [
        (1, None),
        (2, None),
        (names.len(), Some(" and 11 more are ")),
    ] {
        for name in &names[..count] {
            write(&path_of(dir.path(), name), b"later", Duration::ZERO);
        }
        let remote: Arc<dyn Remote> = Arc::new(directory(dir.path()));
        let error = gc(&remote).collect().await.expect_err("stops").to_string();
        let shown = names[..count].iter().take(SHOWN);
        for name in shown {
            assert!(error.contains(name.as_str()), "{error}");
        }
        assert_eq!(error.contains(" more "), more.is_some(), "{error}");
        assert!(more.is_none_or(|more| error.contains(more)), "{error}");
        assert!(path_of(dir.path(), &blob.name()).exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_cannot_be_read_ends_with_the_grace() {
    let (dir, blob) = bucket();
    let lease = path_of(dir.path(), &ObjectName::lease(&Digest::of(b"l")));
    write(&lease, b"later", 2 * GRACE);
    collect(Arc::new(directory(dir.path()))).await;
    assert!(!lease.exists() && !path_of(dir.path(), &blob.name()).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_grace_of_all_who_hold_a_lease_is_kept_to() {
    let (dir, blob) = bucket();
    let other = Container::Pack(Digest::of(b"leased"));
    let object = path_of(dir.path(), &other.name());
    let lease = path_of(dir.path(), &ObjectName::lease(&Digest::of(b"l")));
    let theirs = 12 * GRACE;
    let leased = containers::write(theirs, [other]).expect("writes");
    // What is leased stays as long as the lease says, and what is not leased is left alone as long.
    for (age, grace, left) in [
        (5, theirs, [true, true, true]),
        (13, GRACE, [false, false, false]),
    ] {
        write(&object, b"pack", 20 * GRACE);
        write(&lease, &leased, age * GRACE);
        let collected = collect(Arc::new(directory(dir.path()))).await;
        assert_eq!(u128::from(collected.grace_ms), grace.as_millis());
        let blob = path_of(dir.path(), &blob.name());
        let is_there = [&blob, &object, &lease].map(|path| path.exists());
        assert_eq!(is_there, left, "{age}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_ended_writing_goes_after_a_grace() {
    let (dir, blob) = bucket();
    let beside = path_of(dir.path(), &blob.name());
    let old = beside.with_file_name(".part-old");
    let other = dir.path().join(Kind::Packs.prefix()).join(".part-other");
    let new = beside.with_file_name(".part-new");
    let not_ours = dir.path().join(".part-of-something-else");
    let link = beside.with_file_name(".part-link");
    for (path, ago) in [
        (&old, 2 * GRACE),
        (&other, 2 * GRACE),
        (&new, GRACE / 2),
        (&not_ours, 2 * GRACE),
    ] {
        write(path, b"half", ago);
    }
    std::os::unix::fs::symlink(&not_ours, &link).expect("links");
    let remote: Arc<dyn Remote> = Arc::new(directory(dir.path()));
    let dry = Gc {
        dry_run: true,
        ..gc(&remote)
    };
    let expected = Count {
        objects: 2,
        bytes: 8,
    };
    let would_go = dry.collect().await.expect("looks");
    assert_eq!(would_go.removed["unfinished writes"], expected);
    assert!(old.exists() && other.exists());
    let collected = collect(remote).await;
    assert_eq!(collected.removed["unfinished writes"], expected);
    assert!(!old.exists() && !other.exists());
    assert!(new.exists() && not_ours.exists() && link.is_symlink());
}
