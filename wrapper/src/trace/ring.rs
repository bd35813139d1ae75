//! A ring of records in memory shared by the processes that write them and the one that reads.
//!
//! This file is part of two programs: of the watcher, and of the shim (`shim/lib.rs`), which has no
//! standard library. A writer reserves its place, fills it, and makes it known by its length, which
//! comes first and is zero until then; the reader leaves zeroes behind.

use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// The bytes of all records.
pub(super) const ROOM: usize = 256 * 1024;

/// The bytes of what follows them: directories, with `:` between.
pub(super) const VAIN: usize = 4096;

/// The bytes of the whole.
pub(super) const LENGTH: usize = size_of::<Ends>() + ROOM + VAIN;

/// What a record is a multiple of.
const STEP: usize = size_of::<Head>();

/// Fills the ring's end, where a record does not fit.
const FILLER: u8 = u8::MAX;

/// Where the records begin and end: bytes written, and read, since the beginning.
#[repr(C, align(128))]
struct Ends {
    written: AtomicUsize,
    read: AtomicUsize,
    /// Not zero when nothing is to be written any more.
    closed: AtomicU32,
    /// One more than the bytes of the directories; zero until somebody has looked for them.
    vain: AtomicU32,
}

/// Whether something is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Found {
    /// Nothing is.
    Nothing = 0,
    /// Something is.
    Something = 1,
    /// Nothing is, or a link that leads nowhere: who asked followed links and did not ask again.
    NoWay = 2,
}

impl Found {
    fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Something,
            2 => Self::NoWay,
            _ => Self::Nothing,
        }
    }
}

/// What a record says, but for its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Said {
    /// Who says it: the process that attached.
    pub(super) process: u32,
    /// The length of the text.
    pub(super) text: u16,
    /// What was done.
    pub(super) does: u8,
    /// Whether something was there.
    pub(super) found: Found,
}

#[repr(C)]
struct Head {
    /// Of the whole record; zero until it is written.
    length: AtomicU32,
    said: Said,
    unused: u32,
}

const _: () = assert!(ROOM.is_multiple_of(STEP) && STEP == 16);

/// The ring at an address.
#[derive(Clone, Copy)]
pub(super) struct Ring(*mut Ends);

impl Ring {
    /// The one in these [`LENGTH`] bytes, all zeroes when nothing has been written.
    ///
    /// # Safety
    ///
    /// The memory is readable and writable, aligned to a page, and stays so. What honest processes do
    /// with it is done by this type; whatever else is written there makes records wrong, but never leads
    /// out of the memory.
    pub(super) const unsafe fn at(memory: *mut u8) -> Self {
        #[allow(clippy::cast_ptr_alignment, reason = "the caller's: it is a page's")]
        Self(memory.cast())
    }

    fn ends(&self) -> &Ends {
        // SAFETY: they come first in the memory, and atomics are shared as they are.
        unsafe { &*self.0 }
    }

    /// The place of what comes after so many bytes.
    fn place(self, bytes: usize) -> *mut Head {
        // SAFETY: within the memory, whose records begin after the ends.
        unsafe { self.0.add(1).cast::<Head>().add(bytes % ROOM / STEP) }
    }

    /// Writes a record whose text is these parts; `false` when there is no room.
    pub(super) fn write(self, said: Said, parts: &[&[u8]]) -> bool {
        let text = parts.iter().map(|part| part.len()).sum::<usize>();
        let length = (STEP + text).next_multiple_of(STEP);
        let ends = self.ends();
        if self.is_closed() {
            return false;
        }
        let mut written = ends.written.load(Ordering::Relaxed);
        let (start, filler) = loop {
            let left = ROOM - written % ROOM;
            let filler = if left < length { left } else { 0 };
            let needed = filler + length;
            let read = ends.read.load(Ordering::Acquire);
            if written + needed > read + ROOM {
                return false;
            }
            let next = written + needed;
            let order = Ordering::Relaxed;
            match ends
                .written
                .compare_exchange_weak(written, next, order, order)
            {
                Ok(_) => break (written, filler),
                Err(other) => written = other,
            }
        };
        if filler > 0 {
            let does = FILLER;
            self.fill(start, filler, Said { does, ..said }, &[]);
        }
        self.fill(start + filler, length, said, parts);
        true
    }

