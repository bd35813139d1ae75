//! From a world to its files: manifests, sources, inputs. Pure.
//!
//! Every target has a function `digest` whose text holds the value of each of its inputs, and the
//! digests of its dependencies. Programs print it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::pieces::{self, Piece};
use crate::scripts;
use crate::world::{
    Ask, Dep, DepKind, Files, Krate, Part, Settings, Target, TargetKind, Value, World,
};

/// A file or a symbolic link.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    Text(String),
    Link(String),
}

/// All files, by path below the workspace.
pub type Picture = BTreeMap<String, Entry>;

/// The files of a world.
pub fn render(world: &World) -> Picture {
    let mut picture = Picture::new();
    put(&mut picture, "Cargo.toml".to_owned(), root_manifest(world));
    let config = config(&world.settings);
    if !config.is_empty() {
        put(&mut picture, ".cargo/config.toml".to_owned(), config);
    }
    inputs(&mut picture, "shared", &world.shared);
    // So that there is something to list, whatever the numbers.
    put(&mut picture, "shared/list/always".to_owned(), String::new());
    for number in &world.listed {
        put(
            &mut picture,
            format!("shared/list/n{number}"),
            String::new(),
        );
    }
    for value in 0..3 {
        put(
            &mut picture,
            format!("shared/v{value}/here.txt"),
            format!("here{value}"),
        );
    }
    let to = format!("v{}", world.current);
    picture.insert("shared/current".to_owned(), Entry::Link(to));
    for krate in &world.crates {
        package(&mut picture, world, krate);
    }
    picture
}

fn put(picture: &mut Picture, path: String, text: String) {
    picture.insert(path, Entry::Text(text));
}

fn inputs(picture: &mut Picture, dir: &str, files: &Files) {
    for (name, value) in files {
        if let Some(value) = value {
            put(picture, format!("{dir}/{name}"), input(name, *value));
        }
    }
}

fn input(name: &str, value: Value) -> String {
    if name == "code.rs" {
        format!("\"{name}:v{value}\"")
    } else {
        // Of different lengths.
        format!("{name}:v{value}{}", "+".repeat(usize::from(value)))
    }
}

fn root_manifest(world: &World) -> String {
    let members: Vec<_> = world.crates.iter().map(|krate| &krate.dir).collect();
    let mut text = format!("[workspace]\nresolver = \"2\"\nmembers = {members:?}\n");
    for profile in ["dev", "release"] {
        let _ = writeln!(text, "\n[profile.{profile}]\ndebug = 0");
        if profile == "release" {
            text.push_str("opt-level = 1\n");
        }
        for (name, value) in &world.settings.profile {
            let both = !matches!(&**name, "opt-level" | "debug") || profile == "dev";
            if both && name == "debug" {
                text = text.replace("[profile.dev]\ndebug = 0", "[profile.dev]");
            }
            if both {
                let _ = writeln!(text, "{name} = {value}");
            }
        }
    }
    let faster = world.settings.faster.as_ref();
    if let Some(name) = faster.filter(|name| world.krate(name).is_some()) {
        let _ = writeln!(text, "\n[profile.dev.package.{name}]\nopt-level = 1");
    }
    text
}

fn config(settings: &Settings) -> String {
    let mut text = String::new();
    if let Some(flags) = &settings.config_flags {
        let words: Vec<_> = flags.split(' ').collect();
        let _ = writeln!(text, "[build]\nrustflags = {words:?}");
    }
    if let Some(value) = settings.config_env {
        let _ = writeln!(text, "[env]\nKF_CONFIG = \"v{value}\"");
    }
    text
}

fn package(picture: &mut Picture, world: &World, krate: &Krate) {
    let dir = &krate.dir;
    put(picture, format!("{dir}/Cargo.toml"), manifest(world, krate));
    inputs(picture, &format!("{dir}/data"), &krate.files);
    if let Some(value) = krate.link {
        let to = format!("real{value}.txt");
        picture.insert(format!("{dir}/data/link.txt"), Entry::Link(to));
        for value in 0..3 {
            put(
                picture,
                format!("{dir}/data/real{value}.txt"),
                format!("real{value}"),
            );
        }
    }
    put(picture, format!("{dir}/list/always"), String::new());
    for number in &krate.listed {
        // One of them below another directory.
        let below = ["", "sub/"][usize::from(*number) % 2];
        put(
            picture,
            format!("{dir}/list/{below}n{number}"),
            String::new(),
        );
    }
    if let Some(script) = &krate.script {
        put(
            picture,
            format!("{dir}/build.rs"),
            scripts::render(krate, script),
        );
    }
    for (index, target) in krate.targets.iter().enumerate() {
        let text = if krate.is_macro && index == 0 {
            scripts::macros(krate)
        } else {
            source(picture, world, krate, target)
        };
        put(picture, format!("{dir}/{}", target.root()), text);
    }
}

