//! Where externs come from: the closure of each compiled crate.
//!
//! A crate's rmeta names the crates it was compiled against, but only rustc can read it. kachefs
//! remembers it instead: on the inodes of recorded outputs (by action key), and in memory for
//! crates whose compile is still under way, whose rmeta cargo already hands to dependents.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use store::{ActionEntry, ActionKey, Origin, ViewId};

use crate::storage::Storage;

const REMEMBERED: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not zero");

/// A file an action is making: the view and the path of the output without extension.
pub type UnderWay = (ViewId, Vec<u8>);

/// What is known about the origins of crates.
pub struct Units {
    storage: Arc<Storage>,
    recorded: Mutex<LruCache<ActionKey, Arc<Origin>>>,
    under_way: Mutex<HashMap<UnderWay, Arc<Origin>>>,
}

impl Units {
    /// Nothing in memory yet.
    pub fn new(storage: Arc<Storage>) -> Self {
        Self {
            storage,
            recorded: Mutex::new(LruCache::new(REMEMBERED)),
            under_way: Mutex::default(),
        }
    }

    /// The origin of a file made by `action`.
    pub fn of_action(&self, action: &ActionKey) -> Option<Arc<Origin>> {
        if let Some(origin) = self.recorded.lock().get(action) {
            return Some(Arc::clone(origin));
        }
        match self.storage.index.action(action) {
            Ok(Some(ActionEntry::Result(result))) => {
                let origin = Arc::new(result.origin);
                self.recorded.lock().put(*action, Arc::clone(&origin));
                Some(origin)
            }
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%error, "origin");
                None
            }
        }
    }

    /// The origin of a file whose action is under way.
    pub fn of_output(&self, output: &UnderWay) -> Option<Arc<Origin>> {
        self.under_way.lock().get(output).cloned()
    }

    /// An action that makes `output` begins.
    pub fn begin(&self, output: UnderWay, origin: Origin) {
        self.under_way.lock().insert(output, Arc::new(origin));
    }

    /// It is over; if it was recorded, its files now carry their origin themselves.
    pub fn end(&self, output: &UnderWay) {
        self.under_way.lock().remove(output);
    }
}
