//! Recording a C compile: its object, what it printed and read.
//!
//! `hold` runs before the build script goes on, `record` behind its back. Anything that does not add
//! up stores nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::{
    ActionEntry, ActionResult, Counter, InputRecord, Kind, Look, Observation, Origin, Output,
    OutputContent, RootSet, Timestamp,
};
use wrapper::artifacts;
use wrapper::protocol::Outcome;
use wrapper::trace::Access;

use super::super::Service;
use super::super::observed::{self, Inputs, Program, Untold};
use super::super::prepare::Place;
use super::super::record::{put_entry, read_whole};
use super::super::share::Source;
use super::dates;
use super::key_now;
use super::prepare::Prepared;
use crate::clock;
use crate::fs::{Errno, Node, View};

/// What the sections of debug information are called.
const DEBUG_SECTIONS: &[u8] = b"debug_";

/// A larger object is not searched for them; it counts as having some.
const LARGEST_SEARCHED: u64 = 64 << 20;

/// Why a compile that succeeded is not stored.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotStored {
    /// It could not be watched, so nobody knows what it read.
    #[error("it could not be watched")]
    Unwatched,
    /// What it was seen to do does not tell what it made.
    #[error(transparent)]
    Untold(#[from] Untold),
    /// A text it read names the clock.
    #[error("{0} names the date or the time")]
    Date(String),
    /// An output cannot be taken.
    #[error("output {name}: {errno}")]
    Output {
        /// Its name.
        name: String,
        /// Why.
        errno: Errno,
    },
    /// Somebody still writes to an output.
    #[error("output {0} is still open for writing")]
    Unsettled(String),
    /// An input is not what it was.
    #[error("{0} changed while the compiler ran")]
    Changed(String),
    /// It printed a NUL, which templates cannot hold.
    #[error("diagnostics hold a NUL")]
    Nul,
    /// The index refuses.
    #[error(transparent)]
    Index(#[from] store::IndexError),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] super::super::record::NotStored),
    /// The view refuses.
    #[error("view: {0}")]
    View(#[from] Errno),
}

impl NotStored {
    /// The name it is counted under; `None` for what another run may well not meet.
    pub(super) fn name(&self) -> Option<&'static str> {
        match self {
            Self::Unwatched => Some("cc-unwatched"),
            Self::Untold(Untold::Unseen(unseen)) => Some(unseen.name()),
            Self::Untold(Untold::Writes(_)) => Some("cc-writes-elsewhere"),
            Self::Date(_) => Some("cc-date"),
            _ => None,
        }
    }
}

/// Outputs that stay readable whatever becomes of their names.
pub(super) struct Held<'a> {
    view: &'a View,
    outputs: Vec<(String, Arc<Node>)>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for (_, node) in &self.outputs {
            self.view.unpin(node);
        }
    }
}

/// Finds the outputs and holds on to them.
pub(super) fn hold<'a>(prepared: &'a Prepared, outcome: &Outcome) -> Result<Held<'a>, NotStored> {
    if let Some(path) = &outcome.unsettled {
        return Err(NotStored::Unsettled(path.clone()));
    }
    let view = &prepared.view;
    let mut held = Held {
        view,
        outputs: Vec::new(),
    };
    for name in &prepared.names {
        let shown = String::from_utf8_lossy(name).into_owned();
        let failed = |errno| NotStored::Output {
            name: shown.clone(),
            errno,
        };
        let node = view.child(prepared.directory, name).map_err(failed)?;
        if node.kind != Kind::File {
            return Err(failed(Errno::EINVAL));
        }
        view.settle(&node, Instant::now() + artifacts::PATIENCE)
            .map_err(failed)?;
        view.pin(&node);
        held.outputs.push((shown, node));
    }
    Ok(held)
}

/// Ingests the outputs and stores result and input record, all in one commit.
pub(super) fn record(
    service: &Service,
    prepared: &Prepared,
    outcome: &Outcome,
    held: &Held<'_>,
    started: Timestamp,
    elapsed: Duration,
) -> Result<(), NotStored> {
    if outcome.stdout.contains(&0) || outcome.stderr.contains(&0) {
        return Err(NotStored::Nul);
    }
    let inputs = seen(service, prepared, outcome, started)?;
    refuse_dates(service, prepared, &inputs.observations)?;
    let mut bound = inputs.bound;
    let roots = &prepared.roots;
    let mut template = |bytes: &[u8]| {
        let template = roots.template(bytes);
        bound.extend(roots.held_in(&template));
        template
    };
    let (stdout, stderr) = (template(&outcome.stdout), template(&outcome.stderr));
    let taken = take_outputs(prepared, held)?;
    bound.extend(taken.roots);
    // Debug information holds the working directory, perhaps compressed.
    if prepared.compile.debug || taken.has_debug || !roots.is_plain() {
        bound = RootSet::all();
    }
    let key = key_now(service, prepared, &inputs.observations)
        .ok_or_else(|| NotStored::Changed("an input".into()))?;
    // After everything was hashed: a change before that would have left its time.
    if seen(service, prepared, outcome, started)? != inputs {
        return Err(NotStored::Changed("an input".into()));
    }

    let mut batch = service.storage.index.batch();
    let result = ActionResult {
        crate_name: prepared.compile.source.clone(),
        outputs: taken.outputs,
        stdout,
        stderr,
        origin: Origin::default(),
        compile_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
    };
    let entry = ActionEntry::Result(result);
    let stored_under = put_entry(&mut batch, &key, bound, roots, &entry)?;
    let record = InputRecord {
        sources: Vec::new(),
        env: Vec::new(),
        observed: Some(inputs.observations),
        created_ms: clock::now_ms(),
        loads: None,
    };
    batch.put_record(&prepared.digest, &record)?;
    let source = Source { record, key };
    let secrets = Some(&prepared.secrets);
    let stored = (stored_under, &entry);
    service.share(&mut batch, secrets, prepared.digest, &source, stored)?;
    batch.count(
        &[
            (Counter::CcMisses, 1),
            (Counter::BytesIngested, taken.ingested),
            (Counter::BytesStored, taken.stored),
        ],
        None,
    );
    prepared
        .view
        .commit_origin(batch, &taken.nodes, stored_under)?;
    tracing::debug!(source = prepared.compile.source, ?bound, "object stored");
    Ok(())
}

