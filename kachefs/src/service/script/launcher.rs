//! Putting launchers in the place of build scripts.
//!
//! The launcher is the wrapper's own program, one blob for all views. Where it cannot be had, build
//! scripts stay what they are and run without being asked for.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use store::{Digest, Timestamp};
use wrapper::args::CrateType;
use wrapper::environment;
use wrapper::launcher::{SCRIPT_SUFFIX, is_script};

use super::super::files::changed_at;
use super::super::prepare::Prepared;
use crate::fs::outputs::Bound;
use crate::fs::{Body, FsResult};
use crate::storage::Storage;

/// The wrapper's program, beside our own.
const WRAPPER: &str = "kachefs-rustc";

/// Knows the launcher's blob.
pub struct Launchers {
    storage: Arc<Storage>,
    program: Option<PathBuf>,
    known: Mutex<Option<(Stamp, Launcher)>>,
}

/// One state of the program's file.
type Stamp = (u64, u64, u64, Timestamp);

#[derive(Clone, Copy)]
struct Launcher {
    digest: Digest,
    size: u64,
}

impl Launchers {
    /// The wrapper beside this program is the launcher.
    pub fn new(storage: Arc<Storage>) -> Self {
        let program = std::env::current_exe().map(|own| own.with_file_name(WRAPPER));
        Self {
            storage,
            program: program.ok(),
            known: Mutex::new(None),
        }
    }

    fn launcher(&self) -> Option<Launcher> {
        let program = self.program.as_ref()?;
        let meta = fs::metadata(program).ok()?;
        let stamp = (meta.dev(), meta.ino(), meta.len(), changed_at(&meta));
        let mut known = self.known.lock();
        if let Some((of, launcher)) = *known
            && of == stamp
            && self.storage.cas.has(&launcher.digest, launcher.size)
        {
            return Some(launcher);
        }
        let bytes = fs::read(program).ok()?;
        let stored = match self.storage.cas.ingest_bytes(&bytes) {
            Ok(stored) => stored,
            Err(error) => {
                tracing::warn!(%error, "launcher");
                return None;
            }
        };
        let launcher = Launcher {
            digest: stored.digest,
            size: stored.size,
        };
        *known = Some((stamp, launcher));
        Some(launcher)
    }

    /// What lies in the out-dir once a hit is bound: of a build script, the launcher under its name
    /// and the script beside it.
    pub fn beside(&self, prepared: &Prepared, mut outputs: Vec<Bound>) -> Vec<Bound> {
        let Some(name) = script_name(prepared) else {
            return outputs;
        };
        let Some(launcher) = self.launcher() else {
            return outputs;
        };
        if let Some(script) = outputs.iter_mut().find(|output| output.name == name) {
            let stand_in = launcher.bound(name.clone(), script.perm);
            script.name = aside(&name);
            outputs.push(stand_in);
        }
        outputs
    }

    /// Does the same with a build script the compiler has just made.
    pub fn stand_in(&self, prepared: &Prepared) -> FsResult<()> {
        let Some(name) = script_name(prepared) else {
            return Ok(());
        };
        let Some(launcher) = self.launcher() else {
            return Ok(());
        };
        let (view, out_dir) = (&prepared.view, prepared.out_dir);
        let script = view.child(out_dir, &name)?;
        let perm = script.state.lock().attributes.perm;
        let stand_in = launcher.bound(aside(&name), perm);
        view.stand_in(out_dir, &name, stand_in, prepared.caller)
    }
}

impl Launcher {
    fn bound(self, name: Vec<u8>, perm: u16) -> Bound {
        let Self { digest, size } = self;
        Bound {
            name,
            perm,
            body: Body::Blob { digest, size },
        }
    }
}

fn aside(name: &[u8]) -> Vec<u8> {
    [name, SCRIPT_SUFFIX.as_bytes()].concat()
}

/// The name of the program, where the compile makes a build script. What cargo makes of a binary
/// target it tells the target's name.
fn script_name(prepared: &Prepared) -> Option<Vec<u8>> {
    let invocation = &prepared.invocation;
    let is_script = is_script(&invocation.crate_name)
        && invocation.crate_types == [CrateType::Bin]
        && invocation.emit.link
        && !invocation.test
        && environment::value(&prepared.environment, b"CARGO_BIN_NAME").is_none();
    is_script.then(|| invocation.stem().into_bytes())
}
