//! `cargo clippy` hits like a compile: by the driver's content, its arguments and its configuration,
//! wherever that lies. What changes sources (`--fix`) and other drivers are left alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use harness::messages::Messages;
use harness::{Counters, Must, Outcome, Package, Project, Sandbox, samples, toolchain};

const CLIPPY: &str = "clippy --message-format=json";

/// A library with a lint of clippy's own, and a program that uses it.
fn project(root: &Path) -> Project {
    let lib = Package::new("wordy").lib(
        "pub fn many(a: u8, b: u8, c: u8, d: u8) -> u8 { a + b + c + d }\n\
         pub fn empty(x: &str) -> bool { return x.len() == 0; }\n",
    );
    let app = Package::new("app")
        .dep("wordy")
        .bin("fn main() { println!(\"{}\", wordy::many(1, 2, 3, 4)); }\n");
    Project::new(root, &[lib, app])
}

fn mounted() -> (Sandbox, Project) {
    let sandbox = Sandbox::new();
    let project = project(&sandbox.path("project"));
    sandbox.mount(project.target());
    (sandbox, project)
}

#[track_caller]
fn emptied(sandbox: &Sandbox, project: &Project, words: &str) -> (Counters, Outcome) {
    sandbox.empty_view(project.target());
    sandbox.during(|| sandbox.cargo(project, words).ok())
}

fn warnings(outcome: &Outcome) -> usize {
    let found = Messages::of(outcome).diagnostics();
    found
        .iter()
        .filter(|text| text.contains("clippy::"))
        .count()
}

#[test]
fn a_second_run_hits_and_warns_again() {
    let (sandbox, project) = mounted();
    let (cold, first) = emptied(&sandbox, &project, CLIPPY);
    let units = Messages::of(&first).units();
    assert_eq!((cold.hits, cold.misses), (0, units), "{cold:?}");
    assert_eq!(warnings(&first), 2, "{first}");
    let (warm, second) = emptied(&sandbox, &project, CLIPPY);
    warm.assert_all_hit(units);
    let said = |outcome| Messages::of(outcome).diagnostics();
    assert_eq!(said(&second), said(&first));
    let (idle, third) = sandbox.during(|| sandbox.cargo(&project, CLIPPY).ok());
    Messages::of(&third).assert_all_fresh();
    assert_eq!((idle.hits, idle.misses), (0, 0), "{idle:?}");
    assert_eq!(said(&third), said(&first));
}

#[test]
fn with_proc_macros_and_build_scripts() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let words = "clippy --all-targets --message-format=json";
    let (cold, _) = emptied(&sandbox, &project, words);
    assert!(cold.misses > 0, "{cold:?}");
    let (warm, built) = emptied(&sandbox, &project, words);
    warm.assert_all_hit(Messages::of(&built).units());
    assert_eq!(warm.script_hits, 1, "{warm:?}");
}

#[test]
fn another_checkout_hits() {
    let (sandbox, first) = mounted();
    let second = first.checkout(sandbox.path("elsewhere/the-second-checkout"));
    sandbox.mount(second.target());
    fs::write(
        first.path("clippy.toml"),
        "too-many-arguments-threshold = 3\n",
    )
    .must("write");
    fs::copy(first.path("clippy.toml"), second.path("clippy.toml")).must("copy");
    let (_, one) = emptied(&sandbox, &first, CLIPPY);
    let (seen, two) = emptied(&sandbox, &second, CLIPPY);
    seen.assert_all_hit(Messages::of(&two).units());
    assert_eq!((warnings(&one), warnings(&two)), (3, 3), "{two}");
    let other = first.root().to_str().must("text");
    assert!(!two.stdout.contains(other), "{two}");
}

#[test]
fn what_check_left_is_not_clippys() {
    let (sandbox, project) = mounted();
    let check = "check --message-format=json";
    let _ = emptied(&sandbox, &project, check);
    let (seen, linted) = emptied(&sandbox, &project, CLIPPY);
    assert_eq!(seen.hits, 0, "{seen:?}");
    assert_eq!(warnings(&linted), 2, "{linted}");
    let (seen, checked) = emptied(&sandbox, &project, check);
    seen.assert_all_hit(2);
    assert_eq!(warnings(&checked), 0, "{checked}");
}

/// Goes from one state to the other and back in an emptied view; each has its own number of warnings.
#[track_caller]
fn flip(sandbox: &Sandbox, project: &Project, states: [(&dyn Fn() -> String, usize); 2]) {
    for round in 0..2 {
        for (state, expected) in states {
            let words = state();
            let (seen, linted) = emptied(sandbox, project, &words);
            assert_eq!(
                warnings(&linted),
                expected,
                "{words}, {round}: {seen:?}\n{linted}"
            );
            if round == 1 {
                assert_eq!(seen.misses, 0, "{words}: {seen:?}");
            } else {
                assert!(seen.misses > 0, "{words}: {seen:?}");
            }
        }
    }
}

/// The same with a file of configuration that is there or not, and then with another content.
#[track_caller]
fn flip_file(sandbox: &Sandbox, project: &Project, path: &Path) {
    let words = || CLIPPY.to_owned();
    let write = |number: u32| {
        let text = format!("too-many-arguments-threshold = {number}\n");
        fs::write(path, text).must("write");
        words()
    };
    let remove = || {
        drop(fs::remove_file(path));
        words()
    };
    flip(sandbox, project, [(&remove, 2), (&|| write(3), 3)]);
    let (seen, linted) = {
        let words = write(9);
        emptied(sandbox, project, &words)
    };
    assert!(seen.misses > 0, "{seen:?}");
    assert_eq!(warnings(&linted), 2, "{linted}");
}

