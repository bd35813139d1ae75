//! The test tested: a difference is reported, and each input a world can have reaches what is
//! compared. Without this, a generator that lost an input would go on finding nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use harness::Must;

use crate::builds::{Mode, Way, difference};
use crate::gaps;
use crate::run::Run;
use crate::steps::{COMMANDS, Edit, Step};
use crate::world::{
    Ask, Declares, Dep, DepKind, Files, How, Krate, ModuleStyle, Part, Read, Script, Settings,
    Style, Target, TargetKind, World,
};

const LIMIT: Duration = Duration::from_mins(7);

/// A library, a proc macro, and a program that has every kind of part.
fn world() -> World {
    let mut app = krate("k1");
    app.deps = vec![dep("k0"), dep("m0")];
    app.script = Some(Script {
        value: 0,
        declares: Declares::OnlyItself,
        reads: reads(),
        native: Some(0),
        warns: false,
        fails: false,
    });
    app.targets = vec![
        target(TargetKind::Lib, "lib", parts()),
        target(TargetKind::Bin, "app", Vec::new()),
    ];
    let mut macros = krate("m0");
    macros.is_macro = true;
    let command = COMMANDS.iter().position(|words| *words == "build");
    World {
        crates: vec![krate("k0"), macros, app],
        shared: files(&["s0.txt", "probe.txt"]),
        listed: BTreeSet::new(),
        current: 0,
        env: BTreeMap::from([("KF_A".to_owned(), Some(0))]),
        settings: Settings::default(),
        command: command.must("a build"),
    }
}

fn files(names: &[&str]) -> Files {
    names
        .iter()
        .map(|name| ((*name).to_owned(), (*name != "probe.txt").then_some(0)))
        .collect()
}

fn krate(name: &str) -> Krate {
    Krate {
        name: name.to_owned(),
        dir: format!("crates/{name}"),
        version: 0,
        is_macro: false,
        cdylib: false,
        unit_test: false,
        deps: Vec::new(),
        defaults: BTreeSet::new(),
        files: files(&["one.txt", "two.txt", "code.rs", "probe.txt"]),
        listed: BTreeSet::new(),
        link: Some(0),
        script: None,
        targets: vec![target(TargetKind::Lib, "lib", vec![Part::Feature(0)])],
    }
}

fn dep(on: &str) -> Dep {
    Dep {
        on: on.to_owned(),
        renamed: true,
        defaults: true,
        features: BTreeSet::new(),
        kind: DepKind::Normal,
    }
}

fn target(kind: TargetKind, name: &str, parts: Vec<Part>) -> Target {
    Target {
        kind,
        name: name.to_owned(),
        parts,
    }
}

/// `two.txt`, `s0.txt` and the probes are for the macros, `one.txt` for the script.
fn parts() -> Vec<Part> {
    let ask = |ask| Part::Macro("m0".to_owned(), ask);
    vec![
        Part::Literal(Style::Const, 0),
        Part::Include(How::Code, "code.rs".to_owned(), true),
        Part::Include(How::Text, "link.txt".to_owned(), false),
        Part::IncludeCurrent,
        Part::Module(ModuleStyle::Directory, 0),
        Part::Variable("CARGO_PKG_VERSION".to_owned(), true),
        Part::Cfgs,
        Part::Overflow,
        Part::Scripted,
        Part::Warning(0),
        ask(Ask::Read("two.txt".to_owned())),
        ask(Ask::Read("probe.txt".to_owned())),
        ask(Ask::ReadShared("s0.txt".to_owned())),
        ask(Ask::List),
        ask(Ask::ListShared),
        ask(Ask::Variable("KF_A".to_owned())),
        ask(Ask::Variables),
        ask(Ask::Tag),
    ]
}

fn reads() -> Vec<Read> {
    vec![
        Read::File("one.txt".to_owned()),
        Read::Shared("probe.txt".to_owned()),
        Read::ByCommand("probe.txt".to_owned()),
        Read::Cargo("OPT_LEVEL"),
        Read::Deps,
    ]
}

