//! Whatever a linker, or rustc in its place, finds by a way of its own.

use std::fs;
use std::path::Path;

use harness::flip::{Case, Noticed, State};
use harness::{Must, Package, Project, Sandbox, toolchain};

const PRINTS_ANSWER: &str = "unsafe extern \"C\" { fn kachefs_answer() -> i32; }\n\
     fn main() { println!(\"{}\", unsafe { kachefs_answer() }); }\n";

/// A build script that prints these instructions.
fn says(lines: &[String]) -> String {
    let lines: Vec<_> = lines
        .iter()
        .map(|line| format!("println!({:?});", format!("cargo::{line}")))
        .collect();
    format!(
        "fn main() {{ println!(\"cargo::rerun-if-changed=build.rs\"); {} }}\n",
        lines.join(" ")
    )
}

/// A mounted project whose packages name a directory of the sandbox.
fn case(packages: impl Fn(&Path) -> Vec<Package>) -> Case {
    let sandbox = Sandbox::new();
    let native = sandbox.make_dir("native");
    let project = Project::new(sandbox.path("project"), &packages(&native));
    sandbox.mount(project.target());
    Case {
        sandbox,
        project,
        may_refuse: true,
    }
}

/// A program that links `library`, which is searched for in the directory `native`.
fn links(native: &Path, library: &str) -> Package {
    let script = says(&[
        format!("rustc-link-search=native={}", native.display()),
        format!("rustc-link-lib={library}"),
    ]);
    Package::new("app").bin(PRINTS_ANSWER).build_script(&script)
}

/// An archive with the answer, in a directory of the sandbox; `ar` says which kind. What it is made
/// of lies in another directory.
fn make_archive(sandbox: &Sandbox, directory: &str, ar: &str, number: u32) {
    let objects = sandbox.make_dir(&format!("{directory}-objects"));
    let dir = sandbox.make_dir(directory);
    let text = format!("int kachefs_answer(void) {{ return {number}; }}\n");
    fs::write(objects.join("answer.c"), text).must("write");
    let run = |dir: &Path, program: &str, args: &[&str]| {
        let _ = sandbox.command(program).args(args).in_dir(dir).ok();
    };
    run(&objects, "cc", &["-c", "answer.c", "-o", "answer.o"]);
    run(&dir, "rm", &["-f", "libanswer.a"]);
    // Relative to the archive, as a thin one has to name it.
    let object = format!("../{directory}-objects/answer.o");
    run(&dir, "ar", &[ar, "libanswer.a", &object]);
}

#[test]
fn the_members_of_a_thin_archive_in_an_rlib() {
    let case = case(|native| {
        let script = says(&[
            format!("rustc-link-search=native={}", native.display()),
            "rustc-link-lib=static=answer".to_owned(),
        ]);
        let lib = "unsafe extern \"C\" { fn kachefs_answer() -> i32; }\n\
                   pub fn answer() -> i32 { unsafe { kachefs_answer() } }\n";
        let app = Package::new("app").dep("middle");
        vec![
            Package::new("middle").lib(lib).build_script(&script),
            app.bin("fn main() { println!(\"{}\", middle::answer()); }\n"),
        ]
    });
    let make = |number| make_archive(&case.sandbox, "native", "crsDT", number);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("11").after(|| make(11)),
        &State::printing("22").after(|| make(22)),
    );
}

#[test]
fn a_library_that_a_script_with_a_name_of_its_own_leads_to() {
    let case = case(|native| vec![links(native, "dylib:+verbatim=answer.ld")]);
    let script = |sandbox: &Sandbox| {
        let text = format!(
            "INPUT({}/libanswer.a)\n",
            sandbox.path("elsewhere").display()
        );
        fs::write(sandbox.path("native/answer.ld"), text).must("write");
    };
    let make = |number| {
        make_archive(&case.sandbox, "elsewhere", "crsD", number);
        script(&case.sandbox);
    };
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("11").after(|| make(11)),
        &State::printing("22").after(|| make(22)),
    );
}

