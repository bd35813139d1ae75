//! Parts of large blobs: what is read of them is fetched, and the rest when that is worth it.
//!
//! Who reads on has the next windows fetched meanwhile, as many as were read in a row; when half of a
//! blob is here, all of it is fetched, gets its name in the store, and is an ordinary file from then on.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use remote::blob::{FRAME, Frames, Header};
use remote::{Remote, RemoteError};
use store::{Digest, Kept};
use tokio::task::{self, JoinSet};

use super::connection::Haste;
use super::faults::{FaultError, Fetched, Source, WHOLE, place_of};
use super::partial::{Ahead, Partial, Portion};
use crate::flight::{Boarding, Flight};
use crate::storage::Storage;

/// How many bytes are asked for at once, and how many such requests are under way for a blob.
const PIECE: u64 = 4 << 20;
const PIECES: usize = 4;

/// Windows of a blob that are fetched together: a reader of one of them waits for all. Those that nobody
/// waits for come one request at a time.
const STEP: usize = 32;
const EARLY_STEP: usize = 4;

impl Storage {
    /// Fills `into` from `offset` on with bytes of a blob that is not on this disk, where those bytes are.
    /// Returns how many there were.
    pub fn read_part(
        self: &Arc<Self>,
        digest: &Digest,
        offset: u64,
        into: &mut [u8],
    ) -> io::Result<Option<usize>> {
        let Some(partial) = self.lazy.partials.get(digest) else {
            return Ok(None);
        };
        let read = partial.read(offset, into)?;
        if let Some(length) = read {
            self.fetch_ahead(&partial, offset..offset.saturating_add(length as u64));
        }
        Ok(read)
    }

    /// The same, once they have come; `None` for a blob that is fetched whole. Waits for them, within the
    /// limits of the remote.
    pub fn fetch_part(
        self: &Arc<Self>,
        digest: &Digest,
        size: u64,
        offset: u64,
        into: &mut [u8],
    ) -> Result<Option<usize>, FaultError> {
        if size <= WHOLE || offset >= size || self.cas.has(digest, size) {
            return Ok(None);
        }
        let (connection, kept) = self.kept_for_fault(digest, size)?;
        let source = Source::new(&connection, &kept, Haste::Wanted);
        let partial = self.partial(digest, size)?;
        if self.cas.has(digest, size) {
            // Completed since.
            self.lazy.partials.forget(digest);
            return Ok(None);
        }
        let bytes = offset..offset.saturating_add(into.len() as u64);
        self.fetch_windows(source, &partial, partial.windows(bytes.clone()))?;
        let read = partial.read(offset, into)?;
        self.fetch_ahead(&partial, bytes);
        Ok(read)
    }

    /// Fetches all of a large blob that is not here, and gives it its name in the store. Some at a time: who
    /// reads in it meanwhile waits for no more than that.
    pub(super) fn fetch_rest(&self, source: Source<'_>, digest: &Digest) -> Result<(), FaultError> {
        let size = source.kept.size;
        let partial = self.partial(digest, size)?;
        let all = partial.all();
        let step = match source.haste {
            Haste::Wanted => STEP,
            Haste::Early => EARLY_STEP,
        };
        for first in all.clone().step_by(step) {
            let windows = first..(first + step as u64).min(all.end);
            self.fetch_windows(source, &partial, windows)?;
        }
        let (path, file) = partial.file();
        self.take_file(path, file, *digest, size)?;
        self.lazy.partials.forget(digest);
        Ok(())
    }

    fn partial(&self, digest: &Digest, size: u64) -> Result<Arc<Partial>, FaultError> {
        if let Some(partial) = self.lazy.partials.get(digest) {
            return Ok(partial);
        }
        let frames = Frames::of(size).map_err(|damage| FaultError::Gone(damage.to_string()))?;
        let begin = || {
            let partials = &self.lazy.partials;
            partials.begin(&self.dir.scratch(), *digest, frames)
        };
        Ok(begin().or_else(|error| self.again(error, begin))?)
    }

