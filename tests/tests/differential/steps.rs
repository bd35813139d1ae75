//! What happens between two builds: edits of the world, and things done to directories.
//!
//! A plan is chosen before anything is built, from the seed alone. Every step carries all it needs,
//! so a failing plan can be cut down by leaving steps out.

use std::collections::BTreeMap;

use harness::Chance;

use crate::grow;
use crate::inputs;
use crate::world::{Ask, Dep, Krate, Part, Script, Settings, Target, TargetKind, Value, World};

/// The commands, as words for cargo.
pub const COMMANDS: [&str; 8] = [
    "build",
    "build --all-targets",
    "build --all-targets",
    "test --no-run",
    "check --all-targets",
    "build --release",
    "check",
    "build -p k1 --examples",
];

/// What may be deleted from a target directory: the beginning of a name, in a directory.
pub const DELETIONS: [(&str, &str); 6] = [
    ("debug", "app"),
    ("debug/deps", "libk0"),
    ("debug/deps", "k1"),
    ("debug/.fingerprint", "k"),
    ("debug/incremental", ""),
    ("debug/build", "k0"),
];

/// One step.
#[derive(Clone, Debug)]
pub enum Step {
    Edit(Edit),
    /// Another state of the whole tree, as after a switch of branches.
    Become(Box<World>),
    /// New times, nothing else.
    Touch(String),
    CleanPackage(String),
    CleanAll,
    EmptyView,
    Delete(usize),
    Remount,
    /// `kill -9`.
    KillDaemon,
    /// Go on in a copy of the checkout, under another path.
    Copy,
    /// Go back to an earlier checkout.
    Return(usize),
}

/// A change of the world. Names that are not there make it a change of nothing.
#[derive(Clone, Debug)]
pub enum Edit {
    Shared(String, Option<Value>),
    SharedListed(u8),
    Current(Value),
    Env(String, Option<Value>),
    Settings(Settings),
    Command(usize),
    File(String, String, Option<Value>),
    Listed(String, u8),
    Link(String, Value),
    Version(String, Value),
    Dir(String, String),
    Default(String, u8),
    AddDep(String, Dep),
    RemoveDep(String, String),
    Parts(String, String, Vec<Part>),
    Script(String, Option<Script>),
    AddTarget(String, Target),
    RemoveTarget(String, String),
    UnitTest(String),
    Cdylib(String),
}

/// A world and what happens to it.
pub fn plan(seed: u64, length: usize) -> (World, Vec<Step>) {
    let mut chance = Chance::of(seed);
    let first = grow::world(&mut chance);
    let (mut world, mut history, mut steps) = (first.clone(), vec![first.clone()], Vec::new());
    let mut copies = 0;
    while steps.len() < length {
        let step = choose(&mut chance, &world, &history, &mut copies);
        world = after(&world, &step);
        history.push(world.clone());
        steps.push(step);
    }
    (first, steps)
}

/// The world after a step.
pub fn after(world: &World, step: &Step) -> World {
    match step {
        Step::Edit(edit) => {
            let mut world = world.clone();
            // What is not there, for a step that would have added it was left out, stays away.
            let _ = apply(&mut world, edit);
            world
        }
        Step::Become(other) => (**other).clone(),
        _ => world.clone(),
    }
}

fn flip(numbers: &mut std::collections::BTreeSet<u8>, number: u8) {
    if !numbers.remove(&number) {
        numbers.insert(number);
    }
}

fn apply(world: &mut World, edit: &Edit) -> Option<()> {
    match edit.clone() {
        Edit::Shared(name, value) => drop(world.shared.insert(name, value)),
        Edit::SharedListed(number) => flip(&mut world.listed, number),
        Edit::Current(value) => world.current = value,
        Edit::Env(name, value) => drop(world.env.insert(name, value)),
        Edit::Settings(settings) => world.settings = settings,
        Edit::Command(command) => world.command = command,
        Edit::File(krate, name, value) => {
            world.krate_mut(&krate)?.files.insert(name, value);
        }
        Edit::Listed(krate, number) => flip(&mut world.krate_mut(&krate)?.listed, number),
        Edit::Link(krate, to) => world.krate_mut(&krate)?.link = Some(to),
        Edit::Version(krate, version) => world.krate_mut(&krate)?.version = version,
        Edit::Dir(krate, dir) => world.krate_mut(&krate)?.dir = dir,
        Edit::Default(krate, number) => flip(&mut world.krate_mut(&krate)?.defaults, number),
        Edit::AddDep(krate, dep) => {
            let krate = world.krate_mut(&krate)?;
            krate.deps.retain(|old| old.on != dep.on);
            krate.deps.push(dep);
        }
        Edit::RemoveDep(krate, on) => world.krate_mut(&krate)?.deps.retain(|dep| dep.on != on),
        Edit::Parts(krate, target, parts) => {
            let targets = &mut world.krate_mut(&krate)?.targets;
            targets.iter_mut().find(|found| found.name == target)?.parts = parts;
        }
        Edit::Script(krate, script) => world.krate_mut(&krate)?.script = script,
        Edit::AddTarget(krate, target) => {
            let targets = &mut world.krate_mut(&krate)?.targets;
            targets.retain(|old| old.name != target.name);
            targets.push(target);
        }
        Edit::RemoveTarget(krate, name) => {
            let krate = world.krate_mut(&krate)?;
            krate
                .targets
                .retain(|target| target.kind == TargetKind::Lib || target.name != name);
        }
        Edit::UnitTest(krate) => {
            let krate = world.krate_mut(&krate)?;
            krate.unit_test = !krate.unit_test;
        }
        Edit::Cdylib(krate) => {
            let krate = world.krate_mut(&krate)?;
            krate.cdylib = !krate.cdylib && !krate.is_macro;
        }
    }
    Some(())
}

