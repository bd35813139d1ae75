//! Recording a run: what the script left in `OUT_DIR`, printed and read.
//!
//! `hold` runs before cargo goes on, `record` behind its back. Anything that does not add up stores
//! nothing.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::{
    ActionEntry, ActionKey, Counter, Digest, InputRecord, Kind, Look, Observation, RootSet,
    ScriptResult, Timestamp, TreeContent, TreeEntry,
};
use wrapper::artifacts;
use wrapper::key;
use wrapper::mode::Mode;
use wrapper::protocol::Outcome;

use super::super::Service;
use super::super::lookup;
use super::super::observed::{self, Program, Untold};
use super::super::record::put_entry;
use super::super::share::Source;
use super::prepare::Prepared;
use crate::clock;
use crate::fs::trees::Walked;
use crate::fs::{Body, Errno, View};

/// More names than this are not stored.
const LARGEST_TREE: usize = 20_000;

/// What a script says to have it run again when a file changes (the cargo book, "Build Scripts").
const RERUN_IF_CHANGED: [&[u8]; 2] = [b"cargo:rerun-if-changed=", b"cargo::rerun-if-changed="];

/// Why a run that succeeded is not stored.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotStored {
    /// It could not be watched, so nobody knows what it read.
    #[error("it could not be watched")]
    Unwatched,
    /// What it was seen to do does not tell what it made.
    #[error(transparent)]
    Untold(#[from] Untold),
    /// It left more than is stored.
    #[error("it left too much in OUT_DIR")]
    TooLarge,
    /// It left something that is neither file, directory nor link.
    #[error("it left {0}, which cannot be stored")]
    Special(String),
    /// A file in `OUT_DIR` is still being written.
    #[error("OUT_DIR is still being written: {0}")]
    Unsettled(Errno),
    /// An input is not what it was.
    #[error("{0} changed while it ran")]
    Changed(String),
    /// It printed a NUL, which templates cannot hold.
    #[error("it printed a NUL")]
    Nul,
    /// The index refuses.
    #[error(transparent)]
    Index(#[from] store::IndexError),
    /// The view refuses.
    #[error("view: {0}")]
    View(#[from] Errno),
}

impl NotStored {
    /// The name it is counted under; `None` for what another run may well not meet.
    pub(super) fn name(&self) -> Option<&'static str> {
        match self {
            Self::Unwatched => Some("unwatched"),
            Self::Untold(Untold::Unseen(unseen)) => Some(unseen.name()),
            Self::Untold(Untold::Writes(_)) => Some("writes-elsewhere"),
            Self::TooLarge => Some("out-dir-too-large"),
            Self::Special(_) => Some("out-dir-special"),
            _ => None,
        }
    }
}

/// What a script left, readable whatever becomes of its names.
pub(super) struct Held<'a> {
    view: &'a View,
    found: Vec<Walked>,
    /// The states they were in, in order.
    generations: Vec<u64>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for found in &self.found {
            self.view.unpin(&found.node);
        }
    }
}

/// Finds what is in `OUT_DIR` and holds on to it.
pub(super) fn hold(prepared: &Prepared) -> Result<Held<'_>, NotStored> {
    let found = match prepared.view.walk(prepared.out_dir, LARGEST_TREE) {
        Err(Errno::EFBIG) => return Err(NotStored::TooLarge),
        found => found?,
    };
    for found in &found {
        prepared.view.pin(&found.node);
    }
    let view = &prepared.view;
    let mut held = Held {
        view,
        found,
        generations: Vec::new(),
    };
    let deadline = Instant::now() + artifacts::PATIENCE;
    view.settle_walked(&held.found, deadline)
        .map_err(NotStored::Unsettled)?;
    let generation = |found: &Walked| found.node.state.lock().generation;
    held.generations = held.found.iter().map(generation).collect();
    Ok(held)
}

/// What was stored.
pub(super) struct Recorded {
    /// How it is found.
    pub(super) source: Source,
    /// The key it is stored under.
    pub(super) stored_under: ActionKey,
    /// What the script read.
    pub(super) seen: Vec<(Observation, Digest)>,
    /// Roots what it left is bound to.
    pub(super) bound: RootSet,
}

