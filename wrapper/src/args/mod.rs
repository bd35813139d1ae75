//! The rustc argument model: what one compiler command line asks for, or why it is not cached.
//!
//! An allowlist. A flag, or a value of a flag, that is not understood makes the run uncacheable,
//! because a flag that is wrongly left out of the key gives wrong hits. Everything here is a pure
//! function of the command line and the working directory: no file is read, no environment asked.
//! Called by the action service with the arguments that follow the compiler's own path.

mod codegen;
mod getopt;
mod link;
mod parser;
mod query;
mod uncacheable;
pub mod written;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use link::link_arg_paths;
pub use query::{Query, looks_like_query, query};
pub use uncacheable::Uncacheable;

/// One cacheable run of rustc, or of a driver that takes its arguments.
///
/// Paths are absolute against the working directory unless said otherwise: joined to it and freed
/// of `.` components, but `..` stays, because only the disk knows where it leads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Invocation {
    /// `--crate-name`.
    pub crate_name: String,
    /// What is built, without repetitions. With `--test` it is one executable whatever the crate
    /// is; without any `--crate-type` it is taken for one too, although an attribute in the
    /// source may say otherwise (cargo always passes a type).
    pub crate_types: Vec<CrateType>,
    /// `--test`: a test harness is built.
    pub test: bool,
    /// The root source file, as given.
    pub source: PathBuf,
    /// `--out-dir`, absolute.
    pub out_dir: PathBuf,
    /// `-C extra-filename`, empty if absent.
    pub extra_filename: String,
    /// The output kinds.
    pub emit: Emit,
    /// Every `--extern`, in order.
    pub externs: Vec<Extern>,
    /// Every `-L`, in order.
    pub searches: Vec<Search>,
    /// The values of `-l`, in order, as given.
    pub native_libs: Vec<String>,
    /// `-C incremental`, absolute.
    pub incremental: Option<PathBuf>,
    /// `-C linker`, as given: a bare name is searched in `PATH`.
    pub linker: Option<PathBuf>,
    /// `-C linker-flavor`: without `linker` it decides which program links.
    pub linker_flavor: Option<String>,
    /// `-C link-arg` and the parts of `-C link-args`, in order.
    pub link_args: Vec<String>,
    /// `--target`, a name or the path of a specification, as given.
    pub target: Option<String>,
    /// `--sysroot`, absolute.
    pub sysroot: Option<PathBuf>,
    /// `-C split-debuginfo`: which files lie beside the outputs.
    pub split_debuginfo: SplitDebuginfo,
    /// The output depends on the CPU of this machine.
    pub native_cpu: bool,
    /// Files named by flags whose content matters: target specification, profile, LTO plugin.
    pub input_files: Vec<PathBuf>,
    /// The values of the user's own `--remap-path-prefix`, in order.
    pub user_remaps: Vec<String>,
    /// rustc announces its outputs. Always true for an `Invocation` the parser returns.
    pub json_artifacts: bool,
    /// Every argument that can influence outputs or replayed diagnostics, each in one spelling,
    /// in order. Roots in them are still literal. See [`parse`] for what is left out.
    pub keyed: Vec<String>,
}

impl Invocation {
    /// Whether an output holds more than this crate: the linker or the archiver collects the
    /// objects of the crate graph.
    pub fn is_linked(&self) -> bool {
        self.runs_linker() || (self.emit.link && self.crate_types.contains(&CrateType::Staticlib))
    }

    /// Whether rustc runs a linker, so that its identity and arguments matter.
    pub fn runs_linker(&self) -> bool {
        let linked = |kind: &CrateType| {
            matches!(
                kind,
                CrateType::Bin | CrateType::Dylib | CrateType::Cdylib | CrateType::ProcMacro
            )
        };
        self.emit.link && (self.test || self.crate_types.iter().any(linked))
    }

    /// Whether the crate is a procedural macro (its test harness is not).
    pub fn is_proc_macro(&self) -> bool {
        self.crate_types.contains(&CrateType::ProcMacro)
    }

    /// What output names are made of, such as `serde-0123abcd`.
    pub fn stem(&self) -> String {
        format!("{}{}", self.crate_name, self.extra_filename)
    }

    /// Whether a file is one of its outputs, going by its name: `libserde-0123abcd.rmeta`.
    pub fn is_output(&self, name: &str) -> bool {
        let rest = name.strip_prefix("lib").unwrap_or(name);
        let rest = rest.strip_prefix(&self.stem());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }

    /// The linker chosen by the last `-fuse-ld=`, such as `mold`: the compiler driver then runs
    /// `ld.mold`, or the path itself if it is one.
    pub fn fuse_ld(&self) -> Option<&str> {
        self.link_args
            .iter()
            .rev()
            .find_map(|arg| arg.strip_prefix("-fuse-ld="))
    }
}

/// A value of `--crate-type`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum CrateType {
    /// `lib`: the compiler's choice, an rlib.
    Lib,
    /// `rlib`
    Rlib,
    /// `dylib`: a shared library for Rust.
    Dylib,
    /// `cdylib`: a shared library for other languages.
    Cdylib,
    /// `staticlib`: an archive of the whole crate graph.
    Staticlib,
    /// `bin`: an executable.
    Bin,
    /// `proc-macro`: a shared library for the compiler.
    ProcMacro,
}

/// The output kinds of `--emit` that are cached.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Emit {
    /// `dep-info`. Always true for an `Invocation` the parser returns.
    pub dep_info: bool,
    /// `metadata`: an `.rmeta`.
    pub metadata: bool,
    /// `link`: the library or program.
    pub link: bool,
}

/// A value of `-C split-debuginfo`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum SplitDebuginfo {
    /// All is in the output.
    #[default]
    Off,
    /// In one file beside it.
    Packed,
    /// In a file for each object.
    Unpacked,
}

/// An `--extern`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Extern {
    /// What stands before the colon, such as `priv,noprelude`; empty if nothing does.
    pub options: String,
    /// The name of the crate.
    pub name: String,
    /// The file, absolute. Without one the crate is one of the toolchain's own.
    pub path: Option<PathBuf>,
}

/// A `-L`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Search {
    /// What is searched for.
    pub kind: SearchKind,
    /// The directory, absolute.
    pub path: PathBuf,
}

/// What a `-L` directory is searched for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum SearchKind {
    /// Crates that externs depend on.
    Dependency,
    /// Crates named in the source.
    Crate,
    /// Native libraries.
    Native,
    /// Apple frameworks.
    Framework,
    /// Everything; the default.
    All,
}

/// Reads the arguments that follow the compiler's own path.
///
/// `keyed` of the result holds all of them except: `--out-dir`; the directory of
/// `-C incremental` (`-Cincremental` stays as a marker); `--diagnostic-width`; `--color` where
/// JSON output makes it meaningless; `-L dependency=`; and the directory of each `--extern`.
/// Files and directories behind these are keyed by content, or do not matter.
pub fn parse(argv: &[String], cwd: &Path) -> Result<Invocation, Uncacheable> {
    parser::parse(argv, cwd)
}

/// `path` joined to `cwd`, without looking at the disk.
fn absolute(cwd: &Path, path: &str) -> PathBuf {
    cwd.join(path).components().collect()
}
