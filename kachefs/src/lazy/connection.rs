//! One remote in use: its runtime, its limits, and whether it answers.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use remote::signed::{SecretKey, Trust};
use remote::{Limits, ObjectName, Remote, RemoteError};
use store::{Digest, RemoteId, StoreDir};
use tokio::runtime::Runtime;
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};

use super::breaker::{Breaker, Leave};
use super::counted::{Counted, Traffic, TrafficNow};
use super::pace::Pace;
use crate::clock;
use crate::remote_config::{self, RemoteConfig};

/// Threads that wait for the network; those that unpack what comes are started as they are needed.
const WORKERS: usize = 2;

/// Calls under way at once, of what somebody waits for, and of uploads.
const AT_ONCE: usize = 16;

/// The same of what nobody waits for yet.
const EARLY_AT_ONCE: usize = 4;

/// How much a call asks for that others may be in front of, in bytes.
const QUEUED: u64 = 4 << 20;

/// This part of the grace after it was written, or learned, an object counts as one that nobody removes.
/// What names it is there within as much again, or it is looked after once more (`sending`).
const RECENT: u32 = 3;

/// How long an upload may take at least, for a call.
const SEND: Duration = Duration::from_mins(1);

/// Why nothing came of a call.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The remote has not answered lately, and is left alone for a while.
    #[error("the remote is left alone: it did not answer")]
    LeftAlone,
    /// Too much else was asked of it.
    #[error("the remote has too much else to answer")]
    Busy,
    /// It did not answer, or not so that it can be used.
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

impl Unavailable {
    /// Whether the same call may succeed later, with nobody doing anything.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::LeftAlone | Self::Busy => true,
            Self::Remote(error) => error.is_passing(),
        }
    }
}

/// Who a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// Somebody waits for it.
    Wanted,
    /// Somebody may want it later. It takes nothing from those who wait, and when it fails, they go on
    /// asking.
    Early,
}

/// A place among the calls that nobody waits for yet.
pub struct EarlyPlace<'a>(#[expect(dead_code, reason = "it is held")] SemaphorePermit<'a>);

/// A remote in use.
pub struct Connection {
    /// How it is configured.
    pub config: RemoteConfig,
    /// What tells what is known of it from what is known of others.
    pub id: RemoteId,
    /// What signs.
    pub key: Option<SecretKey>,
    /// What builds wait for.
    asking: Line,
    /// What builds may want later.
    early: Line,
    /// What nobody waits for: it may take longer, and when it fails, builds go on asking.
    sending: Line,
    /// What is found out about it aside: when that fails, nobody is kept from anything.
    looking: Line,
    traffic: Arc<Traffic>,
    pace: Option<Arc<Pace>>,
}

/// One way to a remote.
struct Line {
    opened: OnceCell<Arc<dyn Remote>>,
    breaker: Breaker,
    limits: Limits,
    /// Calls that may be under way: more of them only share the same bandwidth, and their time.
    places: Semaphore,
}

impl Line {
    fn new(call: Duration, at_once: usize) -> Self {
        Self {
            opened: OnceCell::new(),
            breaker: Breaker::new(patience(call, QUEUED)),
            places: Semaphore::new(at_once),
            limits: Limits {
                call,
                ..Limits::default()
            },
        }
    }
}

/// How long a call may take that moves so many bytes, with all its requests, where one may take so long.
fn patience(call: Duration, bytes: u64) -> Duration {
    2 * call + Duration::from_secs(bytes / Limits::SLOWEST)
}

/// The threads of all connections. They live as long as the process: what waits for a remote in them
/// is never waited for.
fn runtime() -> std::io::Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let made = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("remote")
        .enable_all()
        .build()?;
    Ok(RUNTIME.get_or_init(|| made))
}

impl Connection {
    /// Nothing is asked yet. An error where the signing key cannot be read.
    pub(super) fn new(dir: &StoreDir, config: RemoteConfig) -> Result<Self> {
        runtime().context("cannot start threads for the remote")?;
        Ok(Self {
            id: RemoteId::of(&config.location.to_string()),
            key: remote_config::signing_key(dir)?,
            asking: Line::new(config.wait, AT_ONCE),
            early: Line::new(config.wait, EARLY_AT_ONCE),
            sending: Line::new(config.wait.max(SEND), AT_ONCE),
            looking: Line::new(config.wait, AT_ONCE),
            traffic: Arc::default(),
            pace: config.upload_limit.map(|limit| Arc::new(Pace::new(limit))),
            config,
        })
    }

