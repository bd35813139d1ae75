//! One build, and what can be seen of it from outside: whether it succeeded, what the compiler said,
//! what the programs print.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use harness::{Cmd, Must, Outcome, Sandbox, toolchain};
use serde_json::Value as Json;

use crate::checkout::Checkout;
use crate::steps::COMMANDS;
use crate::world::World;

/// What a build showed. Equal for equal inputs, wherever the target directory is.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub success: bool,
    /// Diagnostics as people read them.
    pub diagnostics: BTreeSet<String>,
    /// What programs printed, by path below the target directory.
    pub programs: BTreeMap<String, String>,
    /// In exact mode: what the outputs hold, by path below the target directory.
    pub outputs: BTreeMap<String, blake3::Hash>,
}

/// A finished build.
pub struct Build {
    pub seen: Seen,
    /// Names of what cargo did not find fresh.
    pub stale: Vec<String>,
    pub outcome: Outcome,
}

/// How a workspace is built.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// In the view, with the wrapper.
    View,
    /// In a directory of the disk, by cargo alone.
    Plain,
}

/// What is to be the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// What is said and done.
    Portable,
    /// Every byte: cargo alone builds at the view's own path.
    Exact,
}

/// Builds a checkout. In exact mode the target directory lies where the view does, for either way.
#[track_caller]
pub fn build(
    sandbox: &Sandbox,
    tools: &Tools,
    checkout: &Checkout,
    world: &World,
    (way, mode): (Way, Mode),
) -> Build {
    let words = COMMANDS[world.command];
    let target = match (way, mode) {
        (Way::View, _) | (_, Mode::Exact) => checkout.target(),
        (Way::Plain, Mode::Portable) => checkout.plain(),
    };
    let command = match way {
        Way::View => sandbox.cargo(&checkout.root, words),
        Way::Plain => sandbox
            .plain_cargo(&checkout.root, words)
            .arg("--target-dir")
            .arg(&target),
    };
    let going = keeps_going(words).then_some("--keep-going");
    let command = command.arg("--message-format=json").args(going);
    let mut command = environment(command, world);
    if mode == Mode::Exact {
        // Where it compiles incrementally, rustc names objects after the run.
        command = command.env("CARGO_INCREMENTAL", "0");
        command = command.env("KACHEFS_MODE", "exact");
    }
    let outcome = command.run();
    let mut build = read(words, &target, outcome);
    if build.seen.success {
        if mode == Mode::Exact {
            build.seen.outputs = outputs(&build.outcome, &target);
        }
        for path in programs(&build.outcome) {
            let name = path
                .strip_prefix(&target)
                .must("below the target directory");
            let said = run(sandbox, checkout, tools, &path);
            build.seen.programs.insert(name.display().to_string(), said);
        }
    }
    build
}

/// `cargo test` does not know the option.
fn keeps_going(words: &str) -> bool {
    !words.starts_with("test")
}

/// What both builds see.
fn environment(command: Cmd, world: &World) -> Cmd {
    let mut command = command;
    for (name, value) in &world.env {
        if let Some(value) = value {
            command = command.env(name, format!("v{value}"));
        }
    }
    let settings = &world.settings;
    if let Some(flags) = &settings.flags {
        command = command.env("RUSTFLAGS", flags);
    }
    if let Some(incremental) = settings.incremental {
        command = command.env("CARGO_INCREMENTAL", if incremental { "1" } else { "0" });
    }
    command
}

/// What cargo said.
fn read(words: &str, target: &Path, outcome: Outcome) -> Build {
    let here = target.display().to_string();
    let mut diagnostics = BTreeSet::new();
    let mut stale = Vec::new();
    for message in messages(&outcome) {
        match message["reason"].as_str() {
            Some("compiler-message") => {
                let text = message["message"]["rendered"].as_str().unwrap_or_default();
                let of = &message["target"]["name"];
                diagnostics.insert(format!("{of} {text}").replace(&here, "<target>"));
            }
            Some("compiler-artifact" | "build-script-executed") if message["fresh"] == false => {
                stale.push(message["target"]["name"].to_string());
            }
            _ => {}
        }
    }
    let success = outcome.status.success();
    // Of cargo's own words those that are about the build, not about its progress.
    let said = outcome.stderr.lines().map(str::trim);
    let told = said.filter(|line| {
        line.contains("the script fails")
            || line.starts_with("warning: k")
            || line.starts_with("error")
    });
    // Not how many errors: what fails in a macro is compiled twice, and says so twice
    // (`docs/design.md`, "The key").
    let told = told.map(|line| line.split(" due to ").next().unwrap_or(line));
    diagnostics.extend(told.map(|line| line.replace(&here, "<target>")));
    // Without `--keep-going` it is a race which errors are seen.
    if !success && !keeps_going(words) {
        diagnostics.clear();
    }
    Build {
        seen: Seen {
            success,
            diagnostics,
            programs: BTreeMap::new(),
            outputs: BTreeMap::new(),
        },
        stale,
        outcome,
    }
}

#[track_caller]
fn messages(outcome: &Outcome) -> Vec<Json> {
    let lines = outcome.stdout.lines();
    let messages = lines.map(|line| serde_json::from_str(line).must("a message of cargo"));
    messages.collect()
}