/// Ingests what was left and stores result and input record, all in one commit.
pub(super) fn record(
    service: &Service,
    prepared: &Prepared,
    outcome: &Outcome,
    held: &Held<'_>,
    started: Timestamp,
    elapsed: Duration,
) -> Result<Recorded, NotStored> {
    if outcome.stdout.contains(&0) || outcome.stderr.contains(&0) {
        return Err(NotStored::Nul);
    }
    let observed = outcome.observed.as_ref().ok_or(NotStored::Unwatched)?;
    let site = prepared.site(service);
    let nothing = |_: &Path| false;
    let seen = || {
        let scope = &prepared.scope;
        observed::inputs(site, observed, scope, Program::Script, started, &nothing)
    };
    let inputs = seen()?;
    let mut bound = inputs.bound;
    let declared = declared(prepared, &outcome.stdout);
    let mut observations = inputs.observations.clone();
    observations.extend(declared.iter().map(|(_, observation)| observation.clone()));
    observations.sort_unstable();
    observations.dedup();

    let roots = &prepared.roots;
    let mut template = |bytes: &[u8]| {
        let template = roots.template(bytes);
        bound.extend(roots.held_in(&template));
        template
    };
    let (stdout, stderr) = (template(&outcome.stdout), template(&outcome.stderr));
    let taken = take_tree(prepared, held, &mut template)?;
    bound.extend(taken.roots);
    if !roots.is_plain() || prepared.mode == Mode::Exact {
        bound = RootSet::all();
    }
    let now = lookup::look_again(site, &observations)
        .ok_or_else(|| NotStored::Changed("an input".into()))?;
    let key = key::script_key(&prepared.digest, &now);
    // After everything was hashed: a change before that would have left its time.
    if seen()? != inputs {
        return Err(NotStored::Changed("an input".into()));
    }
    for (path, _) in &declared {
        if site
            .tree_changed(path)
            .is_none_or(|changed| changed >= started)
        {
            return Err(NotStored::Changed(path.display().to_string()));
        }
    }

    let mut batch = service.storage.index.batch();
    let result = ScriptResult {
        package: prepared.package.clone(),
        tree: taken.entries,
        stdout,
        stderr,
        run_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
    };
    let entry = ActionEntry::Script(result);
    let stored_under = put_entry(&mut batch, &key, bound, roots, &entry)?;
    let record = InputRecord {
        sources: Vec::new(),
        env: Vec::new(),
        observed: Some(observations),
        created_ms: clock::now_ms(),
        loads: None,
    };
    batch.put_record(&prepared.digest, &record)?;
    let source = Source { record, key };
    let secrets = prepared.secrets.as_ref();
    let stored = (stored_under, &entry);
    service.share(&mut batch, secrets, prepared.digest, &source, stored)?;
    batch.count(
        &[
            (Counter::ScriptMisses, 1),
            (Counter::BytesIngested, taken.ingested),
            (Counter::BytesStored, taken.stored),
        ],
        None,
    );
    prepared
        .view
        .commit_origin(batch, &taken.nodes, stored_under)?;
    tracing::debug!(package = prepared.package, ?bound, "build script stored");
    for observation in source.record.observed.iter().flatten() {
        let path = String::from_utf8_lossy(&observation.path);
        tracing::trace!(look = ?observation.look, %path, "observed");
    }
    Ok(Recorded {
        source,
        stored_under,
        seen: now,
        bound,
    })
}

/// What the script declares an input, read or not.
fn declared(prepared: &Prepared, stdout: &[u8]) -> Vec<(PathBuf, Observation)> {
    stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let prefix = RERUN_IF_CHANGED
                .iter()
                .find(|prefix| line.starts_with(prefix))?;
            let path = line[prefix.len()..].trim_ascii();
            let path = prepared.cwd.join(std::ffi::OsStr::from_bytes(path));
            let observation = Observation {
                path: prepared.roots.template_place(path.as_os_str().as_bytes()),
                look: Look::Tree,
            };
            Some((path, observation))
        })
        .collect()
}

struct Taken {
    entries: Vec<TreeEntry>,
    nodes: Vec<(Arc<crate::fs::Node>, u64)>,
    roots: RootSet,
    ingested: u64,
    stored: u64,
}

fn take_tree(
    prepared: &Prepared,
    held: &Held<'_>,
    template: &mut dyn FnMut(&[u8]) -> Vec<u8>,
) -> Result<Taken, NotStored> {
    let mut taken = Taken {
        entries: Vec::with_capacity(held.found.len()),
        nodes: Vec::new(),
        roots: RootSet::default(),
        ingested: 0,
        stored: 0,
    };
    let needles = prepared.roots.needles();
    for (found, generation) in held.found.iter().zip(&held.generations) {
        let special = || NotStored::Special(String::from_utf8_lossy(&found.path).into_owned());
        let mode = found.node.state.lock().attributes.perm;
        let content = match found.node.kind {
            Kind::Dir => TreeContent::Directory,
            Kind::Symlink => match &found.node.state.lock().body {
                Body::Link(target) => TreeContent::Link(template(target)),
                _ => return Err(special()),
            },
            Kind::File => {
                let blob = prepared.view.ingest(&found.node, &needles)?;
                if blob.generation != *generation {
                    return Err(NotStored::Unsettled(Errno::EBUSY));
                }
                taken.roots.extend(blob.roots);
                taken.ingested += blob.size;
                taken.stored += if blob.new { blob.size } else { 0 };
                taken.nodes.push((Arc::clone(&found.node), blob.generation));
                TreeContent::Blob {
                    digest: blob.digest,
                    size: blob.size,
                }
            }
            _ => return Err(special()),
        };
        taken.entries.push(TreeEntry {
            path: found.path.clone(),
            mode,
            content,
        });
    }
    Ok(taken)
}
