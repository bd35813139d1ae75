//! Real projects come out of the store complete, and exactly as plain rustc would have made them.
//!
//! The longest parts (eza in release, check and test; second checkouts of large projects) run with
//! `KACHEFS_TEST_LONG=1`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use harness::messages::Messages;
use harness::tree::Outputs;
use harness::{Must, Project, Sandbox, toolchain, tree};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_mins(20);

/// Builds, empties the view and builds again: no miss, the same outputs, then all fresh. Returns
/// the outputs, to be compared with another run's.
#[track_caller]
fn builds_twice(sandbox: &Sandbox, project: &Project, words: &str) -> Outputs {
    let command = format!("{words} --locked --message-format=json");
    let build = || sandbox.cargo(project, &command).timeout(PATIENCE).ok();
    sandbox.empty_view(project.target());
    let (cold, first) = sandbox.during(build);
    let units = Messages::of(&first).units();
    println!("{words}: {units} units, at first {cold:?}");
    // Build scripts may try the compiler through the wrapper, too: more actions than units.
    assert!(
        cold.hits + cold.misses >= units,
        "{words}: every unit is cacheable: {cold:?}"
    );
    let expected = tree::deps(&project.target());

    sandbox.empty_view(project.target());
    let (warm, _) = sandbox.during(build);
    warm.assert_no_miss();
    assert!(warm.hits >= units, "{words}: {units} units: {warm:?}");
    tree::assert_same_outputs(&expected, &tree::deps(&project.target()), words);
    Messages::of(&build()).assert_all_fresh();
    tree::deps_of_any_run(&project.target())
}

/// What plain rustc makes of the same commands at the same path, with the flags that kachefs
/// documents to add. The hashes are those of [`tree::deps_of_any_run`].
#[track_caller]
fn oracle(sandbox: &Sandbox, project: &Project, words: &str) -> Outputs {
    sandbox.unmount(project.target());
    let target = project.target();
    if target.exists() {
        fs::remove_dir(&target).must("the mountpoint is an empty directory again");
    }
    let script = sandbox.path("oracle.sh");
    write_oracle(&script, &sandbox.cargo_home(), &target);
    let build = sandbox
        .cargo(project, words)
        .arg("--locked")
        .env("RUSTC_WRAPPER", &script);
    let _ = build.timeout(PATIENCE).ok();
    tree::deps_of_any_run(&target)
}

/// A wrapper that puts the remapping flags before cargo's arguments, the shortest path first.
fn write_oracle(script: &Path, cargo_home: &Path, target: &Path) {
    let text = format!(
        "#!/bin/bash\n\
         # Probes are left alone: they compile nothing.\n\
         if [[ \" $* \" != *\" --crate-name \"* || \" $* \" == *\" --crate-name ___ \"* ]]; then\n\
             exec \"$@\"\n\
         fi\n\
         home='{}' target='{}' cwd=$(pwd -P)\n\
         rules=(\"$home=/cargo\" \"$target=/proc/self/cwd/target\")\n\
         if [[ $cwd != \"$home\"/* ]]; then rules+=(\"$cwd=/proc/self/cwd\"); fi\n\
         compiler=$1\n\
         shift\n\
         flags=()\n\
         while IFS= read -r rule; do flags+=(\"--remap-path-prefix=$rule\"); done < <(\n\
             for rule in \"${{rules[@]}}\"; do\n\
                 from=${{rule%%=*}}\n\
                 echo \"${{#from}} $rule\"\n\
             done | sort -n -s -k1,1 | cut -d' ' -f2-\n\
         )\n\
         exec \"$compiler\" \"${{flags[@]}}\" \"$@\"\n",
        cargo_home.display(),
        target.display()
    );
    fs::write(script, text).must("write");
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).must("chmod");
}

#[test]
fn ripgrep_dev_and_the_oracle() {
    let sandbox = Sandbox::with_limit(PATIENCE);
    let project = sandbox.fetch_crate("ripgrep", "15.2.0", "ripgrep");
    sandbox.mount(project.target());
    let outputs = builds_twice(&sandbox, &project, "build");

    fs::write(project.path("sample.txt"), "one\ntwo needle\n").must("write");
    let rg = sandbox
        .command(project.program("rg"))
        .args(["-n", "needle", "sample.txt"]);
    assert_eq!(rg.in_dir(&project).ok().stdout, "2:two needle\n");

    let expected = oracle(&sandbox, &project, "build");
    tree::assert_same_outputs(&expected, &outputs, "plain rustc and the store");
}

