//! The projects several tests build.

use std::fmt::Write as _;
use std::path::Path;

use crate::{Package, Project};

/// One of each: a library, a library on top of it, a proc macro, a build script that generates
/// code and sets an env var, a package with a library, a binary, unit and integration tests.
/// The binary `app` prints [`WHOLE_OUTPUT`].
#[track_caller]
pub fn whole(root: impl AsRef<Path>) -> Project {
    let greeting = Package::new("greeting").lib(
        "//! Greets.\n\
         pub fn greet(name: &str) -> String { format!(\"hello {name}{}\", ending()) }\n\
         fn ending() -> &'static str { \"!\" }\n",
    );
    let polite = Package::new("polite")
        .dep("greeting")
        .lib("pub fn greet(name: &str) -> String { greeting::greet(&format!(\"dear {name}\")) }\n");
    let shout = Package::new("shout").proc_macro(
        "use proc_macro::TokenStream;\n\
         #[proc_macro]\n\
         pub fn shout(input: TokenStream) -> TokenStream {\n\
             input.to_string().to_uppercase().parse().expect(\"a literal\")\n\
         }\n",
    );
    let generated = Package::new("generated")
        .build_script(
            "use std::{env, fs, path::Path};\n\
             fn main() {\n\
                 println!(\"cargo::rerun-if-changed=build.rs\");\n\
                 println!(\"cargo::rustc-env=FLAVOUR=vanilla\");\n\
                 let out = env::var(\"OUT_DIR\").expect(\"OUT_DIR\");\n\
                 let code = \"pub const NUMBER: u32 = 42;\";\n\
                 fs::write(Path::new(&out).join(\"code.rs\"), code).expect(\"write\");\n\
             }\n",
        )
        .lib(
            "include!(concat!(env!(\"OUT_DIR\"), \"/code.rs\"));\n\
             pub const FLAVOUR: &str = env!(\"FLAVOUR\");\n",
        );
    let app = Package::new("app")
        .dep("polite")
        .dep("shout")
        .dep("generated")
        .lib(
            "pub fn line() -> String {\n\
                 let (number, flavour) = (generated::NUMBER, generated::FLAVOUR);\n\
                 format!(\"{} {number} {flavour}\", polite::greet(shout::shout!(\"world\")))\n\
             }\n\
             #[cfg(test)]\n\
             mod tests {\n\
                 #[test]\n\
                 fn ends_with_the_flavour() { assert!(super::line().ends_with(\"vanilla\")); }\n\
             }\n",
        )
        .bin("fn main() { println!(\"{}\", app::line()); }\n")
        .file(
            "tests/line.rs",
            "#[test]\nfn starts_politely() { assert!(app::line().starts_with(\"hello dear\")); }\n",
        );
    Project::new(root.as_ref(), &[greeting, polite, shout, generated, app])
}

/// What the binary `app` of [`whole`] prints.
pub const WHOLE_OUTPUT: &str = "hello dear WORLD! 42 vanilla\n";

/// Libraries and a binary, nothing whose outputs could depend on where the checkout lies.
/// The binary `app` prints [`PLAIN_OUTPUT`].
#[track_caller]
pub fn plain(root: impl AsRef<Path>) -> Project {
    let leaf = Package::new("leaf").lib(
        "pub fn answer() -> u32 { private() }\n\
         fn private() -> u32 { 42 }\n\
         pub fn checked(index: usize) -> u32 { [1, 2, 3][index] }\n",
    );
    let middle = Package::new("middle")
        .dep("leaf")
        .lib("pub fn sentence() -> String { format!(\"the answer is {}\", leaf::answer()) }\n");
    let app = Package::new("app")
        .dep("middle")
        .bin("fn main() { println!(\"{}\", middle::sentence()); }\n");
    Project::new(root.as_ref(), &[leaf, middle, app])
}

/// What the binary `app` of [`plain`] prints.
pub const PLAIN_OUTPUT: &str = "the answer is 42\n";

/// `count` libraries in layers of four, each depending on the whole layer below, and a binary `app`
/// on top that prints `sum <count>`. `salt` makes the sources of two such projects differ.
#[track_caller]
pub fn many(root: impl AsRef<Path>, count: usize, salt: &str) -> Project {
    let layer = |index: usize| index / 4;
    let below = |index: usize| (0..index).filter(move |&other| layer(other) + 1 == layer(index));
    let mut packages: Vec<_> = (0..count)
        .map(|index| {
            // Some work for the compiler, so that two builds meet in the same unit.
            let mut source = "pub fn one() -> usize { 1 }\n".to_owned();
            for other in below(index) {
                let _ = writeln!(source, "use part{other} as _;");
            }
            for number in 0..50 {
                let _ = writeln!(
                    source,
                    "pub fn work_{number}(words: &[String]) -> Vec<String> {{ words.iter()\
                     .map(|word| format!(\"{salt}{number}{{word:?}}\")).rev().collect() }}"
                );
            }
            below(index).fold(
                Package::new(&format!("part{index}")).lib(&source),
                |package, other| package.dep(&format!("part{other}")),
            )
        })
        .collect();
    let sum: Vec<_> = (0..count)
        .map(|index| format!("part{index}::one()"))
        .collect();
    let source = format!(
        "fn main() {{ println!(\"sum {{}}\", {}); }}\n",
        sum.join(" + ")
    );
    let app = (0..count).fold(Package::new("app").bin(&source), |package, index| {
        package.dep(&format!("part{index}"))
    });
    packages.push(app);
    Project::new(root.as_ref(), &packages)
}

/// Bytes of a crate behind one that a program depends on and does not use.
pub const UNUSED: u64 = 6 << 20;

/// A program that uses one of the two crates it depends on.
pub fn something_unused(root: impl AsRef<Path>) -> Project {
    let table = format!("pub static TABLE: [u8; {UNUSED}] = [7; {UNUSED}];\n");
    let packages = [
        Package::new("behind").lib(&table),
        Package::new("unused")
            .lib("pub fn value() -> u8 { behind::TABLE[3] }\n")
            .dep("behind"),
        Package::new("used").lib("pub fn value() -> u8 { 1 }\n"),
        Package::new("app")
            .dep("used")
            .dep("unused")
            .bin("fn main() { println!(\"{}\", used::value()); }\n"),
    ];
    Project::new(root.as_ref(), &packages)
}

/// Another program of [`something_unused`]: it uses both, and prints [`BOTH_OUTPUT`].
pub const USES_BOTH: &str = "fn main() { println!(\"{}\", used::value() + unused::value()); }\n";

/// What that prints.
pub const BOTH_OUTPUT: &str = "8\n";
