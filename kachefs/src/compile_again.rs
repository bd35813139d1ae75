//! A compile made again, beside where cargo had it made: without kachefs, with the arguments and the
//! environment it was asked for with, and into another directory. What is made there is compared with
//! what was served (`commands::verify`), or takes the place of what is lost (`service::lineage`).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

use wrapper::args::written::{self, Written};
use wrapper::aside::INCREMENTAL;
use wrapper::environment::is_jobserver;
use wrapper::protocol::PlannedCompile;

/// The compiler, to be started; it writes below `scratch`.
pub fn command(compile: &PlannedCompile, scratch: &Path) -> Command {
    let environment = compile.environment.iter();
    // The descriptors of cargo's jobserver are not ours.
    let environment = environment.filter(|(name, _)| !is_jobserver(name));
    let mut command = Command::new(OsStr::from_bytes(&compile.program));
    command
        .args(redirected(&compile.arguments, scratch))
        .env_clear()
        .envs(environment.map(|(n, v)| (OsStr::from_bytes(n), OsStr::from_bytes(v))))
        .current_dir(OsStr::from_bytes(&compile.cwd))
        .stdin(Stdio::null());
    command
}

/// The arguments with every directory that is written to replaced.
fn redirected(arguments: &[Vec<u8>], scratch: &Path) -> Vec<OsString> {
    let incremental = scratch.join(INCREMENTAL);
    let arguments = arguments.iter().map(|argument| OsStr::from_bytes(argument));
    let mut redirected: Vec<_> = arguments.clone().map(OsStr::to_owned).collect();
    for named in written::named_in(arguments) {
        let (at, argument) = named.with(match named.written {
            Written::Outputs => scratch,
            Written::Incremental => &incremental,
        });
        redirected[at] = argument;
    }
    redirected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_where_cargo_said() {
        let argv = |words: &str| -> Vec<Vec<u8>> {
            words
                .split(' ')
                .map(|word| word.as_bytes().to_vec())
                .collect()
        };
        let redirected = |words: &str| -> String {
            let words = redirected(&argv(words), Path::new("/s"));
            let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
            words.join(" ")
        };
        assert_eq!(
            redirected("--out-dir /t/debug/deps -C incremental=/t/i -C opt-level=1 a.rs"),
            "--out-dir /s -C incremental=/s/incremental -C opt-level=1 a.rs"
        );
        assert_eq!(
            redirected("--out-dir=/t -Cincremental=/t/i --codegen=incremental=/t"),
            "--out-dir=/s -Cincremental=/s/incremental --codegen=incremental=/s/incremental"
        );
    }
}
