//! A second checkout of a project finds what the first one built, and nothing of its path.

use std::fs;
use std::path::Path;

use harness::messages::Messages;
use harness::{Counters, Must, Outcome, Package, Project, Sandbox, samples, tree};

const BUILD: &str = "build --message-format=json";

/// Builds a project in two checkouts with one store. Returns them, and what the second build did.
#[track_caller]
fn build_twice(sandbox: &Sandbox, first: &Project, words: &str) -> (Project, Counters, Outcome) {
    // Of different lengths, so that no path can hide in another.
    let second = first.checkout(sandbox.path("elsewhere/the-second-checkout"));
    sandbox.mount(first.target());
    sandbox.mount(second.target());
    let (cold, _) = sandbox.during(|| sandbox.cargo(first, words).ok());
    assert!(cold.misses > 0, "{cold:?}");
    let (seen, outcome) = sandbox.during(|| sandbox.cargo(&second, words).ok());
    (second, seen, outcome)
}

/// The test fails if anything in `project`'s target names the checkout `other`.
#[track_caller]
fn assert_nothing_of(other: &Project, project: &Project) {
    let found = tree::files_holding(&project.target(), other.root());
    assert!(
        found.is_empty(),
        "these name {}: {found:#?}",
        other.root().display()
    );
}

/// The test fails unless every dep-info file is about its own checkout.
#[track_caller]
fn assert_own_dep_info(project: &Project) {
    let is_dep_info = |path: &&std::path::PathBuf| path.extension().is_some_and(|ext| ext == "d");
    let files = tree::files(&project.path("target/debug/deps"));
    let mut count = 0;
    for file in files.iter().filter(is_dep_info) {
        let text = fs::read_to_string(file).must(file.display());
        let own = project.target().display().to_string();
        assert!(
            text.contains(&own),
            "{} does not name {own}:\n{text}",
            file.display()
        );
        for rule in text.lines().filter(|line| !line.starts_with('#')) {
            for input in rule
                .split_once(':')
                .map_or("", |(_, inputs)| inputs)
                .split_whitespace()
            {
                assert!(
                    project.root().join(input).exists(),
                    "{input} of {}",
                    file.display()
                );
            }
        }
        count += 1;
    }
    assert!(count > 0, "there are dep-info files");
}

#[test]
fn what_holds_no_path_all_hits() {
    let sandbox = Sandbox::new();
    let first = samples::plain(sandbox.path("one"));
    let (second, seen, outcome) = build_twice(&sandbox, &first, BUILD);
    seen.assert_all_hit(Messages::of(&outcome).units());
    assert_eq!(
        sandbox.output_of(second.program("app")),
        samples::PLAIN_OUTPUT
    );
    assert_nothing_of(&first, &second);
    assert_own_dep_info(&second);
    assert_own_dep_info(&first);
    // Everything but dep-info is the very same.
    let outputs = |project: &Project| {
        let mut outputs = tree::deps(&project.target());
        outputs.retain(|name, _| name.extension().is_none_or(|ext| ext != "d"));
        outputs
    };
    tree::assert_same_outputs(&outputs(&first), &outputs(&second), "the two checkouts");
    let again = sandbox.cargo(&second, BUILD).ok();
    Messages::of(&again).assert_all_fresh();
}

#[test]
fn release_check_and_tests_hit_too() {
    for words in ["build --release", "check", "test --no-run"] {
        let sandbox = Sandbox::new();
        let first = samples::plain(sandbox.path("one"));
        let words = format!("{words} --message-format=json");
        let (second, seen, outcome) = build_twice(&sandbox, &first, &words);
        seen.assert_all_hit(Messages::of(&outcome).units());
        assert_nothing_of(&first, &second);
    }
}

#[test]
fn build_scripts_and_proc_macros_hit_where_no_path_is_involved() {
    let sandbox = Sandbox::new();
    let first = samples::whole(sandbox.path("one"));
    let (second, seen, outcome) = build_twice(&sandbox, &first, BUILD);
    let units = Messages::of(&outcome).units();
    assert_eq!(seen.hits + seen.misses, units, "{seen:?}");
    // greeting, polite, the macro and the build script hold no path. What is built from OUT_DIR,
    // and what is built with a proc macro (its environment names the checkout), may be bound to it.
    assert!(seen.hits >= 4, "{seen:?}");
    assert!(seen.misses <= 3, "{seen:?}");
    assert_eq!(
        sandbox.output_of(second.program("app")),
        samples::WHOLE_OUTPUT
    );
    assert_nothing_of(&first, &second);
    assert_own_dep_info(&second);
    let again = sandbox.cargo(&second, BUILD).ok();
    Messages::of(&again).assert_all_fresh();

    // What the second built is its own, and the first one's is still there.
    for project in [&first, &second] {
        sandbox.empty_view(project.target());
        let (seen, _) = sandbox.during(|| sandbox.cargo(project, BUILD).ok());
        seen.assert_all_hit(units);
        assert_eq!(
            sandbox.output_of(project.program("app")),
            samples::WHOLE_OUTPUT
        );
    }
    assert_nothing_of(&second, &first);
    assert_nothing_of(&first, &second);
}

