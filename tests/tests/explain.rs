//! `kachefs explain`: each miss of the last build has a reason, and the reason is the one.

use std::fs;
use std::path::Path;

use harness::{Must, Package, Project, Sandbox};
use serde_json::Value;

/// `app` on `middle` on `bottom`, and `apart`, which nothing depends on.
fn tower(sandbox: &Sandbox) -> Project {
    let project = Project::new(
        sandbox.path("project"),
        &[
            Package::new("bottom").lib(
                "pub fn word() -> &'static str { option_env!(\"WORD\").unwrap_or(\"none\") }\n",
            ),
            Package::new("middle")
                .dep("bottom")
                .lib("pub fn words() -> String { bottom::word().repeat(2) }\n"),
            Package::new("apart")
                .lib("pub const N: u32 = 1;\n")
                .manifest("[features]\nmore = []\n"),
            Package::new("app")
                .dep("middle")
                .bin("fn main() { println!(\"{}\", middle::words()); }\n"),
        ],
    );
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    project
}

#[track_caller]
fn explain(sandbox: &Sandbox, project: &Project) -> Value {
    let outcome = sandbox.kachefs("explain --json").in_dir(project).ok();
    let report: Value = serde_json::from_str(&outcome.stdout).must(format!("JSON\n{outcome}"));
    assert_eq!(report["schema"], 1, "{report:#}");
    report
}

#[track_caller]
fn text(sandbox: &Sandbox, project: &Project, words: &str) -> String {
    let command = format!("explain {words}");
    sandbox.kachefs(&command).in_dir(project).ok().stdout
}

/// The miss of a crate.
#[track_caller]
fn miss<'a>(report: &'a Value, name: &str) -> &'a Value {
    let misses = report["misses"].as_array().must("misses");
    let found = misses.iter().find(|miss| miss["crate"] == name);
    found.must(format!("no miss of {name}: {report:#}"))
}

/// Kind and text of each cause.
#[track_caller]
fn causes(miss: &Value) -> Vec<(String, String)> {
    let string = |value: &Value| value.as_str().must("a text").to_owned();
    let causes = miss["causes"].as_array().must("causes");
    causes
        .iter()
        .map(|cause| (string(&cause["kind"]), string(&cause["text"])))
        .collect()
}

#[track_caller]
fn assert_causes(miss: &Value, expected: &[(&str, &str)]) {
    let expected: Vec<_> = expected
        .iter()
        .map(|(kind, text)| ((*kind).to_owned(), (*text).to_owned()))
        .collect();
    assert_eq!(causes(miss), expected, "{miss:#}");
}

fn crates(units: &Value) -> Vec<&str> {
    let units = units.as_array().must("units");
    units
        .iter()
        .map(|unit| unit["crate"].as_str().must("a name"))
        .collect()
}

#[test]
fn a_first_compile_says_so() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    let report = explain(&sandbox, &project);
    assert_eq!(report["actions"]["misses"], 4, "{report:#}");
    for name in ["bottom", "middle", "apart", "app"] {
        let text = "no earlier compile of it is known";
        assert_causes(miss(&report, name), &[("first-time", text)]);
    }
    sandbox.empty_view(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    let report = explain(&sandbox, &project);
    assert_eq!(report["actions"]["hits"], 4, "{report:#}");
    assert_eq!(report["misses"], Value::Array(Vec::new()));
    let said = text(&sandbox, &project, "middle");
    assert_eq!(said, "middle 0.1.0, lib: hit\n");
}

#[test]
fn a_changed_source_is_named_once_for_all_that_follow() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    project.replace("crates/bottom/src/lib.rs", "\"none\"", "\"nothing\"");
    let _ = sandbox.cargo(&project, "build").ok();
    let report = explain(&sandbox, &project);
    assert_eq!(report["actions"]["misses"], 3, "{report:#}");
    let bottom = miss(&report, "bottom");
    let cause = ("source", "source file crates/bottom/src/lib.rs changed");
    assert_causes(bottom, &[cause]);
    assert_eq!(crates(&bottom["followers"]), ["middle", "app"]);
    for name in ["middle", "app"] {
        let follower = miss(&report, name);
        assert_causes(follower, &[]);
        assert_eq!(crates(&follower["follows"]), ["bottom"]);
    }
    let said = text(&sandbox, &project, "--last-build");
    assert!(said.contains(cause.1), "{said}");
    assert!(said.contains("2 more followed: middle, app"), "{said}");
    assert_eq!(
        said.matches("ran ").count(),
        1,
        "followers are not repeated: {said}"
    );
    // From anywhere below the workspace, and about one crate.
    let below = project.path("crates/app/src");
    let of_one = sandbox.kachefs("explain app").in_dir(below).ok().stdout;
    assert!(of_one.contains("follows from bottom"), "{of_one}");

    // What another daemon hears is the same.
    sandbox.kill_daemon();
    let again = explain(&sandbox, &project);
    assert_eq!(again, report);
}