    fn fill(self, at: usize, length: usize, said: Said, parts: &[&[u8]]) {
        let head = self.place(at);
        // SAFETY: these bytes were reserved by this writer alone, and are within the memory: the
        // record fits, and so do its parts.
        unsafe {
            (&raw mut (*head).said).write(said);
            let mut text = head.add(1).cast::<u8>();
            for part in parts {
                ptr::copy_nonoverlapping(part.as_ptr(), text, part.len());
                text = text.add(part.len());
            }
            // At most what all records have room for.
            #[allow(clippy::cast_possible_truncation)]
            (*head).length.store(length as u32, Ordering::Release);
        }
    }

    /// Reads the next record, for the only reader; its text is put into `text`. `None` when there is
    /// none, or it is still being written.
    pub(super) fn read(self, text: &mut [u8]) -> Option<(Said, usize)> {
        loop {
            let ends = self.ends();
            let read = ends.read.load(Ordering::Relaxed);
            let head = self.place(read);
            // SAFETY: within the memory, and only ever used as an atomic.
            let length = unsafe { &(*head).length }.load(Ordering::Acquire) as usize;
            let left = ROOM - read % ROOM;
            // What cannot be is not read: a program may have written there by mistake.
            if length == 0 || length > left || !length.is_multiple_of(STEP) {
                return None;
            }
            // SAFETY: the record is written and lies within the memory; its writer has left it. What
            // was found is one byte, which may hold anything.
            let said = unsafe {
                let at = &raw const (*head).said;
                let found = at.cast::<u8>().add(offset_of!(Said, found)).read();
                let found = Found::from_byte(found);
                let process = (&raw const (*at).process).read();
                let (length, does) = (
                    (&raw const (*at).text).read(),
                    (&raw const (*at).does).read(),
                );
                Said {
                    process,
                    text: length,
                    does,
                    found,
                }
            };
            let size = usize::from(said.text).min(length - STEP).min(text.len());
            // SAFETY: as above; the text follows and is copied before it is given back.
            unsafe {
                ptr::copy_nonoverlapping(head.add(1).cast::<u8>(), text.as_mut_ptr(), size);
                ptr::write_bytes(head.cast::<u8>(), 0, length);
            }
            ends.read.store(read + length, Ordering::Release);
            if said.does != FILLER {
                return Some((said, size));
            }
        }
    }

    /// Writes, once, the directories that hold nothing that programs are loaded with. Too many are none.
    pub(super) fn set_vain(self, directories: &[u8]) {
        let directories = if directories.len() <= VAIN {
            directories
        } else {
            &[]
        };
        // SAFETY: within the memory, where nobody else writes, and nobody reads before it is made known.
        unsafe {
            let place = self.0.add(1).cast::<u8>().add(ROOM);
            ptr::copy_nonoverlapping(directories.as_ptr(), place, directories.len());
        }
        // At most what there is room for.
        #[allow(clippy::cast_possible_truncation)]
        let known = directories.len() as u32 + 1;
        self.ends().vain.store(known, Ordering::Release);
    }

    /// Those directories; `None` until somebody has looked.
    pub(super) fn vain<'a>(self) -> Option<&'a [u8]> {
        let known = self.ends().vain.load(Ordering::Acquire) as usize;
        let length = known.checked_sub(1)?.min(VAIN);
        // SAFETY: within the memory, which stays, and written but once, before that was made known.
        Some(unsafe { core::slice::from_raw_parts(self.0.add(1).cast::<u8>().add(ROOM), length) })
    }

    /// How many bytes were written, or are being written, that were not read.
    pub(super) fn unread(self) -> usize {
        let ends = self.ends();
        let read = ends.read.load(Ordering::Relaxed);
        ends.written.load(Ordering::Acquire).wrapping_sub(read)
    }