#[test]
fn a_configuration_in_the_package() {
    let (sandbox, project) = mounted();
    flip_file(
        &sandbox,
        &project,
        &project.path("crates/wordy/clippy.toml"),
    );
}

#[test]
fn a_configuration_in_the_workspace() {
    let (sandbox, project) = mounted();
    flip_file(&sandbox, &project, &project.path(".clippy.toml"));
}

#[test]
fn a_configuration_above_the_checkout() {
    let (sandbox, project) = mounted();
    flip_file(&sandbox, &project, &sandbox.path("clippy.toml"));
}

#[test]
fn a_configuration_named_by_a_variable() {
    let (sandbox, project) = mounted();
    let conf = sandbox.make_dir("conf");
    fs::write(
        conf.join("clippy.toml"),
        "too-many-arguments-threshold = 3\n",
    )
    .must("write");
    for (with, expected) in [(false, 2), (true, 3), (false, 2), (true, 3)] {
        sandbox.empty_view(project.target());
        let mut cargo = sandbox.cargo(&project, CLIPPY);
        if with {
            cargo = cargo.env("CLIPPY_CONF_DIR", &conf);
        }
        assert_eq!(warnings(&cargo.ok()), expected, "with it: {with}");
    }
}

#[test]
fn lints_given_as_arguments() {
    let (sandbox, project) = mounted();
    let words = |more: &str| format!("{CLIPPY} {more}");
    flip(
        &sandbox,
        &project,
        [
            (&|| words(""), 2),
            (&|| words("-- -A clippy::needless_return"), 1),
        ],
    );
}

#[test]
fn the_content_of_the_driver() {
    let (sandbox, project) = mounted();
    let copy = sandbox.path("toolchain");
    toolchain::copy_to(&copy);
    let path = format!("{}:/usr/bin:/bin", copy.join("bin").display());
    let clippy = || {
        sandbox.empty_view(project.target());
        let cargo = sandbox.cargo(&project, CLIPPY).env("PATH", &path);
        sandbox.during(|| cargo.ok())
    };
    let (cold, _) = clippy();
    assert_eq!(cold.hits, 0, "{cold:?}");
    let (warm, _) = clippy();
    warm.assert_all_hit(2);
    let driver = copy.join("bin/clippy-driver");
    let mut bytes = fs::read(&driver).must("read");
    bytes.push(0);
    fs::remove_file(&driver).must("remove");
    fs::write(&driver, bytes).must("write");
    fs::set_permissions(&driver, fs::Permissions::from_mode(0o755)).must("chmod");
    let (other, _) = clippy();
    assert_eq!((other.hits, other.misses), (0, 2), "{other:?}");
}

#[test]
fn where_it_cannot_be_watched_nothing_is_stored() {
    let (sandbox, project) = mounted();
    for _ in 0..2 {
        sandbox.empty_view(project.target());
        let cargo = sandbox
            .cargo(&project, CLIPPY)
            .env("KACHEFS_UNWATCHED", "1");
        let (seen, linted) = sandbox.during(|| cargo.ok());
        assert_eq!((seen.hits, seen.misses), (0, 2), "{seen:?}");
        assert_eq!(warnings(&linted), 2, "{linted}");
    }
}

#[test]
fn the_next_run_after_cargo_clean_hits() {
    let (sandbox, project) = mounted();
    let _ = sandbox.cargo(&project, CLIPPY).ok();
    sandbox.counters();
    let _ = sandbox.cargo(&project, "clean").ok();
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, CLIPPY).ok());
    assert!(sandbox.is_mounted(&project.target()));
    seen.assert_all_hit(2);
}

#[test]
fn another_driver_is_refused() {
    let (sandbox, project) = mounted();
    let driver = sandbox.path("driver");
    fs::write(&driver, "#!/bin/sh\nexec \"$@\"\n").must("write");
    fs::set_permissions(&driver, fs::Permissions::from_mode(0o755)).must("chmod");
    for _ in 0..2 {
        sandbox.empty_view(project.target());
        let cargo = sandbox
            .cargo(&project, "build")
            .env("RUSTC_WORKSPACE_WRAPPER", &driver);
        let (seen, _) = sandbox.during(|| cargo.ok());
        assert_eq!((seen.hits, seen.misses), (0, 0), "{seen:?}");
        assert_eq!(seen.reason_names(), ["workspace-wrapper"], "{seen:?}");
    }
}

#[test]
fn what_fixes_sources_is_not_cached() {
    for words in ["fix --allow-no-vcs", "clippy --fix --allow-no-vcs"] {
        let sandbox = Sandbox::new();
        let lib = "pub fn one() -> u32 { let mut x = 1; x }\n";
        let project = Project::new(sandbox.path("project"), &[Package::new("app").lib(lib)]);
        sandbox.mount(project.target());
        for _ in 0..2 {
            project.write("crates/app/src/lib.rs", lib);
            sandbox.empty_view(project.target());
            let (seen, _) = sandbox.during(|| sandbox.cargo(&project, words).ok());
            assert_eq!((seen.hits, seen.misses), (0, 0), "{words}: {seen:?}");
            let fixed = project.read("crates/app/src/lib.rs");
            assert!(!fixed.contains("mut"), "{words}: {fixed}");
        }
    }
}
