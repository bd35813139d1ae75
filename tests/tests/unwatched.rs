//! Where compilers cannot be watched, the conservative rules hold.

use std::fs;

use harness::flip::{Case, Noticed, State, lists, macro_package, macro_user};
use harness::{Sandbox, samples, toolchain};

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