    /// Where it is, for people.
    pub fn place(&self) -> String {
        self.config.location.to_string()
    }

    /// Who is believed.
    pub fn trust(&self) -> &Trust {
        &self.config.trust
    }

    /// Whether what others say may be passed on as our own word: who signs, but believes everybody,
    /// would have strangers believed.
    pub fn vouches(&self) -> bool {
        self.key.is_none() || *self.trust() != Trust::Everybody
    }

    /// How long what was seen or learned of it counts.
    pub(super) fn recent(&self) -> Duration {
        self.config.grace / RECENT
    }

    /// Whether that is less than so long ago, in milliseconds since the epoch. A clock that was set back says
    /// nothing.
    pub(super) fn is_recent(&self, when_ms: u64) -> bool {
        let age = clock::now_ms().checked_sub(when_ms);
        age.is_some_and(|age| Duration::from_millis(age) < self.recent())
    }

    /// Whether it is left alone because it does not answer.
    pub fn is_left_alone(&self) -> bool {
        self.asking.breaker.is_open()
    }

    /// Whether nothing is sent for a while, because that failed.
    pub fn sends_nothing(&self) -> bool {
        self.sending.breaker.is_paused()
    }

    /// Somebody waits until everything is sent.
    pub fn hasten_sending(&self) {
        self.sending.breaker.hasten();
    }

    /// What went over the wire.
    pub fn traffic(&self) -> TrafficNow {
        self.traffic.now()
    }

    /// How long a call may take that moves so many bytes, with all its requests.
    pub fn patience(&self, bytes: u64) -> Duration {
        patience(self.asking.limits.call, bytes)
    }

    /// Asks it, and waits for the answer: never from a thread of the runtime.
    pub fn call<T>(
        &self,
        what: impl AsyncFnOnce(Arc<dyn Remote>) -> Result<T, RemoteError>,
    ) -> Result<T, Unavailable> {
        self.call_for(Haste::Wanted, what)
    }

    /// The same, for whoever it is for.
    pub fn call_for<T>(
        &self,
        haste: Haste,
        what: impl AsyncFnOnce(Arc<dyn Remote>) -> Result<T, RemoteError>,
    ) -> Result<T, Unavailable> {
        match haste {
            Haste::Wanted => {
                let line = &self.asking;
                self.call_on(line, line.breaker.leave_with_others(), what)
            }
            Haste::Early => self.call_on(&self.early, self.early.breaker.leave(), what),
        }
    }

    /// The same for what may take longer.
    pub fn send<T>(
        &self,
        what: impl AsyncFnOnce(Arc<dyn Remote>) -> Result<T, RemoteError>,
    ) -> Result<T, Unavailable> {
        self.call_on(&self.sending, self.sending.breaker.leave(), what)
    }

    /// The same to find something out about it.
    pub fn look<T>(
        &self,
        what: impl AsyncFnOnce(Arc<dyn Remote>) -> Result<T, RemoteError>,
    ) -> Result<T, Unavailable> {
        self.call_on(&self.looking, self.looking.breaker.leave(), what)
    }

    /// Whether it does not answer even who asks for nothing. What it refuses, it answers; and whoever needs
    /// something may ask again then.
    pub fn is_away(&self) -> bool {
        let nothing = ObjectName::lease(&Digest::of(b"nothing"));
        let line = &self.looking;
        let leave = line.breaker.leave_with_others();
        let asked = self.call_on(line, leave, async |remote| remote.head(&nothing).await);
        let is_away = match asked {
            Ok(_) => false,
            Err(Unavailable::Remote(error)) => error.is_passing(),
            Err(Unavailable::LeftAlone | Unavailable::Busy) => true,
        };
        if !is_away {
            self.asking.breaker.try_now();
        }
        is_away
    }

