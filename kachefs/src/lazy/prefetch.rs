//! Prefetch: blobs are fetched before a build asks for them, as others like it did.
//!
//! What a build has fetched and read goes into the manifest of its fingerprint, in that order: its *trace*.
//! A build that hits everything reads nothing, so nothing is fetched for it; with its first miss, it is
//! what the trace names of all that its view shows, and of what is bound later. Whoever asks for everything has
//! it fetched as it is bound. What is fetched for one build is limited, and what of it is read is counted.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;
use store::{Counter, Digest};

use super::connection::{Haste, Unavailable};
use super::faults::FaultError;
use super::manifests::{Process, is_running};
use crate::remote_config::Prefetch as Mode;
use crate::storage::Storage;

/// Blobs fetched at the same time.
const AT_ONCE: usize = 4;

/// Blobs of a trace: those read first.
pub(super) const LONGEST: usize = 4096;

/// Traces that are remembered.
const TRACES: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");

/// Blobs that are remembered as fetched for somebody who has not read them yet.
const UNREAD: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not zero");

/// Where a trace has a blob.
type Trace = HashMap<Digest, usize>;

/// What is known of builds under way, and what is to be fetched for them.
pub struct Prefetch {
    builds: Mutex<HashMap<Process, Open>>,
    /// What builds have read that are over.
    ended: Mutex<LruCache<Digest, Vec<Digest>>>,
    traces: Mutex<LruCache<Digest, Arc<Trace>>>,
    queue: Mutex<Queue>,
    unread: Mutex<LruCache<Digest, Early>>,
    has_unread: AtomicBool,
}

/// A blob fetched for somebody who has not read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Early {
    /// It is on its way, or will be. Whether somebody waits for it already.
    Coming { is_read: bool },
    /// It is here, and so long.
    Here(u64),
}

impl Default for Prefetch {
    fn default() -> Self {
        Self {
            builds: Mutex::default(),
            ended: Mutex::new(LruCache::new(TRACES)),
            traces: Mutex::new(LruCache::new(TRACES)),
            queue: Mutex::default(),
            unread: Mutex::new(LruCache::new(UNREAD)),
            has_unread: AtomicBool::new(false),
        }
    }
}

/// A build under way.
struct Open {
    fingerprint: Digest,
    reads: Vec<Digest>,
    has_missed: bool,
    spent: Arc<AtomicU64>,
}

/// A blob to be fetched.
#[derive(Clone)]
struct Job {
    digest: Digest,
    size: u64,
    process: Process,
    /// Bytes fetched for the same build.
    spent: Arc<AtomicU64>,
}

#[derive(Default)]
struct Queue {
    /// In the order of the trace, then as they came.
    waiting: BinaryHeap<Reverse<(usize, u64)>>,
    jobs: HashMap<u64, Job>,
    count: u64,
    workers: usize,
}

impl Queue {
    fn push(&mut self, at: usize, job: Job) {
        self.count += 1;
        self.waiting.push(Reverse((at, self.count)));
        self.jobs.insert(self.count, job);
    }

    fn pop(&mut self) -> Option<Job> {
        let Reverse((_, number)) = self.waiting.pop()?;
        self.jobs.remove(&number)
    }

    fn clear(&mut self) {
        self.waiting.clear();
        self.jobs.clear();
    }
}

impl Prefetch {
    /// Notes what builds of a fingerprint have read.
    pub(super) fn learned(&self, fingerprint: Digest, reads: &[Digest]) {
        // Others say what they are, and how many.
        let reads = reads.iter().take(LONGEST).enumerate();
        let trace = reads.map(|(at, digest)| (*digest, at));
        self.traces
            .lock()
            .put(fingerprint, Arc::new(trace.collect()));
    }

    fn trace(&self, fingerprint: &Digest) -> Arc<Trace> {
        let known = self.traces.lock().get(fingerprint).map(Arc::clone);
        known.unwrap_or_default()
    }

    /// What builds of a fingerprint that are over have read, where its trace does not have all of it yet.
    pub(super) fn new_reads(&self, fingerprint: &Digest) -> Vec<Digest> {
        self.end_builds();
        let trace = self.trace(fingerprint);
        let ended = self.ended.lock();
        let reads = ended.peek(fingerprint).cloned().unwrap_or_default();
        if reads.iter().all(|digest| trace.contains_key(digest)) {
            return Vec::new();
        }
        reads
    }

