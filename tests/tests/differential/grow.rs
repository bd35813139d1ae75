//! Random worlds. Pure: all follows from the numbers drawn.

use std::collections::BTreeMap;

use harness::Chance;

use crate::gaps;
use crate::world::{
    Ask, Declares, Dep, DepKind, Files, How, Krate, ModuleStyle, Part, Read, Script, Settings,
    Style, Target, TargetKind, VALUES, Value, World,
};

/// Files of a package's `data/`, and of `shared/`.
const FILES: [&str; 3] = ["one.txt", "two.txt", "code.rs"];
const SHARED: [&str; 2] = ["s0.txt", "s1.txt"];
const VARIABLES: [&str; 3] = ["KF_A", "KF_B", "KF_CONFIG"];
/// What cargo tells about a package, and about the build to its script.
const ABOUT: [&str; 5] = [
    "CARGO_PKG_VERSION",
    "CARGO_PKG_DESCRIPTION",
    "CARGO_PKG_NAME",
    "CARGO_MANIFEST_DIR",
    "CARGO_CRATE_NAME",
];
const ABOUT_BUILD: [&str; 6] = [
    "PROFILE",
    "OPT_LEVEL",
    "DEBUG",
    "CARGO_FEATURE_F0",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_MANIFEST_DIR",
];

pub fn value(chance: &mut Chance) -> Value {
    Value::try_from(chance.below(VALUES)).unwrap_or_default()
}

fn one_of<'a>(chance: &mut Chance, from: &[&'a str]) -> &'a str {
    chance.pick(from).copied().unwrap_or_default()
}

fn some_of(chance: &mut Chance, percent: usize) -> std::collections::BTreeSet<u8> {
    (0..2).filter(|_| chance.percent(percent)).collect()
}

/// A whole workspace.
pub fn world(chance: &mut Chance) -> World {
    let mut world = World {
        crates: Vec::new(),
        shared: files(chance, &SHARED),
        listed: some_of(chance, 50),
        current: value(chance),
        env: BTreeMap::new(),
        settings: Settings::default(),
        command: chance.below(3),
    };
    for name in ["KF_A", "KF_B"] {
        let value = chance.percent(70).then(|| value(chance));
        world.env.insert(name.to_owned(), value);
    }
    let libraries = 2 + chance.below(3);
    for number in 0..libraries {
        if number == 1 || (number == 2 && chance.percent(30)) {
            let is_macro = true;
            let grown = krate(chance, &world, &format!("m{number}"), is_macro, false);
            world.crates.push(grown);
        }
        let is_top = number + 1 == libraries;
        let grown = krate(chance, &world, &format!("k{number}"), false, is_top);
        world.crates.push(grown);
    }
    world
}

fn files(chance: &mut Chance, names: &[&str]) -> Files {
    let mut files = Files::new();
    for name in names {
        files.insert((*name).to_owned(), Some(value(chance)));
    }
    // One that is looked for, and not there at first.
    let probe = chance.percent(20).then(|| value(chance));
    files.insert("probe.txt".to_owned(), probe);
    files
}

fn krate(chance: &mut Chance, world: &World, name: &str, is_macro: bool, is_top: bool) -> Krate {
    let mut deps: Vec<Dep> = Vec::new();
    for (number, other) in world.crates.iter().enumerate() {
        let near = number + 2 >= world.crates.len();
        if chance.percent(if is_macro {
            40
        } else if near {
            85
        } else {
            35
        }) {
            deps.push(dep(chance, other));
        }
    }
    let dir = match chance.below(3) {
        0 => format!("libs/deep/{name}"),
        _ => format!("crates/{name}"),
    };
    let mut krate = Krate {
        name: name.to_owned(),
        dir,
        version: value(chance),
        is_macro,
        cdylib: !is_macro && chance.percent(15),
        unit_test: chance.percent(25),
        deps,
        defaults: some_of(chance, 50),
        files: files(chance, &FILES),
        listed: some_of(chance, 50),
        link: chance.percent(40).then(|| value(chance)),
        script: None,
        targets: Vec::new(),
    };
    if !is_macro && chance.percent(50) {
        krate.script = Some(script(chance));
    }
    krate
        .targets
        .push(target(chance, &krate, TargetKind::Lib, "lib"));
    if is_macro {
        krate.targets[0].parts.clear();
    } else if is_top {
        krate
            .targets
            .push(target(chance, &krate, TargetKind::Bin, "app"));
        for (kind, name, percent) in [
            (TargetKind::Bin, "tool", 30),
            (TargetKind::Example, "shown", 30),
            (TargetKind::Test, "tried", 40),
            (TargetKind::Bench, "timed", 15),
        ] {
            if chance.percent(percent) {
                krate.targets.push(target(chance, &krate, kind, name));
            }
        }
    } else if chance.percent(25) {
        krate.targets.push(target(
            chance,
            &krate,
            TargetKind::Test,
            &format!("try_{name}"),
        ));
    }
    if name == "k1" {
        let shown = target(chance, &krate, TargetKind::Example, "shows");
        krate.targets.push(shown);
    }
    krate
}