    /// Makes sure that windows of a blob are here.
    fn fetch_windows(
        &self,
        source: Source<'_>,
        partial: &Arc<Partial>,
        windows: Range<u64>,
    ) -> Result<(), FaultError> {
        // Another one's try is not ours: theirs may have been one that nobody waited for.
        for _ in 0..2 {
            if partial.has(windows.clone()) {
                return Ok(());
            }
            let fetched = self.fetch_missing(source, partial, windows.clone());
            if matches!(fetched, Err(FaultError::Gone(_))) {
                self.lazy.partials.forget(&partial.digest);
            }
            fetched?;
        }
        if partial.has(windows) {
            Ok(())
        } else {
            Err(FaultError::Failed)
        }
    }

    /// Fetches what no other thread is fetching, and waits for the others.
    fn fetch_missing(
        &self,
        source: Source<'_>,
        partial: &Arc<Partial>,
        windows: Range<u64>,
    ) -> Result<(), FaultError> {
        let Some(header) = self.header(source, partial)? else {
            return Ok(());
        };
        let (ours, others) = divide(partial, windows);
        let missing = || ours.iter().flat_map(|(window, _)| partial.missing(*window));
        if missing().next().is_some() {
            self.fetch_some(source, &partial.digest, 0, || {
                let pieces = pieces(&header, missing());
                source.connection.call_for(source.haste, async |remote| {
                    in_pieces(remote, partial, &header, source, pieces).await
                })
            })?;
        }
        drop(ours);
        for boarding in others {
            boarding.wait(source.connection.patience(PIECE));
        }
        Ok(())
    }

    /// `None` where another thread asked for it in vain.
    fn header(
        &self,
        source: Source<'_>,
        partial: &Arc<Partial>,
    ) -> Result<Option<Arc<Header>>, FaultError> {
        if let Some(header) = partial.header() {
            return Ok(Some(header));
        }
        match partial.flights.take_off(Portion::Header) {
            // Fetched between the look and the take-off?
            Ok(_flight) if partial.header().is_some() => {}
            Ok(_flight) => self.fetch_some(source, &partial.digest, 1, || {
                let start = async |remote| start(remote, partial, source.kept).await;
                source.connection.call_for(source.haste, start)
            })?,
            Err(boarding) => drop(boarding.wait(source.connection.patience(PIECE))),
        }
        Ok(partial.header())
    }

    fn fetch_early_windows(
        &self,
        partial: &Arc<Partial>,
        windows: Range<u64>,
    ) -> Result<(), FaultError> {
        let size = partial.frames.size();
        let (connection, kept) = self.kept_for_fault(&partial.digest, size)?;
        let source = Source::new(&connection, &kept, Haste::Early);
        self.fetch_windows(source, partial, windows)
    }

    /// Fetches what nobody waits for yet.
    fn fetch_ahead(self: &Arc<Self>, partial: &Arc<Partial>, read: Range<u64>) {
        let ahead = partial.note_read(&partial.windows(read));
        if ahead == Ahead::Nothing {
            return;
        }
        let Some(busy) = partial.busy() else { return };
        let (storage, partial) = (Arc::clone(self), Arc::clone(partial));
        let fetch = move || {
            let (digest, size) = (partial.digest, partial.frames.size());
            let fetched = match ahead {
                Ahead::Windows(windows) => storage.fetch_early_windows(&partial, windows),
                Ahead::Rest => storage.bring(&digest, size, Haste::Early).map(drop),
                Ahead::Nothing => Ok(()),
            };
            if let Err(error) = fetched {
                tracing::debug!(%digest, %error, "not fetched ahead");
            }
            drop(busy);
        };
        let started = std::thread::Builder::new()
            .name("ahead".into())
            .spawn(fetch);
        if let Err(error) = started {
            tracing::warn!(%error, "cannot start a thread");
        }
    }
}

/// What this thread fetches, and what others do.
type Divided = (Vec<(u64, Flight<Portion>)>, Vec<Boarding>);

fn divide(partial: &Partial, windows: Range<u64>) -> Divided {
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for window in windows.filter(|window| !partial.has(*window..*window + 1)) {
        match partial.flights.take_off(Portion::Window(window)) {
            Ok(flight) => ours.push((window, flight)),
            Err(boarding) => others.push(boarding),
        }
    }
    (ours, others)
}

