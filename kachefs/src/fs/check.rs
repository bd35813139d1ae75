//! Files whose bytes are not in the store any more: a blob or a private file that is missing, or a
//! blob that is damaged.
//!
//! A blob that the store's remote holds is not missing: it is fetched when it is read
//! (`crate::lazy`). When it does not come, it is as good as missing; when it is nowhere any more, it may be
//! made again when it is read (`crate::lazy::Lineage`), and keeps its names until that has failed.
//!
//! Such a file loses its names, so that the next cargo build makes it again; until then a read gives
//! EIO. When a view is mounted afresh that happens before anybody can look; in a mounted view, when a read
//! fails: before the answer if bytes did not come from elsewhere, else soon. Bytes are not read to find out:
//! a blob is judged by its length and by whether it was written since it was sealed.

use std::collections::HashSet;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use store::{ActionEntry, ActionKey, Content, Digest, Ino, InodeRecord, Kind};

use super::node::{Body, Node};
use super::view::View;
use super::{Errno, FsResult};
use crate::lazy::Lost;
use crate::storage::Storage;

/// How long anybody waits until names are taken away.
const WITHDRAWN: Duration = Duration::from_secs(1);

/// Whether the bytes of a stored inode are there.
pub(super) fn is_backed(storage: &Storage, record: &InodeRecord) -> bool {
    match &record.content {
        Content::Blob { digest, size } => storage.has(digest, *size),
        Content::Private(id) => storage.dir.scratch_file(*id).exists(),
        _ => true,
    }
}

/// The names of all that is lost are taken away, at that time.
#[derive(Clone, Copy)]
pub(super) struct Withdrawal {
    began: Instant,
    /// Of all that is out of reach as well.
    of_all_far: bool,
}

impl Withdrawal {
    /// Whether this one, begun later, took away what another one wants to.
    fn covers(self, other: Self) -> bool {
        self.began >= other.began && (self.of_all_far || !other.of_all_far)
    }
}

impl View {
    /// Notes files whose bytes are not there: their names go when suspects are dropped.
    pub fn suspect(&self, inodes: impl IntoIterator<Item = Ino>) {
        self.suspects.lock().extend(inodes);
    }

    /// A blob could not be read, or ended early, and is not in the store any more.
    pub(super) fn doubt_blob(&self, node: &Node, digest: &Digest) {
        self.storage.close_blob(digest);
        tracing::error!(ino = ?node.ino, %digest, "blob is missing or damaged");
        self.suspect([node.ino]);
    }

    /// What is nowhere any more loses its names, but for what may be made again.
    pub fn doubt_lost(&self) {
        self.suspect(self.lost());
    }

    /// The actions that made what is nowhere any more.
    pub fn lost_origins(&self) -> HashSet<ActionKey> {
        self.lost().filter_map(|ino| self.origin(ino)).collect()
    }

    /// Makes again what is nowhere any more, and waits for it; what cannot be made loses its names. For
    /// threads that serve no requests.
    pub fn recompute_lost(&self) {
        for ino in self.lost() {
            if let Err(error) = self.fault(ino) {
                tracing::debug!(?ino, %error, "its names go");
            }
        }
        self.drop_suspects();
    }

    /// Something did not come. Takes the names of all that is lost away, so that the next build finds what it
    /// has to make, however soon it comes; and of all that is out of reach, where the remote does not answer. For
    /// threads that serve no requests, or that of a read: another thread does it, and is not waited for when
    /// somebody has a directory locked, for they may wait for the read.
    pub fn withdraw_lost(self: &Arc<Self>) {
        if self.is_read_only() {
            return;
        }
        self.storage.wait_for_look(None);
        let is_away = self.storage.is_away();
        let wanted = Withdrawal {
            began: Instant::now(),
            of_all_far: is_away,
        };
        let view = Arc::clone(self);
        let (done, ends) = mpsc::channel();
        let work = move || {
            let mut withdrawn = view.withdrawn.lock();
            if withdrawn.is_none_or(|last| !last.covers(wanted)) {
                *withdrawn = Some(Withdrawal {
                    began: Instant::now(),
                    ..wanted
                });
                if is_away {
                    let storage = &view.storage;
                    let is_far = |digest: &Digest, size| !storage.is_within_reach(digest, size);
                    view.suspect(view.blobs_where(is_far));
                }
                view.suspect(view.lost());
                view.drop_now();
            }
            drop(withdrawn);
            // Nobody waits any more, perhaps.
            let _ = done.send(());
        };
        let thread = std::thread::Builder::new().name("withdraw".into());
        match thread.spawn(work) {
            Ok(_) => {
                // When it ends without a word, it ends.
                let _ = ends.recv_timeout(WITHDRAWN);
            }
            Err(error) => tracing::error!(%error, "cannot start a thread"),
        }
    }