/// Builds in one checkout, then in another at another path: there only what is bound to the first
/// one's path may miss, the program runs, and no file names the first.
#[track_caller]
fn second_checkout(krate: &str, version: &str, program: &str) {
    let sandbox = Sandbox::with_limit(PATIENCE);
    let first = sandbox.fetch_crate(krate, version, krate);
    let second = first.checkout(sandbox.path("a-second-checkout"));
    for project in [&first, &second] {
        sandbox.mount(project.target());
    }
    let build = |project: &Project| {
        let command = sandbox.cargo(project, "build --locked --message-format=json");
        command.timeout(PATIENCE).ok()
    };
    sandbox.during(|| build(&first));
    let (seen, outcome) = sandbox.during(|| build(&second));
    let units = Messages::of(&outcome).units();
    println!("{krate} {version}, second checkout: {units} units, {seen:?}");
    assert!(seen.hits + seen.misses >= units, "{seen:?}");
    let report = sandbox.kachefs("explain --json").in_dir(&second).ok();
    let report: Value = serde_json::from_str(&report.stdout).must("JSON");
    let misses = report["misses"].as_array().must("misses");
    for miss in misses {
        println!("{miss}");
    }
    let is_bound = |miss: &&Value| {
        let causes = miss["causes"].as_array().must("causes");
        let bound = causes.iter().all(|cause| cause["kind"] == "path-bound");
        let follows = miss["follows"]
            .as_array()
            .is_some_and(|all| !all.is_empty());
        bound && (follows || !causes.is_empty())
    };
    let unexplained: Vec<_> = misses.iter().filter(|miss| !is_bound(miss)).collect();
    assert!(unexplained.is_empty(), "{unexplained:#?}");
    let found = tree::files_holding(&second.target(), first.root());
    assert!(
        found.is_empty(),
        "these name {}: {found:#?}",
        first.root().display()
    );
    let said = sandbox.command(second.program(program)).arg("--version");
    let said = said.ok().stdout;
    assert!(said.contains(version), "{said}");
    let idle = build(&second);
    Messages::of(&idle).assert_all_fresh();
}

#[test]
fn ripgrep_in_a_second_checkout() {
    second_checkout("ripgrep", "15.2.0", "rg");
}

/// The same for larger ones.
#[track_caller]
fn large_second_checkout(krate: &str, version: &str, program: &str) {
    if std::env::var_os("KACHEFS_TEST_LONG").is_none() {
        eprintln!("skipped: takes minutes; set KACHEFS_TEST_LONG=1");
        return;
    }
    second_checkout(krate, version, program);
}

#[test]
fn eza_in_a_second_checkout() {
    large_second_checkout("eza", "0.23.5", "eza");
}

#[test]
fn bat_in_a_second_checkout() {
    large_second_checkout("bat", "0.26.1", "bat");
}

#[test]
fn cargo_nextest_in_a_second_checkout() {
    large_second_checkout("cargo-nextest", "0.9.151", "cargo-nextest");
}

#[test]
fn eza_dev_and_the_oracle() {
    let sandbox = Sandbox::with_limit(PATIENCE);
    let project = sandbox.fetch_crate("eza", "0.23.5", "eza");
    sandbox.mount(project.target());
    let outputs = builds_twice(&sandbox, &project, "build");
    let listing = sandbox
        .command(project.program("eza"))
        .arg("src")
        .in_dir(&project)
        .ok();
    assert!(listing.stdout.contains("main.rs"), "{listing}");
    let expected = oracle(&sandbox, &project, "build");
    tree::assert_same_outputs(&expected, &outputs, "plain rustc and the store");
}

#[test]
fn eza_release_check_and_test() {
    if std::env::var_os("KACHEFS_TEST_LONG").is_none() {
        eprintln!("skipped: takes minutes; set KACHEFS_TEST_LONG=1");
        return;
    }
    let sandbox = Sandbox::with_limit(PATIENCE * 2);
    let project = sandbox.fetch_crate("eza", "0.23.5", "eza");
    sandbox.mount(project.target());
    for words in ["build --release", "check", "test --no-run"] {
        builds_twice(&sandbox, &project, words);
    }
    builds_twice(&sandbox, &project, "build --release");
    let eza = project.path("target/release/eza");
    let listing = sandbox.command(eza).arg("src").in_dir(&project).ok();
    assert!(listing.stdout.contains("main.rs"), "{listing}");
}

#[test]
fn the_oracle_adds_the_flags_it_should() {
    let sandbox = Sandbox::new();
    let (home, target) = (sandbox.cargo_home(), sandbox.path("project/target"));
    let script = sandbox.path("oracle.sh");
    write_oracle(&script, &home, &target);
    let package = sandbox.make_dir("cargo/registry/src/index/package");
    let project = sandbox.make_dir("project");
    let flags = |dir: &Path, args: &[&str]| -> Vec<String> {
        let command = sandbox
            .command(&script)
            .arg("/bin/echo")
            .args(args)
            .in_dir(dir);
        command
            .ok()
            .stdout
            .split_whitespace()
            .map(ToOwned::to_owned)
            .collect()
    };
    let rule = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let compile = ["--crate-name", "app"];
    assert_eq!(flags(&project, &["-vV"]), ["-vV"]);
    let expected = [
        rule(&home, "/cargo"),
        rule(&target, "/proc/self/cwd/target"),
        "--crate-name".to_owned(),
        "app".to_owned(),
    ];
    assert_eq!(flags(&package, &compile), expected);
    let seen = flags(&project, &compile);
    assert_eq!(seen.len(), 5, "{seen:?}");
    assert!(seen.contains(&rule(&project, "/proc/self/cwd")), "{seen:?}");
    let lengths: Vec<_> = seen[..3]
        .iter()
        .map(|flag| flag.split('=').nth(1).must("a path").len())
        .collect();
    assert!(lengths.is_sorted(), "{seen:?}");
    assert!(toolchain::sysroot().join("bin/rustc").is_file());
}
