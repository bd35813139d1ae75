//! Where compilers cannot be watched, the conservative rules hold.

use std::fs;

use harness::flip::{Case, Noticed, State, lists, macro_package, macro_user};
use harness::{Package, Project, Sandbox, samples, toolchain};

const UNWATCHED: &str = "KACHEFS_UNWATCHED";

#[test]
fn whatever_a_proc_macro_may_read_of_its_package_counts() {
    let app = macro_user().file("assets/one", "");
    let case = Case::new(&[macro_package(&lists("assets")), app]);
    let added = "crates/app/assets/two";
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("[\"one\"]").env(UNWATCHED, "1").after(|| {
            let _ = fs::remove_file(case.project.path(added));
        }),
        &State::printing("[\"one\", \"two\"]")
            .env(UNWATCHED, "1")
            .after(|| case.project.write(added, "")),
    );
}

/// Which program links for a target, only the compiler knows.
#[test]
fn what_is_linked_for_a_target_is_made_each_time() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let words = format!("build --target {}", toolchain::host());
    let build = || {
        sandbox.empty_view(project.target());
        let cargo = sandbox.cargo(&project, &words).env(UNWATCHED, "1");
        sandbox.during(|| cargo.ok()).0
    };
    let first = build();
    let again = build();
    assert_eq!(
        (again.hits, again.misses),
        (first.misses - 1, 1),
        "{again:?}"
    );
}

/// A watched compiler is given its libraries by their paths, of which the gap in its environment tells.
#[test]
fn who_is_watched_does_not_look_for_its_libraries() {
    let longest_gap = "use proc_macro::TokenStream;\n\
         #[proc_macro]\n\
         pub fn gap(_: TokenStream) -> TokenStream {\n\
             let environment = std::fs::read(\"/proc/self/environ\").unwrap();\n\
             let words = environment.split(|byte| *byte != 0);\n\
             format!(\"{}_usize\", words.map(<[u8]>::len).max().unwrap()).parse().unwrap()\n\
         }\n";
    let gap = |unwatched: bool| {
        let sandbox = Sandbox::new();
        let macros = Package::new("macros").proc_macro(longest_gap);
        let app = Package::new("app").dep("macros");
        let app = app.bin("fn main() { println!(\"{}\", macros::gap!()); }\n");
        let project = Project::new(sandbox.path("project"), &[macros, app]);
        sandbox.mount(project.target());
        let cargo = sandbox.cargo(&project, "build");
        let cargo = if unwatched {
            cargo.env(UNWATCHED, "1")
        } else {
            cargo
        };
        cargo.ok();
        let said = sandbox.output_of(project.program("app"));
        said.trim().parse::<usize>().expect("a number")
    };
    let libraries = "libLLVM.so librustc_driver.so libc.so.6".len();
    assert!(gap(false) > libraries);
    assert!(gap(true) < libraries);
}

#[test]
fn doctor_says_whether_compilers_are_watched() {
    let sandbox = Sandbox::new();
    let said = |environment: &[(&str, &str)]| {
        let doctor = sandbox.kachefs("doctor").envs(environment.iter().copied());
        doctor.run().stdout
    };
    assert!(said(&[]).contains("build scripts are watched"));
    assert!(said(&[(UNWATCHED, "1")]).contains("watching     impossible here"));
}
