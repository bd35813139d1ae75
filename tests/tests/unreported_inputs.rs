//! Inputs that rustc never reports: what proc macros read, list and look for.
//!
//! Each is flipped between two states; cargo believes everything fresh, so only the store can be
//! wrong.

use std::fs;
use std::os::unix::fs::symlink;

use harness::flip::{Case, Noticed, State, lists, macro_package, macro_user};
use harness::{Must, Package};

#[test]
fn a_file_added_to_a_directory_a_proc_macro_lists() {
    let app = macro_user().file("assets/one", "");
    let case = Case::new(&[macro_package(&lists("assets")), app]);
    let added = "crates/app/assets/two";
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("[\"one\"]").after(|| {
            let _ = fs::remove_file(case.project.path(added));
        }),
        &State::printing("[\"one\", \"two\"]").after(|| case.project.write(added, "")),
    );
}

#[test]
fn a_file_a_proc_macro_reads() {
    let body = "let root = std::env::var(\"CARGO_MANIFEST_DIR\").expect(\"set by cargo\");\n\
                std::fs::read_to_string(root + \"/query.sql\").expect(\"the file\")";
    let case = Case::new(&[macro_package(body), macro_user()]);
    let write = |text: &str| case.project.write("crates/app/query.sql", text);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("select 1").after(|| write("select 1")),
        &State::printing("select 2").after(|| write("select 2")),
    );
}

#[test]
fn a_variable_a_proc_macro_reads() {
    let case = Case::new(&[
        macro_package("std::env::var(\"TEST_WORD\").unwrap_or_default()"),
        macro_user(),
    ]);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one").env("TEST_WORD", "one"),
        &State::printing("two").env("TEST_WORD", "two"),
    );
}

#[test]
fn a_variable_read_by_a_proc_macro_far_below() {
    // The macro is used by a macro_rules macro of a library between: the user names neither the
    // proc macro's crate nor the variable.
    let between = Package::new("between").dep("looks").lib(
        "pub use looks;\n#[macro_export]\nmacro_rules! word { () => { $crate::looks::look!() } }\n",
    );
    let app = Package::new("app")
        .dep("between")
        .bin("fn main() { println!(\"{}\", between::word!()); }\n");
    let case = Case::new(&[
        macro_package("std::env::var(\"TEST_WORD\").unwrap_or_default()"),
        between,
        app,
    ]);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one").env("TEST_WORD", "one"),
        &State::printing("two").env("TEST_WORD", "two"),
    );
}

