//! Why a compiler run is not cached: one named reason per refusal, counted and shown to the user.
//!
//! A reason is a fact about one invocation, never an error of kachefs, and never stops a build: the
//! caller runs the real compiler. Produced by the argument parser and, for the two reasons the
//! parser cannot see, by the wrapper itself.

use serde::{Deserialize, Serialize};

/// A reason not to cache one compiler run.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum Uncacheable {
    /// A query (`--print`, `-vV`, `--help`, `-C help`), or no source file at all.
    #[error("not a compilation: a query, or no source file")]
    NotACompile,
    /// The source is read from standard input.
    #[error("the source is standard input")]
    StdinSource,
    /// Arguments are in a file the parser does not read, rustc's or the linker's `@file`.
    #[error("arguments come from a response file")]
    ResponseFile,
    /// A flag, or a value of a flag, whose effect is not known to be covered by the key.
    #[error("flag not known to be safe: {0}")]
    UnknownFlag(String),
    /// An unstable flag: what it reads and writes may change with every compiler.
    #[error("unstable flag: {0}")]
    UnstableFlag(String),
    /// No usable `--crate-name`: output names depend on attributes in the source.
    #[error("no --crate-name")]
    NoCrateName,
    /// Outputs do not all go into one `--out-dir`: none, or `-o`, or `--emit kind=path`.
    #[error("outputs do not go into an --out-dir under names rustc chooses")]
    NoOutDir,
    /// No dep-info is emitted, so the sources that were read are not known.
    #[error("no dep-info is emitted")]
    NoDepInfo,
    /// No `--json=artifacts`, so the outputs are not announced.
    #[error("rustc does not announce its artifacts (--json=artifacts)")]
    NoArtifactNotifications,
    /// An output kind that is not stored, such as assembly or LLVM IR.
    #[error("output kind not cached: {0}")]
    EmitKind(String),
    /// An extern crate that rustc searches for, so the file is not known beforehand.
    #[error("extern crate without a path: {0}")]
    ExternWithoutPath(String),
    /// Debug info goes into files of its own (`-C split-debuginfo=packed` or `unpacked`).
    #[error("split debug info writes additional files")]
    SplitDebuginfo,
    /// Temporary files are to be kept (`-C save-temps`).
    #[error("-C save-temps writes additional files")]
    SaveTemps,
    /// More than one source file.
    #[error("several source files")]
    SeveralSources,
    /// `-C rpath`: the output holds a relative path from the output directory to the toolchain.
    #[error("-C rpath makes the output depend on where it is written")]
    Rpath,
    /// A linker argument makes the linker write a file that rustc does not announce.
    #[error("linker argument writes an additional file: {0}")]
    LinkerOutput(String),
    /// Linking for this target writes files rustc does not announce (`.pdb`, `.dSYM`, import
    /// libraries), or is not known not to.
    #[error("linking for {0} may write additional files")]
    TargetOutputs(String),
    /// A workspace wrapper that is not known stands between cargo and rustc (found by the wrapper).
    #[error("an unknown workspace wrapper runs the compiler")]
    WorkspaceWrapper,
    /// An argument is not valid UTF-8 (found by the wrapper).
    #[error("an argument is not valid UTF-8")]
    InvalidUtf8,
}

impl Uncacheable {
    /// The stable name of the reason, for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotACompile => "not-a-compile",
            Self::StdinSource => "stdin-source",
            Self::ResponseFile => "response-file",
            Self::UnknownFlag(_) => "unknown-flag",
            Self::UnstableFlag(_) => "unstable-flag",
            Self::NoCrateName => "no-crate-name",
            Self::NoOutDir => "no-out-dir",
            Self::NoDepInfo => "no-dep-info",
            Self::NoArtifactNotifications => "no-artifact-notifications",
            Self::EmitKind(_) => "emit-kind",
            Self::ExternWithoutPath(_) => "extern-without-path",
            Self::SplitDebuginfo => "split-debuginfo",
            Self::SaveTemps => "save-temps",
            Self::SeveralSources => "several-sources",
            Self::Rpath => "rpath",
            Self::LinkerOutput(_) => "linker-output",
            Self::TargetOutputs(_) => "target-outputs",
            Self::WorkspaceWrapper => "workspace-wrapper",
            Self::InvalidUtf8 => "invalid-utf8",
        }
    }
}
