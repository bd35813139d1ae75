//! What two keys of one unit do not have in common, in words.
//!
//! Differences that follow from others are left out: cargo's hash of a unit (`-C metadata`) follows
//! from whatever it hashed, a new version brings new paths.

use std::collections::{BTreeMap, BTreeSet};

use store::builds::{Part, PartKind, PartValue, Parts};
use store::{Look, Root};
use wrapper::roots;

use super::report::{Cause, CauseKind};

/// Arguments that cargo makes of everything it knows of a unit.
const HASHES_OF_CARGO: [&str; 2] = ["-C metadata", "-C extra-filename"];

/// Variables that a package's version and place decide.
const OF_A_VERSION: [&str; 2] = ["CARGO_PKG_VERSION", "CARGO_MANIFEST_"];

/// What a unit has not in common with the nearest earlier one.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// What differs in itself.
    pub causes: Vec<Cause>,
    /// Crates that differ, with what became of them.
    pub dependencies: BTreeMap<String, &'static str>,
    /// Whether the build script is another one.
    pub script: bool,
    /// The packages whose build scripts made what differs.
    pub makers: BTreeSet<String>,
}

impl Difference {
    /// The difference to the one of `earlier` that differs in the fewest parts; of several, the last.
    pub fn to_nearest(parts: &Parts, earlier: &[Parts]) -> Self {
        let candidates = earlier.iter().rev();
        let nearest = candidates.min_by_key(|known| Changed::between(known, parts).0.len());
        match nearest {
            None => Self::alone(CauseKind::FirstTime, "no earlier compile of it is known"),
            Some(nearest) => Self::to(nearest, parts),
        }
    }

    fn alone(kind: CauseKind, text: &str) -> Self {
        Self {
            causes: vec![cause(kind, "", None, None, text.to_owned())],
            ..Self::default()
        }
    }

    fn to(before: &Parts, after: &Parts) -> Self {
        let changed = Changed::between(before, after);
        if changed.0.is_empty() {
            return Self::of_the_same(before, after);
        }
        let mut difference = Self::default();
        difference.add_version(before, after);
        for (part, (was, is)) in &changed.0 {
            difference.add(part, was, is);
        }
        difference.leave_out_what_follows();
        difference
    }

    /// All parts are the same, and yet nothing was found.
    fn of_the_same(before: &Parts, after: &Parts) -> Self {
        let mut other: Vec<_> = Root::OF_CHECKOUT
            .into_iter()
            .zip(before.roots.iter().zip(&after.roots))
            .filter(|(root, (was, is))| before.bound.contains(*root) && was != is)
            .map(|(root, (was, is))| {
                let what = match root {
                    Root::Cwd => "workspace",
                    Root::CargoHome => "cargo home",
                    Root::View => "target directory",
                    Root::Home | Root::Temp => "user",
                };
                let text = format!(
                    "path-bound: the outputs hold the path of the {what}; it was compiled for {was}, here it is {is}"
                );
                let (was, is) = (Some(was.clone()), Some(is.clone()));
                cause(CauseKind::PathBound, what, was, is, text)
            })
            .collect();
        // Whose they are is not noted.
        for (root, what) in [
            (Root::Home, "home directory"),
            (Root::Temp, "temporary directory"),
        ] {
            if other.is_empty() && before.bound.contains(root) {
                let text =
                    format!("path-bound: the outputs hold the path of a {what}, here another");
                other.push(cause(CauseKind::PathBound, what, None, None, text));
            }
        }
        if !other.is_empty() {
            return Self {
                causes: other,
                ..Self::default()
            };
        }
        if before.key == after.key {
            let text =
                "it was compiled before, but the result is not usable any more: evicted or damaged";
            return Self::alone(CauseKind::ResultGone, text);
        }
        let looks = |part: &Part| matches!(part.kind, PartKind::Observed(_));
        if before.list.iter().chain(&after.list).any(looks) {
            let text = "all that it reads is as before: the result was evicted or damaged, or something \
                it looked for in vain is there now";
            return Self::alone(CauseKind::ResultGone, text);
        }
        let text = "something differs that is not told apart, such as the order of files";
        Self::alone(CauseKind::Unknown, text)
    }

    fn add_version(&mut self, before: &Parts, after: &Parts) {
        if before.version != after.version {
            let (was, is) = (before.version.clone(), after.version.clone());
            let text = format!("version {was} became {is}");
            let version = cause(CauseKind::Version, "", Some(was), Some(is), text);
            self.causes.push(version);
        }
    }

    fn add(&mut self, part: &(PartKind, Vec<u8>), was: &[&PartValue], is: &[&PartValue]) {
        let (kind, name) = (part.0, shown(&part.1));
        if matches!(kind, PartKind::Extern | PartKind::Closure) {
            self.add_dependency(kind, &name, !was.is_empty(), !is.is_empty());
            return;
        }
        if kind == PartKind::Script {
            self.script = true;
        }
        self.makers.extend(maker(&name).map(ToOwned::to_owned));
        self.causes.push(cause_of(kind, &name, was, is));
    }