    /// The files whose bytes are nowhere any more.
    fn lost(&self) -> impl Iterator<Item = Ino> {
        self.blobs_where(|digest, size| !self.storage.has(digest, size))
    }

    /// The files that are blobs of which this is true.
    fn blobs_where(&self, is: impl Fn(&Digest, u64) -> bool) -> impl Iterator<Item = Ino> {
        let is_one = move |node: &Arc<Node>| match node.state.lock().body {
            Body::Blob { digest, size } => is(&digest, size),
            _ => false,
        };
        let nodes = self.all_nodes().into_iter().filter(is_one);
        nodes.map(|node| node.ino)
    }

    /// The blobs of this view that are nowhere any more.
    pub fn lost_blobs(&self) -> Vec<(Digest, u64)> {
        let mut blobs = self.blobs();
        blobs.retain(|(digest, size)| !self.storage.has(digest, *size));
        blobs
    }

    /// Whether the bytes of a file that are nowhere any more may be made again.
    pub(super) fn is_hopeful(&self, node: &Node) -> bool {
        let origin = node.state.lock().origin.clone();
        let lineage = self.storage.lazy.lineage.get().zip(origin);
        lineage.is_some_and(|(lineage, action)| lineage.is_hopeful(self.id, &action))
    }

    /// Makes the bytes of a file again that are nowhere any more, and waits for them. Not where a remote
    /// that does not answer has them.
    pub(super) fn recompute(&self, node: &Node, digest: &Digest, size: u64) -> bool {
        let Some(lineage) = self.storage.lazy.lineage.get() else {
            return false;
        };
        let lost = |action| Lost {
            view: self.id,
            action,
            digest: *digest,
            size,
        };
        let action = self.origin(node.ino);
        !self.storage.has(digest, size)
            && action.is_some_and(|action| lineage.recompute(lost(action)))
    }

    /// Whether a lost file keeps its names, because reading it makes it again.
    fn may_be_made_again(&self, ino: Ino, known: &HashSet<ActionKey>) -> bool {
        let Ok(node) = self.node(ino) else {
            return false;
        };
        let state = node.state.lock();
        let Body::Blob { digest, size } = state.body else {
            return false;
        };
        let is_known = state.origin.as_deref().is_some_and(|o| known.contains(o));
        drop(state);
        is_known && !self.storage.has(&digest, size)
    }

    /// Takes the names of suspected files away. In a mounted view, for threads that serve no
    /// requests: the kernel is told, and takes the locks of directories for it.
    pub fn drop_suspects(&self) {
        let _one_at_a_time = self.withdrawn.lock();
        self.drop_now();
    }

    fn drop_now(&self) {
        let suspects = std::mem::take(&mut *self.suspects.lock());
        // Nobody builds in what is only read: it waits for the remote.
        if self.is_read_only() {
            return;
        }
        let mut lost: HashSet<Ino> = suspects
            .into_iter()
            .filter(|ino| self.is_lost(*ino))
            .collect();
        if lost.is_empty() {
            return;
        }
        // What is mounted afresh nobody has open: there the next build makes everything.
        let mounted = self.invalidate.get().is_some();
        let lineage = self.storage.lazy.lineage.get().filter(|_| mounted);
        let known = lineage.map(|lineage| lineage.known(self.id));
        let known = known.unwrap_or_default();
        lost.retain(|ino| !self.may_be_made_again(*ino, &known));
        if lost.is_empty() {
            return;
        }
        let actions = lost.iter().filter_map(|ino| self.origin(*ino)).collect();
        lost.extend(self.made_by(&actions));
        for (parent, name, ino) in self.names_of(&lost) {
            // Somebody may have written something else there meanwhile.
            let origin = self.origin(ino);
            if !self.is_lost(ino) && origin.is_none_or(|origin| !actions.contains(&origin)) {
                continue;
            }
            self.forget_run(parent, &name, ino);
            let shown = String::from_utf8_lossy(&name).into_owned();
            match self.unlink_lost(parent, &name, ino) {
                Ok(true) => {
                    tracing::error!(
                        view = self.id.0,
                        name = shown,
                        ?ino,
                        "its bytes are lost: removed"
                    );
                    self.renamed(parent, [name.as_slice()]);
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(view = self.id.0, name = shown, %error, "cannot remove what is lost");
                    self.suspect([ino]);
                }
            }
        }
    }

