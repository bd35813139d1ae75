//! Recording a miss: what the compiler made and read becomes a result and an input record.
//!
//! Two steps. `hold` runs before cargo goes on: it finds the output files and holds on to them.
//! `record` runs behind cargo's back: it hashes, ingests and stores. Anything that does not add
//! up (an input changed meanwhile, an output that is not a plain file) stores nothing.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::scan::RootNeedles;
use store::{
    ActionEntry, ActionKey, ActionResult, Batch, Counter, InputRecord, Kind, Loads, Output,
    OutputContent, Root, RootSet, Timestamp,
};
use wrapper::args::SearchKind;
use wrapper::artifacts;
use wrapper::depinfo::{self, DepInfo};
use wrapper::environment;
use wrapper::key::{self, Sources};
use wrapper::mode::Mode;
use wrapper::protocol::{Outcome, Verdict};
use wrapper::roots::Roots;
use wrapper::trace::Observed;

use super::Service;
use super::clippy;
use super::files::changed_at;
use super::lookup::{current_sources, module_twin};
use super::observed::{self, Inputs, Program, Untold};
use super::out_dir;
use super::prepare::{Place, Prepared, Refusal, dependencies_again, same_tools};
use super::share::Source;
use super::sidecars::sidecars;
use super::swapped::Swapped;
use crate::clock;
use crate::fs::{Errno, Node, View};

/// Larger sources are not searched for what they do with `OUT_DIR`.
const LARGEST_TEXT: u64 = 32 << 20;

/// Why a compile that succeeded is not stored.
#[derive(Debug, thiserror::Error)]
pub enum NotStored {
    /// rustc announced a file that is not in its out-dir.
    #[error("output {0} is not in the out-dir")]
    OutputElsewhere(String),
    /// A rustc from before 1.76.
    #[error("the compiler is too old")]
    OldCompiler,
    /// An announced file cannot be taken.
    #[error("output {name}: {errno}")]
    Output {
        /// Its name.
        name: String,
        /// Why.
        errno: Errno,
    },
    /// Somebody still writes to an output although the compiler is gone.
    #[error("output {0} is still open for writing")]
    Unsettled(String),
    /// No dep-info among the outputs, or one that does not parse.
    #[error("dep-info: {0}")]
    DepInfo(String),
    /// An input is not what it was when the compiler started.
    #[error("{0} changed while the compiler ran")]
    Changed(String),
    /// What it was seen to do does not tell what it made.
    #[error(transparent)]
    Untold(#[from] Untold),
    /// What it reads or runs is known only from watching it.
    #[error("it could not be watched")]
    Unwatched,
    /// What an unwatched compiler may have read cannot be keyed.
    #[error("not watched, and its package is not keyed: {0:?}")]
    Package(Refusal),
    /// A dependency cannot be looked at again.
    #[error("a dependency cannot be looked at again: {0:?}")]
    Dependencies(Refusal),
    /// The compiler printed a NUL, which templates cannot hold.
    #[error("diagnostics hold a NUL")]
    Nul,
    /// The index refuses.
    #[error(transparent)]
    Index(#[from] store::IndexError),
    /// The view refuses.
    #[error("view: {0}")]
    View(#[from] Errno),
}

/// Output files that stay readable whatever happens to their names.
pub struct Held<'a> {
    view: &'a View,
    outputs: Vec<(String, Arc<Node>)>,
    dep_info: usize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for (_, node) in &self.outputs {
            self.view.unpin(node);
        }
    }
}

/// Which of the crates in the directories it searches a compiler was seen to load. Not what it made itself.
fn loads(prepared: &Prepared, observed: &Observed) -> Option<Loads> {
    let searches = prepared.invocation.searches.iter();
    let searched: HashSet<_> = searches
        .filter(|search| search.kind == SearchKind::Dependency)
        .map(|search| prepared.cwd.join(&search.path))
        .collect();
    let files = observed.libraries.iter().filter_map(|path| {
        let path = Path::new(OsStr::from_bytes(path));
        let is_there = path
            .parent()
            .is_some_and(|parent| searched.contains(parent));
        let name = path.file_name()?.to_str().filter(|_| is_there)?;
        (!prepared.invocation.is_output(name)).then_some(name)
    });
    let loads = Loads::new(prepared.dependencies.stems(), files);
    // Where it was seen to load nothing, it may have gone another way there.
    (!loads.is_empty()).then_some(loads)
}

/// Whether the compiler looked, by `env!` or `option_env!`, for a variable that was taken away from
/// it. Its outcome is then not what cargo asked for.
pub fn verdict(prepared: &Prepared, outcome: &Outcome) -> Verdict {
    let dep_info = || {
        let name = dep_info_name(prepared)?;
        let node = prepared
            .view
            .child(prepared.out_dir, name.as_bytes())
            .ok()?;
        read_whole(&prepared.view, &node).ok()
    };
    wrapper::verdict::verdict(
        outcome.success,
        &outcome.stderr,
        &prepared.scrubbed,
        dep_info,
    )
}

/// rustc names the dep-info after the crate (rustc book, "--emit").
fn dep_info_name(prepared: &Prepared) -> Option<String> {
    prepared
        .invocation
        .emit
        .dep_info
        .then(|| format!("{}.d", prepared.invocation.stem()))
}

/// Finds the announced outputs, and what lies beside them, and holds on to all.
pub fn hold<'a>(
    prepared: &'a Prepared,
    outcome: &Outcome,
    started: Timestamp,
) -> Result<Held<'a>, NotStored> {
    let mut held = Held {
        view: &prepared.view,
        outputs: Vec::new(),
        dep_info: usize::MAX,
    };
    if let Some(path) = &outcome.unsettled {
        return Err(NotStored::Unsettled(path.clone()));
    }
    if artifacts::is_of_old(&outcome.stderr) {
        return Err(NotStored::OldCompiler);
    }
    let mut linked = Vec::new();
    for note in artifacts::announced(&outcome.stderr) {
        let path = Path::new(note.artifact.as_ref());
        let name = path
            .file_name()
            .filter(|_| path.parent() == Some(&prepared.invocation.out_dir))
            .and_then(|name| name.to_str())
            .ok_or_else(|| NotStored::OutputElsewhere(note.artifact.clone().into_owned()))?;
        let at = held.take(prepared, name)?;
        match note.emit.as_ref() {
            "dep-info" => held.dep_info = at,
            "link" => linked.push(name.to_owned()),
            _ => {}
        }
    }
    if held.dep_info == usize::MAX {
        return Err(NotStored::DepInfo("not announced".into()));
    }
    for name in sidecars(prepared, &linked, started)? {
        held.take(prepared, &name)?;
    }
    Ok(held)
}

