//! What an action's key is made of, listed part by part for people: `kachefs explain` compares such
//! lists. The key itself is made elsewhere (`wrapper::key`); a part that is missing here makes an
//! explanation poorer, never a hit wrong.
//!
//! Runs behind cargo's back, after a miss.

use store::builds::{Part, PartKind, PartValue, Parts};
use store::{ActionKey, Digest, Hasher, Observation, Root, RootSet};
use wrapper::key::{Invocation, ScriptInvocation, Sources};
use wrapper::roots::Roots;

use super::prepare::Prepared;
use super::script;
use crate::clock;

/// More parts of one key than this are counted, not kept.
const MOST: usize = 4096;

/// Longer arguments are known by their hash.
const LONGEST_TEXT: usize = 256;

/// Arguments that may be given once: what follows the `=` is their value. With others, another value
/// is another argument.
const ONE_VALUE: &[&str] = &[
    "--cap-lints",
    "--color",
    "--crate-name",
    "--crate-type",
    "--edition",
    "--emit",
    "--error-format",
    "--json",
    "--sysroot",
    "--target",
];

/// Options of `-C` that may be given more than once.
const MANY_VALUES: &[&str] = &["-Clink-arg", "-Clink-args", "-Cllvm-args", "-Cpasses"];

/// What a compile or a run was found to be.
pub struct Known<'a, S: ?Sized> {
    /// Its key, before it is bound to paths.
    pub key: ActionKey,
    /// What it read.
    pub read: &'a S,
    /// Roots its outputs are bound to.
    pub bound: RootSet,
}

/// The parts of a compile's key; without what it read when that is not known.
pub fn of_compile(prepared: &Prepared, version: &str, known: Option<&Known<'_, Sources>>) -> Parts {
    let mut parts = Collected::new(&prepared.roots, version);
    parts.invocation(&prepared.facts);
    let dependencies = &prepared.dependencies;
    for (name, file, digest) in &dependencies.externs {
        let mut hasher = Hasher::new("kachefs extern");
        hasher.field(name.as_bytes()).field(file.as_bytes());
        let digest = hasher.digest(digest).finish();
        let name = name.rsplit(':').next().unwrap_or(name);
        parts.hash(PartKind::Extern, name.as_bytes(), &digest);
    }
    for (stem, digest) in &dependencies.closure {
        parts.hash(PartKind::Closure, stem.as_bytes(), digest);
    }
    let is_unwatched = known.is_some_and(|known| known.read.observed.is_none());
    let searched = is_unwatched.then_some(&dependencies.searched);
    for (path, digest) in dependencies
        .named
        .iter()
        .chain(searched.into_iter().flatten())
    {
        parts.hash(PartKind::Named, path, digest);
    }
    for (name, value) in &dependencies.environment {
        parts.add(PartKind::Variable, name, PartValue::hashed(value));
    }
    if let Some(known) = known {
        parts.read(known.read);
    }
    parts.finish(known.map(|known| (known.key, known.bound)))
}

/// The parts of the key of a build script's run.
pub(super) fn of_script(
    prepared: &script::Prepared,
    version: &str,
    known: Option<&Known<'_, [(Observation, Digest)]>>,
) -> Parts {
    let mut parts = Collected::new(&prepared.roots, version);
    parts.script(&prepared.facts);
    if let Some(known) = known {
        parts.observed(known.read);
    }
    parts.finish(known.map(|known| (known.key, known.bound)))
}

/// Parts being collected.
struct Collected(Parts);

impl Collected {
    fn new(roots: &Roots, version: &str) -> Self {
        Self(Parts {
            key: None,
            version: version.to_owned(),
            noted_ms: clock::now_ms(),
            bound: RootSet::default(),
            roots: Root::OF_CHECKOUT.map(|root| roots.path(root).to_owned()),
            list: Vec::new(),
            left_out: 0,
        })
    }

    fn add(&mut self, kind: PartKind, name: &[u8], value: PartValue) {
        if self.0.list.len() == MOST {
            self.0.left_out += 1;
            return;
        }
        let name = name.to_vec();
        self.0.list.push(Part { kind, name, value });
    }

    fn hash(&mut self, kind: PartKind, name: &[u8], digest: &Digest) {
        self.add(kind, name, PartValue::of(digest));
    }