fn manifest(world: &World, krate: &Krate) -> String {
    let Krate { name, version, .. } = krate;
    let mut text = format!(
        "[package]\nname = \"{name}\"\nversion = \"0.1.{version}\"\nedition = \"2021\"\n\
         description = \"about {version}\"\n"
    );
    if krate.script.is_some() {
        let _ = writeln!(text, "links = \"{name}\"");
    }
    text.push_str("\n[features]\n");
    let defaults: Vec<_> = krate
        .defaults
        .iter()
        .map(|number| format!("f{number}"))
        .collect();
    let _ = writeln!(
        text,
        "default = {defaults:?}\nf0 = []\nf1 = []\n\n[lib]\ndoctest = false"
    );
    if krate.is_macro {
        text.push_str("proc-macro = true\ntest = false\n");
    } else {
        let _ = writeln!(text, "test = {}", krate.unit_test);
        if is_cdylib(world, krate) {
            text.push_str("crate-type = [\"lib\", \"cdylib\"]\n");
        }
    }
    for target in &krate.targets {
        if matches!(target.kind, TargetKind::Test | TargetKind::Bench) {
            let kind = if target.kind == TargetKind::Test {
                "test"
            } else {
                "bench"
            };
            let _ = writeln!(
                text,
                "\n[[{kind}]]\nname = \"{}\"\nharness = false",
                target.name
            );
        }
    }
    for (kind, section) in [
        (DepKind::Normal, "dependencies"),
        (DepKind::Build, "build-dependencies"),
        (DepKind::Dev, "dev-dependencies"),
    ] {
        let _ = writeln!(text, "\n[{section}]");
        for dep in krate.deps.iter().filter(|dep| dep.kind == kind) {
            if let Some(other) = world.krate(&dep.on) {
                text.push_str(&dependency(krate, dep, other));
            }
        }
    }
    text
}

fn dependency(krate: &Krate, dep: &Dep, other: &Krate) -> String {
    let features: Vec<_> = dep
        .features
        .iter()
        .map(|number| format!("f{number}"))
        .collect();
    format!(
        "{} = {{ package = \"{}\", path = \"{}{}\", default-features = {}, features = {features:?} }}\n",
        dep.alias(),
        dep.on,
        up(&krate.dir),
        other.dir,
        dep.defaults,
    )
}

/// The way from a directory below the workspace up to it.
pub fn up(dir: &str) -> String {
    "../".repeat(dir.split('/').count())
}

/// The source of a target; what it needs beside it is put into the picture.
fn source(picture: &mut Picture, world: &World, krate: &Krate, target: &Target) -> String {
    let mut all = Piece::default();
    for (number, part) in target.parts.iter().enumerate() {
        if is_possible(krate, target, part) {
            pieces::render(&mut all, krate, target, number, part);
        }
    }
    for (path, text) in std::mem::take(&mut all.files) {
        put(picture, format!("{}/{path}", krate.dir), text);
    }
    let is_lib = target.kind == TargetKind::Lib;
    let mut deps = String::new();
    for dep in &krate.deps {
        let used = match dep.kind {
            DepKind::Normal => true,
            DepKind::Build => false,
            DepKind::Dev => !is_lib && target.kind != TargetKind::Bin,
        };
        if used && !dep.on.starts_with('m') {
            let _ = writeln!(deps, "    out.push_str(&{}::digest());", dep.alias());
        }
    }
    if !is_lib {
        deps.clear();
        let _ = writeln!(deps, "    out.push_str(&{}::digest());", krate.name);
    }
    let visible = if is_lib { "pub " } else { "" };
    let mut text = format!(
        "#![allow(unexpected_cfgs, dead_code, unused_macros)]\n{}\n\
         {visible}fn digest() -> String {{\n    let mut out = String::new();\n{}{deps}    out\n}}\n",
        all.items, all.lines
    );
    if is_lib && is_cdylib(world, krate) {
        let _ = writeln!(
            text,
            "#[no_mangle]\npub extern \"C\" fn {}_print() {{ print!(\"{{}}\", digest()); }}",
            krate.name
        );
    }
    if is_lib && krate.unit_test {
        text.push_str("#[test]\nfn tells() { println!(\"{}\", digest()); }\n");
    }
    if !is_lib {
        text.push_str("fn main() { print!(\"{}\", digest().replace(';', \"\\n\")); }\n");
    }
    text
}

/// Only where nobody depends on it: the file has no hash in its name, and a library built for a build
/// script and for a program would be one file.
fn is_cdylib(world: &World, krate: &Krate) -> bool {
    krate.cdylib
        && !world
            .crates
            .iter()
            .any(|other| other.depends_on(&krate.name))
}

/// Whether the package has what the part needs; other edits may have taken it away.
fn is_possible(krate: &Krate, target: &Target, part: &Part) -> bool {
    match part {
        Part::Scripted => krate.script.is_some(),
        Part::Macro(_, Ask::Link) if krate.link.is_none() => false,
        Part::Macro(_, Ask::Generated) if krate.script.is_none() => false,
        Part::Macro(name, _) => krate.depends_on(name),
        Part::Program => {
            target.kind == TargetKind::Test
                && krate
                    .targets
                    .iter()
                    .any(|other| other.kind == TargetKind::Bin)
        }
        _ => true,
    }
}