    /// Whether nothing is to be written any more.
    pub(super) fn is_closed(self) -> bool {
        self.ends().closed.load(Ordering::Relaxed) != 0
    }

    /// Has nothing be written any more. What is being written may still be.
    pub(super) fn close(self) {
        self.ends().closed.store(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// A ring in memory of this process, which is left to it.
    #[derive(Clone, Copy)]
    struct Shared(Ring);
    // SAFETY: a ring is made to be shared.
    unsafe impl Send for Shared {}

    fn ring() -> Ring {
        let pages: &'static mut [Page] = Vec::leak(vec![Page([0; 4096]); LENGTH.div_ceil(4096)]);
        // SAFETY: aligned, and nobody else's for ever.
        unsafe { Ring::at(pages.as_mut_ptr().cast()) }
    }

    #[derive(Clone)]
    #[repr(C, align(4096))]
    struct Page([u8; 4096]);

    fn said(process: u32, text: usize) -> Said {
        Said {
            process,
            text: u16::try_from(text).expect("short"),
            does: 2,
            found: [Found::Nothing, Found::Something, Found::NoWay][process as usize % 3],
        }
    }

    #[test]
    fn what_is_written_is_read_until_there_is_no_room() {
        let ring = ring();
        let mut text = vec![0; ROOM];
        assert_eq!(ring.read(&mut text), None);
        // Lengths that do not divide the room, so that its end is met in many ways.
        let path = [b'x'; 5000];
        for round in 0..300 {
            let mut written = Vec::new();
            loop {
                let length = 1 + (round * 37 + written.len() * 611) % path.len();
                let said = said(u32::try_from(written.len()).expect("few"), length);
                if !ring.write(said, &[&path[..length / 3], &path[length / 3..length]]) {
                    break;
                }
                written.push(said);
            }
            assert!(written.len() > 40, "there is room for {}", written.len());
            for expected in written {
                let (said, length) = ring.read(&mut text).expect("was written");
                assert_eq!(said, expected);
                assert_eq!(&text[..length], &path[..usize::from(said.text)]);
            }
            assert_eq!(ring.read(&mut text), None);
            assert_eq!(ring.unread(), 0);
        }
    }

    #[test]
    fn directories_are_told_if_there_is_room() {
        let ring = ring();
        assert_eq!(ring.vain(), None);
        ring.set_vain(b"/a:/b");
        assert_eq!(ring.vain(), Some(&b"/a:/b"[..]));
        ring.set_vain(&[b'x'; VAIN]);
        assert_eq!(ring.vain().map(<[u8]>::len), Some(VAIN));
        ring.set_vain(&[b'x'; VAIN + 1]);
        assert_eq!(ring.vain(), Some(&b""[..]));
        // Nothing else is disturbed, and nothing beyond the memory is read.
        assert_eq!(ring.read(&mut vec![0; ROOM]), None);
        ring.ends().vain.store(u32::MAX, Ordering::Relaxed);
        assert_eq!(ring.vain().map(<[u8]>::len), Some(VAIN));
    }

    #[test]
    fn many_write_at_once() {
        const EACH: usize = 20_000;
        let ring = ring();
        let mut text = vec![0; ROOM];
        thread::scope(|threads| {
            for process in 0..4 {
                let shared = Shared(ring);
                threads.spawn(move || {
                    let ring = { shared }.0;
                    for number in 0..EACH {
                        let path = format!("/{process}/{number}");
                        while !ring.write(said(process, path.len()), &[path.as_bytes()]) {
                            thread::yield_now();
                        }
                    }
                });
            }
            let mut next = [0; 4];
            while next.iter().sum::<usize>() < 4 * EACH {
                let Some((said, length)) = ring.read(&mut text) else {
                    thread::yield_now();
                    continue;
                };
                let number = &mut next[said.process as usize];
                let path = format!("/{}/{number}", said.process);
                assert_eq!(&text[..length], path.as_bytes());
                *number += 1;
            }
        });
        assert_eq!(ring.read(&mut text), None);
    }
}