    /// Forgets what the trace of a fingerprint has by now.
    pub(super) fn told(&self, fingerprint: &Digest) {
        let trace = self.trace(fingerprint);
        let mut ended = self.ended.lock();
        if let Some(reads) = ended.get_mut(fingerprint) {
            reads.retain(|digest| !trace.contains_key(digest));
            if reads.is_empty() {
                ended.pop(fingerprint);
            }
        }
    }

    fn end_builds(&self) {
        let mut builds = self.builds.lock();
        let over = builds.extract_if(|process, _| !is_running(*process));
        let over: Vec<_> = over.map(|(_, open)| open).collect();
        drop(builds);
        let mut ended = self.ended.lock();
        for open in over.into_iter().filter(|open| !open.reads.is_empty()) {
            let known = ended.pop(&open.fingerprint).unwrap_or_default();
            ended.put(open.fingerprint, once_each(open.reads, known, |_| true));
        }
    }

    /// Does something with what is known of a build.
    fn open<T>(
        &self,
        process: Process,
        fingerprint: Digest,
        work: impl FnOnce(&mut Open) -> T,
    ) -> T {
        if !self.builds.lock().contains_key(&process) {
            self.end_builds();
        }
        let mut builds = self.builds.lock();
        let open = builds.entry(process).or_insert_with(|| Open {
            fingerprint,
            reads: Vec::new(),
            has_missed: false,
            spent: Arc::default(),
        });
        work(open)
    }

    /// Somebody reads a blob that came from elsewhere. Its length where it was fetched for whoever that is.
    fn read(&self, digest: &Digest, was_elsewhere: bool) -> Option<u64> {
        let foreseen = self.take_unread(digest);
        if was_elsewhere || foreseen.is_some() {
            for open in self.builds.lock().values_mut() {
                if open.reads.len() < LONGEST && !open.reads.contains(digest) {
                    open.reads.push(*digest);
                }
            }
        }
        foreseen
    }

    fn take_unread(&self, digest: &Digest) -> Option<u64> {
        if !self.has_unread.load(Ordering::Acquire) {
            return None;
        }
        let mut unread = self.unread.lock();
        let size = match unread.get_mut(digest)? {
            Early::Coming { is_read } => {
                *is_read = true;
                return None;
            }
            Early::Here(size) => *size,
        };
        unread.pop(digest);
        self.has_unread.store(!unread.is_empty(), Ordering::Release);
        Some(size)
    }

    fn is_coming(&self, digest: Digest) {
        let mut unread = self.unread.lock();
        unread.put(digest, Early::Coming { is_read: false });
        self.has_unread.store(true, Ordering::Release);
    }

    /// It has come, and is so long; `None` where it has not, or somebody else has fetched it. Whether
    /// somebody has read it meanwhile.
    fn has_come(&self, digest: &Digest, size: Option<u64>) -> bool {
        let mut unread = self.unread.lock();
        let is_read = match unread.pop(digest) {
            Some(Early::Coming { is_read }) => is_read,
            _ => false,
        };
        if let Some(size) = size.filter(|_| !is_read) {
            unread.put(*digest, Early::Here(size));
        }
        self.has_unread.store(!unread.is_empty(), Ordering::Release);
        is_read
    }
}

impl Storage {
    /// A build has bound blobs: fetches what it will read, as far as that is known and wanted.
    pub fn foresee<I: IntoIterator<Item = (Digest, u64)>>(
        self: &Arc<Self>,
        process: Process,
        fingerprint: Digest,
        blobs: impl FnOnce() -> I,
    ) {
        let Some(connection) = self.lazy.connection() else {
            return;
        };
        let prefetch = &self.lazy.prefetch;
        let has_missed = prefetch.open(process, fingerprint, |open| open.has_missed);
        let trace = prefetch.trace(&fingerprint);
        match connection.config.prefetch {
            Mode::All => self.fetch_early(process, &trace, blobs()),
            Mode::Trace if has_missed && !trace.is_empty() => {
                let blobs = blobs().into_iter();
                let blobs = blobs.filter(|(digest, _)| trace.contains_key(digest));
                self.fetch_early(process, &trace, blobs);
            }
            Mode::Trace | Mode::Off => {}
        }
    }

    /// A build has to make something itself, and will read some of what is `shown`.
    pub fn has_missed<I: IntoIterator<Item = (Digest, u64)>>(
        self: &Arc<Self>,
        process: Process,
        fingerprint: Digest,
        shown: impl FnOnce() -> I,
    ) {
        let prefetch = &self.lazy.prefetch;
        let missed_before = prefetch.open(process, fingerprint, |open| {
            std::mem::replace(&mut open.has_missed, true)
        });
        let trace = prefetch.trace(&fingerprint);
        let connection = self.lazy.connection();
        let mode = connection.map_or(Mode::Off, |connection| connection.config.prefetch);
        if missed_before || mode == Mode::Off || trace.is_empty() {
            return;
        }
        let shown = shown().into_iter();
        let blobs = shown.filter(|(digest, _)| trace.contains_key(digest));
        self.fetch_early(process, &trace, blobs);
    }