fn choose(chance: &mut Chance, world: &World, history: &[World], copies: &mut usize) -> Step {
    if let Some(mended) = mend(world)
        && chance.percent(60)
    {
        return mended;
    }
    if world
        .settings
        .profile
        .get("lto")
        .is_some_and(|lto| lto.contains("thin"))
    {
        let settings = Settings::default();
        return Step::Edit(Edit::Settings(settings));
    }
    // Checks make no programs, and programs are what tells most.
    if COMMANDS[world.command].starts_with("check") && chance.percent(30) {
        return Step::Edit(Edit::Command(chance.below(2)));
    }
    let Some(krate) = chance.pick(&world.crates).cloned() else {
        return Step::EmptyView;
    };
    match chance.below(100) {
        0..=9 => {
            // The recent past more often than the beginning.
            let back = chance.below(history.len().min(6)) + 1;
            Step::Become(Box::new(history[history.len() - back].clone()))
        }
        10..=12 => Step::Touch(krate.name),
        13..=14 => Step::CleanPackage(krate.name),
        15 => Step::CleanAll,
        16..=21 => Step::EmptyView,
        22..=24 => Step::Delete(chance.below(DELETIONS.len())),
        25 if chance.percent(50) => Step::KillDaemon,
        25 => Step::Remount,
        26..=28 if *copies < 3 => {
            *copies += 1;
            Step::Copy
        }
        29..=30 if *copies > 0 => Step::Return(chance.below(*copies + 1)),
        31..=36 => Step::Edit(Edit::Command(chance.below(COMMANDS.len()))),
        37..=41 => Step::Edit(settings(chance, world)),
        42..=61 => Step::Edit(inputs::edit(chance, world)),
        62..=66 => Step::Edit(edit_script(chance, &krate)),
        67..=80 => Step::Edit(edit_package(chance, world, krate)),
        _ => Step::Edit(edit_parts(chance, &krate)),
    }
}

/// The step that ends a state in which nothing compiles.
fn mend(world: &World) -> Option<Step> {
    for krate in &world.crates {
        if let Some(script) = krate.script.as_ref().filter(|script| script.fails) {
            let script = Script {
                fails: false,
                ..script.clone()
            };
            return Some(Step::Edit(Edit::Script(krate.name.clone(), Some(script))));
        }
        for target in &krate.targets {
            let is_well =
                |part: &&Part| !matches!(part, Part::Broken(_) | Part::Macro(_, Ask::Fail(_)));
            let parts: Vec<_> = target.parts.iter().filter(is_well).cloned().collect();
            if parts.len() < target.parts.len() {
                let edit = Edit::Parts(krate.name.clone(), target.name.clone(), parts);
                return Some(Step::Edit(edit));
            }
        }
    }
    None
}

fn maybe(chance: &mut Chance) -> Option<Value> {
    chance.percent(75).then(|| grow::value(chance))
}

fn edit_script(chance: &mut Chance, krate: &Krate) -> Edit {
    let script = match &krate.script {
        _ if krate.is_macro => None,
        Some(script) => match chance.below(8) {
            0 => None,
            1 => Some(grow::script(chance)),
            2 => Some(Script {
                fails: true,
                ..script.clone()
            }),
            3 => Some(Script {
                warns: !script.warns,
                ..script.clone()
            }),
            4 if script.native.is_some() => Some(Script {
                native: Some(grow::value(chance)),
                ..script.clone()
            }),
            _ => Some(Script {
                value: grow::value(chance),
                ..script.clone()
            }),
        },
        None => Some(grow::script(chance)),
    };
    Edit::Script(krate.name.clone(), script)
}

