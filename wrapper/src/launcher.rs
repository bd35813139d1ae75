//! The launcher: what lies in a view under a build script's name.
//!
//! The daemon puts this program there and the script itself beside it, so that cargo, which runs
//! build scripts without asking any wrapper, asks the daemon after all: a run that was made before
//! is replayed, any other is watched and recorded. It holds no policy, and whatever goes wrong, the
//! script runs.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::cc::WATCHED;
use crate::client::{self, CANNOT_RUN, Call, DISABLE};
use crate::environment;
use crate::protocol::{self, Outcome, Request, Run, ScriptRequest, Token};
use crate::run;
use crate::trace::{Access, Observed};

/// How the name of the script itself ends, beside the launcher that has taken its name.
pub const SCRIPT_SUFFIX: &str = ".script";

/// How cargo names the programs it makes of build scripts: as a crate, and as what it runs.
const NAMES: [&[u8]; 2] = [b"build_script_", b"build-script-"];

/// Whether a program called so is to be the launcher.
pub(crate) fn stands_in(own: &OsStr) -> bool {
    let name = Path::new(own).file_name().unwrap_or_default().as_bytes();
    NAMES.iter().any(|start| name.starts_with(start))
}

/// Whether a crate of this name is what cargo makes of a build script.
pub fn is_script(crate_name: &str) -> bool {
    crate_name.as_bytes().starts_with(NAMES[0])
}

/// Runs the launcher, called as `own` with these arguments.
pub(crate) fn main(own: &OsStr, arguments: Vec<OsString>) -> ExitCode {
    let script = match Script::beside(own, arguments) {
        Ok(script) => script,
        Err(error) => {
            let own = Path::new(own).display();
            client::say(&format!("kachefs: no build script beside {own}: {error}"));
            return ExitCode::from(CANNOT_RUN);
        }
    };
    if env::var_os(DISABLE).is_some() {
        return script.become_it();
    }
    let Some(token) = client::read_token(&script.directory) else {
        return script.become_it();
    };
    let Ok(request) = script.request(&token) else {
        return script.become_it();
    };
    let call = Call {
        request: Request::Script(request),
        become_it: &|| script.become_it(),
        run: &|run, stream| script.run(run, stream),
    };
    call.make(&token)
}

/// The script and how it was called.
struct Script {
    own: OsString,
    directory: PathBuf,
    name: OsString,
    arguments: Vec<OsString>,
}

