//! Where compilers cannot be watched, the conservative rules hold.

use std::fs;

use harness::Sandbox;
use harness::flip::{Case, Noticed, State, lists, macro_package, macro_user};

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