/// An edit of a manifest.
fn edit_package(chance: &mut Chance, world: &World, krate: Krate) -> Edit {
    let place = world
        .crates
        .iter()
        .position(|other| other.name == krate.name);
    let earlier = &world.crates[..place.unwrap_or(0)];
    match chance.below(12) {
        0 | 1 => Edit::Version(krate.name, grow::value(chance)),
        2 => {
            let dirs = ["crates", "libs/deep", "other"];
            let dir = chance.pick(&dirs).copied().unwrap_or("crates");
            Edit::Dir(krate.name.clone(), format!("{dir}/{}", krate.name))
        }
        3 | 4 => Edit::Default(krate.name, u8::from(chance.percent(50))),
        5 | 6 => match chance.pick(earlier) {
            Some(other) => Edit::AddDep(krate.name, grow::dep(chance, other)),
            None => Edit::Version(krate.name, grow::value(chance)),
        },
        7 => match chance.pick(&krate.deps) {
            Some(dep) => Edit::RemoveDep(krate.name, dep.on.clone()),
            None => Edit::UnitTest(krate.name),
        },
        8 => {
            let kinds = [TargetKind::Bin, TargetKind::Example, TargetKind::Test];
            let kind = chance.pick(&kinds).copied().unwrap_or(TargetKind::Bin);
            let name = format!("more_{}_{}", format!("{kind:?}").to_lowercase(), krate.name);
            if krate.is_macro {
                return Edit::Listed(krate.name, 0);
            }
            Edit::AddTarget(
                krate.name.clone(),
                grow::target(chance, &krate, kind, &name),
            )
        }
        9 => match krate.targets.last() {
            Some(target) => Edit::RemoveTarget(krate.name, target.name.clone()),
            None => Edit::UnitTest(krate.name),
        },
        10 => Edit::UnitTest(krate.name),
        _ => Edit::Cdylib(krate.name),
    }
}

/// An edit of a source.
fn edit_parts(chance: &mut Chance, krate: &Krate) -> Edit {
    let Some(target) = chance.pick(&krate.targets).cloned() else {
        return Edit::UnitTest(krate.name.clone());
    };
    if krate.is_macro {
        // The code of the macros themselves.
        return Edit::Listed(krate.name.clone(), u8::from(chance.percent(50)));
    }
    let mut parts = target.parts;
    let place = chance.below(parts.len().max(1));
    match chance.below(20) {
        0..=2 => parts.insert(place.min(parts.len()), grow::part(chance, krate)),
        3 | 4 if parts.len() > 1 => drop(parts.remove(place)),
        5 => parts.push(Part::Broken(grow::value(chance))),
        6 => match chance.pick(&krate.macros()) {
            Some(name) => parts.push(Part::Macro(name.clone(), Ask::Fail(grow::value(chance)))),
            None => parts.push(Part::Warning(grow::value(chance))),
        },
        7 => parts.swap(0, place),
        _ => {
            let with_value = parts.iter_mut().filter_map(value_of);
            let mut values: Vec<_> = with_value.collect();
            let place = chance.below(values.len().max(1));
            match values.get_mut(place) {
                Some(value) => **value = grow::value(chance),
                None => parts.push(Part::Literal(grow::style(chance), grow::value(chance))),
            }
        }
    }
    Edit::Parts(krate.name.clone(), target.name, parts)
}

/// The value in the source itself, of parts that have one.
pub fn value_of(part: &mut Part) -> Option<&mut Value> {
    match part {
        Part::Literal(_, value)
        | Part::Module(_, value)
        | Part::Warning(value)
        | Part::Broken(value) => Some(value),
        _ => None,
    }
}

/// Flags and profiles; mostly back to none, because each change builds everything again.
fn settings(chance: &mut Chance, world: &World) -> Edit {
    let mut settings = world.settings.clone();
    let flags = [
        "--cfg kf_a",
        "--cfg kf_b",
        "--cfg kf_c=\"one\"",
        "-C debug-assertions=no",
    ];
    let flags = |chance: &mut Chance| {
        let flags = chance.pick(&flags).map(|flags| (*flags).to_owned());
        flags.filter(|_| chance.percent(50))
    };
    match chance.below(8) {
        0 => settings.flags = flags(chance),
        1 => settings.config_flags = flags(chance),
        2 | 3 => settings.config_env = maybe(chance),
        4 => {
            let names: Vec<_> = world
                .crates
                .iter()
                .map(|krate| krate.name.clone())
                .collect();
            let faster = chance.pick(&names).cloned();
            settings.faster = faster.filter(|_| chance.percent(50));
        }
        5 => settings.incremental = [None, Some(false), Some(true)][chance.below(3)],
        _ => {
            let choices = [
                ("opt-level", "1"),
                ("debug", "1"),
                ("debug-assertions", "false"),
                ("overflow-checks", "false"),
                ("panic", "\"abort\""),
                ("codegen-units", "1"),
                ("lto", "\"off\""),
                ("strip", "true"),
            ];
            let mut profile = BTreeMap::new();
            if let Some((name, value)) = chance.pick(&choices)
                && chance.percent(60)
            {
                profile.insert((*name).to_owned(), (*value).to_owned());
            }
            // Rarely: it takes the standard library in, for each program.
            if chance.percent(3) {
                profile.insert("lto".to_owned(), "\"thin\"".to_owned());
            }
            settings.profile = profile;
        }
    }
    Edit::Settings(settings)
}