    fn add_dependency(&mut self, kind: PartKind, name: &str, was: bool, is: bool) {
        // A crate in the closure goes by its file: `serde-0123abcd`.
        let name = match kind {
            PartKind::Closure => name.rsplit_once('-').map_or(name, |(name, _)| name),
            _ => name,
        };
        let became = match (was, is) {
            (true, false) => "is gone",
            (false, true) => "is new",
            _ => "changed",
        };
        let known = self.dependencies.entry(name.to_owned()).or_insert(became);
        if *known != became {
            *known = "changed";
        }
    }

    fn leave_out_what_follows(&mut self) {
        let has = |kind| self.causes.iter().any(|cause| cause.kind == kind);
        let (version, argument) = (has(CauseKind::Version), has(CauseKind::Argument));
        let sources: BTreeSet<String> = self
            .causes
            .iter()
            .filter(|cause| matches!(cause.kind, CauseKind::Source | CauseKind::GeneratedSource))
            .map(|cause| cause.name.clone())
            .collect();
        let (mut variables, mut looked_at) = (BTreeSet::new(), BTreeSet::new());
        self.causes.retain(|cause| match cause.kind {
            CauseKind::Unknown => !argument,
            CauseKind::Source | CauseKind::CrateRoot | CauseKind::LookedAt if version => false,
            CauseKind::LookedAt => {
                !sources.contains(&cause.name) && looked_at.insert(cause.name.clone())
            }
            CauseKind::Variable => {
                let of_version = |start: &&str| cause.name.starts_with(start);
                let follows = version && OF_A_VERSION.iter().any(of_version);
                !follows && variables.insert(cause.name.clone())
            }
            _ => true,
        });
        let is_hash = |cause: &Cause| {
            cause.kind == CauseKind::Argument && HASHES_OF_CARGO.contains(&cause.name.as_str())
        };
        if self.causes.iter().any(|cause| !is_hash(cause)) || !self.dependencies.is_empty() {
            self.causes.retain(|cause| !is_hash(cause));
        }
        self.causes
            .sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    }
}

type Values<'a> = (Vec<&'a PartValue>, Vec<&'a PartValue>);

/// Parts that are not the same, by what they are.
struct Changed<'a>(BTreeMap<(PartKind, Vec<u8>), Values<'a>>);

impl<'a> Changed<'a> {
    fn between(before: &'a Parts, after: &'a Parts) -> Self {
        let mut parts: BTreeMap<_, Values> = BTreeMap::new();
        // What it read is not known of one that is not stored.
        let told = |part: &&Part| after.key.is_some() || !is_read(part.kind);
        for part in before.list.iter().filter(told) {
            let key = (part.kind, part.name.clone());
            parts.entry(key).or_default().0.push(&part.value);
        }
        for part in after.list.iter().filter(told) {
            let key = (part.kind, part.name.clone());
            parts.entry(key).or_default().1.push(&part.value);
        }
        parts.retain(|(kind, _), (was, is)| {
            was.sort_unstable();
            is.sort_unstable();
            // Where else it looks follows from what it found, or from names it made up.
            let elsewhere =
                matches!(kind, PartKind::Observed(_)) && was.is_empty() != is.is_empty();
            was != is && !elsewhere
        });
        Self(parts)
    }
}

fn is_read(kind: PartKind) -> bool {
    matches!(
        kind,
        PartKind::Source | PartKind::Reported | PartKind::Observed(_) | PartKind::Package
    )
}

/// The package whose build script made what has this name: it lies in `build/<package>-<hash>/out` of
/// the target, or in `build/<package>/<hash>/out`.
pub(super) fn maker(name: &str) -> Option<&str> {
    let mut names = name.strip_prefix("target/")?.split('/');
    names.find(|name| *name == "build")?;
    let (package, next) = (names.next()?, names.next()?);
    if next == "out" {
        return Some(package.rsplit_once('-')?.0);
    }
    (names.next()? == "out").then_some(package)
}

fn cause(
    kind: CauseKind,
    name: &str,
    before: Option<String>,
    after: Option<String>,
    text: String,
) -> Cause {
    Cause {
        kind,
        name: name.to_owned(),
        before,
        after,
        text,
    }
}

