//! Large blobs of which a part is here.
//!
//! A partial blob is a file with holes, beside the scratch files, which goes when it is complete and has
//! its name in the store, when too many others were used since, or after the daemon. What is here is
//! counted in *windows* of a few frames: so much is fetched at least.

use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use remote::blob::{Damage, Frames, Header};
use store::{Digest, limits};

use crate::flight::Flights;

/// Frames in a window: a megabyte, which takes about as long to come as the request for it.
pub(super) const WINDOW: u64 = 4;

/// Windows that are fetched before a reader asks for them, at most.
const AHEAD: u64 = 16;

/// Partial blobs that are kept, each with an open file, where so many may be open.
const KEPT: u64 = 128;

fn kept() -> NonZeroUsize {
    let kept = usize::try_from(limits::share(KEPT)).unwrap_or(usize::MAX);
    NonZeroUsize::new(kept).unwrap_or(NonZeroUsize::MIN)
}

/// What is fetched at one time by one thread, of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Portion {
    /// The header, and what comes with it.
    Header,
    /// A window.
    Window(u64),
}

/// The partial blobs of a store.
pub(super) struct Partials {
    open: Mutex<LruCache<Digest, Arc<Partial>>>,
    /// How many there were.
    count: AtomicU64,
}

impl Default for Partials {
    fn default() -> Self {
        Self {
            open: Mutex::new(LruCache::new(kept())),
            count: AtomicU64::new(0),
        }
    }
}

impl Partials {
    pub(super) fn get(&self, digest: &Digest) -> Option<Arc<Partial>> {
        self.open.lock().get(digest).map(Arc::clone)
    }

    /// Begins one, in a directory for scratch files, unless another thread was faster.
    pub(super) fn begin(
        &self,
        dir: &Path,
        digest: Digest,
        frames: Frames,
    ) -> io::Result<Arc<Partial>> {
        let mut open = self.open.lock();
        if let Some(first) = open.get(&digest) {
            return Ok(Arc::clone(first));
        }
        // No name that a private file has: what a dead daemon left is removed when the store is opened.
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("part-{number}"));
        let partial = Arc::new(Partial::create(digest, frames, path)?);
        let oldest = open.push(digest, Arc::clone(&partial));
        drop(open);
        // Its file goes when nobody reads it any more.
        drop(oldest);
        Ok(partial)
    }

    pub(super) fn forget(&self, digest: &Digest) {
        let forgotten = self.open.lock().pop(digest);
        drop(forgotten);
    }
}

/// A blob of which a part is here.
pub(super) struct Partial {
    /// Of the whole blob.
    pub digest: Digest,
    /// Which bytes of it are in which frame.
    pub frames: Frames,
    path: PathBuf,
    file: File,
    known: Mutex<Known>,
    /// What is being fetched.
    pub flights: Arc<Flights<Portion>>,
    /// Whether a thread fetches what nobody waits for.
    is_busy: AtomicBool,
}

struct Known {
    header: Option<Arc<Header>>,
    /// Of each frame, whether it is in the file.
    here: Vec<bool>,
    count: u64,
    /// The window after the one read last; then how many were read in a row after the first.
    next: Option<u64>,
    in_a_row: u64,
}

/// What a read wants besides its own bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Ahead {
    Nothing,
    /// These windows.
    Windows(Range<u64>),
    /// All of it: so much is here that the rest costs less than asking for it piece by piece.
    Rest,
}