#[test]
fn the_body_of_a_proc_macro() {
    let case = Case::new(&[macro_package("String::new()"), macro_user()]);
    let source = case.project.read("crates/looks/src/lib.rs");
    let write = |word: &str| {
        let body = format!("\"{word}\".to_owned()");
        case.project.write(
            "crates/looks/src/lib.rs",
            &source.replace("String::new()", &body),
        );
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

#[test]
fn a_file_a_proc_macro_reads_outside_the_package() {
    let case = Case::new(&[macro_package(&lists("../../migrations")), macro_user()]);
    case.project.write("migrations/one", "");
    let added = "migrations/two";
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("[\"one\"]").after(|| {
            let _ = fs::remove_file(case.project.path(added));
        }),
        &State::printing("[\"one\", \"two\"]").after(|| case.project.write(added, "")),
    );
}

#[test]
fn a_file_included_by_the_assembler() {
    let app = Package::new("app").bin(
        "core::arch::global_asm!(\n\
             \".section .rodata\", \".globl KACHEFS_WORD\", \"KACHEFS_WORD:\",\n\
             concat!(\".incbin \\\"\", env!(\"CARGO_MANIFEST_DIR\"), \"/word.bin\\\"\"),\n\
             \".text\");\n\
         unsafe extern \"C\" { static KACHEFS_WORD: [u8; 3]; }\n\
         fn main() { println!(\"{}\", String::from_utf8_lossy(unsafe { &KACHEFS_WORD })); }\n",
    );
    let case = Case::new(&[app]);
    let write = |word: &str| case.project.write("crates/app/word.bin", word);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

/// A macro that lists the directory its user's build script writes to.
fn lists_out_dir() -> Package {
    macro_package(
        "let names = std::fs::read_dir(std::env::var(\"OUT_DIR\").expect(\"set\")).expect(\"dir\");\n\
         let mut names: Vec<_> = names.flatten().map(|name| name.file_name()).collect();\n\
         names.sort();\n\
         format!(\"{names:?}\")",
    )
}

#[test]
fn a_file_a_build_script_leaves_for_a_proc_macro() {
    let app = macro_user().file("list", "one").build_script(
        "fn main() {\n\
                 println!(\"cargo::rerun-if-changed=list\");\n\
                 let out = std::path::PathBuf::from(std::env::var(\"OUT_DIR\").unwrap());\n\
                 for old in std::fs::read_dir(&out).unwrap().flatten() {\n\
                     std::fs::remove_file(old.path()).unwrap();\n\
                 }\n\
                 for name in std::fs::read_to_string(\"list\").unwrap().split_whitespace() {\n\
                     std::fs::write(out.join(name), \"\").unwrap();\n\
                 }\n\
             }\n",
    );
    let case = Case::new(&[lists_out_dir(), app]);
    let list = |names: &str| case.project.write("crates/app/list", names);
    case.flip(
        Noticed::ByCargo,
        &State::printing("[\"one\"]").after(|| list("one")),
        &State::printing("[\"one\", \"two\"]").after(|| list("one two")),
    );
}

#[test]
fn a_file_behind_a_linked_directory() {
    let app = macro_user().file("own", "");
    let case = Case::new(&[macro_package(&lists("assets")), app]);
    let shared = case.sandbox.make_dir("shared");
    fs::write(shared.join("one"), "").must("write");
    symlink(&shared, case.project.path("crates/app/assets")).must("link");
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("[\"one\"]").after(|| {
            let _ = fs::remove_file(shared.join("two"));
        }),
        &State::printing("[\"one\", \"two\"]")
            .after(|| fs::write(shared.join("two"), "").must("write")),
    );
}

#[test]
fn a_module_behind_a_linked_directory_and_dots() {
    // `src/..` is where `src` leads to, not where it is named: a decoy lies there by the text.
    let app = Package::new("app")
        .bin("fn main() {}\n")
        .file("shared/x.rs", "decoy");
    let case = Case::new(&[app]);
    let real = case.sandbox.make_dir("real/src");
    fs::write(
        real.join("main.rs"),
        "#[path = \"../shared/x.rs\"]\nmod x;\nfn main() { println!(\"{}\", x::WORD); }\n",
    )
    .must("write");
    let module = case.sandbox.make_dir("real/shared").join("x.rs");
    fs::remove_dir_all(case.project.path("crates/app/src")).must("remove");
    symlink(&real, case.project.path("crates/app/src")).must("link");
    let write = |word: &str| {
        fs::write(&module, format!("pub const WORD: &str = \"{word}\";\n")).must("write");
    };
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

#[test]
fn a_variable_of_the_terminal_asked_for_at_compile_time() {
    let app = Package::new("app").dep("looks").bin(
        "fn main() { println!(\"{} {:?} {}\", looks::look!(), option_env!(\"SSH_TTY\"), \
         env!(\"TERM\")); }\n",
    );
    let mut case = Case::new(&[macro_package("String::from(\"x\")"), app]);
    case.may_refuse = true;
    case.build(
        &State::printing("x Some(\"tty1\") dumb")
            .env("SSH_TTY", "tty1")
            .env("TERM", "dumb"),
        true,
        "as plain cargo has it",
    );
    case.build(
        &State::printing("x Some(\"tty2\") dumb")
            .env("SSH_TTY", "tty2")
            .env("TERM", "dumb"),
        true,
        "another terminal",
    );
}

/// Cargo starts who reads a library's metadata when it hears of that, and may hear of it once.
#[test]
fn a_variable_of_the_terminal_asked_for_by_a_library() {
    let low = Package::new("low").dep("looks").lib(
        "pub const TTY: Option<&str> = option_env!(\"SSH_TTY\");\n\
         pub fn looked() -> String { String::from(looks::look!()) }\n",
    );
    let middle = Package::new("middle").dep("low").lib(
        "pub const TTY: Option<&str> = low::TTY;\n\
         pub fn looked() -> String { low::looked() }\n",
    );
    let app = Package::new("app")
        .dep("middle")
        .bin("fn main() { println!(\"{} {:?}\", middle::looked(), middle::TTY); }\n");
    let mut case = Case::new(&[macro_package("String::from(\"x\")"), low, middle, app]);
    case.may_refuse = true;
    case.build(
        &State::printing("x Some(\"tty1\")").env("SSH_TTY", "tty1"),
        true,
        "as plain cargo has it",
    );
    case.build(
        &State::printing("x Some(\"tty2\")").env("SSH_TTY", "tty2"),
        true,
        "another terminal",
    );
}

#[test]
fn a_variable_of_the_terminal_without_which_it_fails() {
    let app = Package::new("app").dep("looks").bin(
        "const TTY: &str = match option_env!(\"SSH_TTY\") { Some(tty) => tty, None => panic!() };\n\
         fn main() { println!(\"{} {TTY}\", looks::look!()); }\n",
    );
    let mut case = Case::new(&[macro_package("String::from(\"x\")"), app]);
    case.may_refuse = true;
    for tty in ["tty1", "tty2"] {
        let printed = format!("x {tty}");
        let state = State::printing(&printed).env("SSH_TTY", tty);
        case.build(&state, true, "as plain cargo has it");
    }
}