#[test]
fn a_module_more_and_one_less() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    let lib = "crates/apart/src/lib.rs";
    project.write(lib, "mod more;\npub const N: u32 = more::N;\n");
    project.write("crates/apart/src/more.rs", "pub const N: u32 = 2;\n");
    let _ = sandbox.cargo(&project, "build").ok();
    let report = explain(&sandbox, &project);
    let changed = ("source", "source file crates/apart/src/lib.rs changed");
    let more = ("source", "source file crates/apart/src/more.rs is new");
    assert_causes(miss(&report, "apart"), &[changed, more]);
}

#[test]
fn profiles_and_features_are_arguments() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    let _ = sandbox.cargo(&project, "build --release").ok();
    let report = explain(&sandbox, &project);
    let said = causes(miss(&report, "apart"));
    let opt_level = (
        "argument".to_owned(),
        "argument -C opt-level=3 added".to_owned(),
    );
    assert!(said.contains(&opt_level), "{said:?}");
    assert!(
        said.iter().all(|(_, text)| !text.contains("metadata")),
        "{said:?}"
    );

    let _ = sandbox
        .cargo(&project, "build -p apart --features more")
        .ok();
    let report = explain(&sandbox, &project);
    assert_causes(
        miss(&report, "apart"),
        &[("argument", "argument --cfg=feature=\"more\" added")],
    );
}

#[test]
fn a_variable_is_named_and_its_value_is_not() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    let build = |word: &str| sandbox.cargo(&project, "build").env("WORD", word).ok();
    let _ = build("secretly");
    let report = explain(&sandbox, &project);
    let [(kind, said)] = &causes(miss(&report, "bottom"))[..] else {
        panic!("{report:#}");
    };
    assert_eq!(kind, "variable");
    assert!(
        said.starts_with("variable WORD is set (value hash "),
        "{said}"
    );
    let _ = build("otherwise");
    let report = explain(&sandbox, &project);
    let [(_, said)] = &causes(miss(&report, "bottom"))[..] else {
        panic!("{report:#}");
    };
    assert!(
        said.starts_with("variable WORD changed (value hash "),
        "{said}"
    );
    assert!(!format!("{report}").contains("otherwise"), "{report:#}");
}

#[test]
fn a_path_bound_result_says_to_what() {
    let sandbox = Sandbox::new();
    let source = "pub fn home() -> &'static str { env!(\"CARGO_MANIFEST_DIR\") }\n";
    let project = Project::new(sandbox.path("one"), &[Package::new("bound").lib(source)]);
    let other = project.checkout(sandbox.path("two"));
    for project in [&project, &other] {
        sandbox.mount(project.target());
        let _ = sandbox.cargo(project, "build").ok();
    }
    let report = explain(&sandbox, &other);
    let (one, two) = (project.root().display(), other.root().display());
    let said = causes(miss(&report, "bound"));
    assert_eq!(said[0].0, "path-bound", "{report:#}");
    assert!(said[0].1.contains("path of the workspace"), "{said:?}");
    assert!(
        said[0]
            .1
            .contains(&format!("compiled for {one}, here it is {two}")),
        "{said:?}"
    );
}

#[test]
fn a_result_that_is_gone_says_so() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    sandbox.counters();
    sandbox.empty_view(project.target());
    for directory in fs::read_dir(sandbox.store().join("blobs"))
        .must("blobs")
        .flatten()
    {
        for blob in fs::read_dir(directory.path()).must("blobs").flatten() {
            fs::remove_file(blob.path()).must("removing a blob");
        }
    }
    let _ = sandbox.cargo(&project, "build").ok();
    let report = explain(&sandbox, &project);
    assert_eq!(
        causes(miss(&report, "apart"))[0].0,
        "result-gone",
        "{report:#}"
    );
    assert_eq!(
        causes(miss(&report, "bottom"))[0].0,
        "result-gone",
        "{report:#}"
    );
}

#[test]
fn what_is_not_cached_has_a_reason_in_words() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    let flags = "-C save-temps";
    let _ = sandbox
        .cargo(&project, "build")
        .env("RUSTFLAGS", flags)
        .ok();
    let report = explain(&sandbox, &project);
    assert_eq!(report["actions"]["uncacheable"], 4, "{report:#}");
    let one = &report["uncacheable"][0];
    assert_eq!(one["reason"], "save-temps", "{report:#}");
    assert_eq!(one["text"], "-C save-temps writes additional files");
    let said = text(&sandbox, &project, "apart");
    assert!(
        said.contains("-C save-temps writes additional files (save-temps)"),
        "{said}"
    );
}

#[test]
fn a_failed_compile_is_told_as_one() {
    let sandbox = Sandbox::new();
    let project = tower(&sandbox);
    project.write("crates/apart/src/lib.rs", "pub const N: u32 = \"\";\n");
    let _ = sandbox.cargo(&project, "build").fails();
    let report = explain(&sandbox, &project);
    assert_eq!(report["failed"][0]["crate"], "apart", "{report:#}");
    let said = text(&sandbox, &project, "apart");
    assert!(said.contains("failed after"), "{said}");
}