#[test]
fn panics_name_files_and_not_the_first_checkout() {
    let sandbox = Sandbox::new();
    let first = samples::plain(sandbox.path("one"));
    first.write(
        "crates/app/src/main.rs",
        "fn main() { let _ = middle::sentence(); panic!(\"here\"); }\n",
    );
    let (second, seen, _) = build_twice(&sandbox, &first, BUILD);
    seen.assert_no_miss();
    let ran = sandbox
        .command(second.program("app"))
        .env("RUST_BACKTRACE", "full")
        .fails();
    assert!(ran.stderr.contains("crates/app/src/main.rs:1:"), "{ran}");
    assert!(
        !ran.stderr.contains(first.root().to_str().must("text")),
        "{ran}"
    );
}

#[test]
fn dependencies_outside_the_workspace_hit() {
    // A path dependency beside the checkout: cargo names its files by absolute path.
    let sandbox = Sandbox::new();
    let dependency = "[package]\nname = \"beside\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\
                      [workspace]\n";
    let make = |parent: &str| {
        let place = |name: &str| sandbox.path(parent).join(name);
        fs::create_dir_all(place("beside/src")).must("mkdir");
        fs::write(place("beside/Cargo.toml"), dependency).must("write");
        let source = "pub fn word(index: usize) -> char { ['a', 'b'][index] }\n";
        fs::write(place("beside/src/lib.rs"), source).must("write");
        let app = Package::new("app")
            .manifest("beside = { path = \"../../../beside\" }\n")
            .bin("fn main() { println!(\"{}\", beside::word(1)); }\n");
        Project::new(place("project"), &[app])
    };
    let (first, second) = (make("one"), make("two-of-another-length"));
    for project in [&first, &second] {
        sandbox.mount(project.target());
    }
    let _ = sandbox.cargo(&first, BUILD).ok();
    let (seen, _) = sandbox.during(|| sandbox.cargo(&second, BUILD).ok());
    assert_eq!(seen.hits + seen.misses, 2, "{seen:?}");
    assert_eq!(sandbox.output_of(second.program("app")), "b\n");
    let parent: &Path = first.root().parent().must("a parent");
    let found = tree::files_holding(&second.target(), parent);
    assert!(
        found.is_empty(),
        "these name {}: {found:#?}",
        parent.display()
    );
}

/// The test fails unless each of two checkouts prints its own answer.
#[track_caller]
fn assert_own_answers(app: Package, answer: impl Fn(&Project) -> String) {
    let sandbox = Sandbox::new();
    let first = Project::new(sandbox.path("one"), &[app]);
    let (second, _, _) = build_twice(&sandbox, &first, BUILD);
    for _ in 0..2 {
        for project in [&first, &second] {
            let _ = sandbox.cargo(project, BUILD).ok();
            assert_eq!(sandbox.output_of(project.program("app")), answer(project));
            sandbox.empty_view(project.target());
        }
    }
}

#[test]
fn the_length_of_a_path_is_this_checkouts() {
    let app = Package::new("app")
        .build_script("fn main() { println!(\"cargo::rerun-if-changed=build.rs\"); }\n")
        .bin(
            "const LENGTH: usize = env!(\"OUT_DIR\").len();\n\
             fn main() { println!(\"{}\", LENGTH - \"/build/app-0123456789abcdef/out\".len()); }\n",
        );
    assert_own_answers(app, |project| {
        let debug = project.path("target/debug");
        format!("{}\n", debug.as_os_str().len())
    });
}

