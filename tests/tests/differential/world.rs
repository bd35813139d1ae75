//! What a generated workspace is: plain data, from which `render` makes files and `steps` other
//! worlds. It never touches the disk.
//!
//! Values come from a small range, so that edits go back to earlier states all the time: that is
//! when a cache hits, rightly or wrongly.

use std::collections::{BTreeMap, BTreeSet};

/// The content of an input. Few, so that they come back.
pub type Value = u8;

/// How many values there are.
pub const VALUES: usize = 3;

/// Files by name; `None` is a file that could be there.
pub type Files = BTreeMap<String, Option<Value>>;

/// A workspace, the environment it is built in, and the command.
#[derive(Clone, Debug, PartialEq)]
pub struct World {
    /// In an order in which each depends on earlier ones only.
    pub crates: Vec<Krate>,
    /// Files in `shared/`, outside every package.
    pub shared: Files,
    /// Numbers of the files in `shared/list/`.
    pub listed: BTreeSet<u8>,
    /// Where the link `shared/current` leads: to one of the directories `shared/v0`...
    pub current: Value,
    /// Variables the build sees.
    pub env: BTreeMap<String, Option<Value>>,
    pub settings: Settings,
    pub command: usize,
}

/// Everything in the root manifest, `.cargo/config.toml` and `RUSTFLAGS`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Lines of `[profile.dev]` and `[profile.release]`.
    pub profile: BTreeMap<String, String>,
    /// A crate with an `opt-level` of its own.
    pub faster: Option<String>,
    /// `RUSTFLAGS`.
    pub flags: Option<String>,
    /// `build.rustflags` of `.cargo/config.toml`.
    pub config_flags: Option<String>,
    /// `KF_CONFIG` in `[env]` of `.cargo/config.toml`.
    pub config_env: Option<Value>,
    /// `CARGO_INCREMENTAL`.
    pub incremental: Option<bool>,
}

/// A package.
#[derive(Clone, Debug, PartialEq)]
pub struct Krate {
    pub name: String,
    /// Below the workspace.
    pub dir: String,
    pub version: Value,
    pub is_macro: bool,
    pub cdylib: bool,
    /// Whether the library has a unit test.
    pub unit_test: bool,
    pub deps: Vec<Dep>,
    /// Which of `f0` and `f1` are on by default.
    pub defaults: BTreeSet<u8>,
    /// Files in `data/`.
    pub files: Files,
    /// Numbers of the files in `list/`.
    pub listed: BTreeSet<u8>,
    /// Where the link `data/link.txt` leads.
    pub link: Option<Value>,
    pub script: Option<Script>,
    /// The first is the library.
    pub targets: Vec<Target>,
}

/// A dependency on another package of the world.
#[derive(Clone, Debug, PartialEq)]
pub struct Dep {
    pub on: String,
    pub renamed: bool,
    pub defaults: bool,
    pub features: BTreeSet<u8>,
    pub kind: DepKind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DepKind {
    Normal,
    Build,
    Dev,
}

/// Something cargo compiles.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    pub kind: TargetKind,
    pub name: String,
    pub parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TargetKind {
    Lib,
    Bin,
    Example,
    Test,
    Bench,
}

/// One input of a target; it adds its value to what the programs print.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    Literal(Style, Value),
    /// A file of the package, by a path that begins with `CARGO_MANIFEST_DIR` or a relative one.
    Include(How, String, bool),
    IncludeShared(String),
    /// A file behind a link to a directory.
    IncludeCurrent,
    Module(ModuleStyle, Value),
    /// `env!` or `option_env!`.
    Variable(String, bool),
    Feature(u8),
    /// `debug_assertions`, `panic`, the cfgs of `RUSTFLAGS`.
    Cfgs,
    Overflow,
    /// All that the package's build script made.
    Scripted,
    Macro(String, Ask),
    Place,
    /// What a program of the package prints, started by a test.
    Program,
    Warning(Value),
    Broken(Value),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Style {
    Const,
    Inline,
    Generic,
    Plain,
    Rules,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    Text,
    Bytes,
    Code,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ModuleStyle {
    File,
    Directory,
    Path,
}

/// What a proc macro is asked to look at.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// A file of the package, there or not.
    Read(String),
    /// The same by a path from the working directory.
    ReadFromHere(String),
    ReadShared(String),
    List,
    ListShared,
    /// A file looked for in the package's directory and in each one above.
    Climb(String),
    Variable(String),
    /// All variables whose names begin with `KF_`.
    Variables,
    /// Only the length of a file, without opening it.
    Length(String),
    /// The text of a link, and the path it leads to.
    Link,
    /// A file behind a link to a directory.
    Current,
    /// A file the build script made.
    Generated,
    /// A known gap: the name of the checkout's directory.
    DirectoryName,
    /// The macro's own code and that of its dependencies.
    Tag,
    Fail(Value),
}

/// A build script.
#[derive(Clone, Debug, PartialEq)]
pub struct Script {
    pub value: Value,
    pub declares: Declares,
    pub reads: Vec<Read>,
    /// A static library in C.
    pub native: Option<Value>,
    pub warns: bool,
    pub fails: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Declares {
    Nothing,
    Everything,
    OnlyItself,
}

/// What a build script looks at.
#[derive(Clone, Debug, PartialEq)]
pub enum Read {
    File(String),
    Shared(String),
    List,
    ListShared,
    Variable(String),
    /// All variables whose names begin with `KF_`.
    Variables,
    /// A file, read by a program the script starts.
    ByCommand(String),
    Link,
    /// What the scripts of dependencies tell (`DEP_…`).
    Metadata,
    /// A variable cargo sets.
    Cargo(&'static str),
    /// The script's own dependencies.
    Deps,
}

impl World {
    pub fn krate(&self, name: &str) -> Option<&Krate> {
        self.crates.iter().find(|krate| krate.name == name)
    }

