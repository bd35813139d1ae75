//! A build in an emptied view comes out of the store: nothing misses, everything is the same.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use harness::messages::Messages;
use harness::{Counters, Must, Outcome, Package, Project, Sandbox, samples, tree};

/// Builds, empties the view, builds again, and once more: the second build hits in every unit and
/// leaves the same outputs, the third finds everything fresh. `words` is the cargo command.
/// Returns the outcome of the first and of the second build.
#[track_caller]
fn second_build_hits(sandbox: &Sandbox, project: &Project, words: &str) -> (Outcome, Outcome) {
    let command = format!("{words} --message-format=json");
    let build = || sandbox.cargo(project, &command).ok();

    sandbox.empty_view(project.target());
    let (cold, first) = sandbox.during(build);
    let units = Messages::of(&first).units();
    assert!(units > 0, "the project has units\n{first}");
    assert_eq!(
        cold.hits + cold.misses,
        units,
        "every unit is cacheable: {cold:?}"
    );
    let expected = tree::deps(&project.target());

    sandbox.empty_view(project.target());
    let (warm, second) = sandbox.during(build);
    warm.assert_all_hit(units);
    assert_eq!(warm.failed, 0, "{warm:?}");
    tree::assert_same_outputs(&expected, &tree::deps(&project.target()), words);

    let (idle, third) = sandbox.during(build);
    Messages::of(&third).assert_all_fresh();
    assert_eq!(
        (idle.hits, idle.misses),
        (0, 0),
        "a no-op build asks for nothing: {idle:?}"
    );
    (first, second)
}

#[test]
fn dev() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    second_build_hits(&sandbox, &project, "build");
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );

    // cargo's second name for the binary is the same file, as after a build on the disk.
    let uplifted = project.program("app").metadata().must("the binary");
    let deps = tree::files(&project.path("target/debug/deps"));
    let same =
        |path: &&std::path::PathBuf| path.metadata().is_ok_and(|m| m.ino() == uplifted.ino());
    assert_eq!(
        deps.iter().filter(same).count(),
        1,
        "one of deps/ is the binary"
    );
    assert_eq!(uplifted.nlink(), 2);
}