impl Held<'_> {
    /// Takes hold of the output of this name, once. Returns where it is in the list.
    fn take(&mut self, prepared: &Prepared, name: &str) -> Result<usize, NotStored> {
        let failed = |errno| NotStored::Output {
            name: name.to_owned(),
            errno,
        };
        let node = prepared
            .view
            .child(prepared.out_dir, name.as_bytes())
            .map_err(failed)?;
        if node.kind != Kind::File {
            return Err(failed(Errno::EINVAL));
        }
        if let Some(at) = self.outputs.iter().position(|(known, _)| known == name) {
            return Ok(at);
        }
        match prepared
            .view
            .settle(&node, Instant::now() + artifacts::PATIENCE)
        {
            Err(Errno::EBUSY) => return Err(NotStored::Unsettled(name.to_owned())),
            settled => settled.map_err(failed)?,
        }
        prepared.view.pin(&node);
        self.outputs.push((name.to_owned(), node));
        Ok(self.outputs.len() - 1)
    }
}

/// How a compiler ran.
pub struct Ran {
    /// When it was started.
    pub started: Timestamp,
    /// How long it took.
    pub elapsed: Duration,
    /// What it was told in place of the out-dir.
    pub stood_in: Option<PathBuf>,
}

/// What was stored.
pub struct Recorded {
    /// How it is found.
    pub(super) source: Source,
    /// The key it is stored under.
    pub(super) stored_under: ActionKey,
    /// What the compiler read.
    pub sources: Sources,
    /// Roots the outputs are bound to.
    pub bound: RootSet,
}