impl Partial {
    /// Nothing is here yet.
    fn create(digest: Digest, frames: Frames, path: PathBuf) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let count = usize::try_from(frames.count()).unwrap_or(usize::MAX);
        Ok(Self {
            digest,
            frames,
            flights: Arc::default(),
            path,
            file,
            known: Mutex::new(Known {
                header: None,
                here: vec![false; count],
                count: 0,
                next: None,
                in_a_row: 0,
            }),
            is_busy: AtomicBool::new(false),
        })
    }

    pub(super) fn header(&self) -> Option<Arc<Header>> {
        self.known.lock().header.clone()
    }

    pub(super) fn know(&self, header: Arc<Header>) {
        self.known.lock().header = Some(header);
    }

    pub(super) fn file(&self) -> (&PathBuf, &File) {
        (&self.path, &self.file)
    }

    /// The windows that hold these bytes of the blob.
    pub(super) fn windows(&self, bytes: Range<u64>) -> Range<u64> {
        let frames = self.frames.holding(bytes);
        frames.start / WINDOW..frames.end.div_ceil(WINDOW)
    }

    /// All windows.
    pub(super) fn all(&self) -> Range<u64> {
        0..self.frames.count().div_ceil(WINDOW)
    }

    /// The frames of a window that are not here.
    pub(super) fn missing(&self, window: u64) -> impl Iterator<Item = u64> + use<> {
        let frames = window * WINDOW..((window + 1) * WINDOW).min(self.frames.count());
        let known = self.known.lock();
        let is_missing = |frame: &u64| {
            let index = usize::try_from(*frame).unwrap_or(usize::MAX);
            known.here.get(index).is_some_and(|here| !here)
        };
        frames.filter(is_missing).collect::<Vec<_>>().into_iter()
    }

    /// Whether all of these windows are here.
    pub(super) fn has(&self, mut windows: Range<u64>) -> bool {
        windows.all(|window| self.missing(window).next().is_none())
    }

    /// Fills `into` from `offset` on, where those bytes are here; how many there were.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Option<usize>> {
        let end = offset
            .saturating_add(into.len() as u64)
            .min(self.frames.size());
        let length = usize::try_from(end.saturating_sub(offset)).map_err(io::Error::other)?;
        if !self.has(self.windows(offset..end)) {
            return Ok(None);
        }
        self.file.read_exact_at(&mut into[..length], offset)?;
        Ok(Some(length))
    }

    /// Notes that windows are read, and says what to fetch before somebody asks for it: as much again as
    /// was read in a row.
    pub(super) fn note_read(&self, windows: &Range<u64>) -> Ahead {
        let all = self.all();
        let mut known = self.known.lock();
        let next = known.next.replace(windows.end);
        match next {
            Some(next) if windows.start <= next && windows.end > next => {
                known.in_a_row += windows.end - next;
            }
            // The kernel asks for several at a time, and they come in any order.
            Some(next) if windows.end <= next && windows.end + known.in_a_row >= next => {
                known.next = Some(next);
            }
            _ => known.in_a_row = 0,
        }
        if known.count * 2 >= self.frames.count() {
            return Ahead::Rest;
        }
        let ahead = windows.end..(windows.end + known.in_a_row.min(AHEAD)).min(all.end);
        drop(known);
        if ahead.is_empty() || self.has(ahead.clone()) {
            Ahead::Nothing
        } else {
            Ahead::Windows(ahead)
        }
    }

    /// The right to fetch what nobody waits for, unless another has it.
    pub(super) fn busy(self: &Arc<Self>) -> Option<Busy> {
        let was_busy = self.is_busy.swap(true, Ordering::AcqRel);
        (!was_busy).then(|| Busy(Arc::clone(self)))
    }

    /// Verifies frames, of which `kept` is what the object holds, and writes them where they belong.
    /// Returns how many bytes of the blob that were.
    pub(super) fn file_frames(
        &self,
        header: &Header,
        frames: Range<u64>,
        kept: &Bytes,
    ) -> io::Result<Result<u64, Damage>> {
        let start = header.kept(frames.clone()).start;
        let mut written = 0;
        for frame in frames {
            let range = header.kept(frame..frame + 1);
            let at = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
            let Some(bytes) = kept.get(at(range.start)..at(range.end)) else {
                return Ok(Err(Damage::Short));
            };
            let bytes = match header.unpack(frame, bytes) {
                Ok(bytes) => bytes,
                Err(damage) => return Ok(Err(damage)),
            };
            self.file
                .write_all_at(&bytes, self.frames.bytes(frame).start)?;
            let mut known = self.known.lock();
            let index = usize::try_from(frame).unwrap_or(usize::MAX);
            if let Some(here) = known.here.get_mut(index)
                && !std::mem::replace(here, true)
            {
                known.count += 1;
                written += bytes.len() as u64;
            }
        }
        Ok(Ok(written))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a part of a blob");
        }
    }
}