#[test]
fn build_scripts_are_explained_too() {
    let sandbox = Sandbox::new();
    let script = "fn main() {\n    let text = std::fs::read_to_string(\"data.txt\").unwrap();\n    \
        let out = std::env::var(\"OUT_DIR\").unwrap();\n    \
        std::fs::write(format!(\"{out}/made.rs\"), format!(\"pub const T: &str = {text:?};\")).unwrap();\n    \
        println!(\"cargo::rerun-if-changed=data.txt\");\n}\n";
    let lib = "include!(concat!(env!(\"OUT_DIR\"), \"/made.rs\"));\n";
    let made = Package::new("made")
        .build_script(script)
        .file("data.txt", "one")
        .lib(lib);
    let project = Project::new(sandbox.path("project"), &[made]);
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    project.write("crates/made/data.txt", "two");
    // A run into an OUT_DIR that holds what an earlier one left is not stored.
    sandbox.empty_view(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    let report = explain(&sandbox, &project);
    let run = miss(&report, "build_script_build");
    assert_eq!(run["kind"], "build script run", "{report:#}");
    let [(kind, said)] = &causes(run)[..] else {
        panic!("{report:#}");
    };
    assert_eq!(kind, "looked-at");
    assert!(said.starts_with("crates/made/data.txt, "), "{said}");
    let lib = miss(&report, "made");
    assert_causes(lib, &[]);
    assert_eq!(
        crates(&lib["follows"]),
        ["build_script_build"],
        "{report:#}"
    );
}

/// What a script compiles from C may hold the checkout's path. That costs another checkout what holds it
/// too, and not the crates that are merely told where it lies.
#[test]
fn native_code_that_names_its_checkout_costs_whom_it_is_put_into() {
    let sandbox = Sandbox::new();
    let script = "use std::process::Command;\n\
        fn run(command: &mut Command) { assert!(command.status().unwrap().success()); }\n\
        fn main() {\n    let out = std::env::var(\"OUT_DIR\").unwrap();\n    \
        let text = format!(\"const char *where_am_i(void) {{ return \\\"{out}\\\"; }}\\n\");\n    \
        std::fs::write(format!(\"{out}/a.c\"), text).unwrap();\n    \
        run(Command::new(\"cc\").args([\"-c\", \"a.c\", \"-o\", \"a.o\"]).current_dir(&out));\n    \
        run(Command::new(\"ar\").args([\"crsD\", \"liba.a\", \"a.o\"]).current_dir(&out));\n    \
        println!(\"cargo::rustc-link-search=native={out}\");\n    \
        println!(\"cargo::rustc-link-lib=static=a\");\n}\n";
    let lib = "unsafe extern \"C\" { fn where_am_i() -> *const std::ffi::c_char; }\n\
        pub fn place() -> &'static std::ffi::CStr {\n    \
        unsafe { std::ffi::CStr::from_ptr(where_am_i()) }\n}\n";
    let project = Project::new(
        sandbox.path("one"),
        &[
            Package::new("a-sys").build_script(script).lib(lib),
            Package::new("middle").dep("a-sys").lib(
                "pub fn place() -> String { a_sys::place().to_string_lossy().into_owned() }\n",
            ),
            Package::new("app")
                .dep("middle")
                .bin("fn main() { println!(\"{}\", middle::place()); }\n"),
        ],
    );
    let other = project.checkout(sandbox.path("two"));
    for project in [&project, &other] {
        sandbox.mount(project.target());
        let _ = sandbox.cargo(project, "build").ok();
        let said = sandbox.output_of(project.program("app"));
        assert!(Path::new(&said).starts_with(project.target()), "{said}");
    }
    let report = explain(&sandbox, &other);
    let misses = report["misses"].as_array().must("misses");
    let mut missed: Vec<_> = misses.iter().map(|miss| miss["crate"].as_str()).collect();
    missed.sort_unstable();
    let expected = ["a_sys", "app", "build_script_build"].map(Some);
    assert_eq!(missed, expected, "{report:#}");
    let run = miss(&report, "build_script_build");
    assert_eq!(causes(run)[0].0, "path-bound", "{report:#}");
    for name in ["a_sys", "app"] {
        let follows = miss(&report, name);
        assert_causes(follows, &[]);
        assert_eq!(crates(&follows["follows"]), ["build_script_build"]);
    }
}

#[test]
fn bad_questions_get_one_line() {
    let sandbox = Sandbox::new();
    let complains = |words: &str, about: &str| {
        let outcome = sandbox.kachefs(words).in_dir(sandbox.root()).fails();
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert!(outcome.stderr.contains(about), "{outcome}");
        assert!(outcome.stdout.is_empty(), "{outcome}");
    };
    complains("explain", "no daemon is running");
    let project = Project::new(
        sandbox.path("project"),
        &[Package::new("apart").lib("pub const N: u32 = 1;\n")],
    );
    sandbox.mount(project.target());
    complains("explain", "was never mounted");
    complains("explain --view project/target", "nothing was built in");
    let _ = sandbox.cargo(&project, "build").ok();
    complains(
        "explain --view project/target other",
        "asked for no crate other",
    );
    complains("explain --view nowhere/at/all", "cannot be mounted on");
    complains("explain --no-such-flag", "--no-such-flag");
}