    /// Waits for a place among the calls that nobody waits for yet.
    pub fn early_place(&self) -> Result<EarlyPlace<'_>, Unavailable> {
        if self.early.breaker.is_paused() {
            return Err(Unavailable::LeftAlone);
        }
        let place = self.place_in(&self.early);
        runtime()
            .map_err(no_threads)?
            .block_on(place)
            .map(EarlyPlace)
    }

    /// Asks it from such a place.
    pub fn call_early<T>(
        &self,
        _place: &EarlyPlace<'_>,
        what: impl AsyncFnOnce(Arc<dyn Remote>) -> Result<T, RemoteError>,
    ) -> Result<T, Unavailable> {
        let line = &self.early;
        let leave = line.breaker.leave().ok_or(Unavailable::LeftAlone)?;
        let asked = self.ask(line, leave, what);
        Ok(runtime().map_err(no_threads)?.block_on(asked)?)
    }

    fn call_on<T>(
        &self,
        line: &Line,
        leave: Option<Leave>,
        what: impl AsyncFnOnce(Arc<dyn Remote>) -> Result<T, RemoteError>,
    ) -> Result<T, Unavailable> {
        let mut leave = leave.ok_or(Unavailable::LeftAlone)?;
        runtime().map_err(no_threads)?.block_on(async {
            // Kept until what came of the call is noted: the next one has to know.
            let _place = match self.place_in(line).await {
                Ok(place) => place,
                Err(error) => {
                    if leave.is_try {
                        // Nobody has to wait for one that is not made.
                        line.breaker.failed(leave, false);
                    }
                    return Err(error);
                }
            };
            if !leave.is_try {
                // Those in front may have waited in vain.
                leave = line.breaker.leave().ok_or(Unavailable::LeftAlone)?;
            }
            Ok(self.ask(line, leave, what).await?)
        })
    }

    async fn place_in<'a>(&self, line: &'a Line) -> Result<SemaphorePermit<'a>, Unavailable> {
        let place = tokio::time::timeout(self.patience(QUEUED), line.places.acquire()).await;
        // They are never closed.
        place.ok().and_then(Result::ok).ok_or(Unavailable::Busy)
    }

    /// Asks, and notes what came of it.
    async fn ask<T>(
        &self,
        line: &Line,
        leave: Leave,
        what: impl AsyncFnOnce(Arc<dyn Remote>) -> Result<T, RemoteError>,
    ) -> Result<T, RemoteError> {
        let result = async { what(self.open(line).await?).await }.await;
        self.note(line, leave, result.as_ref().err());
        result
    }

    /// Notes what came of a call.
    fn note(&self, line: &Line, leave: Leave, error: Option<&RemoteError>) {
        match error {
            Some(error) if !is_of_this_machine(error) => {
                let waited = matches!(error, RemoteError::TimedOut { .. });
                if line.breaker.failed(leave, waited) {
                    tracing::warn!(%error, "the remote is left alone for a while");
                }
            }
            _ => {
                if line.breaker.answered() {
                    for other in [&self.asking, &self.early, &self.sending, &self.looking] {
                        other.breaker.try_now();
                    }
                    tracing::info!(remote = self.place(), "the remote answers again");
                }
            }
        }
    }

    /// Opening looks for credentials, which may ask others for them.
    async fn open(&self, line: &Line) -> Result<Arc<dyn Remote>, RemoteError> {
        let open = async || {
            let opening = remote::open(&self.config.location, line.limits);
            let opened = tokio::time::timeout(line.limits.call, opening).await;
            let remote = opened.map_err(|_| RemoteError::TimedOut {
                place: self.place(),
                limit: line.limits.call,
            })??;
            Ok::<Arc<dyn Remote>, RemoteError>(Arc::new(Counted {
                remote,
                traffic: Arc::clone(&self.traffic),
                pace: self.pace.clone(),
            }))
        };
        line.opened.get_or_try_init(open).await.map(Arc::clone)
    }
}

fn no_threads(source: std::io::Error) -> RemoteError {
    RemoteError::Io {
        path: "threads".to_owned(),
        source,
    }
}

