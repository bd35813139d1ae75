//! Questions to compilers, answered from memory.
//!
//! Cargo asks a compiler for its version and the target's properties up to six times before it
//! builds in an empty target. An answer is kept for the compiler's content, the arguments and the
//! variables rustc reads, and never outlives the daemon. Not answered: compilers behind a proxy or
//! script, which would have to be run to tell which one is meant, and what `args::query` does not
//! understand.

use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use store::{Digest, Hasher};
use wrapper::args;
use wrapper::environment;
use wrapper::protocol::{self, Decision, Outcome, ProbeRequest, ProtocolError, Run};
use wrapper::trace::Scope;

use super::Service;
use super::machine::processor;
use super::pulse::Pulse;
use super::toolchain::Caller;

/// How many answers are kept: a few for each compiler and set of flags.
const ANSWERS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Where rustc looks for descriptions of targets it does not know.
const TARGET_PATH: &[u8] = b"RUST_TARGET_PATH";

/// What compilers said.
pub struct Probes(Mutex<LruCache<Digest, Arc<[u8]>>>);

impl Default for Probes {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(ANSWERS)))
    }
}

impl Service {
    /// Answers a question, or has the compiler asked and remembers what it says.
    pub fn probe(&self, stream: &UnixStream, request: &ProbeRequest) -> Result<(), ProtocolError> {
        let Some(asked) = Pulse::during(stream, || self.asked(request))? else {
            return protocol::send(stream, &Decision::Plain);
        };
        let known = self.probes.0.lock().get(&asked).map(Arc::clone);
        if let Some(answer) = known {
            let (stdout, stderr) = (answer.to_vec(), Vec::new());
            return protocol::send(stream, &Decision::Hit { stdout, stderr });
        }
        let run = Run::as_called(Scope::default());
        protocol::send(stream, &Decision::Run(run))?;
        let said: Outcome = protocol::receive(stream)?;
        // Warnings are worded for a terminal or not, and the compiler may just have been replaced.
        if said.success && said.stderr.is_empty() && self.asked(request) == Some(asked) {
            self.probes.0.lock().put(asked, said.stdout.into());
        }
        Ok(())
    }

    /// Everything the answer depends on; `None` when that cannot be told.
    fn asked(&self, request: &ProbeRequest) -> Option<Digest> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let cwd = PathBuf::from(text(&request.cwd)?);
        let argv: Vec<String> = request
            .argv
            .iter()
            .map(|arg| text(arg))
            .collect::<Option<_>>()?;
        let (program, arguments) = argv.split_first()?;
        let query = args::query(arguments, &cwd).ok()?;
        if environment::value(&request.environment, TARGET_PATH).is_some() {
            return None;
        }
        let is_ours = |path: &Path| self.mounts.locate(path).is_some();
        let caller = Caller {
            environment: &request.environment,
            cwd: &cwd,
            in_view: &is_ours,
        };
        let program = Path::new(program);
        let named = self.toolchains.told_by_content(program, &caller)?;
        if is_ours(&named) {
            return None;
        }
        let (sysroot, target) = (query.sysroot.as_deref(), query.target.as_deref());
        let compiler = self
            .toolchains
            .compiler(program, sysroot, target, &caller)
            .ok()?;
        let mut hasher = Hasher::new("kachefs probe");
        hasher.digest(&compiler.digest);
        // The sysroot it prints goes by where it is, and by where it is called.
        let real = fs::canonicalize(&named).ok()?;
        for path in [Some(named.as_path()), Some(&real), sysroot]
            .into_iter()
            .flatten()
        {
            hasher.field(path.as_os_str().as_encoded_bytes());
        }
        hasher.number(arguments.len() as u64);
        for argument in arguments {
            hasher.field(argument.as_bytes());
        }
        for (name, value) in environment::keyed(&request.environment, false) {
            hasher.field(name).field(value);
        }
        if query.native_cpu {
            hasher.digest(&processor().ok()?);
        }
        Some(hasher.finish())
    }
}
