//! What makes blobs again that are nowhere any more: told by the views that miss them, done by the action
//! service, which is installed here when it starts (`service::lineage`).

use std::collections::HashSet;

use store::{ActionKey, Digest, ViewId};

/// A blob that is neither on this machine nor in a remote.
#[derive(Clone, Copy, Debug)]
pub struct Lost {
    /// A view that shows it.
    pub view: ViewId,
    /// The action whose output it was there.
    pub action: ActionKey,
    /// Its name.
    pub digest: Digest,
    /// Its length.
    pub size: u64,
}

/// Runs actions again.
pub trait Lineage: Send + Sync {
    /// Whether it is worth asking for what an action made in a view: not where it was tried in vain a moment
    /// ago, or was lost when something else was. Cheap.
    fn is_hopeful(&self, view: ViewId, action: &ActionKey) -> bool;

    /// The actions of this view that it is worth asking for, as far as can be told beforehand.
    fn known(&self, view: ViewId) -> HashSet<ActionKey>;

    /// Makes a blob again, and waits for it, within a limit. `false` when it is still not here. Called
    /// with no lock held, and never by a thread that serves requests: a compiler reads from views.
    fn recompute(&self, lost: Lost) -> bool;

    /// The process groups of the compilers that make something for a view, and have it in use.
    fn groups(&self, view: ViewId) -> Vec<u32>;

    /// Ends what is being made for a view.
    fn leave(&self, view: ViewId);
}
