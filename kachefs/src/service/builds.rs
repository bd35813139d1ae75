//! The log of builds: what each cargo process asked for, and how it ended.
//!
//! An action is noted after its answer was sent, in memory; once a second, and before anybody asks,
//! what was noted goes to the index in one batch. So a hit waits for none of it. The last builds of
//! each view are kept, and the requests that hit in the very last, or whose results the view still shows,
//! so that they can be made again.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io, thread};

use parking_lot::Mutex;
use store::builds::{BuildId, BuildRecord, KeptRequest, LoggedAction, LoggedEnd, Unit};
use store::{ActionKey, Batch, IndexError, ViewId};
use wrapper::environment::{self, Environment};
use wrapper::launcher;
use wrapper::protocol::{CompileRequest, ScriptRequest};

use super::hit_cost::{Stopwatch, micros};
use crate::clock;
use crate::storage::Storage;

/// How long what was noted may stay in memory alone.
const INTERVAL: Duration = Duration::from_secs(1);

/// Builds remembered for each view.
const BUILDS_PER_VIEW: usize = 4;

/// Actions remembered for each build; a build that asks for more is not told in full.
const ACTIONS_PER_BUILD: u32 = 20_000;

/// Larger requests are not kept.
const LARGEST_REQUEST: usize = 1 << 20;

/// A request as the log knows it.
#[derive(Clone, Debug)]
pub struct Asked {
    view: ViewId,
    /// The process that started the wrapper: cargo.
    parent: u32,
    unit: Unit,
    /// The package's version.
    pub version: String,
    at_ms: u64,
    /// Measures the answer.
    pub watch: Stopwatch,
    answered: Option<Duration>,
}

impl Asked {
    /// A compile was asked for just now.
    pub fn compile(request: &CompileRequest) -> Self {
        let crate_name = argument(&request.argv, b"--crate-name").unwrap_or_default();
        let kind = kind_of(&request.argv, &crate_name);
        let (view, environment) = (request.token.0, &request.environment);
        Self::new(view, request.parent, environment, crate_name, kind)
    }

    /// A run of a build script was asked for just now.
    pub fn script(request: &ScriptRequest) -> Self {
        let (view, environment) = (request.token.0, &request.environment);
        let name = "build_script_build".to_owned();
        let kind = SCRIPT_RUN.to_owned();
        Self::new(view, request.parent, environment, name, kind)
    }

    fn new(
        view: u32,
        parent: u32,
        environment: &Environment,
        crate_name: String,
        kind: String,
    ) -> Self {
        let variable = |name| {
            let value = environment::value(environment, name).unwrap_or_default();
            String::from_utf8_lossy(value).into_owned()
        };
        Self {
            view: ViewId(view),
            parent,
            unit: Unit {
                package: variable(b"CARGO_PKG_NAME"),
                crate_name,
                kind,
            },
            version: variable(b"CARGO_PKG_VERSION"),
            at_ms: clock::now_ms(),
            watch: Stopwatch::start(),
            answered: None,
        }
    }

    /// The answer is about to be sent.
    pub fn answered(&mut self) {
        self.answered = Some(self.watch.cost());
    }

    /// What is kept of a request that hit.
    pub fn kept(&self, request: CompileRequest, key: store::ActionKey) -> Option<KeptRequest> {
        let size = |texts: &[Vec<u8>]| texts.iter().map(Vec::len).sum::<usize>();
        let environment = &request.environment;
        let environment: usize = environment.iter().map(|(n, v)| n.len() + v.len()).sum();
        (size(&request.argv) + environment <= LARGEST_REQUEST).then(|| KeptRequest {
            unit: self.unit.clone(),
            version: self.version.clone(),
            key,
            out_dir: request.token,
            argv: request.argv,
            environment: request.environment,
            cwd: request.cwd,
            umask: request.umask,
        })
    }
}

/// The kind of a unit that is a run of a build script.
pub const SCRIPT_RUN: &str = "build script run";

/// The kind of a unit that is a build script being compiled.
pub const SCRIPT: &str = "build script";

/// The value of an argument that is written `--name value` or `--name=value`.
fn argument(argv: &[Vec<u8>], name: &[u8]) -> Option<String> {
    let mut values = arguments(argv, name);
    values.pop()
}

fn arguments(argv: &[Vec<u8>], name: &[u8]) -> Vec<String> {
    let value = |(at, arg): (usize, &Vec<u8>)| match arg.strip_prefix(name)? {
        [] => argv.get(at + 1).cloned(),
        [b'=', value @ ..] => Some(value.to_vec()),
        _ => None,
    };
    let values = argv.iter().enumerate().filter_map(value);
    values
        .map(|value| String::from_utf8_lossy(&value).into_owned())
        .collect()
}

fn kind_of(argv: &[Vec<u8>], crate_name: &str) -> String {
    if launcher::is_script(crate_name) {
        return SCRIPT.to_owned();
    }
    if argv.iter().any(|arg| arg == b"--test") {
        return "test".to_owned();
    }
    arguments(argv, b"--crate-type").join(",")
}

