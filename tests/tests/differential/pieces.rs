//! From a part of a target to its Rust code. Pure.

use std::fmt::Write as _;

use crate::render::up;
use crate::world::{Ask, How, Krate, ModuleStyle, Part, Style, Target, TargetKind};

/// Code of a target under construction.
#[derive(Default)]
pub struct Piece {
    /// Items of the root module.
    pub items: String,
    /// Statements of `digest`.
    pub lines: String,
    /// Files below the package.
    pub files: Vec<(String, String)>,
}

impl Piece {
    /// A statement that adds the text of an expression under a label.
    fn say(&mut self, label: &str, expression: &str) {
        let _ = writeln!(
            self.lines,
            "    out.push_str(&format!(\"{label}={{}};\", {expression}));"
        );
    }
}

/// Adds a part to the code.
pub fn render(code: &mut Piece, krate: &Krate, target: &Target, number: usize, part: &Part) {
    let label = format!("{}.{}.{number}", krate.name, target.name);
    // Where files beside the root are, and the way from there to the package.
    let root = target.root();
    let (dir, _) = root.rsplit_once('/').unwrap_or_default();
    let back = up(dir);
    match part {
        Part::Literal(style, value) => literal(code, &label, *style, number, &format!("v{value}")),
        Part::Include(how, name, absolute) => {
            let path = if *absolute {
                format!("concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/data/{name}\")")
            } else {
                format!("\"{back}data/{name}\"")
            };
            code.say(&label, &include(*how, &path));
        }
        Part::IncludeShared(name) => {
            let path = format!("\"{back}{}shared/{name}\"", up(&krate.dir));
            code.say(&label, &include(How::Text, &path));
        }
        Part::IncludeCurrent => {
            let path = format!("\"{back}{}shared/current/here.txt\"", up(&krate.dir));
            code.say(&label, &include(How::Text, &path));
        }
        Part::Program => {
            let programs = krate.targets.iter();
            let bin = programs.rev().find(|other| other.kind == TargetKind::Bin);
            let name = bin.map(|bin| bin.name.clone()).unwrap_or_default();
            code.say(
                &label,
                &format!(
                    "String::from_utf8_lossy(&std::process::Command::new(env!(\"CARGO_BIN_EXE_{name}\"))\
                     .output().unwrap().stdout).replace('\\n', \" \")"
                ),
            );
        }
        Part::Module(style, value) => {
            module(code, target, *style, number, &format!("v{value}"));
            code.say(&label, &format!("mod{number}::tell()"));
        }
        Part::Variable(name, needed) => {
            let expression = if *needed {
                format!("env!(\"{name}\")")
            } else {
                format!("option_env!(\"{name}\").unwrap_or(\"unset\")")
            };
            code.say(&label, &expression);
        }
        Part::Feature(number) => {
            code.say(&label, &format!("cfg!(feature = \"f{number}\")"));
        }
        Part::Cfgs => code.say(
            &label,
            "[cfg!(debug_assertions), cfg!(panic = \"unwind\"), cfg!(kf_a), cfg!(kf_b), \
             cfg!(kf_c = \"one\"), cfg!(test)].map(|on| if on { \"y\" } else { \"n\" }).concat()",
        ),
        Part::Overflow => code.say(
            &label,
            "if cfg!(panic = \"unwind\") { std::panic::set_hook(Box::new(|_| {})); \
             std::panic::catch_unwind(|| std::hint::black_box(255_u8) + std::hint::black_box(1))\
             .is_err() } else { false }",
        ),
        Part::Scripted => scripted(code, krate, &label, number),
        Part::Macro(name, ask) => ask_macro(code, krate, &label, name, ask),
        Part::Place => code.say(
            &label,
            "format!(\"{} {} {}\", file!(), line!(), module_path!())",
        ),
        Part::Warning(value) => {
            let _ = writeln!(code.lines, "    let unused_v{value} = 1;");
        }
        Part::Broken(value) => {
            let _ = writeln!(code.lines, "    let _: u32 = \"broken v{value}\";");
        }
    }
}