    pub fn krate_mut(&mut self, name: &str) -> Option<&mut Krate> {
        self.crates.iter_mut().find(|krate| krate.name == name)
    }

    /// What cargo does not look at, of what the macros in a target read: when it changes, somebody
    /// must touch the source, or cargo will not even call the compiler.
    pub fn unseen_by_target(&self, krate: &Krate, target: &Target) -> String {
        let mut seen = String::new();
        for part in &target.parts {
            if *part == Part::IncludeCurrent {
                seen.push_str(&self.current.to_string());
            }
            if let Part::Macro(_, ask) = part {
                let value = match ask {
                    Ask::Read(name) | Ask::ReadFromHere(name) | Ask::Length(name) => {
                        format!("{:?}", krate.files.get(name))
                    }
                    Ask::ReadShared(name) | Ask::Climb(name) => {
                        format!("{:?}{:?}", self.shared.get(name), krate.files.get(name))
                    }
                    Ask::List => format!("{:?}", krate.listed),
                    Ask::ListShared => format!("{:?}", self.listed),
                    Ask::Variable(name) => self.variable(name),
                    Ask::Variables => format!("{:?}{:?}", self.env, self.settings.config_env),
                    Ask::Link => format!("{:?}", krate.link),
                    Ask::Current => self.current.to_string(),
                    // Of another script the files are other ones.
                    Ask::Generated => {
                        format!("{:?}{}", krate.script, self.unseen_by_script(krate))
                    }
                    Ask::Tag | Ask::Fail(_) | Ask::DirectoryName => String::new(),
                };
                seen.push_str(&value);
                seen.push('\n');
            }
        }
        seen
    }

    /// The same for the build script.
    pub fn unseen_by_script(&self, krate: &Krate) -> String {
        let Some(script) = &krate.script else {
            return String::new();
        };
        let mut seen = String::new();
        for read in &script.reads {
            // Nobody can declare variables by the beginning of their names.
            let declared = script.declares == Declares::Everything && *read != Read::Variables;
            let value = match read {
                _ if declared => continue,
                Read::Cargo(_) | Read::Deps | Read::Metadata => continue,
                Read::Variables => format!("{:?}{:?}", self.env, self.settings.config_env),
                Read::Link => format!("{:?}", krate.link),
                Read::File(name) | Read::ByCommand(name) => format!("{:?}", krate.files.get(name)),
                Read::List => format!("{:?}", krate.listed),
                Read::Shared(name) => format!("{:?}", self.shared.get(name)),
                Read::ListShared => format!("{:?}", self.listed),
                Read::Variable(name) => self.variable(name),
            };
            seen.push_str(&value);
            seen.push('\n');
        }
        seen
    }

    /// Whether something in it surely is the same in every checkout: nothing names the path, and no
    /// macro could.
    pub fn has_portable_package(&self) -> bool {
        let names_path = |part: &Part| match part {
            Part::Include(_, _, absolute) => *absolute,
            Part::Variable(name, _) => name == "CARGO_MANIFEST_DIR",
            Part::Scripted => true,
            _ => false,
        };
        self.crates.iter().any(|krate| {
            let library = krate.targets.first();
            let parts = library.map(|target| &target.parts).into_iter().flatten();
            krate.deps.is_empty() && krate.script.is_none() && !parts.into_iter().any(names_path)
        })
    }

    fn variable(&self, name: &str) -> String {
        match name {
            "KF_CONFIG" => format!("{:?}", self.settings.config_env),
            _ => format!("{:?}", self.env.get(name)),
        }
    }
}

impl Krate {
    pub fn depends_on(&self, name: &str) -> bool {
        self.deps.iter().any(|dep| dep.on == name)
    }

    /// Proc macros this package may use.
    pub fn macros(&self) -> Vec<String> {
        let names = self.deps.iter().map(|dep| dep.on.clone());
        names.filter(|name| name.starts_with('m')).collect()
    }
}

impl Dep {
    /// What the code calls it.
    pub fn alias(&self) -> String {
        if self.renamed {
            format!("r_{}", self.on)
        } else {
            self.on.clone()
        }
    }
}

impl Target {
    /// The file of its root, below the package.
    pub fn root(&self) -> String {
        let name = &self.name;
        match self.kind {
            TargetKind::Lib => "src/lib.rs".to_owned(),
            TargetKind::Bin => format!("src/bin/{name}.rs"),
            TargetKind::Example => format!("examples/{name}.rs"),
            TargetKind::Test => format!("tests/{name}.rs"),
            TargetKind::Bench => format!("benches/{name}.rs"),
        }
    }
}
