//! Requests for bytes that are not on this machine. They are answered by threads of their own, so that
//! whoever asks for something else is not kept waiting.

use std::sync::Arc;

use fuser::ReplyData;
use store::Ino;

use super::Adapter;
use super::convert::errno;
use crate::fs::View;

impl Adapter {
    /// Answers a read when the bytes have come.
    pub(super) fn read_elsewhere(&self, ino: Ino, offset: u64, size: u32, reply: ReplyData) {
        tracing::debug!(?ino, offset, "a read waits for what is elsewhere");
        self.aside(move |view| {
            let mut buffer = vec![0; size as usize];
            match view.read(ino, offset, &mut buffer) {
                Ok(read) => reply.data(&buffer[..read]),
                Err(error) => {
                    view.withdraw_lost();
                    reply.error(errno(error));
                }
            }
        });
    }

    /// Does something that needs the bytes of a file, when they have come.
    pub(super) fn once_here(&self, ino: Ino, work: impl FnOnce(&View) + Send + 'static) {
        if !self.view.is_elsewhere(ino) {
            return work(&self.view);
        }
        self.aside(move |view| {
            let came = view.fault(ino);
            // That they have not come is what the work itself finds.
            work(view);
            if let Err(error) = came {
                tracing::debug!(?ino, %error, "not here");
                // Not before the answer: until then the kernel may hold the file locked, and somebody who removes
                // its name the directory that is locked for this.
                view.withdraw_lost();
            }
        });
    }

    fn aside(&self, work: impl FnOnce(&Arc<View>) + Send + 'static) {
        let view = Arc::clone(&self.view);
        let started = std::thread::Builder::new()
            .name("fault".into())
            .spawn(move || work(&view));
        if let Err(error) = started {
            // The answer went with the closure: fuser says EIO for it.
            tracing::error!(%error, "cannot start a thread");
        }
    }
}