#[test]
fn a_cfg_that_holds_a_path_is_this_checkouts() {
    let app = Package::new("app")
        .build_script(
            "fn main() {\n\
                 let root = std::env::var(\"CARGO_MANIFEST_DIR\").unwrap();\n\
                 println!(\"cargo::rerun-if-changed=build.rs\");\n\
                 println!(\"cargo::rustc-cfg=root={root:?}\");\n\
             }\n",
        )
        .bin("fn main() { println!(\"{}\", cfg!(root = \"PLACE\")); }\n");
    let sandbox = Sandbox::new();
    let first = Project::new(sandbox.path("one"), &[app]);
    let place = first.path("crates/app");
    first.replace(
        "crates/app/src/main.rs",
        "PLACE",
        place.to_str().must("text"),
    );
    let (second, _, _) = build_twice(&sandbox, &first, BUILD);
    assert_eq!(sandbox.output_of(first.program("app")), "true\n");
    assert_eq!(sandbox.output_of(second.program("app")), "false\n");
}

#[test]
fn views_share_bytes_but_not_times() {
    let sandbox = Sandbox::new();
    let first = samples::plain(sandbox.path("one"));
    let (second, seen, _) = build_twice(&sandbox, &first, BUILD);
    seen.assert_no_miss();
    let before = harness::Tree::of(&second.target());
    // What one checkout does to its files, the other never sees.
    for path in tree::files(&first.path("target/debug/deps")) {
        fs::File::options()
            .append(true)
            .open(&path)
            .must("open")
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .must("touch");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .must("chmod");
    }
    fs::write(first.program("app"), "garbage").must("write");
    before.assert_same(&harness::Tree::of(&second.target()), "the second checkout");
    assert_eq!(
        sandbox.output_of(second.program("app")),
        samples::PLAIN_OUTPUT
    );
}

/// In dep-info a space is written with a backslash, so texts made elsewhere do not fit here.
#[test]
fn a_path_that_some_text_writes_in_another_form_is_built_once() {
    let sandbox = Sandbox::new();
    let first = samples::whole(sandbox.path("one"));
    let odd = first.checkout(sandbox.path("a copy/of it ($1)"));
    let plain = first.checkout(sandbox.path("three"));
    for (number, project) in [&first, &odd, &plain].into_iter().enumerate() {
        sandbox.mount(project.target());
        let (seen, _) = sandbox.during(|| sandbox.cargo(project, BUILD).ok());
        assert_eq!(
            sandbox.output_of(project.program("app")),
            samples::WHOLE_OUTPUT
        );
        let again = sandbox.cargo(project, BUILD).ok();
        Messages::of(&again).assert_all_fresh();
        // What the odd one stores takes nothing from the others.
        if number == 2 {
            assert!(seen.hits >= 4, "{seen:?}");
        }
        sandbox.empty_view(project.target());
        let (seen, _) = sandbox.during(|| sandbox.cargo(project, BUILD).ok());
        seen.assert_no_miss();
    }
}

/// rustc lists the directory it searches, and so finds what no argument names.
#[test]
fn who_has_listed_a_directory_sees_there_what_a_hit_brings() {
    let sandbox = Sandbox::new();
    let compile = |checkout: &str| {
        let project = Project::at(sandbox.path(checkout));
        project.write("lib.rs", "pub fn one() -> u32 { 1 }\n");
        project.write("Cargo.toml", "");
        sandbox.mount(project.target());
        let deps = project.target().join("debug/deps");
        fs::create_dir_all(&deps).must("mkdir");
        let state = || {
            let names = fs::read_dir(&deps).must("list");
            let mut names: Vec<_> = names.map(|name| name.must("a name").file_name()).collect();
            names.sort();
            (
                names,
                fs::metadata(&deps)
                    .and_then(|meta| meta.modified())
                    .must("a time"),
            )
        };
        let before = state();
        assert!(before.0.is_empty());
        let rustc = "rustc --crate-name one --crate-type lib --emit=dep-info,metadata,link \
                     --error-format=json --json=artifacts -Cmetadata=1 -Cextra-filename=-1";
        let rustc = sandbox
            .command(sandbox.wrapper())
            .args(rustc.split_whitespace());
        let rustc = rustc
            .arg("--out-dir")
            .arg(&deps)
            .arg("lib.rs")
            .in_dir(project.root());
        let (seen, _) = sandbox.during(|| rustc.ok());
        let after = state();
        assert!(after.1 > before.1, "the directory has its old time");
        (seen, after.0)
    };
    let (cold, made) = compile("one");
    let (seen, brought) = compile("another");
    assert_eq!((cold.misses, seen.hits), (1, 1), "{cold:?} {seen:?}");
    assert_eq!(made, ["libone-1.rlib", "libone-1.rmeta", "one-1.d"]);
    assert_eq!(brought, made);
}