    /// Somebody reads a blob; `was_elsewhere` until now.
    pub fn note_read(&self, digest: &Digest, was_elsewhere: bool) {
        if let Some(size) = self.lazy.prefetch.read(digest, was_elsewhere) {
            let counted = [
                (Counter::PrefetchedRead, 1),
                (Counter::BytesPrefetchedRead, size),
            ];
            self.count_prefetch(&counted);
        }
    }

    fn count_prefetch(&self, counted: &[(Counter, u64)]) {
        let mut batch = self.index.batch();
        batch.count(counted, None);
        if let Err(error) = batch.commit() {
            tracing::warn!(%error, "prefetched blobs are not counted");
        }
    }

    fn fetch_early(
        self: &Arc<Self>,
        process: Process,
        trace: &Trace,
        blobs: impl IntoIterator<Item = (Digest, u64)>,
    ) {
        let prefetch = &self.lazy.prefetch;
        let blobs = blobs.into_iter();
        let blobs: Vec<_> = blobs
            .filter(|(digest, size)| !self.cas.has(digest, *size))
            .collect();
        let builds = prefetch.builds.lock();
        let Some(spent) = builds.get(&process).map(|open| Arc::clone(&open.spent)) else {
            return;
        };
        drop(builds);
        let queue = &prefetch.queue;
        let new = {
            let mut queue = queue.lock();
            let before = queue.workers;
            for (digest, size) in blobs {
                let at = trace.get(&digest).copied().unwrap_or(usize::MAX);
                let job = Job {
                    digest,
                    size,
                    process,
                    spent: Arc::clone(&spent),
                };
                queue.push(at, job);
            }
            queue.workers = queue.jobs.len().min(AT_ONCE).max(before);
            queue.workers - before
        };
        for _ in 0..new {
            let storage = Arc::clone(self);
            let work = move || storage.work_early();
            let started = std::thread::Builder::new()
                .name("prefetch".into())
                .spawn(work);
            if let Err(error) = started {
                tracing::warn!(%error, "cannot start a thread");
                queue.lock().workers -= 1;
            }
        }
    }

    fn work_early(&self) {
        let queue = &self.lazy.prefetch.queue;
        loop {
            let job = {
                let mut queue = queue.lock();
                let Some(job) = queue.pop() else {
                    queue.workers -= 1;
                    return;
                };
                job
            };
            if !self.fetch_job(&job) {
                queue.lock().clear();
            }
        }
    }

    /// Fetches a blob that somebody may want; whether it makes sense to go on with others.
    fn fetch_job(&self, job: &Job) -> bool {
        let Some(connection) = self.lazy.connection() else {
            return false;
        };
        let config = &connection.config;
        if connection.is_left_alone() || config.prefetch == Mode::Off {
            return false;
        }
        let is_over = config.prefetch == Mode::Trace && !is_running(job.process);
        if is_over || self.cas.has(&job.digest, job.size) {
            return true;
        }
        // Others say how long it is.
        let spend = |spent: u64| {
            let spent = spent.checked_add(job.size)?;
            (spent <= config.prefetch_budget).then_some(spent)
        };
        let order = Ordering::Relaxed;
        if job.spent.fetch_update(order, order, spend).is_err() {
            return true;
        }
        let prefetch = &self.lazy.prefetch;
        prefetch.is_coming(job.digest);
        let brought = self.bring(&job.digest, job.size, Haste::Early);
        if !matches!(brought, Ok(true)) {
            job.spent.fetch_sub(job.size, order);
            prefetch.has_come(&job.digest, None);
        }
        match brought {
            Ok(true) => {
                let read = u64::from(prefetch.has_come(&job.digest, Some(job.size)));
                self.count_prefetch(&[
                    (Counter::Prefetched, 1),
                    (Counter::BytesPrefetched, job.size),
                    (Counter::PrefetchedRead, read),
                    (Counter::BytesPrefetchedRead, read * job.size),
                ]);
            }
            Ok(false) => {}
            Err(FaultError::Unavailable(Unavailable::LeftAlone)) => return false,
            Err(error) => tracing::debug!(digest = %job.digest, %error, "not fetched early"),
        }
        true
    }
}