/// The actions whose outputs a view shows; none of one that is not mounted.
pub type Shown = Box<dyn Fn(ViewId) -> HashSet<ActionKey> + Send + Sync>;

/// The log.
pub struct Builds {
    storage: Arc<Storage>,
    shown: Shown,
    /// Whether nobody else can read the index, and so what is kept in full.
    private: bool,
    noted: Mutex<Noted>,
    /// Held while what was noted is written, so that who asks afterwards finds it.
    writing: Mutex<()>,
}

#[derive(Default)]
struct Noted {
    open: HashMap<ViewId, Vec<Open>>,
    rows: Vec<Row>,
}

/// A build that may still ask.
#[derive(Clone, Copy)]
struct Open {
    build: BuildId,
    pid: u32,
    started: Option<u64>,
    next: u32,
}

impl Open {
    fn new(build: BuildId, record: &BuildRecord, next: u32) -> Self {
        Self {
            build,
            pid: record.pid,
            started: record.started,
            next,
        }
    }
}

struct Row {
    view: ViewId,
    build: BuildId,
    number: u32,
    /// The build's own record, with its first action.
    begins: Option<BuildRecord>,
    action: LoggedAction,
    request: Option<KeptRequest>,
}

impl Builds {
    /// The log of a store's builds.
    pub fn new(storage: Arc<Storage>, shown: Shown) -> Self {
        let closed = close_to_others(&storage);
        if let Err(error) = &closed {
            tracing::warn!(%error, "requests are not kept: others may read the index");
        }
        Self {
            storage,
            shown,
            private: closed.is_ok(),
            noted: Mutex::default(),
            writing: Mutex::default(),
        }
    }

    /// Notes how an action ended. Its answer has been sent.
    pub fn note(&self, asked: &Asked, end: LoggedEnd, request: Option<KeptRequest>) {
        let answered = asked.answered.unwrap_or_else(|| asked.watch.cost());
        let action = LoggedAction {
            unit: asked.unit.clone(),
            version: asked.version.clone(),
            asked_ms: asked.at_ms,
            answer_us: micros(answered),
            end,
        };
        let started = started(asked.parent);
        let mut noted = self.noted.lock();
        let (open, begins) = match self.open(&mut noted, asked, started) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "an action is not noted");
                return;
            }
        };
        let (build, number) = (open.build, open.next);
        if number == ACTIONS_PER_BUILD {
            return;
        }
        open.next += 1;
        noted.rows.push(Row {
            view: asked.view,
            build,
            number,
            begins,
            action,
            request: request.filter(|_| self.private),
        });
    }

    /// The build an action belongs to; with a record of its own if it is new.
    fn open<'a>(
        &self,
        noted: &'a mut Noted,
        asked: &Asked,
        started: Option<u64>,
    ) -> Result<(&'a mut Open, Option<BuildRecord>), IndexError> {
        let known = noted.open.entry(asked.view).or_default();
        // A process that is gone already cannot have been followed by another of its number.
        let is_it = |pid: u32, then: Option<u64>| {
            pid == asked.parent && (then == started || started.is_none())
        };
        if let Some(at) = known.iter().rposition(|open| is_it(open.pid, open.started)) {
            return Ok((&mut known[at], None));
        }
        let stored = self.storage.index.builds(asked.view)?;
        let last = stored.last();
        let (open, begins) = match last {
            // An earlier daemon knew it.
            Some((build, record)) if known.is_empty() && is_it(record.pid, record.started) => {
                let actions = self.storage.index.build_actions(asked.view, *build)?;
                let next = u32::try_from(actions.len()).unwrap_or(ACTIONS_PER_BUILD);
                (Open::new(*build, record, next), None)
            }
            _ => {
                let stored = last.map(|(build, _)| build.0);
                let greatest = known.iter().map(|open| open.build.0).chain(stored).max();
                let record = BuildRecord {
                    pid: asked.parent,
                    started,
                    asked_ms: asked.at_ms,
                };
                let build = BuildId(greatest.unwrap_or(0) + 1);
                (Open::new(build, &record, 0), Some(record))
            }
        };
        if known.len() == BUILDS_PER_VIEW {
            known.remove(0);
        }
        known.push(open);
        let at = known.len() - 1;
        Ok((&mut known[at], begins))
    }

    /// Stores what was noted.
    pub fn write(&self) {
        let _writing = self.writing.lock();
        let rows = std::mem::take(&mut self.noted.lock().rows);
        if rows.is_empty() {
            return;
        }
        let mut batch = self.storage.index.batch();
        let stored = rows
            .iter()
            .try_for_each(|row| self.put(&mut batch, row))
            .and_then(|()| batch.commit());
        if let Err(error) = stored {
            tracing::warn!(%error, actions = rows.len(), "not noted in the log of builds");
        }
    }

    fn put(&self, batch: &mut Batch<'_>, row: &Row) -> Result<(), IndexError> {
        let Row {
            view,
            build,
            number,
            ..
        } = *row;
        if let Some(record) = &row.begins {
            let oldest = build.0.saturating_sub(BUILDS_PER_VIEW as u64 - 1);
            batch.forget_builds_before(view, BuildId(oldest));
            batch.forget_requests_but(view, &(self.shown)(view))?;
            batch.put_build(view, build, record)?;
        }
        batch.put_build_action(view, build, number, &row.action)?;
        if let Some(request) = &row.request {
            batch.put_build_request(view, build, number, request)?;
        }
        match &row.action.end {
            LoggedEnd::Miss {
                parts,
                not_stored: None,
                ..
            } => batch.put_parts(&row.action.unit, parts),
            _ => Ok(()),
        }
    }

    /// Stores what is noted now and then, for as long as anybody has the log.
    pub fn write_now_and_then(self: &Arc<Self>) -> io::Result<()> {
        let builds = Arc::downgrade(self);
        let write = move || {
            while let Some(builds) = builds.upgrade() {
                builds.write();
                drop(builds);
                thread::sleep(INTERVAL);
            }
        };
        let thread = thread::Builder::new().name("builds".into()).spawn(write);
        thread.map(drop)
    }
}

