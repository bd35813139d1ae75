//! Crates behind proc macros are written aside, unless a macro could tell.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use harness::aside::{assert_none_left, looking, sessions};
use harness::messages::Messages;
use harness::{Cmd, Counters, Must, Package, Project, Sandbox, processes};

/// What a macro says that looks for the directory of outputs among the compiler's arguments, where it finds them by
/// this expression.
fn finds_directory(arguments: &str) -> String {
    format!(
        "use proc_macro::TokenStream;\n\
         #[proc_macro] pub fn directory(_: TokenStream) -> TokenStream {{\n\
         let all: Vec<String> = {arguments};\n\
         let at = all.iter().position(|word| word == \"--out-dir\").unwrap() + 1;\n\
         format!(\"{{:?}}\", all[at]).parse().unwrap() }}\n"
    )
}

/// Such an expression, that reads the kernel's file and does not hold its name.
fn by_parts() -> String {
    by_kernel("[\"//proc/self/cmd\", \"line\"].concat()")
}

fn by_kernel(path: &str) -> String {
    format!(
        "String::from_utf8(std::fs::read({path}).unwrap()).unwrap()\
         .split('\\0').map(String::from).collect()"
    )
}

/// A program that says what a macro made when the library was compiled, and a number.
fn user_of(sandbox: &Sandbox, macros: &str, made: &str) -> Project {
    user_in(sandbox.path("project"), macros, made)
}

fn user_in(path: PathBuf, macros: &str, made: &str) -> Project {
    let macros = Package::new("macros").proc_macro(macros);
    let library = Package::new("library").dep("macros");
    let library = library.lib(&text(made, 1));
    let app = Package::new("app").dep("library");
    let app = app.bin("fn main() { println!(\"{}\", library::said()); }\n");
    Project::new(path, &[macros, library, app])
}

/// Its compiler takes long enough for its directory to be seen.
fn text(made: &str, number: u32) -> String {
    let modules = (0..12).map(|n| {
        format!("pub mod m{n} {{ pub fn f(x: u64) -> String {{ format!(\"{{x}}-{n}\") }} }}\n")
    });
    let slow = "#![allow(long_running_const_eval)]\n\
                pub static STEPS: u64 = { let mut i = 0; while i < 5_000_000 { i += 1; } i };\n";
    let said = format!(
        "pub fn said() -> String {{ format!(\"{{}} {{}} {number}\", {made}, STEPS / 5_000_000) }}\n"
    );
    slow.to_owned() + &modules.collect::<String>() + &said
}

fn edit(project: &Project, made: &str, number: u32) {
    project.write("crates/library/src/lib.rs", &text(made, number));
}

/// Runs cargo, and says whether the library's compiler was seen to write aside.
fn is_aside(sandbox: &Sandbox, cargo: Cmd) -> bool {
    let is_librarys = |directory: fs::DirEntry| {
        let files = fs::read_dir(directory.path());
        let mut names = files.into_iter().flatten().flatten();
        names.any(|file| file.file_name().as_encoded_bytes().starts_with(b"library-"))
    };
    let mut is_aside = false;
    let look = || {
        let directories = fs::read_dir(sandbox.store().join("aside"));
        let mut directories = directories.into_iter().flatten().flatten();
        is_aside |= directories.any(is_librarys);
    };
    let _ = looking(look, || cargo.ok());
    assert_none_left(sandbox);
    is_aside
}

/// The same without incremental state, and how often it was refused for this reason.
fn refused(sandbox: &Sandbox, cargo: Cmd, reason: &str) -> (bool, u64, Counters) {
    let cargo = cargo.env("CARGO_INCREMENTAL", "0");
    let (seen, is_aside) = sandbox.during(|| is_aside(sandbox, cargo));
    let refused = seen.reasons.get(reason).copied();
    (is_aside, refused.unwrap_or_default(), seen)
}

