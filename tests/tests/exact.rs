//! In exact mode nothing is added to the compiler: what is built is what plain cargo builds at that
//! path, byte for byte, and hits where all paths are the same.

use std::fs;

use harness::messages::Messages;
use harness::{Cmd, Must, Project, Sandbox, samples, tree};

const BUILD: &str = "build --message-format=json";

/// A project that leaves nothing to chance: rustc names incremental objects after the run.
fn project(sandbox: &Sandbox, name: &str) -> Project {
    let project = samples::whole(sandbox.path(name));
    let manifest = project.read("Cargo.toml");
    let manifest = format!("{manifest}\n[profile.dev]\nincremental = false\n");
    project.write("Cargo.toml", &manifest);
    project
}

fn exact(sandbox: &Sandbox, project: &Project) -> Cmd {
    sandbox.cargo(project, BUILD).env("KACHEFS_MODE", "exact")
}

#[test]
fn outputs_are_plain_cargos_byte_for_byte() {
    let sandbox = Sandbox::new();
    let project = project(&sandbox, "project");
    let outputs = || {
        let mut outputs = tree::deps(&project.target());
        outputs.extend(harness::Tree::of(&project.target()).outputs());
        // Launchers stand in for build scripts, and cargo notes times and paths for itself.
        let parts = ["build", ".fingerprint", ".rustc_info.json", "CACHEDIR.TAG"];
        outputs.retain(|path, _| {
            !path
                .iter()
                .any(|part| parts.iter().any(|name| part == *name))
        });
        outputs
    };
    let _ = sandbox.plain_cargo(&project, BUILD).ok();
    let plain = outputs();
    assert!(plain.keys().any(|path| path.ends_with("debug/app")));
    fs::remove_dir_all(project.target()).must("remove");
    sandbox.mount(project.target());

    let (cold, built) = sandbox.during(|| exact(&sandbox, &project).ok());
    let units = Messages::of(&built).units();
    assert_eq!((cold.hits, cold.misses), (0, units), "{cold:?}");
    tree::assert_same_outputs(&plain, &outputs(), "compiled");
    sandbox.empty_view(project.target());
    let (warm, _) = sandbox.during(|| exact(&sandbox, &project).ok());
    warm.assert_all_hit(units);
    assert_eq!(warm.script_hits, 1, "{warm:?}");
    tree::assert_same_outputs(&plain, &outputs(), "from the store");
    let again = exact(&sandbox, &project).ok();
    Messages::of(&again).assert_all_fresh();
}

#[test]
fn another_path_shares_nothing() {
    let sandbox = Sandbox::new();
    let first = project(&sandbox, "one");
    let second = first.checkout(sandbox.path("two"));
    for project in [&first, &second] {
        sandbox.mount(project.target());
        let (seen, built) = sandbox.during(|| exact(&sandbox, project).ok());
        let units = Messages::of(&built).units();
        assert_eq!((seen.hits, seen.misses), (0, units), "{seen:?}");
        assert_eq!((seen.script_hits, seen.script_misses), (0, 1), "{seen:?}");
        let said = sandbox.output_of(project.program("app"));
        assert_eq!(said, samples::WHOLE_OUTPUT);
    }
}

#[test]
fn the_modes_share_nothing() {
    let sandbox = Sandbox::new();
    let project = project(&sandbox, "project");
    sandbox.mount(project.target());
    for mode in ["portable", "exact"] {
        sandbox.empty_view(project.target());
        let cargo = sandbox.cargo(&project, BUILD).env("KACHEFS_MODE", mode);
        let (seen, _) = sandbox.during(|| cargo.ok());
        assert_eq!((seen.hits, seen.script_hits), (0, 0), "{mode}: {seen:?}");
    }
    // The one without a name is portable.
    sandbox.empty_view(project.target());
    let (seen, built) = sandbox.during(|| sandbox.cargo(&project, BUILD).ok());
    seen.assert_all_hit(Messages::of(&built).units());
}

#[test]
fn a_file_of_the_workspace_or_of_the_store_says_so() {
    let sandbox = Sandbox::new();
    let project = project(&sandbox, "project");
    sandbox.mount(project.target());
    let _ = exact(&sandbox, &project).ok();
    let build = || {
        sandbox.empty_view(project.target());
        sandbox.during(|| sandbox.cargo(&project, BUILD).ok())
    };
    for file in [
        project.path("kachefs.toml"),
        sandbox.store().join("kachefs.toml"),
    ] {
        fs::write(&file, "mode = \"exact\"\n").must("write");
        let (seen, built) = build();
        seen.assert_all_hit(Messages::of(&built).units());
        fs::remove_file(&file).must("remove");
    }
    fs::write(project.path("kachefs.toml"), "mode = \"exakt\"\n").must("write");
    let (seen, _) = build();
    assert_eq!((seen.hits, seen.misses), (0, 0), "{seen:?}");
    assert_eq!(seen.reason_names(), ["unknown-mode"], "{seen:?}");
}
