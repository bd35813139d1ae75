//! Debugging information that rustc writes beside its outputs, and does not announce, comes back with
//! them, and a debugger finds it in every checkout.

use harness::messages::Messages;
use harness::{Package, Project, Sandbox, samples, tree};

const BUILD: &str = "build --message-format=json";

/// A project whose debugging information is split like this.
fn project(sandbox: &Sandbox, name: &str, kind: &str) -> Project {
    let project = samples::plain(sandbox.path(name));
    let manifest = project.read("Cargo.toml");
    let profile = format!("\n[profile.dev]\nsplit-debuginfo = \"{kind}\"\n");
    project.write("Cargo.toml", &(manifest + &profile));
    project
}

/// How many files of this kind lie in a target.
fn count(project: &Project, extension: &str) -> usize {
    let outputs = tree::deps(&project.target());
    let is_one = |path: &&std::path::PathBuf| path.extension().is_some_and(|is| is == extension);
    outputs.keys().filter(is_one).count()
}

#[track_caller]
fn comes_back(kind: &str, extension: &str) {
    let sandbox = Sandbox::new();
    let first = project(&sandbox, "one", kind);
    sandbox.mount(first.target());
    let (cold, built) = sandbox.during(|| sandbox.cargo(&first, BUILD).ok());
    let units = Messages::of(&built).units();
    assert_eq!((cold.hits, cold.misses), (0, units), "{cold:?}");
    let expected = tree::deps(&first.target());
    assert!(count(&first, extension) > 0, "{expected:#?}");
    sandbox.empty_view(first.target());
    let (warm, _) = sandbox.during(|| sandbox.cargo(&first, BUILD).ok());
    warm.assert_all_hit(units);
    tree::assert_same_outputs(&expected, &tree::deps(&first.target()), kind);
    let again = sandbox.cargo(&first, BUILD).ok();
    Messages::of(&again).assert_all_fresh();

    let second = first.checkout(sandbox.path("elsewhere/the-second-checkout"));
    sandbox.mount(second.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&second, BUILD).ok());
    seen.assert_all_hit(units);
    // Nothing is left of the first one that a debugger could find.
    sandbox.empty_view(first.target());
    let found = tree::files_holding(&second.target(), first.root());
    assert!(found.is_empty(), "{found:#?}");
    let gdb = [
        "-nx",
        "-batch",
        "-ex",
        "break crates/leaf/src/lib.rs:2",
        "-ex",
        "run",
    ];
    let said = sandbox
        .command("gdb")
        .args(gdb)
        .args(["-ex", "list", "-ex", "backtrace"])
        .arg(second.program("app"))
        .in_dir(&second)
        .ok();
    for part in [
        "leaf::private ()",
        "fn private() -> u32 { 42 }",
        "middle::sentence ()",
    ] {
        assert!(said.stdout.contains(part), "{part}\n{said}");
    }
}

#[test]
fn packed_into_one_file() {
    comes_back("packed", "dwp");
}

#[test]
fn a_file_for_each_object() {
    comes_back("unpacked", "dwo");
}

#[test]
fn of_proc_macros_and_libraries_for_others() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let manifest = project.read("Cargo.toml");
    let profile = "\n[profile.dev]\nsplit-debuginfo = \"packed\"\n\
        [profile.dev.build-override]\ndebug = 2\nsplit-debuginfo = \"packed\"\n";
    project.write("Cargo.toml", &(manifest + profile));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, BUILD).ok();
    let expected = tree::deps(&project.target());
    sandbox.empty_view(project.target());
    let (warm, built) = sandbox.during(|| sandbox.cargo(&project, BUILD).ok());
    warm.assert_all_hit(Messages::of(&built).units());
    tree::assert_same_outputs(&expected, &tree::deps(&project.target()), "packed");
    assert!(count(&project, "dwp") >= 1);
}

#[test]
fn where_no_path_leads_to_it_nothing_is_cached() {
    let sandbox = Sandbox::new();
    let project = project(&sandbox, "project", "unpacked");
    let target = sandbox.path("built");
    sandbox.mount(&target);
    let build = || {
        sandbox
            .cargo(&project, BUILD)
            .env("CARGO_TARGET_DIR", &target)
    };
    let (seen, _) = sandbox.during(|| build().ok());
    assert_eq!((seen.hits, seen.misses), (0, 0), "{seen:?}");
    assert_eq!(seen.reason_names(), ["split-debuginfo"], "{seen:?}");
}

#[test]
fn one_that_is_left_is_not_taken_along() {
    // A flag that leaves no trace in names: what lies there is of the compile before.
    let sandbox = Sandbox::new();
    let app = Package::new("app").bin("fn main() { println!(\"here\"); }\n");
    let project = Project::new(sandbox.path("project"), &[app]);
    sandbox.mount(project.target());
    let rustc = |debuginfo: &str| {
        let words = format!("rustc -p app -- -Csplit-debuginfo=packed -Cdebuginfo={debuginfo}");
        let _ = sandbox.cargo(&project, &words).ok();
        sandbox.counters();
    };
    rustc("2");
    assert_eq!(count(&project, "dwp"), 1);
    rustc("0");
    sandbox.empty_view(project.target());
    rustc("0");
    let left = count(&project, "dwp");
    let plain = sandbox.path("plain");
    let words = "rustc -p app -- -Csplit-debuginfo=packed -Cdebuginfo=0";
    let cargo = sandbox.plain_cargo(&project, words);
    let _ = cargo.env("CARGO_TARGET_DIR", &plain).ok();
    let expected = tree::deps(&plain);
    let is_one = |path: &&std::path::PathBuf| path.extension().is_some_and(|is| is == "dwp");
    assert_eq!(left, expected.keys().filter(is_one).count());
}
