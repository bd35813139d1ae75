//! The JSON of `kachefs explain --json`: a contract with scripts. Fields are added, never renamed.

use serde::{Deserialize, Serialize};
use store::builds::LoggedAction;

/// Version of the JSON form.
pub const SCHEMA: u32 = 1;

/// Why a build did not hit in everything.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Version of this form.
    pub schema: u32,
    /// Where the view is mounted.
    pub view: String,
    /// Which build this is.
    pub build: Build,
    /// How many actions ended how.
    pub actions: Actions,
    /// Actions that hit.
    pub hits: Vec<UnitName>,
    /// Actions that ran, and why.
    pub misses: Vec<Miss>,
    /// Actions that ran and failed.
    pub failed: Vec<Failed>,
    /// Actions that are not cached, and why.
    pub uncacheable: Vec<Uncacheable>,
}

impl Report {
    /// Nothing yet.
    pub fn new(view: String, build: Build) -> Self {
        Self {
            schema: SCHEMA,
            view,
            build,
            actions: Actions::default(),
            hits: Vec::new(),
            misses: Vec::new(),
            failed: Vec::new(),
            uncacheable: Vec::new(),
        }
    }
}

/// One build.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Build {
    /// Its number in its view.
    pub number: u64,
    /// Cargo's process.
    pub pid: u32,
    /// Milliseconds since the epoch when it first asked.
    pub asked_ms: u64,
}

/// Numbers of actions.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Actions {
    /// Served.
    pub hits: usize,
    /// Ran, and succeeded.
    pub misses: usize,
    /// Ran, and failed.
    pub failed: usize,
    /// Not cached.
    pub uncacheable: usize,
}

/// What an action makes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UnitName {
    /// The package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// The crate.
    #[serde(rename = "crate")]
    pub crate_name: String,
    /// Crate types, `test`, `build script` or `build script run`.
    pub kind: String,
}

impl UnitName {
    /// The unit of an action.
    pub fn of(action: &LoggedAction) -> Self {
        Self {
            package: action.unit.package.clone(),
            version: action.version.clone(),
            crate_name: action.unit.crate_name.clone(),
            kind: action.unit.kind.clone(),
        }
    }

    /// Whether a person who says `name` means it.
    pub fn is_called(&self, name: &str) -> bool {
        let alike = |own: &str| own.replace('-', "_") == name.replace('-', "_");
        alike(&self.package) || alike(&self.crate_name)
    }
}

/// An action that ran.
#[derive(Debug, Serialize, Deserialize)]
pub struct Miss {
    /// What it makes.
    #[serde(flatten)]
    pub unit: UnitName,
    /// Milliseconds it took.
    pub ran_ms: u64,
    /// Why it will miss again: it is not stored.
    pub not_stored: Option<String>,
    /// What is not as in the nearest earlier compile; empty where it only follows from others.
    pub causes: Vec<Cause>,
    /// The misses of this build it follows from.
    pub follows: Vec<UnitName>,
    /// The misses of this build that follow from it alone or with others.
    pub followers: Vec<UnitName>,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// What differs.
    pub kind: CauseKind,
    /// Which one of its kind.
    pub name: String,
    /// What it was, or a hash of it; `null` for what was not there.
    pub before: Option<String>,
    /// What it is, or a hash of it; `null` for what is not there.
    pub after: Option<String>,
    /// The same for people.
    pub text: String,
}

/// What differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CauseKind {
    /// No earlier compile of the unit is known.
    FirstTime,
    /// It was compiled before, and the result is not there any more.
    ResultGone,
    /// The outputs hold a path that is another one here.
    PathBound,
    /// The package's version.
    Version,
    /// The compiler.
    Compiler,
    /// The linker or what it links in by itself.
    Linker,
    /// The processor.
    Processor,
    /// An argument.
    Argument,
    /// The crate's root file.
    CrateRoot,
    /// Whether the package lies in `$CARGO_HOME`.
    Place,
    /// A source file.
    Source,
    /// A source file that a build script makes.
    GeneratedSource,
    /// A variable.
    Variable,
    /// A file or directory that a flag names.
    NamedInput,
    /// A path that was looked at.
    LookedAt,
    /// The package's directory.
    PackageDirectory,
    /// The build script.
    BuildScript,
    /// The working directory.
    WorkingDirectory,
    /// The file mode mask.
    Umask,
    /// A dependency.
    Dependency,
    /// Something that is not told apart.
    Unknown,
}

/// An action that failed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failed {
    /// What it makes.
    #[serde(flatten)]
    pub unit: UnitName,
    /// Milliseconds it took.
    pub ran_ms: u64,
}

/// An action that is not cached.
#[derive(Debug, Serialize, Deserialize)]
pub struct Uncacheable {
    /// What it makes.
    #[serde(flatten)]
    pub unit: UnitName,
    /// The name `kachefs stats` counts it under.
    pub reason: String,
    /// The reason in words.
    pub text: String,
}