#[test]
fn release() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    second_build_hits(&sandbox, &project, "build --release");
    assert_eq!(
        sandbox.output_of(project.path("target/release/app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn check() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    second_build_hits(&sandbox, &project, "check");
    second_build_hits(&sandbox, &project, "check --all-targets");
}

#[test]
fn test_executables() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    second_build_hits(&sandbox, &project, "test --no-run --workspace");
    let ran = sandbox
        .cargo(&project, "test --workspace --lib --bins --tests")
        .ok();
    for test in ["ends_with_the_flavour ... ok", "starts_politely ... ok"] {
        assert!(ran.stdout.contains(test), "{ran}");
    }
}

#[test]
fn without_incremental_compilation() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    project.write(
        "Cargo.toml",
        &format!(
            "{}\n[profile.dev]\nincremental = false\n",
            project.read("Cargo.toml")
        ),
    );
    sandbox.mount(project.target());
    second_build_hits(&sandbox, &project, "build");
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn cdylib_and_staticlib() {
    let sandbox = Sandbox::new();
    let package = Package::new("native").lib_of(
        "\"cdylib\", \"staticlib\", \"rlib\"",
        "#[unsafe(no_mangle)]\npub extern \"C\" fn kachefs_answer() -> i32 { 42 }\n",
    );
    let project = Project::new(sandbox.path("project"), &[package]);
    project.write(
        "main.c",
        "#include <stdio.h>\nint kachefs_answer(void);\n\
         int main(void) { printf(\"%d\\n\", kachefs_answer()); return 0; }\n",
    );
    sandbox.mount(project.target());
    second_build_hits(&sandbox, &project, "build");

    let link = |program: &str, library: &str, more: &[&str]| {
        let program = project.path(program);
        let cc = sandbox
            .command("cc")
            .in_dir(&project)
            .arg("-o")
            .arg(&program)
            .arg("main.c");
        let _ = cc
            .arg(project.path("target/debug").join(library))
            .args(more)
            .ok();
        program
    };
    let fixed = link(
        "fixed",
        "libnative.a",
        &["-lpthread", "-ldl", "-lm", "-lgcc_s"],
    );
    assert_eq!(sandbox.output_of(fixed), "42\n");
    let shared = link("shared", "libnative.so", &[]);
    let shared = sandbox
        .command(shared)
        .env("LD_LIBRARY_PATH", project.path("target/debug"))
        .ok();
    assert_eq!(shared.stdout, "42\n");
}

#[test]
fn dylib_or_a_named_reason() {
    let sandbox = Sandbox::new();
    let lib = Package::new("shared").lib_of("\"dylib\"", "pub fn answer() -> u32 { 42 }\n");
    let app = Package::new("app")
        .dep("shared")
        .bin("fn main() { println!(\"{}\", shared::answer()); }\n");
    let project = Project::new(sandbox.path("project"), &[lib, app]);
    sandbox.mount(project.target());
    for _ in 0..2 {
        let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build -p app").ok());
        let counted = seen.hits + seen.misses + seen.reasons.values().sum::<u64>();
        assert!(
            counted >= 2,
            "every unit is counted, or its reason is: {seen:?}"
        );
        let ran = sandbox.cargo(&project, "run -q -p app").ok();
        assert_eq!(ran.stdout, "42\n");
        sandbox.empty_view(project.target());
    }
}

#[test]
fn examples_benches_and_several_binaries() {
    let sandbox = Sandbox::new();
    let package = Package::new("app")
        .lib("pub fn name() -> &'static str { \"app\" }\n")
        .file(
            "src/bin/one.rs",
            "fn main() { println!(\"one {}\", app::name()); }\n",
        )
        .file(
            "src/bin/two.rs",
            "fn main() { println!(\"two {}\", app::name()); }\n",
        )
        .file(
            "examples/three.rs",
            "fn main() { println!(\"three {}\", app::name()); }\n",
        );
    let project = Project::new(sandbox.path("project"), &[package]);
    sandbox.mount(project.target());
    second_build_hits(&sandbox, &project, "build --all-targets");
    assert_eq!(sandbox.output_of(project.program("one")), "one app\n");
    assert_eq!(sandbox.output_of(project.program("two")), "two app\n");
    assert_eq!(
        sandbox.output_of(project.program("examples/three")),
        "three app\n"
    );
}

#[test]
fn another_command_shares_what_it_can() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.empty_view(project.target());
    // What `cargo build` compiled of the dependencies, `cargo build -p` needs again.
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build -p polite").ok());
    seen.assert_all_hit(2);
}

/// stderr without what may differ between two equal builds: the time, and the order in which
/// parallel jobs announced themselves.
fn story(outcome: &Outcome) -> Vec<String> {
    let lines = outcome
        .stderr
        .lines()
        .filter(|line| !line.trim_start().starts_with("Finished"));
    let mut lines: Vec<_> = lines.map(ToOwned::to_owned).collect();
    lines.sort();
    lines
}

fn noisy(root: &Path) -> Project {
    let lib = Package::new("noisy").lib(
        "pub fn answer() -> u32 { let unused = 1; 42 }\n\
         fn never_called() {}\n\
         #[deprecated(note = \"use answer\")] pub fn old() {}\n",
    );
    let app = Package::new("app").dep("noisy").bin(
        "fn main() { noisy::old(); let mut kept = noisy::answer(); println!(\"{}\", kept); }\n",
    );
    Project::new(root, &[lib, app])
}

#[test]
fn warnings_are_replayed() {
    let sandbox = Sandbox::new();
    let project = noisy(&sandbox.path("project"));
    sandbox.mount(project.target());
    for words in ["build", "check", "build --release"] {
        let build = || sandbox.cargo(&project, words).arg("-j1").ok();
        let (_, first) = sandbox.during(build);
        let warnings = first.stderr.matches("warning:").count();
        assert!(warnings >= 5, "the sample warns\n{first}");
        sandbox.empty_view(project.target());
        let (warm, second) = sandbox.during(build);
        warm.assert_all_hit(2);
        assert_eq!(story(&second), story(&first), "{words}");
        // cargo keeps them: a fresh build shows them again.
        let third = build();
        let shown = |outcome: &Outcome| outcome.stderr.matches("warning:").count();
        assert_eq!(shown(&third), warnings, "{third}");
    }
}