const BLIND: &str = "#[proc_macro] pub fn seven(_: proc_macro::TokenStream) -> proc_macro::TokenStream \
                     { \"7\".parse().unwrap() }\n";
const SEVEN: &str = "macros::seven!()";

#[test]
fn behind_a_macro_that_cannot_tell() {
    let sandbox = Sandbox::new();
    let project = user_of(&sandbox, BLIND, SEVEN);
    sandbox.mount(project.target());
    let build = || sandbox.cargo(&project, "build --message-format=json");
    assert!(is_aside(&sandbox, build()));
    assert_eq!(sandbox.output_of(project.program("app")), "7 1 1\n");
    Messages::of(&build().ok()).assert_all_fresh();
    let before = sessions(&project, "library-").pop().must("a session");
    edit(&project, SEVEN, 2);
    assert!(is_aside(&sandbox, build()));
    assert_eq!(sandbox.output_of(project.program("app")), "7 1 2\n");
    let after = sessions(&project, "library-").pop().must("a session");
    let kept = before.intersection(&after).count();
    assert!(kept > 0, "{before:?} {after:?}");
}

/// Whatever a macro sees of arguments is what cargo said, and who was compiled twice for that is not again.
#[test]
fn behind_a_macro_that_looks_for_the_directory() {
    let by_another = "String::from_utf8(std::process::Command::new(\"cat\")\
         .arg([&format!(\"/proc/{}/cmd\", std::process::id()), \"line\"].concat()).output().unwrap().stdout)\
         .unwrap().split('\\0').map(String::from).collect()";
    for (arguments, twice) in [
        ("std::env::args().collect()", false),
        (&by_kernel("\"/proc/self/cmdline\""), false),
        (&by_parts(), true),
        (by_another, true),
    ] {
        let sandbox = Sandbox::new();
        let made = "macros::directory!()";
        let project = user_of(&sandbox, &finds_directory(arguments), made);
        sandbox.mount(project.target());
        let deps = project.target().join("debug/deps");
        let build = |number: u32| {
            let cargo = sandbox.cargo(&project, "build");
            let (is_aside, refused, seen) = refused(&sandbox, cargo, "reads-arguments");
            let said = sandbox.output_of(project.program("app"));
            assert_eq!(said, format!("{} 1 {number}\n", deps.display()));
            assert_eq!(is_aside, refused > 0, "{arguments}: {seen:?}");
            refused
        };
        assert_eq!(build(1), u64::from(twice), "{arguments}");
        edit(&project, made, 2);
        assert_eq!(build(2), 0, "{arguments}");
        // One that does not know them begins anew.
        sandbox.kill_daemon();
        edit(&project, made, 3);
        assert_eq!(build(3), u64::from(twice), "{arguments}");
    }
}

/// Nobody reads what was made while a macro saw other arguments, although cargo would let them when there is
/// metadata.
#[test]
fn who_is_made_from_it_meanwhile() {
    let sandbox = Sandbox::new();
    let macros = Package::new("macros").proc_macro(&finds_directory(&by_parts()));
    let made = "#[inline] pub fn made() -> &'static str { macros::directory!() }\n";
    let library = Package::new("library").dep("macros");
    let library = library.lib(&(text("made()", 1) + made));
    let next = Package::new("next").dep("library");
    let next = next.lib("pub const MADE: fn() -> &'static str = library::made;\n");
    let app = Package::new("app").dep("next").dep("library");
    let app = app.bin("fn main() { println!(\"{} {}\", (next::MADE)(), library::said()); }\n");
    let project = Project::new(sandbox.path("project"), &[macros, library, next, app]);
    sandbox.mount(project.target());
    for words in ["check --message-format=json", "build --message-format=json"] {
        let run = || sandbox.cargo(&project, words).env("CARGO_INCREMENTAL", "0");
        let _ = run().ok();
        Messages::of(&run().ok()).assert_all_fresh();
    }
    let deps = project.target().join("debug/deps");
    let deps = deps.display();
    let said = sandbox.output_of(project.program("app"));
    assert_eq!(said, format!("{deps} {deps} 1 1\n"));
}