fn literal(code: &mut Piece, label: &str, style: Style, number: usize, value: &str) {
    let item = match style {
        Style::Const => format!("pub const P{number}: &str = \"{value}\";"),
        Style::Inline => {
            format!("#[inline(always)] pub fn p{number}() -> &'static str {{ \"{value}\" }}")
        }
        Style::Plain => {
            format!("#[inline(never)] fn p{number}() -> String {{ \"{value}\".to_owned() }}")
        }
        Style::Generic => format!(
            "pub fn p{number}<T: std::fmt::Display>(t: T) -> String {{ format!(\"{value}{{t}}\") }}"
        ),
        Style::Rules => {
            format!("macro_rules! p{number} {{ () => {{ concat!(\"{value}\", \":\", line!()) }} }}")
        }
    };
    let call = match style {
        Style::Const => format!("P{number}"),
        Style::Inline | Style::Plain => format!("p{number}()"),
        Style::Generic => format!("p{number}(7_u8)"),
        Style::Rules => format!("p{number}!()"),
    };
    let _ = writeln!(code.items, "{item}");
    code.say(label, &call);
}

fn include(how: How, path: &str) -> String {
    match how {
        How::Text => format!("include_str!({path})"),
        How::Bytes => format!("String::from_utf8_lossy(include_bytes!({path}))"),
        How::Code => format!("{{ let text: &str = include!({path}); text }}"),
    }
}

fn module(code: &mut Piece, target: &Target, style: ModuleStyle, number: usize, value: &str) {
    let root = target.root();
    let (dir, _) = root.rsplit_once('/').unwrap_or_default();
    // Files beside programs and tests would be programs and tests.
    let style = if target.kind == TargetKind::Lib {
        style
    } else {
        ModuleStyle::Path
    };
    let (attribute, file) = match style {
        ModuleStyle::File => (String::new(), format!("{dir}/mod{number}.rs")),
        ModuleStyle::Directory => (String::new(), format!("{dir}/mod{number}/mod.rs")),
        ModuleStyle::Path => {
            let file = format!("odd/{}_{number}.rs", target.name);
            (format!("#[path = \"{}{file}\"] ", up(dir)), file)
        }
    };
    let _ = writeln!(code.items, "{attribute}mod mod{number};");
    let text = format!("pub fn tell() -> &'static str {{ \"{value}\" }}\n");
    code.files.push((file, text));
}

fn scripted(code: &mut Piece, krate: &Krate, label: &str, number: usize) {
    code.say(label, "include!(concat!(env!(\"OUT_DIR\"), \"/gen.rs\"))");
    code.say(
        label,
        "include_str!(concat!(env!(\"OUT_DIR\"), \"/sub/gen.txt\"))",
    );
    code.say(label, "env!(\"KF_SCRIPT\")");
    code.say(
        label,
        "[cfg!(kf_script = \"v0\"), cfg!(kf_script = \"v1\"), cfg!(kf_script = \"v2\")]\
         .map(|on| if on { \"y\" } else { \"n\" }).concat()",
    );
    let native = krate.script.as_ref().and_then(|script| script.native);
    if native.is_some() {
        let name = format!("native_{}", krate.name);
        let _ = writeln!(
            code.items,
            "mod native{number} {{ extern \"C\" {{ pub fn {name}() -> i32; }} }}"
        );
        // SAFETY of the generated code: the function only returns a number.
        code.say(label, &format!("unsafe {{ native{number}::{name}() }}"));
    }
}

fn ask_macro(code: &mut Piece, krate: &Krate, label: &str, name: &str, ask: &Ask) {
    let dep = krate.deps.iter().find(|dep| dep.on == name);
    let alias = dep.map_or_else(|| name.to_owned(), crate::world::Dep::alias);
    let call = match ask {
        Ask::Read(file) => format!("read!(\"data/{file}\")"),
        Ask::ReadFromHere(file) => format!("read_here!(\"{}/data/{file}\")", krate.dir),
        Ask::ReadShared(file) => format!("read!(\"{}shared/{file}\")", up(&krate.dir)),
        Ask::List => "list!(\"list\")".to_owned(),
        Ask::ListShared => format!("list!(\"{}shared/list\")", up(&krate.dir)),
        Ask::Climb(file) => format!("climb!(\"data/{file}\")"),
        Ask::Variable(name) => format!("variable!(\"{name}\")"),
        Ask::Variables => "variables!(\"KF_\")".to_owned(),
        Ask::Length(file) => format!("length!(\"data/{file}\")"),
        Ask::Link => "link!(\"data/link.txt\")".to_owned(),
        Ask::Current => format!("read!(\"{}shared/current/here.txt\")", up(&krate.dir)),
        Ask::Generated => "generated!(\"sub/gen.txt\")".to_owned(),
        Ask::DirectoryName => "directory_name!(\"\")".to_owned(),
        Ask::Tag => "tag!(\"\")".to_owned(),
        Ask::Fail(value) => format!("fail!(\"v{value}\")"),
    };
    code.say(label, &format!("{alias}::{call}"));
}