/// A dependency on `other`.
pub fn dep(chance: &mut Chance, other: &Krate) -> Dep {
    let kind = if other.is_macro {
        DepKind::Normal
    } else {
        match chance.below(10) {
            0 => DepKind::Build,
            1 => DepKind::Dev,
            _ => DepKind::Normal,
        }
    };
    Dep {
        on: other.name.clone(),
        renamed: chance.percent(25),
        defaults: chance.percent(60),
        features: some_of(chance, 30),
        kind,
    }
}

/// A target with a few parts.
pub fn target(chance: &mut Chance, krate: &Krate, kind: TargetKind, name: &str) -> Target {
    let count = if kind == TargetKind::Lib {
        3 + chance.below(4)
    } else {
        1 + chance.below(2)
    };
    let mut parts: Vec<_> = (0..count).map(|_| part(chance, krate)).collect();
    if krate.script.is_some() && kind == TargetKind::Lib && chance.percent(80) {
        parts.push(Part::Scripted);
    }
    Target {
        kind,
        name: name.to_owned(),
        parts,
    }
}

/// A part for a target of this package.
pub fn part(chance: &mut Chance, krate: &Krate) -> Part {
    let macros = krate.macros();
    if let Some(name) = chance.pick(&macros)
        && chance.percent(40)
    {
        return Part::Macro(name.clone(), ask(chance));
    }
    match chance.below(15) {
        13 => Part::IncludeCurrent,
        14 => Part::Program,
        0 | 1 => Part::Literal(style(chance), value(chance)),
        2 | 3 => {
            let name = one_of(
                chance,
                &["one.txt", "two.txt", "one.txt", "code.rs", "link.txt"],
            );
            let how = match name {
                "code.rs" => How::Code,
                _ if chance.percent(30) => How::Bytes,
                _ => How::Text,
            };
            // Where there is no link, another file.
            let name = if name == "link.txt" && krate.link.is_none() {
                "one.txt"
            } else {
                name
            };
            Part::Include(how, name.to_owned(), chance.percent(40))
        }
        4 => Part::IncludeShared(one_of(chance, &SHARED).to_owned()),
        5 | 6 => {
            let styles = [ModuleStyle::File, ModuleStyle::Directory, ModuleStyle::Path];
            let style = chance.pick(&styles).copied().unwrap_or(ModuleStyle::File);
            Part::Module(style, value(chance))
        }
        7 => {
            let known = chance.percent(50);
            let name = if known {
                one_of(chance, &ABOUT)
            } else {
                one_of(chance, &VARIABLES)
            };
            Part::Variable(name.to_owned(), known)
        }
        8 => Part::Feature(u8::from(chance.percent(50))),
        9 => Part::Cfgs,
        10 => Part::Overflow,
        11 => Part::Place,
        _ => Part::Warning(value(chance)),
    }
}

pub fn style(chance: &mut Chance) -> Style {
    let styles = [
        Style::Const,
        Style::Inline,
        Style::Generic,
        Style::Plain,
        Style::Rules,
    ];
    chance.pick(&styles).copied().unwrap_or(Style::Plain)
}

fn ask(chance: &mut Chance) -> Ask {
    let file = one_of(chance, &["one.txt", "two.txt", "probe.txt", "probe.txt"]).to_owned();
    if let Some((ask, _)) = chance.pick(gaps::wanted())
        && chance.percent(20)
    {
        return ask.clone();
    }
    match chance.below(14) {
        9 => Ask::Variables,
        10 => Ask::Length(file),
        11 => Ask::Link,
        12 => Ask::Current,
        13 => Ask::Generated,
        0 | 1 => Ask::Read(file),
        2 => Ask::ReadFromHere(file),
        3 => Ask::ReadShared(one_of(chance, &["s0.txt", "probe.txt"]).to_owned()),
        4 => Ask::List,
        5 => Ask::ListShared,
        6 => Ask::Climb("probe.txt".to_owned()),
        7 => Ask::Variable(one_of(chance, &VARIABLES).to_owned()),
        _ => Ask::Tag,
    }
}

/// A build script.
pub fn script(chance: &mut Chance) -> Script {
    let declares = [
        Declares::Nothing,
        Declares::Everything,
        Declares::OnlyItself,
    ];
    let declares = chance.pick(&declares).copied().unwrap_or(Declares::Nothing);
    Script {
        value: value(chance),
        declares,
        reads: (0..=chance.below(4)).map(|_| read(chance)).collect(),
        native: chance.percent(15).then(|| value(chance)),
        warns: chance.percent(15),
        fails: false,
    }
}

fn read(chance: &mut Chance) -> Read {
    match chance.below(12) {
        8 => Read::Variables,
        9 => Read::ByCommand(one_of(chance, &["one.txt", "probe.txt"]).to_owned()),
        10 => Read::Link,
        11 => Read::Metadata,
        0 | 1 => Read::File(one_of(chance, &["one.txt", "two.txt", "probe.txt"]).to_owned()),
        2 => Read::Shared(one_of(chance, &["s0.txt", "s1.txt", "probe.txt"]).to_owned()),
        3 => Read::List,
        4 => Read::ListShared,
        5 => Read::Variable(one_of(chance, &VARIABLES).to_owned()),
        6 => Read::Cargo(one_of(chance, &ABOUT_BUILD)),
        _ => Read::Deps,
    }
}