/// What a build names as its outputs, but for build scripts: in a view a launcher stands in for them.
#[track_caller]
fn outputs(outcome: &Outcome, target: &Path) -> BTreeMap<String, blake3::Hash> {
    let mut all = BTreeMap::new();
    for message in messages(outcome) {
        let kinds = message["target"]["kind"].as_array();
        if kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind == "custom-build")) {
            continue;
        }
        let files = message["filenames"].as_array().into_iter().flatten();
        for path in files.filter_map(Json::as_str) {
            let name = Path::new(path).strip_prefix(target);
            let name = name
                .must("below the target directory")
                .display()
                .to_string();
            all.insert(name, blake3::hash(&fs::read(path).must(path)));
        }
    }
    all
}

/// Programs, and libraries that a program can load.
fn programs(outcome: &Outcome) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for message in messages(outcome) {
        if let Some(path) = message["executable"].as_str() {
            all.push(PathBuf::from(path));
        }
        let is_cdylib = message["target"]["crate_types"]
            .as_array()
            .is_some_and(|types| types.iter().any(|name| name == "cdylib"));
        let files = message["filenames"].as_array().into_iter().flatten();
        let names = files.filter_map(Json::as_str);
        let libraries = names.filter(|name| is_cdylib && is_library(name));
        all.extend(libraries.map(PathBuf::from));
    }
    all
}

fn is_library(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|ext| ext == "so")
}

/// Runs a program, or has a library say its part.
#[track_caller]
fn run(sandbox: &Sandbox, checkout: &Checkout, tools: &Tools, path: &Path) -> String {
    let command = if is_library(&path.to_string_lossy()) {
        let name = path.file_stem().must("a name").to_string_lossy();
        let name = name.trim_start_matches("lib").to_owned();
        let name = name.split('-').next().unwrap_or_default().to_owned();
        let command = sandbox.command(&tools.loader);
        command.arg(path).arg(format!("{name}_print"))
    } else {
        sandbox.command(path)
    };
    // The unit tests of proc macros are linked against the compiler's libraries.
    let command = command.env("LD_LIBRARY_PATH", &tools.libraries);
    let outcome = command.in_dir(&checkout.root).run();
    // Unit tests say how long they took.
    let mut text: String = outcome
        .said()
        .lines()
        .filter(|line| !line.contains("finished in"))
        .fold(String::new(), |text, line| text + line + "\n");
    let target = if path.starts_with(checkout.target()) {
        checkout.target()
    } else {
        checkout.plain()
    };
    text = text.replace(&target.display().to_string(), "<target>");
    if !outcome.status.success() {
        let _ = write!(text, "{}", outcome.status);
    }
    text
}

/// What it takes to run what was built.
pub struct Tools {
    /// A program that loads a library and calls a function of it.
    loader: PathBuf,
    /// The libraries of the compiler.
    libraries: PathBuf,
}

impl Tools {
    #[track_caller]
    pub fn new(sandbox: &Sandbox) -> Self {
        let (source, program) = (sandbox.path("loader.rs"), sandbox.path("loader"));
        fs::write(&source, LOADER).must("loader.rs");
        let compile = sandbox
            .command("rustc")
            .arg(&source)
            .arg("-o")
            .arg(&program);
        let _ = compile.ok();
        let libraries = format!("lib/rustlib/{}/lib", toolchain::host());
        Self {
            loader: program,
            libraries: toolchain::sysroot().join(libraries),
        }
    }
}

const LOADER: &str = r#"
use std::ffi::{CString, c_char, c_int, c_void};
extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}
fn main() {
    let args: Vec<_> = std::env::args().map(|arg| CString::new(arg).unwrap()).collect();
    // SAFETY: the library is one of ours, and its function takes and gives nothing.
    unsafe {
        let library = dlopen(args[1].as_ptr(), 2);
        assert!(!library.is_null());
        let symbol = dlsym(library, args[2].as_ptr());
        assert!(!symbol.is_null());
        let print: extern "C" fn() = std::mem::transmute(symbol);
        print();
    }
}
"#;

/// Where two builds differ, for people; `None` if nowhere.
pub fn difference(one: &Seen, other: &Seen) -> Option<String> {
    let mut text = String::new();
    if one.success != other.success {
        let _ = writeln!(text, "success: {} / {}", one.success, other.success);
    }
    for (mark, from, without) in [('<', one, other), ('>', other, one)] {
        for line in from.diagnostics.difference(&without.diagnostics) {
            let _ = writeln!(text, "{mark} {line}");
        }
    }
    let names: BTreeSet<_> = one.programs.keys().chain(other.programs.keys()).collect();
    for name in names {
        let (one, other) = (one.programs.get(name), other.programs.get(name));
        if one != other {
            let _ = writeln!(text, "{name}:\n{}", lines_apart(one, other));
        }
    }
    for (mark, from, without) in [
        ('<', &one.outputs, &other.outputs),
        ('>', &other.outputs, &one.outputs),
    ] {
        for (name, hash) in from {
            if without.get(name) != Some(hash) {
                let _ = writeln!(text, "{mark} {name}: {hash}");
            }
        }
    }
    (one != other).then_some(text)
}

fn lines_apart(one: Option<&String>, other: Option<&String>) -> String {
    let (Some(one), Some(other)) = (one, other) else {
        return format!("  {} / {}", one.is_some(), other.is_some());
    };
    let mut text = String::new();
    let (first, second): (Vec<_>, Vec<_>) = (one.lines().collect(), other.lines().collect());
    for index in 0..first.len().max(second.len()) {
        let (a, b) = (first.get(index), second.get(index));
        if a != b {
            let _ = writeln!(text, "  < {}\n  > {}", a.unwrap_or(&""), b.unwrap_or(&""));
        }
    }
    text
}