fn seen(
    service: &Service,
    prepared: &Prepared,
    outcome: &Outcome,
    started: Timestamp,
) -> Result<Inputs, NotStored> {
    let observed = outcome.observed.as_ref().ok_or(NotStored::Unwatched)?;
    let (site, scope) = (prepared.site(service), &prepared.scope);
    let nothing = |_: &Path| false;
    let mut seen = observed::inputs(site, observed, scope, Program::Script, started, &nothing)?;
    let is_temporary = |path: &[u8]| {
        let uses = observed.paths.get(path);
        uses.is_some_and(|uses| uses.absent && uses.accesses.contains(Access::Make))
            && is_random_name(path)
    };
    // Another one in each run, and free whenever it is chosen.
    seen.observations
        .retain(|seen| !is_temporary(&prepared.roots.render(&seen.path)));
    Ok(seen)
}

/// Whether gcc may have chosen a name for what it passes from one of its programs to the next:
/// `ccXXXXXX.s`.
fn is_random_name(path: &[u8]) -> bool {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let Some(rest) = name.strip_prefix(b"cc") else {
        return false;
    };
    let (random, ending) = rest.split_at(rest.len().min(6));
    random.len() == 6 && random.iter().all(u8::is_ascii_alphanumeric) && ending.starts_with(b".")
}

/// An object that has the date in it is another one tomorrow.
fn refuse_dates(
    service: &Service,
    prepared: &Prepared,
    observations: &[Observation],
) -> Result<(), NotStored> {
    let opened = observations.iter().filter(|seen| seen.look == Look::Open);
    for observation in opened {
        let path = prepared.roots.render(&observation.path);
        let path = Path::new(OsStr::from_bytes(&path));
        let found = match prepared.site(service).locate(path) {
            // An absence, or something that cannot be opened, is no text.
            Place::Disk(path) => service
                .dates
                .in_file(&service.files, &path)
                .unwrap_or(false),
            Place::View(view, path) => match view.resolve(&path) {
                Ok(node) if node.kind == Kind::File => dates::in_text(&read_whole(&view, &node)?),
                _ => false,
            },
        };
        if found {
            return Err(NotStored::Date(path.display().to_string()));
        }
    }
    Ok(())
}

#[derive(Default)]
struct Taken {
    outputs: Vec<Output>,
    nodes: Vec<(Arc<Node>, u64)>,
    roots: RootSet,
    has_debug: bool,
    ingested: u64,
    stored: u64,
}

fn take_outputs(prepared: &Prepared, held: &Held<'_>) -> Result<Taken, NotStored> {
    let mut taken = Taken::default();
    let needles = prepared.roots.needles();
    for (name, node) in &held.outputs {
        let failed = |errno| NotStored::Output {
            name: name.clone(),
            errno,
        };
        let mode = u32::from(node.state.lock().attributes.perm);
        let blob = prepared.view.ingest(node, &needles).map_err(failed)?;
        taken.has_debug |= has_debug(prepared, node, blob.size)?;
        taken.roots.extend(blob.roots);
        taken.ingested += blob.size;
        taken.stored += if blob.new { blob.size } else { 0 };
        taken.nodes.push((Arc::clone(node), blob.generation));
        taken.outputs.push(Output {
            name: name.clone(),
            mode,
            content: OutputContent::Blob {
                digest: blob.digest,
                size: blob.size,
            },
        });
    }
    Ok(taken)
}

/// Whether debug information is in an object although nobody asked for it on the command line: a
/// configuration file of the compiler's may.
fn has_debug(prepared: &Prepared, node: &Node, size: u64) -> Result<bool, NotStored> {
    if size > LARGEST_SEARCHED {
        return Ok(true);
    }
    let bytes = read_whole(&prepared.view, node)?;
    let mut windows = bytes.windows(DEBUG_SECTIONS.len());
    Ok(windows.any(|part| part == DEBUG_SECTIONS))
}

#[cfg(test)]
mod tests {
    use super::is_random_name;

    #[test]
    fn names_gcc_chooses() {
        for name in ["/tmp/ccuCizle.s", "cc012345.o"] {
            assert!(is_random_name(name.as_bytes()), "{name}");
        }
        for name in ["/tmp/ccuCizle", "cc1.s", "/tmp/ccuCizle.d/x", "xx012345.o"] {
            assert!(!is_random_name(name.as_bytes()), "{name}");
        }
    }
}