/// Ingests the outputs and stores result and input record, all in one commit.
pub fn record(
    service: &Service,
    prepared: &Prepared,
    outcome: &Outcome,
    held: &Held<'_>,
    ran: &Ran,
) -> Result<Recorded, NotStored> {
    let started = ran.started;
    if outcome.stdout.contains(&0) || outcome.stderr.contains(&0) {
        return Err(NotStored::Nul);
    }
    // What the loader says where it is given a library that has just gone (ld.so(8), "LD_PRELOAD").
    let mut lines = outcome.stderr.split(|byte| *byte == b'\n');
    if lines.any(|line| line.starts_with(b"ERROR: ld.so: object")) {
        return Err(NotStored::Changed("a library of the compiler".into()));
    }
    // First, while they are still there: their digests are from before the compiler ran.
    let again = dependencies_again(service, prepared).map_err(NotStored::Dependencies)?;
    if let Some(part) = prepared.dependencies.difference(&again) {
        return Err(NotStored::Changed(part));
    }
    if !same_tools(service, prepared) {
        return Err(NotStored::Changed("the compiler or the linker".into()));
    }
    let text = read_whole(&prepared.view, &held.outputs[held.dep_info].1)?;
    let info = depinfo::parse(&text).map_err(|error| NotStored::DepInfo(error.to_string()))?;
    let inputs = seen(service, prepared, outcome, &info, started)?;
    let record = input_record(prepared, &info, inputs.as_ref(), outcome.observed.as_ref());
    let sources = current_sources(service, prepared, &record)
        .ok_or_else(|| NotStored::Changed("a source".into()))?;
    // After the bytes were taken: a change before that would have left its time.
    check_unchanged(service, prepared, &info, started)?;
    if seen(service, prepared, outcome, &info, started)? != inputs {
        return Err(NotStored::Changed("an input".into()));
    }
    for ((name, seen), (_, now)) in info.env.iter().zip(&sources.environment) {
        let seen = seen
            .as_ref()
            .map(|value| prepared.roots.template(value.as_bytes()));
        if seen != *now {
            return Err(NotStored::Changed(format!("variable {name}")));
        }
    }

    let roots = &prepared.roots;
    let mut bound = roots_in_environment(service, prepared, &info);
    let mut template = |bytes: &[u8]| {
        let template = roots.template(bytes);
        bound.extend(roots.held_in(&template));
        template
    };
    let (stdout, stderr) = (template(&outcome.stdout), template(&outcome.stderr));
    let dep_info = template(&text);
    let stood_in = ran.stood_in.as_deref();
    let needles = stood_in.map_or_else(|| roots.needles(), |path| roots.needles_and(path));
    let taken = take_outputs(prepared, held, &needles, &dep_info)?;
    bound.extend(taken.roots);
    bound.extend(prepared.hidden_roots);
    bound.extend(inputs.map(|inputs| inputs.bound).unwrap_or_default());
    if !roots.is_plain() || prepared.mode == Mode::Exact {
        bound = RootSet::all();
    }
    let key = key::action_key(&prepared.digest, &prepared.dependencies, &sources);
    let mut batch = service.storage.index.batch();
    let result = ActionResult {
        crate_name: prepared.invocation.crate_name.clone(),
        outputs: taken.outputs,
        stdout,
        stderr,
        origin: prepared.origin.clone(),
        compile_ms: u64::try_from(ran.elapsed.as_millis()).unwrap_or(u64::MAX),
    };
    let entry = ActionEntry::Result(result);
    let stored_under = put_entry(&mut batch, &key, bound, roots, &entry)?;
    batch.put_record(&prepared.digest, &record)?;
    let source = Source { record, key };
    let secrets = prepared.secrets.as_ref();
    let stored = (stored_under, &entry);
    service.share(&mut batch, secrets, prepared.digest, &source, stored)?;
    batch.count(
        &[
            (Counter::Misses, 1),
            (Counter::BytesIngested, taken.ingested),
            (Counter::BytesStored, taken.stored),
        ],
        None,
    );
    prepared
        .view
        .commit_origin(batch, &taken.nodes, stored_under)?;
    tracing::debug!(
        crate_name = prepared.invocation.crate_name,
        ?bound,
        "stored"
    );
    for observation in source.record.observed.iter().flatten() {
        let path = String::from_utf8_lossy(&observation.path);
        tracing::trace!(look = ?observation.look, %path, "observed");
    }
    Ok(Recorded {
        source,
        stored_under,
        sources,
        bound,
    })
}