impl Script {
    /// Finds the script beside the launcher: the one whose crate has the launcher's name.
    fn beside(own: &OsStr, arguments: Vec<OsString>) -> io::Result<Self> {
        let path = Path::new(own);
        // Cargo gives the whole path; a name alone was looked for in `PATH`.
        let path = if path.components().count() > 1 {
            std::path::absolute(path)?
        } else {
            env::current_exe()?
        };
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let directory = path.parent().ok_or_else(missing)?;
        let called = path.file_name().ok_or_else(missing)?.as_bytes();
        let names = std::fs::read_dir(directory)?
            .filter_map(|entry| Some(entry.ok()?.file_name()))
            .filter(|name| is_called(name.as_bytes(), called));
        // Of several, made by different compiles, the last one is meant.
        let changed = |name: &OsString| directory.join(name).metadata().ok()?.modified().ok();
        Ok(Self {
            own: own.to_owned(),
            name: names.max_by_key(changed).ok_or_else(missing)?,
            directory: directory.to_owned(),
            arguments,
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.directory.join(&self.name));
        command.arg0(&self.own).args(&self.arguments);
        command
    }

    fn become_it(&self) -> ExitCode {
        let error = self.command().exec();
        client::say(&format!(
            "kachefs: cannot run {}: {error}",
            self.directory.join(&self.name).display()
        ));
        ExitCode::from(CANNOT_RUN)
    }

    fn request(&self, token: &Token) -> io::Result<ScriptRequest> {
        let bytes = |text: &OsStr| text.as_bytes().to_vec();
        Ok(ScriptRequest {
            token: (token.view, token.directory),
            directory: bytes(self.directory.as_os_str()),
            script: bytes(&self.name),
            arguments: self
                .arguments
                .iter()
                .map(|argument| bytes(argument))
                .collect(),
            environment: environment::own(),
            cwd: env::current_dir()?.into_os_string().into_vec(),
            umask: client::current_umask(),
            parent: std::os::unix::process::parent_id(),
        })
    }

    fn run(&self, run: &Run, stream: &UnixStream) -> ExitCode {
        // What a compiler started by the script reads must be seen, which it is not where the compile
        // hits. Only `kachefs-cc` sees to that itself.
        let command = || {
            let mut command = self.command();
            command.env(DISABLE, "1").env(WATCHED, "1");
            command
        };
        let ended = match run::streamed(command, run, None, |_| true) {
            Ok(ended) => ended,
            Err(run::Failed::Again | run::Failed::Unwatched) => return self.become_it(),
            Err(run::Failed::Lost(error)) => {
                client::say(&format!("kachefs: lost the build script: {error}"));
                return ExitCode::FAILURE;
            }
        };
        // Under a watch without privileges, such programs get none (`prctl(2)`, PR_SET_NO_NEW_PRIVS).
        if !ended.status.success() && ended.observed.as_ref().is_some_and(ran_setuid) {
            return self.become_it();
        }
        let outcome = Outcome {
            success: ended.status.success(),
            stdout: ended.stdout,
            stderr: ended.stderr,
            unsettled: None,
            observed: ended.observed,
        };
        // The run stands whether or not the daemon hears of it. It answers once it holds on to what
        // is in `OUT_DIR`.
        let heard = protocol::send(stream, &outcome);
        let _ = heard.and_then(|()| protocol::decision(stream));
        run::exit_like(ended.status)
    }
}

/// Whether a program was run, or at least opened, that runs as another user (`sudo`, say).
fn ran_setuid(observed: &Observed) -> bool {
    const SET_ID: u32 = 0o6000;
    let opened = observed.paths.iter();
    opened
        .filter(|(_, uses)| uses.accesses.contains(Access::Open))
        .filter_map(|(path, _)| Path::new(OsStr::from_bytes(path)).metadata().ok())
        .any(|meta| meta.is_file() && meta.mode() & SET_ID != 0)
}

/// Whether a file is the script that a launcher called so stands for: `build_script_build-0af.script`
/// for `build-script-build` and for `build_script_build-0af`.
fn is_called(file: &[u8], called: &[u8]) -> bool {
    let Some(script) = file.strip_suffix(SCRIPT_SUFFIX.as_bytes()) else {
        return false;
    };
    let alike = |name: &[u8]| -> Vec<u8> {
        let same = |byte: &u8| if *byte == b'-' { b'_' } else { *byte };
        name.iter().map(same).collect()
    };
    let (script, called) = (alike(script), alike(called));
    let rest = script.strip_prefix(called.as_slice());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_script_by_its_name() {
        let called = |file: &str, called: &str| is_called(file.as_bytes(), called.as_bytes());
        assert!(called(
            "build_script_build-0af.script",
            "build-script-build"
        ));
        assert!(called(
            "build_script_build-0af.script",
            "build_script_build-0af"
        ));
        assert!(called("build_script_build.script", "build-script-build"));
        assert!(!called("build_script_build-0af", "build-script-build"));
        assert!(!called("build_script_build-0af.d", "build-script-build"));
        assert!(!called(
            "build_script_main-0af.script",
            "build-script-build"
        ));
    }

    #[test]
    fn stands_in_for_build_scripts_only() {
        for name in [
            "/t/debug/build/a-1/build-script-build",
            "build_script_build-1",
        ] {
            assert!(stands_in(OsStr::new(name)), "{name}");
        }
        for name in ["kachefs-rustc", "/usr/bin/kachefs-rustc", "build"] {
            assert!(!stands_in(OsStr::new(name)), "{name}");
        }
    }
}
