//! The buffers that workers read into. What the kernel writes arrives in fuser's own (see `memory`).

use parking_lot::Mutex;

/// What workers read into, up to [`MAX_REQUEST`](super::MAX_REQUEST) each: a fresh buffer for every
/// request would be cleared, and its pages given back to the system, each time. Shared by all
/// views, of which few read at once.
static READ_BUFFERS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// How many of them are kept.
const READ_BUFFERS_KEPT: usize = 4;

/// Lends a buffer of this size.
pub(super) fn with_read_buffer<T>(size: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = READ_BUFFERS.lock().pop().unwrap_or_default();
    if buffer.len() < size {
        buffer.resize(size, 0);
    }
    let value = work(&mut buffer[..size]);
    let mut kept = READ_BUFFERS.lock();
    if kept.len() < READ_BUFFERS_KEPT {
        kept.push(buffer);
    }
    value
}