/// Stores a result where a lookup finds it: behind the roots' paths, if it is bound to any. Returns the
/// key it is stored under.
pub fn put_entry(
    batch: &mut Batch<'_>,
    key: &ActionKey,
    bound: RootSet,
    roots: &Roots,
    entry: &ActionEntry,
) -> Result<ActionKey, store::IndexError> {
    let stored_under = if bound.is_empty() {
        *key
    } else {
        // Roots that are not plain bind everything: who has such ones needs no entry to say so, and
        // it would be in the way of a result for all others.
        if roots.is_plain() {
            batch.put_action(key, &ActionEntry::PathBound(bound))?;
        }
        key::bound_key(key, bound, roots)
    };
    batch.put_action(&stored_under, entry)?;
    Ok(stored_under)
}

/// What the compiler was seen to read besides what it reports; `None` where it could not be watched.
/// Then all of its package counts, of which nothing may have changed meanwhile, not even back.
fn seen(
    service: &Service,
    prepared: &Prepared,
    outcome: &Outcome,
    info: &DepInfo,
    started: Timestamp,
) -> Result<Option<Inputs>, NotStored> {
    let Some(observed) = &outcome.observed else {
        // Which program links for a target, only the compiler knows: it is seen when it is run.
        let invocation = &prepared.invocation;
        let links_unknown =
            invocation.runs_linker() && invocation.linker.is_none() && invocation.target.is_some();
        if prepared.is_clippy || links_unknown {
            return Err(NotStored::Unwatched);
        }
        let (_, changed) = prepared.package(service).map_err(NotStored::Package)?;
        return if changed < started {
            Ok(None)
        } else {
            Err(NotStored::Changed("its package".into()))
        };
    };
    let sources: HashSet<PathBuf> = info
        .sources
        .iter()
        .map(|path| prepared.cwd.join(path))
        .collect();
    let configured = clippy_places(service, prepared)?;
    let is_known = |path: &Path| {
        sources.contains(path)
            || configured.iter().any(|place| place == path)
            || prepared.is_driver(path)
            || prepared.linker_knows(path)
    };
    let site = prepared.site(service);
    let scope = &prepared.scope;
    let inputs = observed::inputs(site, observed, scope, Program::Compiler, started, &is_known)?;
    Ok(Some(inputs))
}

/// Where clippy looks for its configuration; nothing where it does not run.
fn clippy_places(service: &Service, prepared: &Prepared) -> Result<Vec<PathBuf>, NotStored> {
    if !prepared.is_clippy {
        return Ok(Vec::new());
    }
    let (environment, cwd, roots) = (&prepared.environment, &prepared.cwd, &prepared.roots);
    clippy::configuration(&service.files, environment, cwd, roots)
        .map(|found| found.places)
        .map_err(|_| NotStored::Changed("clippy's configuration".into()))
}

fn input_record(
    prepared: &Prepared,
    info: &DepInfo,
    inputs: Option<&Inputs>,
    observed: Option<&Observed>,
) -> InputRecord {
    InputRecord {
        sources: info
            .sources
            .iter()
            .map(|path| prepared.roots.template_place(path.as_os_str().as_bytes()))
            .collect(),
        env: info.env.iter().map(|(name, _)| name.clone()).collect(),
        observed: inputs.map(|inputs| inputs.observations.clone()),
        created_ms: clock::now_ms(),
        loads: observed.and_then(|observed| loads(prepared, observed)),
    }
}

/// A file changed at or after the compiler's start may have been read before or after the
/// change: its content now says nothing. Nor does it when the path has led to another file.
fn check_unchanged(
    service: &Service,
    prepared: &Prepared,
    info: &DepInfo,
    started: Timestamp,
) -> Result<(), NotStored> {
    let in_view = |path: &Path| service.mounts.locate(path).is_some();
    let mut swapped = Swapped::since(started, &in_view);
    // A second file of a module is keyed as it is now: it must not have come since.
    for twin in info.sources.iter().filter_map(|path| module_twin(path)) {
        if let Place::Disk(twin) = prepared.locate(service, &twin)
            && let Ok(meta) = fs::metadata(&twin)
            && (changed_at(&meta) >= started || !matches!(swapped.on_the_way_to(&twin), Ok(false)))
        {
            return Err(NotStored::Changed(twin.display().to_string()));
        }
    }
    for path in &info.sources {
        let changed = match prepared.locate(service, path) {
            Place::Disk(path) => fs::metadata(&path)
                .ok()
                .map(|meta| changed_at(&meta))
                .filter(|_| swapped.on_the_way_to(&path).is_ok_and(|swapped| !swapped)),
            Place::View(view, path) => view
                .resolve(&path)
                .ok()
                .map(|node| node.state.lock().attributes.ctime),
        };
        if changed.is_none_or(|changed| changed >= started) {
            return Err(NotStored::Changed(path.display().to_string()));
        }
    }
    Ok(())
}