#[test]
fn a_library_that_a_script_in_the_drivers_path_leads_to() {
    let case = case(|_| {
        let script = says(&["rustc-link-lib=dylib=answer".to_owned()]);
        vec![Package::new("app").bin(PRINTS_ANSWER).build_script(&script)]
    });
    let make = |number| {
        make_archive(&case.sandbox, "elsewhere", "crsD", number);
        let text = format!(
            "INPUT({}/libanswer.a)\n",
            case.sandbox.path("elsewhere").display()
        );
        fs::write(case.sandbox.path("native/libanswer.so"), text).must("write");
    };
    let native = case.sandbox.path("native").display().to_string();
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("11")
            .after(|| make(11))
            .env("LIBRARY_PATH", &native),
        &State::printing("22")
            .after(|| make(22))
            .env("LIBRARY_PATH", &native),
    );
}

#[test]
fn a_linker_that_comes_first_in_path() {
    let case = case(|native| vec![links(native, "dylib=answer")]);
    make_archive(&case.sandbox, "native", "crsD", 11);
    make_archive(&case.sandbox, "other", "crsD", 22);
    let first = case.sandbox.make_dir("first");
    let mut path = vec![first.clone()];
    path.extend(toolchain::search_path());
    let path = std::env::join_paths(path).must("a search path");
    let build = || {
        case.sandbox
            .cargo(&case.project, "build")
            .env("PATH", &path)
            .env("RUSTFLAGS", "-Clinker-features=-lld")
    };
    let _ = build().ok();
    assert_eq!(case.sandbox.output_of(case.project.program("app")), "11\n");
    let linker = first.join("ld");
    let text = format!(
        "#!/bin/sh\nexec /usr/bin/ld -L{} \"$@\"\n",
        case.sandbox.path("other").display()
    );
    fs::write(&linker, text).must("write");
    fs::set_permissions(&linker, std::os::unix::fs::PermissionsExt::from_mode(0o755)).must("chmod");
    case.sandbox.empty_view(case.project.target());
    let _ = build().ok();
    let said = case.sandbox.output_of(case.project.program("app"));
    assert_eq!(said, "22\n", "a wrong hit");
}

#[test]
fn a_linker_that_its_flavor_names() {
    let case = Case::new(&[Package::new("app").bin("fn main() {}\n")]);
    let flavor = ("RUSTFLAGS", "-Clinker-flavor=gcc");
    let build = || {
        case.sandbox
            .cargo(&case.project, "build")
            .env(flavor.0, flavor.1)
            .ok()
    };
    let (seen, _) = case.sandbox.during(build);
    assert_eq!(seen.reasons.get("linker-flavor"), Some(&1), "{seen:?}");
}

#[test]
fn what_a_linker_is_told_by_its_variables() {
    let case = Case::new(&[Package::new("app").bin("fn main() {}\n")]);
    let build = |version: &str| {
        case.sandbox.empty_view(case.project.target());
        let cargo = case.sandbox.cargo(&case.project, "build");
        let build = cargo.env("LLD_VERSION", version);
        case.sandbox.during(|| build.ok()).0
    };
    assert_eq!(build("one").misses, 1);
    assert_eq!(build("two").misses, 1, "its output says two");
    assert_eq!(build("one").misses, 0);
}

#[test]
fn a_proc_macro_that_no_argument_names() {
    let app = Package::new("app")
        .bin("extern crate found;\nfn main() { println!(\"{}\", found::look!()); }\n");
    let case = Case::new(&[app]);
    let dir = case.sandbox.make_dir("macros");
    let source = "extern crate proc_macro;\n\
         use proc_macro::{Literal, TokenStream, TokenTree};\n\
         #[proc_macro]\n\
         pub fn look(_: TokenStream) -> TokenStream {\n\
             let word = std::env::var(\"TEST_WORD\").unwrap_or_default();\n\
             TokenTree::from(Literal::string(&word)).into()\n\
         }\n";
    fs::write(dir.join("found.rs"), source).must("write");
    let _ = case
        .sandbox
        .command("rustc")
        .args(["--crate-type=proc-macro", "--crate-name=found", "found.rs"])
        .in_dir(&dir)
        .ok();
    let flags = format!("-L{}", dir.display());
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one")
            .env("TEST_WORD", "one")
            .env("RUSTFLAGS", &flags),
        &State::printing("two")
            .env("TEST_WORD", "two")
            .env("RUSTFLAGS", &flags),
    );
}