    fn invocation(&mut self, facts: &Invocation) {
        self.hash(PartKind::Compiler, b"", &facts.compiler);
        if let Some(linker) = &facts.linker {
            self.hash(PartKind::Linker, b"", linker);
        }
        if let Some(cpu) = &facts.cpu {
            self.hash(PartKind::Processor, b"", cpu);
        }
        self.arguments(&facts.arguments);
        self.add(PartKind::CrateRoot, b"", text(&facts.source));
        self.add(PartKind::Place, b"", text(&[u8::from(facts.remaps_cwd)]));
    }

    fn script(&mut self, facts: &ScriptInvocation) {
        self.hash(PartKind::Script, b"", &facts.script);
        self.hash(PartKind::Compiler, b"", &facts.compiler);
        self.hash(PartKind::Processor, b"", &facts.processor);
        self.arguments(&facts.arguments);
        self.add(PartKind::Directory, b"", text(&facts.cwd));
        let umask = format!("{:o}", facts.umask);
        self.add(PartKind::Umask, b"", text(umask.as_bytes()));
        for (name, value) in &facts.environment {
            self.add(PartKind::Variable, name, PartValue::hashed(value));
        }
    }

    fn arguments(&mut self, arguments: &[Vec<u8>]) {
        let mut order = Hasher::new("kachefs order of arguments");
        for argument in arguments.iter().filter(|argument| is_own(argument)) {
            order.field(argument);
            let (name, value) = split(argument);
            self.add(PartKind::Argument, name, text(value));
        }
        self.hash(PartKind::ArgumentOrder, b"", &order.finish());
    }

    fn read(&mut self, sources: &Sources) {
        for (path, digest) in &sources.files {
            self.hash(PartKind::Source, path, digest);
        }
        for (name, value) in &sources.environment {
            let value = match value {
                Some(value) => PartValue::hashed(value),
                None => PartValue::Absent,
            };
            self.add(PartKind::Reported, name.as_bytes(), value);
        }
        self.observed(sources.observed.as_deref().unwrap_or_default());
        if let Some(digest) = &sources.package {
            self.hash(PartKind::Package, b"", digest);
        }
    }

    fn observed(&mut self, observed: &[(Observation, Digest)]) {
        for (observation, digest) in observed {
            let kind = PartKind::Observed(observation.look);
            self.hash(kind, &observation.path, digest);
        }
    }

    fn finish(mut self, known: Option<(ActionKey, RootSet)>) -> Parts {
        if let Some((key, bound)) = known {
            self.0.key = Some(key);
            self.0.bound = bound;
        }
        self.0
    }
}

fn text(text: &[u8]) -> PartValue {
    if text.len() > LONGEST_TEXT {
        PartValue::hashed(text)
    } else {
        PartValue::Text(text.to_vec())
    }
}

/// Whether an argument is no part of its own in another form: externs, and the crate's root.
fn is_own(argument: &[u8]) -> bool {
    argument.starts_with(b"-") && !argument.starts_with(b"--extern=")
}

/// An argument's name and its value, where another value is the same argument changed.
fn split(argument: &[u8]) -> (&[u8], &[u8]) {
    let Some(at) = argument.iter().position(|byte| *byte == b'=') else {
        return (argument, b"");
    };
    let (name, value) = (&argument[..at], &argument[at + 1..]);
    let is_any = |names: &[&str]| names.iter().any(|known| known.as_bytes() == name);
    if is_any(ONE_VALUE) || (name.starts_with(b"-C") && !is_any(MANY_VALUES)) {
        (name, value)
    } else {
        (argument, b"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_have_names_and_values() {
        let split = |text: &'static str| split(text.as_bytes());
        assert_eq!(split("-Copt-level=2"), (&b"-Copt-level"[..], &b"2"[..]));
        assert_eq!(split("--edition=2024"), (&b"--edition"[..], &b"2024"[..]));
        for whole in [
            "--cfg=feature=\"a\"",
            "-Clink-arg=-la",
            "-Cincremental",
            "src/lib.rs",
        ] {
            assert_eq!(split(whole), (whole.as_bytes(), &b""[..]));
        }
    }
}