#[test]
fn warnings_are_replayed_as_json_and_in_color() {
    let sandbox = Sandbox::new();
    let project = noisy(&sandbox.path("project"));
    sandbox.mount(project.target());
    let (first, second) = second_build_hits(&sandbox, &project, "build");
    assert!(Messages::of(&first).diagnostics().len() >= 4, "{first}");
    assert_eq!(
        Messages::of(&second).diagnostics(),
        Messages::of(&first).diagnostics()
    );

    for (color, escapes) in [("always", true), ("never", false)] {
        sandbox.empty_view(project.target());
        let build = sandbox.cargo(&project, "build --color").arg(color).ok();
        assert!(build.stderr.contains("never_called"), "{build}");
        let line = build
            .stderr
            .lines()
            .find(|line| line.contains("never_called"))
            .must("a line");
        assert_eq!(line.contains('\u{1b}'), escapes, "--color {color}\n{build}");
    }
}

#[test]
fn denied_warnings_still_fail_after_a_hit() {
    let sandbox = Sandbox::new();
    let project = noisy(&sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.empty_view(project.target());
    let denied = sandbox
        .cargo(&project, "build")
        .env("RUSTFLAGS", "-D warnings")
        .fails();
    assert!(denied.stderr.contains("never_called"), "{denied}");
}

#[test]
fn removing_one_output_brings_it_back() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    let before = tree::deps(&project.target());
    let _ = sandbox.cargo(&project, "clean -p middle").ok();
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    assert_eq!(seen.misses, 0, "{seen:?}");
    assert!(seen.hits >= 1, "{seen:?}");
    tree::assert_same_outputs(&before, &tree::deps(&project.target()), "after clean -p");
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::PLAIN_OUTPUT
    );
}

#[test]
fn after_cargo_clean() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    let _ = sandbox.cargo(&project, "clean").ok();
    assert!(!project.target().exists(), "cargo clean removes the target");
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    assert!(sandbox.is_mounted(&project.target()), "and it is back");
    seen.assert_no_miss();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn after_a_restart_of_the_daemon() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.counters();
    let _ = sandbox.kachefs("daemon stop").ok();
    sandbox.mount(project.target());
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn what_hits_bring_is_writable_and_private() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();

    // `strip` and friends write into outputs; the store must not notice.
    let program = project.program("app");
    let original = fs::read(&program).must("read");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .open(&program)
        .must("open for writing");
    std::io::Write::write_all(&mut file, b"garbage").must("write");
    file.set_len(100).must("truncate");
    drop(file);
    assert_eq!(program.metadata().must("stat").len(), 100);

    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();
    assert!(
        fs::read(&program).must("read") == original,
        "the blob was not touched"
    );
    assert_eq!(sandbox.output_of(&program), samples::PLAIN_OUTPUT);
}

#[test]
fn blobs_are_named_by_their_bytes_and_read_only() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    let Counters { blobs, .. } = sandbox.counters();
    let files = tree::files(&sandbox.store().join("blobs"));
    assert_eq!(files.len() as u64, blobs, "stats count the blobs");
    assert!(blobs > 0);
    for blob in files {
        let name = blob
            .file_name()
            .and_then(|name| name.to_str())
            .must("a name");
        let fan = blob
            .parent()
            .and_then(Path::file_name)
            .and_then(|fan| fan.to_str())
            .must("fan");
        assert_eq!((fan, name.len()), (&name[..2], 64), "{}", blob.display());
        assert!(
            name.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{}",
            blob.display()
        );
        assert_eq!(
            blob.metadata().must("stat").mode() & 0o222,
            0,
            "{}",
            blob.display()
        );
    }
}