/// Held by the thread that fetches what nobody waits for.
pub(super) struct Busy(Arc<Partial>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.is_busy.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use remote::blob::{self, FRAME};

    use super::*;

    /// A partial blob of so many frames, and the object that keeps it.
    fn partial(dir: &tempfile::TempDir, count: u64) -> (Partial, Header, Bytes, Vec<u8>) {
        let size = count * FRAME - 5;
        let bytes: Vec<u8> = (0..size).map(|at| (at / 1000 % 251) as u8).collect();
        let mut object = Cursor::new(Vec::new());
        let digest = blob::pack(&bytes[..], size, &mut object).expect("packs");
        let object = Bytes::from(object.into_inner());
        let header = Header::read(&object, digest, size).expect("reads");
        let path = dir.path().join("part");
        let partial = Partial::create(digest, header.frames(), path).expect("creates");
        (partial, header, object, bytes)
    }

    fn file(partial: &Partial, header: &Header, object: &Bytes, frames: Range<u64>) -> u64 {
        let kept = header.kept(frames.clone());
        let at = |offset| usize::try_from(offset).expect("fits");
        let kept = object.slice(at(kept.start)..at(kept.end));
        let filed = partial.file_frames(header, frames, &kept);
        filed.expect("writes").expect("is right")
    }

    #[test]
    fn what_is_here_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (partial, header, object, bytes) = partial(&dir, 10);
        let mut into = vec![0; 1000];
        assert_eq!(partial.read(0, &mut into).expect("reads"), None);
        assert_eq!(file(&partial, &header, &object, 4..8), 4 * FRAME);
        // Nothing counts twice.
        assert_eq!(file(&partial, &header, &object, 4..8), 0);
        let offset = 8 * FRAME - 1000;
        assert_eq!(partial.read(offset, &mut into).expect("reads"), Some(1000));
        let at = usize::try_from(offset).expect("fits");
        assert_eq!(into, bytes[at..at + 1000]);
        // One byte of the next window.
        assert_eq!(partial.read(offset + 1, &mut into).expect("reads"), None);
        assert_eq!(file(&partial, &header, &object, 8..10), 2 * FRAME - 5);
        // At the end and behind it.
        let end = bytes.len() as u64;
        assert_eq!(partial.read(end - 7, &mut into).expect("reads"), Some(7));
        assert_eq!(into[..7], bytes[bytes.len() - 7..]);
        assert_eq!(partial.read(end, &mut into).expect("reads"), Some(0));
        assert_eq!(partial.read(u64::MAX, &mut into).expect("reads"), Some(0));
    }

    #[test]
    fn damage_is_not_filed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (partial, header, object, _) = partial(&dir, 10);
        let kept = header.kept(0..4);
        let at = |offset| usize::try_from(offset).expect("fits");
        let mut damaged = object[at(kept.start)..at(kept.end)].to_vec();
        let last = damaged.len() - 20;
        damaged[last] ^= 1;
        let filed = partial.file_frames(&header, 0..4, &damaged.into());
        assert_eq!(filed.expect("writes"), Err(Damage::Frame(3)));
        assert!(!partial.has(0..1));
        let short = object.slice(at(kept.start)..at(kept.end) - 1);
        let filed = partial.file_frames(&header, 0..4, &short);
        assert_eq!(filed.expect("writes"), Err(Damage::Short));
        assert_eq!(partial.missing(0).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn who_reads_on_has_more_fetched_and_who_jumps_has_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (partial, header, object, _) = partial(&dir, 400);
        let ahead = |windows| partial.note_read(&windows);
        assert_eq!(ahead(0..1), Ahead::Nothing);
        assert_eq!(ahead(1..2), Ahead::Windows(2..3));
        // The same again is no step, nor is the one before it.
        assert_eq!(ahead(1..2), Ahead::Windows(2..3));
        assert_eq!(ahead(2..4), Ahead::Windows(4..7));
        assert_eq!(ahead(3..4), Ahead::Windows(4..7));
        assert_eq!(ahead(4..5), Ahead::Windows(5..9));
        assert_eq!(ahead(50..51), Ahead::Nothing);
        assert_eq!(ahead(20..21), Ahead::Nothing);
        assert_eq!(ahead(99..100), Ahead::Nothing);
        file(&partial, &header, &object, 0..199);
        assert_eq!(ahead(60..61), Ahead::Nothing);
        file(&partial, &header, &object, 300..301);
        assert_eq!(ahead(60..61), Ahead::Rest);
    }

    #[test]
    fn one_thread_fetches_ahead() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (partial, ..) = partial(&dir, 2);
        let partial = Arc::new(partial);
        let busy = partial.busy().expect("is free");
        assert!(partial.busy().is_none());
        drop(busy);
        assert!(partial.busy().is_some());
        let path = partial.file().0.clone();
        drop(partial);
        assert!(!path.exists(), "what nobody has any more is removed");
    }
}