fn cause_of(kind: PartKind, name: &str, was: &[&PartValue], is: &[&PartValue]) -> Cause {
    let (before, after) = (values(was), values(is));
    let became = match (&before, &after) {
        (None, _) => "is new",
        (_, None) => "is gone",
        _ => "changed",
    };
    let (kind, name, text) = match kind {
        PartKind::Argument => {
            let name = spelled(name);
            let text = argument(&name, before.as_deref(), after.as_deref());
            (CauseKind::Argument, name, text)
        }
        PartKind::Variable | PartKind::Reported => {
            let text = variable(name, before.as_deref(), after.as_deref());
            (CauseKind::Variable, name.to_owned(), text)
        }
        PartKind::Source if maker(name).is_some() => {
            let text = format!("generated file {name} {became}");
            (CauseKind::GeneratedSource, name.to_owned(), text)
        }
        PartKind::Source => {
            let became = if became == "is gone" {
                "is not read any more"
            } else {
                became
            };
            let text = format!("source file {name} {became}");
            (CauseKind::Source, name.to_owned(), text)
        }
        PartKind::Named => {
            let text = format!("{name}, which an argument names, {became}");
            (CauseKind::NamedInput, name.to_owned(), text)
        }
        PartKind::Observed(look) => {
            let text = format!("{name}, {}, {became}", looked(look));
            (CauseKind::LookedAt, name.to_owned(), text)
        }
        PartKind::CrateRoot => {
            let text = format!(
                "the crate's root file is {}",
                after.as_deref().unwrap_or("gone")
            );
            (CauseKind::CrateRoot, name.to_owned(), text)
        }
        other => {
            let (kind, text) = plain(other);
            (kind, String::new(), text.to_owned())
        }
    };
    cause(kind, &name, before, after, text)
}

/// Parts of which there is one.
fn plain(kind: PartKind) -> (CauseKind, &'static str) {
    match kind {
        PartKind::Compiler => (CauseKind::Compiler, "the compiler changed"),
        PartKind::Linker => {
            let text = "the linker changed, or a library where it looks for libraries";
            (CauseKind::Linker, text)
        }
        PartKind::Processor => (
            CauseKind::Processor,
            "the processor is another (target-cpu=native)",
        ),
        PartKind::Place => (
            CauseKind::Place,
            "the package moved into or out of $CARGO_HOME",
        ),
        PartKind::Package => {
            let text =
                "something in the package's directory changed (compilers cannot be watched here)";
            (CauseKind::PackageDirectory, text)
        }
        PartKind::Script => (CauseKind::BuildScript, "the build script changed"),
        PartKind::Directory => (
            CauseKind::WorkingDirectory,
            "the working directory is another",
        ),
        PartKind::Umask => (CauseKind::Umask, "the file mode mask (umask) changed"),
        _ => (CauseKind::Unknown, "the arguments came in another order"),
    }
}

fn looked(look: Look) -> &'static str {
    match look {
        Look::Open => "which it opens",
        Look::Status | Look::Link => "which it looks for",
        Look::Tree => "which it declares an input",
    }
}

/// An argument as people write it: `-C opt-level`.
fn spelled(name: &str) -> String {
    match name.strip_prefix("-C") {
        Some(option) => format!("-C {option}"),
        None => name.to_owned(),
    }
}

fn argument(name: &str, before: Option<&str>, after: Option<&str>) -> String {
    let with = |value: &str| match value {
        "" => name.to_owned(),
        value => format!("{name}={value}"),
    };
    match (before, after) {
        (None, Some(is)) => format!("argument {} added", with(is)),
        (Some(was), None) => format!("argument {} removed", with(was)),
        (Some(was), Some(is)) => format!("argument {} became {}", with(was), with(is)),
        (None, None) => format!("argument {name} changed"),
    }
}

fn variable(name: &str, before: Option<&str>, after: Option<&str>) -> String {
    match (before, after) {
        (None | Some(UNSET), Some(is)) => format!("variable {name} is set (value hash {is})"),
        (Some(was), None | Some(UNSET)) => {
            format!("variable {name} is not set any more (value hash {was})")
        }
        (was, is) => {
            let (was, is) = (was.unwrap_or(UNSET), is.unwrap_or(UNSET));
            format!("variable {name} changed (value hash {was} became {is})")
        }
    }
}

/// What stands for a variable that is not set.
const UNSET: &str = "unset";

fn values(values: &[&PartValue]) -> Option<String> {
    use std::fmt::Write;
    if values.is_empty() {
        return None;
    }
    let shown = values.iter().map(|value| match value {
        PartValue::Hash(hash) => hash.iter().fold(String::new(), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        }),
        PartValue::Text(text) => shown(text),
        PartValue::Absent => UNSET.to_owned(),
    });
    Some(shown.collect::<Vec<_>>().join(" "))
}

/// A template as people see it: relative to the workspace, below `target` or `$CARGO_HOME`.
fn shown(template: &[u8]) -> String {
    String::from_utf8_lossy(&roots::shown(template)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::maker;

    #[test]
    fn what_a_build_script_makes_tells_whose_it_is() {
        for (name, package) in [
            (
                "target/debug/build/a-sys-0123456789abcdef/out/lib/liba.a",
                "a-sys",
            ),
            ("target/debug/build/a-sys-0123456789abcdef/out", "a-sys"),
            ("target/ci-build/build/a-0123456789abcdef/out", "a"),
            (
                "target/x/release/build/a-sys/0123456789abcdef/out/a.rs",
                "a-sys",
            ),
        ] {
            assert_eq!(maker(name), Some(package), "{name}");
        }
        for name in [
            "target/debug/deps/liba.rlib",
            "target/debug/build/a-sys-0123456789abcdef/output",
            "target/debug/build/a-sys/0123456789abcdef/run/out",
            "src/build/a-0/out/a.rs",
        ] {
            assert_eq!(maker(name), None, "{name}");
        }
    }
}
