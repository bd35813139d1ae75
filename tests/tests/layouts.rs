//! Every place cargo puts what it builds: today's layout and the one with a directory for each unit,
//! with the build directory in the target or outside it, and the views on either or both.
//!
//! In each, a second build hits, the next one finds all fresh, programs run, another checkout shares,
//! and `cargo clean` works.

use std::fs;
use std::path::PathBuf;

use harness::flip::{Case, Noticed, State, lists, macro_package, macro_user};
use harness::messages::Messages;
use harness::{Cmd, Must, Project, Sandbox, Tree, samples, tree};

/// Which directories are views.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Views {
    Target,
    Build,
    Both,
}

/// Where cargo builds, and which of those directories are views.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// A directory for each unit.
    new: bool,
    /// The build directory lies outside the target.
    apart: bool,
    views: Views,
}

const TODAY: Layout = Layout {
    new: false,
    apart: false,
    views: Views::Target,
};

const NEW: Layout = Layout { new: true, ..TODAY };

const BUILD_APART: Layout = Layout {
    apart: true,
    views: Views::Build,
    ..TODAY
};

impl Layout {
    fn build_dir(self, project: &Project) -> PathBuf {
        if self.apart {
            project.root().with_extension("built")
        } else {
            project.target()
        }
    }

    fn views(self, project: &Project) -> Vec<PathBuf> {
        let target = (self.views != Views::Build).then(|| project.target());
        let build = (self.views != Views::Target).then(|| self.build_dir(project));
        target.into_iter().chain(build).collect()
    }

    fn mount(self, sandbox: &Sandbox, project: &Project) {
        if self.apart {
            fs::create_dir_all(self.build_dir(project)).must("mkdir");
        }
        for view in self.views(project) {
            sandbox.mount(view);
        }
    }

    /// Empties what is built, whether or not it is a view.
    fn empty(self, sandbox: &Sandbox, project: &Project) {
        for directory in [project.target(), self.build_dir(project)] {
            if sandbox.is_mounted(&directory) {
                sandbox.empty_view(&directory);
            } else if directory.exists() {
                fs::remove_dir_all(&directory).must(directory.display());
            }
        }
    }

    fn cargo(self, sandbox: &Sandbox, project: &Project, words: &str) -> Cmd {
        let mut cargo = sandbox.cargo(project, words);
        if self.new {
            cargo = cargo
                .arg("-Zbuild-dir-new-layout")
                .env("RUSTC_BOOTSTRAP", "1");
        }
        if self.apart {
            cargo = cargo.env("CARGO_BUILD_BUILD_DIR", self.build_dir(project));
        }
        cargo
    }

    /// All compilers leave, but for what only they do.
    fn outputs(self, project: &Project) -> tree::Outputs {
        let mut outputs = Tree::of(&self.build_dir(project))
            .without_incremental()
            .outputs();
        let is_cargos = |part: &std::ffi::OsStr| {
            [".fingerprint", "fingerprint", "run", ".rustc_info.json"]
                .iter()
                .any(|name| part == *name)
        };
        outputs.retain(|path, _| !path.iter().any(is_cargos));
        outputs
    }
}

const BUILD: &str = "build --message-format=json";

/// Builds, builds again in emptied directories, and once more: all hits, all the same, all fresh.
#[track_caller]
fn second_build_hits(layout: Layout) {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    layout.mount(&sandbox, &project);
    let build = || layout.cargo(&sandbox, &project, BUILD).ok();
    let (cold, first) = sandbox.during(build);
    let units = Messages::of(&first).units();
    assert_eq!((cold.hits, cold.misses), (0, units), "{cold:?}");
    assert_eq!(cold.script_misses, 1, "{cold:?}");
    assert_eq!(cold.reason_names(), [""; 0], "{cold:?}");
    let expected = layout.outputs(&project);

    layout.empty(&sandbox, &project);
    let (warm, _) = sandbox.during(build);
    warm.assert_all_hit(units);
    assert_eq!((warm.script_hits, warm.script_misses), (1, 0), "{warm:?}");
    tree::assert_same_outputs(&expected, &layout.outputs(&project), "the second build");
    let said = sandbox.output_of(project.program("app"));
    assert_eq!(said, samples::WHOLE_OUTPUT);

    let (idle, third) = sandbox.during(build);
    Messages::of(&third).assert_all_fresh();
    assert_eq!((idle.hits, idle.misses, idle.script_hits), (0, 0, 0));

    let tests = "test --workspace --lib --bins --tests";
    for _ in 0..2 {
        let ran = layout.cargo(&sandbox, &project, tests).ok();
        assert!(ran.stdout.contains("starts_politely ... ok"), "{ran}");
        layout.empty(&sandbox, &project);
    }
}

/// Builds in two checkouts: only what holds a path is compiled again.
#[track_caller]
fn checkouts_share(layout: Layout) {
    let sandbox = Sandbox::new();
    let first = samples::whole(sandbox.path("one"));
    let second = first.checkout(sandbox.path("elsewhere/the-second-checkout"));
    for project in [&first, &second] {
        layout.mount(&sandbox, project);
    }
    let _ = layout.cargo(&sandbox, &first, BUILD).ok();
    let (seen, built) = sandbox.during(|| layout.cargo(&sandbox, &second, BUILD).ok());
    let units = Messages::of(&built).units();
    assert_eq!((seen.hits, seen.misses), (units, 0), "{seen:?}");
    assert_eq!((seen.script_hits, seen.script_misses), (1, 0), "{seen:?}");
    let said = sandbox.output_of(second.program("app"));
    assert_eq!(said, samples::WHOLE_OUTPUT);
    for directory in [second.target(), layout.build_dir(&second)] {
        let found = tree::files_holding(&directory, first.root());
        assert!(found.is_empty(), "these name {first:?}: {found:#?}");
    }
    let again = layout.cargo(&sandbox, &second, BUILD).ok();
    Messages::of(&again).assert_all_fresh();
}