/// Frames that are asked for together.
fn pieces(header: &Header, frames: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut pieces: Vec<Range<u64>> = Vec::new();
    for frame in frames {
        match pieces.last_mut() {
            Some(last) if last.end == frame && length(&header.kept(last.clone())) < PIECE => {
                last.end += 1;
            }
            _ => pieces.push(frame..frame + 1),
        }
    }
    pieces
}

fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// Fetches the header of a large blob, and the first frames, which are read first.
async fn start(
    remote: Arc<dyn Remote>,
    partial: &Arc<Partial>,
    kept: &Kept,
) -> Result<Fetched, RemoteError> {
    let (name, within) = place_of(&partial.digest, kept);
    let most = partial.frames.header_len() + FRAME;
    let range = match within {
        Some(within) => within.start..within.end.min(within.start.saturating_add(most)),
        None => 0..most,
    };
    let Some(bytes) = remote.get(&name, Some(range), most).await? else {
        return Ok(Fetched::Absent);
    };
    let header = match Header::read(&bytes, partial.digest, kept.size) {
        Ok(header) => Arc::new(header),
        Err(damage) => return Ok(Fetched::Damaged(damage)),
    };
    let has = bytes.len() as u64;
    let frames =
        (0..header.frames().count()).take_while(|frame| header.kept(0..frame + 1).end <= has);
    let frames = 0..frames.count() as u64;
    let start = usize::try_from(partial.frames.header_len()).unwrap_or(usize::MAX);
    let filed = file(partial, &header, frames, bytes.slice(start..)).await;
    if matches!(filed, Fetched::Filed(_)) {
        partial.know(header);
    }
    Ok(filed)
}

/// Fetches frames into the file of a blob.
async fn in_pieces(
    remote: Arc<dyn Remote>,
    partial: &Arc<Partial>,
    header: &Arc<Header>,
    source: Source<'_>,
    pieces: Vec<Range<u64>>,
) -> Result<Fetched, RemoteError> {
    let (name, within) = place_of(&partial.digest, source.kept);
    let start = within.map_or(0, |range| range.start);
    let at_once = match source.haste {
        Haste::Wanted => PIECES,
        Haste::Early => 1,
    };
    let mut pieces = pieces.into_iter();
    let mut under_way = JoinSet::new();
    let mut count = 0;
    let mut failed = None;
    loop {
        while under_way.len() < at_once
            && failed.is_none()
            && let Some(frames) = pieces.next()
        {
            let kept = header.kept(frames.clone());
            let range = start.saturating_add(kept.start)..start.saturating_add(kept.end);
            let (remote, name) = (Arc::clone(&remote), name.clone());
            let (header, partial) = (Arc::clone(header), Arc::clone(partial));
            under_way.spawn(async move {
                let most = length(&range);
                let Some(bytes) = remote.get(&name, Some(range), most).await? else {
                    return Ok(Fetched::Absent);
                };
                Ok(file(&partial, &header, frames, bytes).await)
            });
        }
        // To the end, whatever came of one: nothing is written any more once this returns.
        match under_way.join_next().await {
            None => return failed.unwrap_or(Ok(Fetched::Filed(count))),
            Some(Ok(Ok(Fetched::Filed(new)))) => count += new,
            Some(Ok(other)) => drop(failed.get_or_insert(other)),
            Some(Err(error)) => {
                failed.get_or_insert(Ok(Fetched::Unwritten(io::Error::other(error))));
            }
        }
    }
}

/// Verifies frames and writes them, which takes longer than a thread of the runtime may be kept.
async fn file(
    partial: &Arc<Partial>,
    header: &Arc<Header>,
    frames: Range<u64>,
    bytes: bytes::Bytes,
) -> Fetched {
    let (partial, header) = (Arc::clone(partial), Arc::clone(header));
    let filed = task::spawn_blocking(move || partial.file_frames(&header, frames, &bytes));
    match filed.await {
        Ok(Ok(Ok(count))) => Fetched::Filed(count),
        Ok(Ok(Err(damage))) => Fetched::Damaged(damage),
        Ok(Err(error)) => Fetched::Unwritten(error),
        Err(error) => Fetched::Unwritten(io::Error::other(error)),
    }
}
