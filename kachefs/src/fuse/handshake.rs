//! The handshake: what is asked of the kernel, and what it has agreed to.

use std::sync::atomic::Ordering;

use fuser::{InitFlags, KernelConfig};

use super::{Adapter, MAX_REQUEST};
use crate::keeper::wire::Connection;

/// Requests the kernel may have under way in the background.
const MAX_BACKGROUND: u16 = 64;

impl Adapter {
    /// Asks for what the adapter relies on or can do without, and keeps the answer for the keeper.
    pub(super) fn shake_hands(&self, config: &mut KernelConfig) {
        // Without PARALLEL_DIROPS one lookup blocks its whole directory.
        for capability in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
        ] {
            if config.add_capabilities(capability).is_err() {
                tracing::info!(?capability, "kernel does without");
            }
        }
        // The kernel then opens files of a compiler straight onto their backings (see
        // `fs::passthrough`); a stack of one is the depth of a plain disk below a view.
        if self.wants_passthrough && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
            let allowed = config.set_max_stack_depth(1).is_ok();
            self.passthrough.store(allowed, Ordering::Relaxed);
        }
        for (what, set) in [
            ("max_write", config.set_max_write(MAX_REQUEST).err()),
            ("max_readahead", config.set_max_readahead(MAX_REQUEST).err()),
            (
                "max_background",
                config
                    .set_max_background(MAX_BACKGROUND)
                    .err()
                    .map(u32::from),
            ),
        ] {
            if let Some(nearest) = set {
                tracing::debug!(what, nearest, "kernel limit differs");
            }
        }
        let fuser::Version(major, minor) = config.kernel_abi();
        let connection = Connection {
            abi: (major, minor),
            capabilities: config.capabilities().bits(),
        };
        // There is one handshake.
        let _ = self.connection.set(connection);
    }
}
