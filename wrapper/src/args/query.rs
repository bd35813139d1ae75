//! Questions to a compiler: command lines that make no file and whose answer depends on little.
//!
//! Only what cargo asks before it builds (`cargo::util::rustc`, `TargetInfo::new`) is understood:
//! the version, and how outputs are named and which `cfg`s are set. Called by the action service,
//! and, by shape alone, by the wrapper.

use std::path::{Path, PathBuf};

use super::Uncacheable;
use super::getopt::{self, Token};
use super::parser::Parser;

/// What is printed about the target and the session, as `--print` takes it.
const PRINTED: &[&str] = &[
    "cfg",
    "crate-name",
    "file-names",
    "split-debuginfo",
    "sysroot",
];

/// The name cargo gives the crate it asks about.
const NO_CRATE: &str = "___";

/// A question whose answer depends on the compiler, its arguments and what is named here.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Query {
    /// `--target`, as given.
    pub target: Option<String>,
    /// `--sysroot`, absolute.
    pub sysroot: Option<PathBuf>,
    /// The answer depends on the CPU of this machine.
    pub native_cpu: bool,
    /// Whether standard input is the source.
    pub reads_input: bool,
}

/// Whether a command line, without the compiler's own path, may be a [`Query`].
pub fn looks_like_query<A: AsRef<[u8]>>(arguments: &[A]) -> bool {
    let is = |at: usize, text: &str| {
        let argument = arguments.get(at).map(AsRef::as_ref);
        argument == Some(text.as_bytes())
    };
    (is(0, "-vV") && arguments.len() == 1)
        || (is(0, "-") && is(1, "--crate-name") && is(2, NO_CRATE))
}

/// Reads the arguments that follow the compiler's own path.
pub fn query(arguments: &[String], cwd: &Path) -> Result<Query, Uncacheable> {
    if arguments == ["-vV"] {
        return Ok(Query {
            target: None,
            sysroot: None,
            native_cpu: false,
            reads_input: false,
        });
    }
    let mut parser = Parser::new(cwd);
    let (mut reads_input, mut prints) = (false, false);
    for token in getopt::tokens(arguments)? {
        match token {
            Token::Free(source) if source == "-" => reads_input = true,
            Token::Free(_) => return Err(Uncacheable::NotACompile),
            Token::Flag(name) => parser.flag(name)?,
            Token::Value("--print", what) if PRINTED.contains(&what.as_str()) => prints = true,
            Token::Value("--print" | "--explain" | "--emit", _) => {
                return Err(Uncacheable::NotACompile);
            }
            Token::Value(name, value) => parser.value(name, &value)?,
        }
    }
    let run = parser.run;
    // Files that are named would have to be looked at.
    let reads_files = !run.input_files.is_empty() || !run.externs.is_empty();
    if !prints || !reads_input || reads_files || run.crate_name != NO_CRATE {
        return Err(Uncacheable::NotACompile);
    }
    Ok(Query {
        target: run.target,
        sysroot: run.sysroot,
        native_cpu: run.native_cpu,
        reads_input,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: &str = "- --crate-name ___ --print=file-names --crate-type bin --crate-type rlib \
        --crate-type dylib --crate-type cdylib --crate-type staticlib --crate-type proc-macro \
        --print=sysroot --print=split-debuginfo --print=crate-name --print=cfg -Wwarnings";

    fn read(text: &str) -> Result<Query, Uncacheable> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        let query = query(&words, Path::new("/ws"));
        assert!(query.is_err() || looks_like_query(&words), "{text}");
        query
    }

    #[test]
    fn what_cargo_asks_is_understood() {
        let version = read("-vV").expect("a question");
        assert!(!version.reads_input);
        let plain = read(ASKED).expect("a question");
        assert!(plain.reads_input);
        assert_eq!((plain.target, plain.native_cpu), (None, false));
        let flags = format!("{ASKED} -Ctarget-cpu=native --target x86_64-unknown-linux-musl");
        let flags = read(&flags).expect("a question");
        assert!(flags.native_cpu);
        assert_eq!(flags.target.as_deref(), Some("x86_64-unknown-linux-musl"));
    }

    #[test]
    fn other_questions_are_not() {
        for other in [
            "-V",
            "-vV x",
            "--print=cfg",
            "- --crate-name ___",
            "- --crate-name ___ --print=native-static-libs",
            "- --crate-name ___ --print=cfg=file",
            "- --crate-name ___ --print=cfg --emit=metadata",
            "- --crate-name ___ --print=cfg -o out",
            "- --crate-name ___ --print=cfg x.rs",
            "- --crate-name other --print=cfg",
            "- --crate-name ___ --print=cfg -Zls=root",
            "- --crate-name ___ --print=cfg --target spec.json",
            "- --crate-name ___ --print=cfg -Cprofile-use=/p",
            "- --crate-name ___ --print=cfg @file",
            "- --crate-name ___ --print=cfg --wholly-new",
        ] {
            assert!(read(other).is_err(), "{other}");
        }
    }
}