/// Roots whose path reached the crate through `env!`. A literal search of the outputs would miss
/// a path whose length or hash was taken at compile time. `OUT_DIR` is left to the search where
/// every use of it names a file to include.
fn roots_in_environment(service: &Service, prepared: &Prepared, info: &DepInfo) -> RootSet {
    let mut set = RootSet::default();
    for (name, _) in &info.env {
        if name == "OUT_DIR" && includes_only(service, prepared, info) {
            continue;
        }
        if let Some(value) = environment::value(&prepared.environment, name.as_bytes()) {
            set.extend(prepared.roots.held_in(value));
        }
    }
    // The mountpoint lies in the workspace, whose path it then also holds.
    if set.contains(Root::View) {
        set.insert(Root::Cwd);
    }
    set
}

/// Whether a crate that asks for `OUT_DIR` does so to include files, as far as its own text shows.
/// Where that does not name it at all, a macro of another crate asked, for who knows what.
fn includes_only(service: &Service, prepared: &Prepared, info: &DepInfo) -> bool {
    let mut uses = out_dir::Uses::default();
    for path in &info.sources {
        let text = match prepared.locate(service, path) {
            Place::Disk(path) => read_small(&path),
            Place::View(view, path) => view
                .resolve(&path)
                .ok()
                .filter(|node| {
                    view.getattr(node.ino)
                        .is_ok_and(|is| is.size <= LARGEST_TEXT)
                })
                .and_then(|node| read_whole(&view, &node).ok()),
        };
        let Some(text) = text else {
            return false;
        };
        uses.extend(out_dir::uses(&text));
    }
    uses.includes && !uses.other
}

fn read_small(path: &Path) -> Option<Vec<u8>> {
    let meta = fs::metadata(path).ok()?;
    (meta.len() <= LARGEST_TEXT).then(|| fs::read(path).ok())?
}

struct TakenOutputs {
    outputs: Vec<Output>,
    nodes: Vec<(Arc<Node>, u64)>,
    roots: RootSet,
    ingested: u64,
    stored: u64,
}

fn take_outputs(
    prepared: &Prepared,
    held: &Held<'_>,
    needles: &RootNeedles,
    dep_info: &[u8],
) -> Result<TakenOutputs, NotStored> {
    let mut taken = TakenOutputs {
        outputs: Vec::new(),
        nodes: Vec::new(),
        roots: RootSet::default(),
        ingested: 0,
        stored: 0,
    };
    for (at, (name, node)) in held.outputs.iter().enumerate() {
        let mode = u32::from(node.state.lock().attributes.perm);
        let content = if at == held.dep_info {
            OutputContent::Template(dep_info.to_vec())
        } else {
            let blob = prepared
                .view
                .ingest(node, needles)
                .map_err(|errno| NotStored::Output {
                    name: name.clone(),
                    errno,
                })?;
            taken.roots.extend(blob.roots);
            taken.ingested += blob.size;
            taken.stored += if blob.new { blob.size } else { 0 };
            taken.nodes.push((Arc::clone(node), blob.generation));
            OutputContent::Blob {
                digest: blob.digest,
                size: blob.size,
            }
        };
        taken.outputs.push(Output {
            name: name.clone(),
            mode,
            content,
        });
    }
    Ok(taken)
}

pub(super) fn read_whole(view: &View, node: &Node) -> Result<Vec<u8>, NotStored> {
    let size = view.getattr(node.ino)?.size;
    let size = usize::try_from(size).map_err(|_| Errno::EFBIG)?;
    let mut bytes = vec![0; size];
    let read = view.read(node.ino, 0, &mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}
