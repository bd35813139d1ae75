//! The code that runs while a world is built: build scripts and proc macros. Pure.

use std::fmt::Write as _;

use crate::render::up;
use crate::world::{Declares, Dep, DepKind, Krate, Read, Script};

/// What scripts and macros share.
const HELPERS: &str = r#"
fn read_file(path: &std::path::Path) -> String {
    std::fs::read_to_string(path).map_or("absent".to_owned(), |text| text.replace('"', ""))
}
fn list_dir(path: &std::path::Path) -> String {
    let Ok(entries) = std::fs::read_dir(path) else { return "no directory".to_owned() };
    let mut names: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if path.is_dir() { format!("{name}({})", list_dir(&path)) } else { name }
        })
        .collect();
    names.sort();
    names.join(",")
}
fn all_variables(prefix: &str) -> String {
    let ours = std::env::vars().filter(|(name, _)| name.starts_with(prefix));
    let mut all: Vec<_> = ours.map(|(name, value)| format!("{name}={value}")).collect();
    all.sort();
    all.join(",")
}
fn leads_to(path: &std::path::Path) -> String {
    let (text, whole) = (std::fs::read_link(path), std::fs::canonicalize(path));
    let whole = whole.map(|path| path.file_name().expect("a name").to_owned());
    format!("{text:?} {whole:?}").replace('"', "")
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
pub fn variables(input: TokenStream) -> TokenStream {
    text(all_variables(&asked(input)))
}
#[proc_macro]
pub fn length(input: TokenStream) -> TokenStream {
    let meta = std::fs::metadata(package().join(asked(input)));
    text(meta.map_or("absent".to_owned(), |meta| meta.len().to_string()))
}
#[proc_macro]
pub fn link(input: TokenStream) -> TokenStream {
    text(leads_to(&package().join(asked(input))))
}
#[proc_macro]
pub fn generated(input: TokenStream) -> TokenStream {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR").expect("a build script"));
    text(read_file(&out.join(asked(input))))
}
#[proc_macro]
pub fn directory_name(_: TokenStream) -> TokenStream {
    let mut above = package();
    while !above.join("Cargo.lock").exists() {
        assert!(above.pop(), "there is one");
    }
    text(above.parent().expect("a directory").file_name().expect("a name").to_string_lossy().into())
}
#[proc_macro]
pub fn fail(input: TokenStream) -> TokenStream {
    panic!("the macro fails: {}", asked(input));
}
"#;

/// The library of a proc macro package.
pub fn macros(krate: &Krate) -> String {
    let mut deps = String::new();
    let is_library = |dep: &&Dep| dep.kind == DepKind::Normal && !dep.on.starts_with('m');
    for dep in krate.deps.iter().filter(is_library) {
        let _ = writeln!(deps, "    said.push_str(&{}::digest());", dep.alias());
    }
    let features = "cfg!(feature = \"f0\"), cfg!(feature = \"f1\")";
    // The version, so that an edit of the macro is an edit of its code.
    format!(
        "#![allow(unused_mut)]\nextern crate proc_macro;\n{HELPERS}{MACROS}\n#[proc_macro]\n\
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
    body.push_str("    println!(\"cargo::metadata=text={text}\");\n");
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
fn by_command(path: &str) -> String {
    let command = format!("if [ -e {path} ]; then cat {path}; else echo absent; fi");
    let output = std::process::Command::new("sh").arg("-c").arg(command).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
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
    let path = |path: String, function: &str| {
        let mut lines = vec![format!("text += &{function}(\"{path}\".as_ref());")];
        if script.declares == Declares::Everything {
            lines.push(format!("println!(\"cargo::rerun-if-changed={path}\");"));
        }
        lines
    };
    match read {
        Read::File(name) => lines = path(format!("data/{name}"), "read_file"),
        Read::Shared(name) => lines = path(format!("{}shared/{name}", up(&krate.dir)), "read_file"),
        Read::List => lines = path("list".to_owned(), "list_dir"),
        Read::ListShared => lines = path(format!("{}shared/list", up(&krate.dir)), "list_dir"),
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
        Read::Variables => lines.push("text += &all_variables(\"KF_\");".to_owned()),
        Read::ByCommand(name) => {
            lines.push(format!("text += &by_command(\"data/{name}\");"));
            if script.declares == Declares::Everything {
                lines.push(format!(
                    "println!(\"cargo::rerun-if-changed=data/{name}\");"
                ));
            }
        }
        Read::Link if krate.link.is_some() => lines = path("data/link.txt".to_owned(), "leads_to"),
        Read::Link => {}
        Read::Metadata => lines.push("text += &all_variables(\"DEP_\");".to_owned()),
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