/// Requests hold environments, and those hold secrets.
fn close_to_others(storage: &Storage) -> io::Result<()> {
    fs::set_permissions(storage.dir.index(), fs::Permissions::from_mode(0o700))
}

/// When a process started (proc(5), "stat": the 22nd field; the second may hold blanks, in brackets).
pub(crate) fn started(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::StoreDir;

    fn asked(view: u32, parent: u32) -> Asked {
        let environment = [(b"CARGO_PKG_NAME".to_vec(), b"p".to_vec())];
        Asked::new(view, parent, &environment, "c".into(), "lib".into())
    }

    fn builds() -> (tempfile::TempDir, Arc<Storage>, Builds) {
        let dir = tempfile::tempdir().expect("tempdir");
        let storage = Storage::open(StoreDir::new(dir.path().join("store"))).expect("opens");
        let storage = Arc::new(storage);
        let builds = Builds::new(Arc::clone(&storage), Box::new(|_| HashSet::new()));
        (dir, storage, builds)
    }

    const END: LoggedEnd = LoggedEnd::Failed { ran_ms: 1 };

    #[test]
    fn a_build_is_what_one_process_asks_for() {
        let (_dir, storage, builds) = builds();
        let own = std::process::id();
        // Process 1 is another one, and always there.
        for parent in [own, own, 1, own] {
            builds.note(&asked(1, parent), END, None);
        }
        builds.note(&asked(2, own), END, None);
        builds.write();
        let index = &storage.index;
        let numbers: Vec<_> = index.builds(ViewId(1)).expect("reads");
        assert_eq!(numbers.len(), 2);
        let of = |view, build| {
            let actions = index.build_actions(ViewId(view), BuildId(build));
            actions.expect("reads").len()
        };
        assert_eq!((of(1, 1), of(1, 2), of(2, 1)), (3, 1, 1));
    }

    #[test]
    fn another_daemon_goes_on_with_a_build() {
        let (_dir, storage, builds) = builds();
        let own = std::process::id();
        builds.note(&asked(1, own), END, None);
        builds.write();
        let next = Builds::new(Arc::clone(&storage), Box::new(|_| HashSet::new()));
        next.note(&asked(1, own), END, None);
        next.write();
        let index = &storage.index;
        assert_eq!(index.builds(ViewId(1)).expect("reads").len(), 1);
        let actions = index.build_actions(ViewId(1), BuildId(1)).expect("reads");
        assert_eq!(actions.len(), 2);
    }

    #[test]
    fn old_builds_go() {
        let (_dir, storage, builds) = builds();
        // None of them runs: each is a build because its number is another.
        for parent in 0..10 {
            builds.note(&asked(1, u32::MAX - parent), END, None);
            builds.write();
        }
        let left = storage.index.builds(ViewId(1)).expect("reads");
        let left: Vec<_> = left.iter().map(|(build, _)| build.0).collect();
        assert_eq!(left, [7, 8, 9, 10]);
    }

    #[test]
    fn units_are_named_by_their_arguments() {
        let argv = |words: &str| -> Vec<Vec<u8>> {
            words
                .split(' ')
                .map(|word| word.as_bytes().to_vec())
                .collect()
        };
        let kind = |words: &str| {
            let argv = argv(words);
            let name = argument(&argv, b"--crate-name").unwrap_or_default();
            (kind_of(&argv, &name), name)
        };
        let of = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
        assert_eq!(
            kind("rustc --crate-name a --crate-type lib --crate-type=cdylib a.rs"),
            of("lib,cdylib", "a")
        );
        assert_eq!(kind("rustc --crate-name=a --test a.rs"), of("test", "a"));
        assert_eq!(
            kind("rustc --crate-name build_script_build --crate-type bin build.rs"),
            of(SCRIPT, "build_script_build")
        );
        assert_eq!(kind("rustc a.rs"), of("", ""));
    }
}