/// After `cargo clean` nothing is left, and the next build brings the views back and hits.
#[track_caller]
fn clean_works(layout: Layout) {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    layout.mount(&sandbox, &project);
    let _ = layout.cargo(&sandbox, &project, BUILD).ok();
    sandbox.counters();
    let _ = layout.cargo(&sandbox, &project, "clean").ok();
    for directory in [project.target(), layout.build_dir(&project)] {
        assert!(!directory.exists(), "{} is left", directory.display());
    }
    let (seen, built) = sandbox.during(|| layout.cargo(&sandbox, &project, BUILD).ok());
    for view in layout.views(&project) {
        assert!(sandbox.is_mounted(&view), "{} is back", view.display());
    }
    seen.assert_all_hit(Messages::of(&built).units());
    let said = sandbox.output_of(project.program("app"));
    assert_eq!(said, samples::WHOLE_OUTPUT);
}

#[test]
fn the_layout_of_today() {
    second_build_hits(TODAY);
    checkouts_share(TODAY);
}

#[test]
fn a_directory_for_each_unit_hits() {
    second_build_hits(NEW);
}

#[test]
fn a_directory_for_each_unit_is_shared_between_checkouts() {
    checkouts_share(NEW);
}

#[test]
fn a_directory_for_each_unit_is_cleaned() {
    clean_works(NEW);
}

#[test]
fn a_view_on_a_build_directory_outside_the_target() {
    second_build_hits(BUILD_APART);
    second_build_hits(Layout {
        new: true,
        ..BUILD_APART
    });
}

#[test]
fn a_build_directory_outside_the_target_is_shared_between_checkouts() {
    checkouts_share(BUILD_APART);
}

#[test]
fn a_build_directory_outside_the_target_is_cleaned() {
    clean_works(BUILD_APART);
}

#[test]
fn views_on_target_and_build_directory() {
    let both = Layout {
        views: Views::Both,
        ..BUILD_APART
    };
    second_build_hits(both);
    checkouts_share(both);
    clean_works(both);
}

#[test]
fn a_view_on_the_target_alone_is_a_plain_build() {
    let layout = Layout {
        views: Views::Target,
        ..BUILD_APART
    };
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    layout.mount(&sandbox, &project);
    let (seen, _) = sandbox.during(|| layout.cargo(&sandbox, &project, BUILD).ok());
    assert_eq!((seen.hits, seen.misses, seen.uncacheable), (0, 0, 0));
    let said = sandbox.output_of(project.program("app"));
    assert_eq!(said, samples::WHOLE_OUTPUT);
    let again = layout.cargo(&sandbox, &project, BUILD).ok();
    Messages::of(&again).assert_all_fresh();
    let _ = layout.cargo(&sandbox, &project, "clean").ok();
    assert!(!project.target().exists());
    assert!(!layout.build_dir(&project).exists());
}

#[test]
fn libraries_are_shared_between_layouts() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let bootstrap = |layout: Layout| {
        layout
            .cargo(&sandbox, &project, BUILD)
            .env("RUSTC_BOOTSTRAP", "1")
    };
    let _ = bootstrap(TODAY).ok();
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| bootstrap(NEW).ok());
    // A program has another name there.
    assert_eq!((seen.hits, seen.misses), (2, 1), "{seen:?}");
}

/// A flip of what a macro finds in the files a build script leaves, which lie among the directories
/// the compiler is told to search for crates.
#[track_caller]
fn a_macro_sees_out_dir(body: &str, one: &str, two: &str) {
    let script = "fn main() {\n\
            println!(\"cargo::rerun-if-changed=list\");\n\
            let out = std::path::PathBuf::from(std::env::var(\"OUT_DIR\").unwrap());\n\
            let list = std::fs::read_to_string(\"list\").unwrap();\n\
            std::fs::create_dir_all(out.join(\"made\")).unwrap();\n\
            for old in std::fs::read_dir(out.join(\"made\")).unwrap().flatten() {\n\
                std::fs::remove_file(old.path()).unwrap();\n\
            }\n\
            for name in list.split_whitespace() {\n\
                std::fs::write(out.join(\"made\").join(name), name).unwrap();\n\
            }\n\
            std::fs::write(out.join(\"libmade.so\"), list).unwrap();\n\
        }\n";
    let app = macro_user().file("list", "one").build_script(script);
    let case = Case::new(&[macro_package(body), app]);
    let list = |names: &str| case.project.write("crates/app/list", names);
    let state = |output, names: &'static str| {
        State::printing(output)
            .after(move || list(names))
            .args("-Zbuild-dir-new-layout")
            .env("RUSTC_BOOTSTRAP", "1")
    };
    case.flip(Noticed::ByCargo, &state(one, "one"), &state(two, "one two"));
}

#[test]
fn a_directory_a_build_script_leaves_for_a_proc_macro() {
    let body = lists("made").replace("CARGO_MANIFEST_DIR", "OUT_DIR");
    a_macro_sees_out_dir(&body, "[\"one\"]", "[\"one\", \"two\"]");
}

#[test]
fn a_library_a_build_script_leaves_for_a_proc_macro() {
    let body =
        "std::fs::read_to_string(std::env::var(\"OUT_DIR\").unwrap() + \"/libmade.so\").unwrap()";
    a_macro_sees_out_dir(body, "one", "one two");
}