/// What builds have read, the newest first: `reads` and then `others`, each once, of those that are
/// `wanted`.
pub(super) fn once_each(
    reads: Vec<Digest>,
    others: Vec<Digest>,
    wanted: impl Fn(&Digest) -> bool,
) -> Vec<Digest> {
    let mut seen = HashSet::new();
    let all = reads.into_iter().chain(others);
    let mut once: Vec<_> = all
        .filter(|digest| wanted(digest) && seen.insert(*digest))
        .collect();
    once.truncate(LONGEST);
    once
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    /// A build of a process that is there as long as the test.
    fn here() -> Process {
        let pid = std::process::id();
        (pid, crate::service::builds::started(pid))
    }

    #[test]
    fn what_was_read_is_told_once_its_build_is_over() {
        let prefetch = Prefetch::default();
        let fingerprint = digest(0);
        let gone = (u32::MAX, Some(1));
        prefetch.open(gone, fingerprint, |_| ());
        for n in [3, 1, 3, 2] {
            assert_eq!(prefetch.read(&digest(n), true), None);
        }
        // What was there is nobody's business.
        prefetch.read(&digest(9), false);
        let reads = [3, 1, 2].map(digest);
        assert_eq!(prefetch.new_reads(&fingerprint), reads);
        assert_eq!(prefetch.new_reads(&digest(7)), []);
        prefetch.learned(fingerprint, &reads);
        assert_eq!(prefetch.new_reads(&fingerprint), [], "known to all");
        prefetch.learned(fingerprint, &reads[..2]);
        assert_eq!(prefetch.new_reads(&fingerprint), reads);
        // One of them came after what was told.
        prefetch.told(&fingerprint);
        assert_eq!(prefetch.new_reads(&fingerprint), [digest(2)]);
        prefetch.learned(fingerprint, &reads);
        prefetch.told(&fingerprint);
        assert_eq!(prefetch.new_reads(&fingerprint), []);
        prefetch.open(here(), fingerprint, |_| ());
        prefetch.read(&digest(4), true);
        assert_eq!(prefetch.new_reads(&fingerprint), [], "not over yet");
    }

    #[test]
    fn what_was_fetched_early_is_read_once() {
        let prefetch = Prefetch::default();
        let fingerprint = digest(0);
        prefetch.open((u32::MAX, Some(1)), fingerprint, |_| ());
        for n in [1, 2, 3] {
            prefetch.is_coming(digest(n));
        }
        assert!(!prefetch.has_come(&digest(1), Some(100)));
        assert_eq!(prefetch.read(&digest(1), false), Some(100));
        assert_eq!(prefetch.read(&digest(1), false), None);
        // Somebody waits for it.
        assert_eq!(prefetch.read(&digest(2), true), None);
        assert!(prefetch.has_come(&digest(2), Some(200)));
        assert!(prefetch.has_unread.load(Ordering::Acquire));
        assert!(!prefetch.has_come(&digest(3), None));
        assert!(!prefetch.has_unread.load(Ordering::Acquire));
        assert_eq!(prefetch.read(&digest(3), false), None);
        assert_eq!(prefetch.new_reads(&fingerprint), [1, 2].map(digest));
    }

    #[test]
    fn no_trace_is_endless() {
        let prefetch = Prefetch::default();
        let many: Vec<_> = (0..LONGEST + 9)
            .map(|n| Digest::of(&n.to_le_bytes()))
            .collect();
        prefetch.learned(digest(0), &many);
        let trace = prefetch.trace(&digest(0));
        assert_eq!(trace.len(), LONGEST);
        assert_eq!(trace.get(&many[LONGEST - 1]), Some(&(LONGEST - 1)));
    }

    #[test]
    fn the_trace_says_what_comes_first() {
        let mut queue = Queue::default();
        for (at, n) in [(usize::MAX, 1), (5, 2), (usize::MAX, 3), (0, 4)] {
            let job = Job {
                digest: digest(n),
                size: 1,
                process: here(),
                spent: Arc::default(),
            };
            queue.push(at, job);
        }
        let order = std::iter::from_fn(|| queue.pop()).map(|job| job.digest);
        assert_eq!(order.collect::<Vec<_>>(), [4, 2, 1, 3].map(digest));
    }

    #[test]
    fn the_newest_reads_come_first_and_each_once() {
        let named = [1, 2, 3, 4].map(digest);
        let once = once_each(
            [3, 9, 1].map(digest).to_vec(),
            [1, 2, 3, 8].map(digest).to_vec(),
            |digest| named.contains(digest),
        );
        assert_eq!(once, [3, 1, 2].map(digest));
    }
}