/// An edit of every input of that world.
fn edits(world: &World) -> Vec<Edit> {
    let app = || "k1".to_owned();
    let file = |name: &str| Edit::File(app(), name.to_owned(), Some(1));
    let settings = |change: fn(&mut Settings)| {
        let mut settings = world.settings.clone();
        change(&mut settings);
        Edit::Settings(settings)
    };
    let script = |change: fn(&mut Script)| {
        let script = world.krate("k1").and_then(|krate| krate.script.clone());
        let mut script = script.must("a script");
        change(&mut script);
        Edit::Script(app(), Some(script))
    };
    let mut edits: Vec<_> = ["one.txt", "two.txt", "code.rs", "probe.txt"]
        .map(file)
        .into();
    edits.extend([
        Edit::Link(app(), 1),
        Edit::Current(1),
        Edit::Version(app(), 1),
        Edit::Listed(app(), 0),
        Edit::Listed("m0".to_owned(), 0),
        Edit::SharedListed(1),
        Edit::Shared("s0.txt".to_owned(), Some(1)),
        Edit::Shared("probe.txt".to_owned(), Some(1)),
        Edit::Env("KF_A".to_owned(), None),
        Edit::Env("KF_NEW".to_owned(), Some(1)),
        Edit::Default("k0".to_owned(), 0),
        script(|script| script.value = 1),
        script(|script| script.native = Some(1)),
        script(|script| script.warns = true),
        script(|script| script.fails = true),
        settings(|settings| settings.flags = Some("--cfg kf_a".to_owned())),
        settings(|settings| settings.config_env = Some(1)),
        settings(|settings| {
            let checks = ("overflow-checks".to_owned(), "false".to_owned());
            settings.profile.extend([checks]);
        }),
        settings(|settings| {
            settings
                .profile
                .extend([("opt-level".to_owned(), "1".to_owned())]);
        }),
    ]);
    for (place, part) in [
        (0, Part::Literal(Style::Const, 1)),
        (4, Part::Module(ModuleStyle::Directory, 1)),
        (9, Part::Warning(1)),
        (9, Part::Broken(1)),
        (9, Part::Macro("m0".to_owned(), Ask::Fail(1))),
    ] {
        let mut parts = parts();
        parts[place] = part;
        edits.push(Edit::Parts(app(), "lib".to_owned(), parts));
    }
    edits
}

#[test]
fn every_input_reaches_what_is_compared() {
    let world = world();
    let mut run = Run::new(&world, Mode::Portable, LIMIT);
    let first = run.build(Way::Plain);
    assert!(first.seen.success, "{}", first.outcome);
    assert_eq!(first.seen.programs.len(), 1, "{}", first.outcome);
    for edit in edits(&world) {
        run.take(&Step::Edit(edit.clone()));
        let seen = run.build(Way::Plain).seen;
        assert!(
            difference(&first.seen, &seen).is_some(),
            "{edit:?} changes nothing that is compared: {seen:#?}"
        );
        run.take(&Step::Become(Box::new(world.clone())));
    }
    assert_eq!(difference(&first.seen, &run.build(Way::Plain).seen), None);
}

/// The compiler in the view never hears of an edit: as with a wrong hit, its program is the old one.
#[test]
fn a_hidden_edit_is_reported() {
    let world = world();
    let mut run = Run::new(&world, Mode::Portable, LIMIT);
    run.compare(0).map_err(|failure| failure.what).must("alike");
    let view = run.build(Way::View);
    let edit = Edit::File("k1".to_owned(), "two.txt".to_owned(), Some(1));
    run.take(&Step::Edit(edit));
    let failure = run.judge(7, &view).err();
    let failure = failure.must("the difference is seen");
    assert_eq!(failure.step, 7);
    for part in ["two.txt:v0", "two.txt:v1", "in the emptied view: right"] {
        assert!(failure.what.contains(part), "{part:?}: {}", failure.what);
    }
}

/// A real wrong hit is found, and whoever closes a gap hears that the list is out of date.
#[test]
fn known_gaps_are_found_where_they_are_generated() {
    for (ask, reason) in gaps::KNOWN {
        let mut world = world();
        let app = world.krate_mut("k1").must("the program's package");
        app.targets[0].parts = vec![Part::Macro("m0".to_owned(), ask.clone())];
        let mut run = Run::new(&world, Mode::Portable, LIMIT);
        run.compare(0).map_err(|failure| failure.what).must("alike");
        run.take(&Step::Copy);
        let failure = run.compare(1).err();
        let failure = failure.must(format!("{ask:?} is no gap any more: {reason}"));
        assert!(failure.what.contains("still different"), "{}", failure.what);
    }
}