#[test]
fn what_is_said_by_a_compiler_that_runs_again() {
    let sandbox = Sandbox::new();
    let made = "macros::directory!()";
    let project = user_of(&sandbox, &finds_directory(&by_parts()), made);
    let with_more = text(made, 1) + "fn nobody_calls_this() {}\n";
    project.write("crates/library/src/lib.rs", &with_more);
    sandbox.mount(project.target());
    let said = sandbox.cargo(&project, "build").ok().stderr;
    let warnings = said.matches("`nobody_calls_this` is never used");
    assert_eq!(warnings.count(), 1, "{said}");
}

/// What a macro has seen by then does not stand, although nobody can be asked any more.
#[test]
fn a_macro_that_looks_for_it_while_the_daemon_dies() {
    let sandbox = Sandbox::new();
    let [asked, go_on] = ["asked", "go-on"].map(|name| sandbox.path(name));
    let arguments = format!(
        "{{ let all = {}; std::fs::write({asked:?}, \"\").unwrap(); \
         while !std::path::Path::new({go_on:?}).exists() {{ \
         std::thread::sleep(std::time::Duration::from_millis(5)) }} all }}",
        by_parts()
    );
    let project = user_of(
        &sandbox,
        &finds_directory(&arguments),
        "macros::directory!()",
    );
    sandbox.mount(project.target());
    let build = sandbox.cargo(&project, "build").spawn();
    assert!(processes::wait_for(Duration::from_mins(1), || asked.exists()));
    sandbox.kill_daemon();
    fs::write(&go_on, "").must("writes");
    let _ = build.finish().success();
    assert_none_left(&sandbox);
    let deps = project.target().join("debug/deps");
    let said = sandbox.output_of(project.program("app"));
    assert_eq!(said, format!("{} 1 1\n", deps.display()));
}

/// Directories are no files of the kernel, whatever they are called.
#[test]
fn a_project_in_a_directory_called_like_the_kernels_file() {
    let sandbox = Sandbox::new();
    let project = user_in(sandbox.path("cmdline"), BLIND, SEVEN);
    sandbox.mount(project.target());
    let cargo = sandbox.cargo(&project, "build");
    let (is_aside, refused, seen) = refused(&sandbox, cargo, "reads-arguments");
    assert!(is_aside && refused == 0, "{seen:?}");
}

/// What is taken away from such compilers, and looked for, is there, too.
#[test]
fn behind_a_macro_with_a_variable_that_was_taken_away() {
    let sandbox = Sandbox::new();
    let made = "format!(\"{} {:?}\", macros::seven!(), option_env!(\"COLUMNS\"))";
    let project = user_of(&sandbox, BLIND, made);
    sandbox.mount(project.target());
    for columns in ["80", "90"] {
        let cargo = sandbox.cargo(&project, "build").env("COLUMNS", columns);
        let (is_aside, refused, seen) = refused(&sandbox, cargo, "reads-terminal-variable");
        assert!(is_aside && refused == 1, "{seen:?}");
        let said = sandbox.output_of(project.program("app"));
        assert_eq!(said, format!("7 Some({columns:?}) 1 1\n"));
    }
}

#[test]
fn who_is_not_watched_writes_where_it_is_told() {
    let sandbox = Sandbox::new();
    let project = user_of(&sandbox, BLIND, SEVEN);
    sandbox.mount(project.target());
    let cargo = sandbox.cargo(&project, "build");
    let cargo = cargo.env("KACHEFS_UNWATCHED", "1");
    let (is_aside, refused, seen) = refused(&sandbox, cargo, "not-watched");
    assert!(!is_aside && refused == 0 && seen.misses == 3, "{seen:?}");
    assert_eq!(sandbox.output_of(project.program("app")), "7 1 1\n");
}