/// Whether the remote has no part in an error: it answers, or nobody knows.
fn is_of_this_machine(error: &RemoteError) -> bool {
    matches!(error, RemoteError::Io { .. } | RemoteError::TooLarge { .. })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    use remote::blob;
    use store::Place;

    use super::super::{kept_now, testing};
    use super::*;

    /// How long a call hangs.
    const HANGS: Duration = Duration::from_secs(1);

    fn all_places(line: &Line) -> Vec<impl Sized> {
        std::iter::from_fn(|| line.places.try_acquire().ok()).collect()
    }

    #[test]
    fn who_waits_behind_those_who_hang_hangs_no_more() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (_storage, connection) = testing::store(dir.path());
        let started = AtomicUsize::new(0);
        let hang = async |_| {
            started.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(HANGS).await;
            Err::<(), _>(RemoteError::TimedOut {
                place: "here".to_owned(),
                limit: HANGS,
            })
        };
        let began = Instant::now();
        let left_alone = std::thread::scope(|scope| {
            let callers: Vec<_> = (0..2 * AT_ONCE)
                .map(|_| scope.spawn(|| connection.call(hang)))
                .collect();
            let results = callers
                .into_iter()
                .map(|caller| caller.join().expect("joins"));
            results
                .filter(|result| matches!(result, Err(Unavailable::LeftAlone)))
                .count()
        });
        assert_eq!(started.into_inner(), AT_ONCE);
        assert_eq!(left_alone, AT_ONCE);
        assert!(began.elapsed() < 2 * HANGS, "{:?}", began.elapsed());
    }

    #[test]
    fn who_tries_behind_a_pause_does_so_once_there_is_a_place() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (_storage, connection) = testing::store(dir.path());
        let line = &connection.asking;
        line.breaker.waits_in_vain();
        line.breaker.hasten();
        std::thread::sleep(Duration::from_millis(1100));
        let places = all_places(line);
        std::thread::scope(|scope| {
            let tries = scope.spawn(|| connection.call(async |_| Ok(())));
            while !line.breaker.is_paused() {
                std::thread::yield_now();
            }
            let other = connection.call(async |_| Ok(()));
            assert!(matches!(other, Err(Unavailable::LeftAlone)), "{other:?}");
            drop(places);
            tries.join().expect("joins").expect("is answered");
        });
        assert!(!connection.is_left_alone());
    }

    #[test]
    fn who_asks_while_it_is_found_to_answer_is_answered() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (_storage, connection) = testing::store(dir.path());
        let line = &connection.asking;
        line.breaker.waits_in_vain();
        line.breaker.try_now();
        let answers = async |_| {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok(())
        };
        std::thread::scope(|scope| {
            let callers = [0; 4].map(|_| scope.spawn(|| connection.call(answers)));
            for caller in callers {
                let answered = caller.join().expect("joins");
                answered.expect("is answered");
            }
        });
    }

    #[test]
    fn what_answers_again_is_asked_by_everybody() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (_storage, connection) = testing::store(dir.path());
        connection.asking.breaker.waits_in_vain();
        connection.sending.breaker.waits_in_vain();
        let asked = connection.call(async |_| Ok(()));
        assert!(matches!(asked, Err(Unavailable::LeftAlone)), "{asked:?}");
        connection.sending.breaker.try_now();
        connection.send(async |_| Ok(())).expect("is answered");
        connection.call(async |_| Ok(())).expect("is tried");
        assert!(!connection.is_left_alone());
    }

    #[test]
    fn who_reads_waits_for_nobody_who_has_no_place_yet() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (storage, connection) = testing::store(dir.path());
        let bytes = b"bytes";
        let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
        let object = dir
            .path()
            .join("bucket")
            .join(ObjectName::blob(&digest).as_str());
        std::fs::create_dir_all(object.parent().expect("a parent")).expect("makes");
        let file = std::fs::File::create(&object).expect("creates");
        blob::pack(&bytes[..], size, file).expect("packs");
        let kept = kept_now(size, Place::Own);
        let mut batch = storage.index.batch();
        let put = batch.put_kept(connection.id, &digest, &kept);
        put.expect("puts");
        batch.commit().expect("commits");
        let places = all_places(&connection.early);
        std::thread::scope(|scope| {
            let ahead = scope.spawn(|| storage.bring(&digest, size, Haste::Early));
            std::thread::sleep(Duration::from_millis(300));
            let began = Instant::now();
            storage.fault(&digest, size).expect("comes");
            assert!(began.elapsed() < HANGS, "{:?}", began.elapsed());
            drop(places);
            let brought = ahead.join().expect("joins");
            assert!(matches!(brought, Ok(false)), "{brought:?}");
        });
    }
}
