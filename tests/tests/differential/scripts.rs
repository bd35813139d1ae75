//! The code that runs while a world is built: build scripts and proc macros. Pure.

use std::fmt::Write as _;

use crate::render::up;
use crate::world::{Declares, DepKind, Krate, Read, Script};

/// What scripts and macros share.
const HELPERS: &str = r#"
fn read_file(path: &std::path::Path) -> String {
    std::fs::read_to_string(path).map_or("absent".to_owned(), |text| text.replace('"', ""))
}
fn list_dir(path: &std::path::Path) -> String {
    let Ok(entries) = std::fs::read_dir(path) else { return "no directory".to_owned() };
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names.join(",")
}
"#;

const MACROS: &str = r#"
use proc_macro::TokenStream;
fn asked(input: TokenStream) -> String {
    input.to_string().trim_matches('"').to_owned()
}
fn text(said: String) -> TokenStream {
    format!("{said:?}").parse().expect("a literal")
}
fn package() -> std::path::PathBuf {
    std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it").into()
}
#[proc_macro]
pub fn read(input: TokenStream) -> TokenStream {
    text(read_file(&package().join(asked(input))))
}
#[proc_macro]
pub fn read_here(input: TokenStream) -> TokenStream {
    text(read_file(asked(input).as_ref()))
}
#[proc_macro]
pub fn list(input: TokenStream) -> TokenStream {
    text(list_dir(&package().join(asked(input))))
}
#[proc_macro]
pub fn climb(input: TokenStream) -> TokenStream {
    let (package, name) = (package(), asked(input));
    let mut found = package.ancestors().take(3).map(|dir| dir.join(&name));
    text(found.find(|path| path.exists()).map_or("nowhere".to_owned(), |path| read_file(&path)))
}
#[proc_macro]
pub fn variable(input: TokenStream) -> TokenStream {
    text(std::env::var(asked(input)).unwrap_or("unset".to_owned()))
}
#[proc_macro]
pub fn fail(input: TokenStream) -> TokenStream {
    panic!("the macro fails: {}", asked(input));
}
"#;

/// The library of a proc macro package.
pub fn macros(krate: &Krate) -> String {
    let mut deps = String::new();
    for dep in krate.deps.iter().filter(|dep| dep.kind == DepKind::Normal) {
        let _ = writeln!(deps, "    said.push_str(&{}::digest());", dep.alias());
    }
    let features = "cfg!(feature = \"f0\"), cfg!(feature = \"f1\")";
    // The version, so that an edit of the macro is an edit of its code.
    format!(
        "extern crate proc_macro;\n{HELPERS}{MACROS}\n#[proc_macro]\n\
         pub fn tag(_: TokenStream) -> TokenStream {{\n    \
         let mut said = format!(\"tag{} {{:?}} {{}}\", [{features}], env!(\"CARGO_PKG_VERSION\"));\n\
         {deps}    text(said.replace(';', \" \"))\n}}\n",
        krate.listed.len()
    )
}

/// A build script.
pub fn render(krate: &Krate, script: &Script) -> String {
    let mut body = format!("    let mut text = String::from(\"s{}\");\n", script.value);
    for read in &script.reads {
        let _ = writeln!(body, "    text += \",\";");
        for line in read_lines(krate, script, read) {
            let _ = writeln!(body, "    {line}");
        }
    }
    if script.declares != Declares::Nothing {
        body.push_str("    println!(\"cargo::rerun-if-changed=build.rs\");\n");
    }
    let _ = writeln!(
        body,
        "    println!(\"cargo::rustc-env=KF_SCRIPT={{text}}\");"
    );
    let _ = writeln!(
        body,
        "    println!(\"cargo::rustc-cfg=kf_script=\\\"v{}\\\"\");",
        script.value
    );
    if script.warns {
        body.push_str("    println!(\"cargo::warning={text}\");\n");
    }
    if script.fails {
        body.push_str("    panic!(\"the script fails: {text}\");\n");
    }
    body.push_str(
        "    let out = std::path::PathBuf::from(std::env::var(\"OUT_DIR\").unwrap());\n    \
         std::fs::write(out.join(\"gen.rs\"), format!(\"{text:?}\")).unwrap();\n    \
         std::fs::create_dir_all(out.join(\"sub\")).unwrap();\n    \
         std::fs::write(out.join(\"sub/gen.txt\"), &text).unwrap();\n",
    );
    if let Some(value) = script.native {
        let _ = writeln!(
            body,
            "    native(&out, \"native_{}\", {value});",
            krate.name
        );
    }
    format!("#![allow(unreachable_code, dead_code)]\n{HELPERS}{NATIVE}\nfn main() {{\n{body}}}\n")
}

const NATIVE: &str = r#"
fn native(out: &std::path::Path, name: &str, value: u8) {
    std::fs::write(out.join("n.c"), format!("int {name}(void) {{ return {value}; }}")).unwrap();
    let run = |program: &str, args: &[&str]| {
        let status = std::process::Command::new(program).args(args).current_dir(out).status();
        assert!(status.unwrap().success(), "{program}");
    };
    run("cc", &["-c", "n.c", "-o", "n.o"]);
    run("ar", &["crsD", &format!("lib{name}.a"), "n.o"]);
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static={name}");
}
"#;

fn read_lines(krate: &Krate, script: &Script, read: &Read) -> Vec<String> {
    let mut lines = Vec::new();
    let mut path = |path: String, function: &str| {
        lines.push(format!("text += &{function}(\"{path}\".as_ref());"));
        (script.declares == Declares::Everything)
            .then(|| lines.push(format!("println!(\"cargo::rerun-if-changed={path}\");")));
    };
    match read {
        Read::File(name) => path(format!("data/{name}"), "read_file"),
        Read::Shared(name) => path(format!("{}shared/{name}", up(&krate.dir)), "read_file"),
        Read::List => path("list".to_owned(), "list_dir"),
        Read::ListShared => path(format!("{}shared/list", up(&krate.dir)), "list_dir"),
        Read::Variable(name) => {
            if script.declares == Declares::Everything {
                lines.push(format!("println!(\"cargo::rerun-if-env-changed={name}\");"));
            }
            lines.push(format!(
                "text += &std::env::var(\"{name}\").unwrap_or(\"unset\".to_owned());"
            ));
        }
        Read::Cargo(name) => lines.push(format!(
            "text += &std::env::var(\"{name}\").unwrap_or(\"unset\".to_owned());"
        )),
        Read::Deps => {
            for dep in krate.deps.iter().filter(|dep| dep.kind == DepKind::Build) {
                lines.push(format!(
                    "text += &{}::digest().replace(';', \" \");",
                    dep.alias()
                ));
            }
        }
    }
    lines
}