    /// The action that made a file.
    fn origin(&self, ino: Ino) -> Option<ActionKey> {
        let node = self.node(ino).ok()?;
        node.state.lock().origin.as_deref().copied()
    }

    /// What actions made: it goes with what is lost of it, or cargo would not have all of it made again.
    fn made_by(&self, actions: &HashSet<ActionKey>) -> Vec<Ino> {
        if actions.is_empty() {
            return Vec::new();
        }
        let files = self.inodes().into_iter();
        let files = files.filter(|(_, kind)| *kind == Kind::File);
        let is_of_them = |ino: &Ino| {
            let origin = self.origin(*ino);
            origin.is_some_and(|action| actions.contains(&action))
        };
        files.map(|(ino, _)| ino).filter(is_of_them).collect()
    }

    /// Cargo does not look for what a build script left, only for what it printed. Where the first is
    /// lost, the second goes too, so that the script runs again.
    fn forget_run(&self, parent: Ino, name: &[u8], ino: Ino) {
        let action = self
            .origin(ino)
            .map(|origin| self.storage.index.action(&origin));
        let Some(Ok(Some(ActionEntry::Script(result)))) = action else {
            return;
        };
        let Ok(directory) = self.path_of(parent) else {
            return;
        };
        let path = [&directory, &b"/"[..], name].concat();
        let out_dir = result.tree.iter().find_map(|entry| {
            let out_dir = path.strip_suffix(entry.path.as_slice())?;
            out_dir.strip_suffix(b"/")
        });
        let Some(at) = out_dir.and_then(|path| path.iter().rposition(|byte| *byte == b'/')) else {
            return;
        };
        // Beside it, or in a directory of their own in the layout of a directory for each unit.
        let beside = &path[..at];
        for place in [beside.to_vec(), [beside, b"/run"].concat()] {
            if let Ok(place) = self.resolve(&place) {
                self.remove_files(place.ino);
            }
        }
    }

    fn remove_files(&self, directory: Ino) {
        for row in self.list(directory, 0, usize::MAX).unwrap_or_default() {
            if self.node(row.ino).is_ok_and(|node| node.kind == Kind::File)
                && self.unlink(directory, &row.name).is_ok()
            {
                self.renamed(directory, [&*row.name]);
            }
        }
    }

    /// Whether a suspected file still is what it was suspected of.
    fn is_lost(&self, ino: Ino) -> bool {
        let Ok(node) = self.node(ino) else {
            return false;
        };
        let state = node.state.lock();
        match &state.body {
            Body::Blob { digest, size } => {
                let (digest, size) = (*digest, *size);
                drop(state);
                !self.storage.is_within_reach(&digest, size)
            }
            Body::Private { id, .. } => !self.storage.dir.scratch_file(*id).exists(),
            _ => false,
        }
    }

    fn names_of(&self, inodes: &HashSet<Ino>) -> Vec<(Ino, Vec<u8>, Ino)> {
        let mut names = Vec::new();
        for (directory, kind) in self.inodes() {
            if kind != Kind::Dir {
                continue;
            }
            let rows = self.list(directory, 0, usize::MAX).unwrap_or_default();
            let wanted = rows.into_iter().filter(|row| inodes.contains(&row.ino));
            names.extend(wanted.map(|row| (directory, row.name.to_vec(), row.ino)));
        }
        names
    }

    /// Removes a name unless it stands for something else by now.
    fn unlink_lost(&self, parent: Ino, name: &[u8], ino: Ino) -> FsResult<bool> {
        match self.child(parent, name) {
            Ok(found) if found.ino == ino => {}
            Ok(_) | Err(Errno::ENOENT) => return Ok(false),
            Err(error) => return Err(error),
        }
        match self.unlink(parent, name) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wants_more_names_gone_takes_them_away() {
        let earlier = Instant::now();
        let later = earlier + Duration::from_millis(1);
        let withdrawal = |began, of_all_far| Withdrawal { began, of_all_far };
        let lost = withdrawal(earlier, false);
        assert!(withdrawal(later, false).covers(lost));
        assert!(withdrawal(later, true).covers(lost));
        assert!(!lost.covers(withdrawal(later, false)));
        assert!(!withdrawal(later, false).covers(withdrawal(earlier, true)));
    }
}
