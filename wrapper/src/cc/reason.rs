//! Why a run of a C compiler is not cached: one named reason each, counted and shown to the user.

/// A reason not to cache one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It links.
    Link,
    /// It preprocesses, or checks, and makes no object.
    Preprocess,
    /// It makes assembly.
    Assembly,
    /// It asks the compiler about itself.
    Query,
    /// No source is named.
    NoSource,
    /// More than one is.
    SeveralSources,
    /// What is compiled is no C, C++ or assembly: an object, a header, what was preprocessed.
    OtherSource,
    /// The source is standard input.
    Stdin,
    /// The object gets a name the compiler chooses.
    NoObject,
    /// `-x`: the language is not the one of the source's name.
    Language,
    /// Arguments are in a file.
    ResponseFile,
    /// `-M…` in a combination other than `-MD` or `-MMD` with `-MF`.
    DepfileFlags,
    /// Intermediate files are kept.
    SaveTemps,
    /// Debug information goes into a file of its own.
    SplitDwarf,
    /// A profile or coverage is made or used.
    Profile,
    /// A compiler's plugin runs.
    Plugin,
    /// C++ or clang modules.
    Modules,
    /// A precompiled header is made or used.
    PrecompiledHeader,
    /// A flag that is not known to be safe.
    UnknownFlag,
}

impl Reason {
    /// The stable name, for counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Link => "cc-link",
            Self::Preprocess => "cc-preprocess",
            Self::Assembly => "cc-assembly",
            Self::Query => "cc-query",
            Self::NoSource => "cc-no-source",
            Self::SeveralSources => "cc-several-sources",
            Self::OtherSource => "cc-other-source",
            Self::Stdin => "cc-stdin-source",
            Self::NoObject => "cc-no-object",
            Self::Language => "cc-language-flag",
            Self::ResponseFile => "cc-response-file",
            Self::DepfileFlags => "cc-depfile-flags",
            Self::SaveTemps => "cc-save-temps",
            Self::SplitDwarf => "cc-split-dwarf",
            Self::Profile => "cc-profile",
            Self::Plugin => "cc-plugin",
            Self::Modules => "cc-modules",
            Self::PrecompiledHeader => "cc-precompiled-header",
            Self::UnknownFlag => "cc-unknown-flag",
        }
    }
}
