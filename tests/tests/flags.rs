//! Each flag that changes what is built: with it nothing of what was built without it is served, and
//! what was built with it comes back byte for byte, or is refused by name.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use harness::messages::Messages;
use harness::{Cmd, Counters, Must, Package, Project, Sandbox, Tree, samples, toolchain, tree};

/// A build in an emptied view: what it did, its number of units, and what it left.
struct Built {
    seen: Counters,
    units: u64,
    outputs: tree::Outputs,
}

#[track_caller]
fn emptied(sandbox: &Sandbox, project: &Project, cargo: Cmd) -> Built {
    sandbox.empty_view(project.target());
    let (seen, built) = sandbox.during(|| cargo.ok());
    let mut outputs = Tree::of(&project.target()).without_incremental().outputs();
    // What cargo notes for itself.
    outputs.retain(|path, _| {
        let mut parts = path.iter();
        !parts.any(|part| part == ".fingerprint" || part == ".rustc_info.json" || part == "build")
    });
    Built {
        seen,
        units: Messages::of(&built).units(),
        outputs,
    }
}

/// A command that is tried without and with what changes.
type Tried<'a> = &'a dyn Fn(&Sandbox, &Project) -> Cmd;

/// Without, with, and with again, without again: only the first two compile. Nothing of the two is
/// the same compile, unless `shares`.
#[track_caller]
fn keyed_in(project: impl Fn(&Path) -> Project, without: Tried, with: Tried, shares: bool) {
    let sandbox = Sandbox::new();
    let project = project(&sandbox.path("project"));
    sandbox.mount(project.target());
    let build = |command: Tried| emptied(&sandbox, &project, command(&sandbox, &project));
    let first = build(without);
    assert_eq!((first.seen.hits, first.seen.misses), (0, first.units));
    let changed = build(with);
    assert!(changed.seen.misses > 0, "{:?}", changed.seen);
    assert!(shares || changed.seen.hits == 0, "{:?}", changed.seen);
    for (command, expected) in [(with, &changed), (without, &first)] {
        let again = build(command);
        again.seen.assert_all_hit(expected.units);
        tree::assert_same_outputs(&expected.outputs, &again.outputs, "what came back");
    }
}

#[track_caller]
fn keyed(without: Tried, with: Tried) {
    keyed_in(|root| samples::plain(root), without, with, false);
}

fn plain(sandbox: &Sandbox, project: &Project) -> Cmd {
    cargo(sandbox, project, "build")
}

/// A cargo command that tells its units.
fn cargo(sandbox: &Sandbox, project: &Project, words: &str) -> Cmd {
    sandbox.cargo(project, words).arg("--message-format=json")
}

#[track_caller]
fn rustflags_are_keyed(flags: &str) {
    keyed(&plain, &|sandbox, project| {
        plain(sandbox, project).env("RUSTFLAGS", flags)
    });
}

/// So many compiles with these flags are counted under a name, and are correct.
#[track_caller]
fn refused(reason: &str, units: u64, command: Tried) {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = emptied(&sandbox, &project, plain(&sandbox, &project));
    for _ in 0..2 {
        let Built { seen, .. } = emptied(&sandbox, &project, command(&sandbox, &project));
        assert_eq!(seen.reason_names(), [reason], "{seen:?}");
        assert_eq!(seen.uncacheable, units, "{seen:?}");
        let said = sandbox.output_of(project.program("app"));
        assert_eq!(said, samples::PLAIN_OUTPUT);
    }
}

#[test]
fn codegen_units() {
    rustflags_are_keyed("-Ccodegen-units=1");
}

#[test]
fn embed_bitcode() {
    rustflags_are_keyed("-Cembed-bitcode=yes");
}

#[test]
fn panic_abort() {
    keyed(&plain, &|sandbox, project| {
        plain(sandbox, project).env("CARGO_PROFILE_DEV_PANIC", "abort")
    });
}

#[test]
fn coverage_flags() {
    rustflags_are_keyed("-Cinstrument-coverage");
}

#[test]
fn the_users_own_remap_path_prefix() {
    keyed(
        &|sandbox, project| plain(sandbox, project).env("RUSTFLAGS", "--remap-path-prefix=/a=/one"),
        &|sandbox, project| plain(sandbox, project).env("RUSTFLAGS", "--remap-path-prefix=/a=/two"),
    );
}

#[test]
fn rustc_bootstrap() {
    keyed(&plain, &|sandbox, project| {
        plain(sandbox, project).env("RUSTC_BOOTSTRAP", "1")
    });
}

#[test]
fn link_time_optimisation() {
    let release = |lto: &'static str| {
        move |sandbox: &Sandbox, project: &Project| {
            cargo(sandbox, project, "build --release").env("CARGO_PROFILE_RELEASE_LTO", lto)
        }
    };
    keyed(&release("off"), &release("thin"));
    keyed(&release("thin"), &release("fat"));
}

#[test]
fn arguments_given_to_cargo_rustc() {
    let rustc = |more: &'static str| {
        move |sandbox: &Sandbox, project: &Project| {
            cargo(sandbox, project, "rustc -p app").args(more.split_whitespace())
        }
    };
    // What the package depends on is the same.
    keyed_in(
        |root| samples::plain(root),
        &rustc(""),
        &rustc("-- -Copt-level=1"),
        true,
    );
}

#[test]
fn rpath_is_refused() {
    refused("rpath", 1, &|sandbox, project| {
        plain(sandbox, project).env("RUSTFLAGS", "-Crpath")
    });
}

#[test]
fn a_sanitizer_is_refused() {
    refused("unstable-flag", 3, &|sandbox, project| {
        // Without a target of its own, build scripts and macros would have it too.
        cargo(sandbox, project, "build")
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", "-Zsanitizer=address")
    });
}

#[test]
fn other_unstable_flags_are_refused() {
    refused("unstable-flag", 3, &|sandbox, project| {
        plain(sandbox, project)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", "-Zshare-generics=y")
    });
}

#[test]
fn benches() {
    let project = |root: &Path| {
        let app = Package::new("app")
            .lib("pub fn f() {}\n")
            .file("benches/fast.rs", "fn main() { app::f(); }\n");
        let app = app.manifest("[[bench]]\nname = \"fast\"\nharness = false\n");
        Project::new(root, &[app])
    };
    let bench = |sandbox: &Sandbox, project: &Project| cargo(sandbox, project, "bench --no-run");
    keyed_in(
        project,
        &bench,
        &|sandbox, project| bench(sandbox, project).env("CARGO_PROFILE_BENCH_OPT_LEVEL", "1"),
        false,
    );
}

#[test]
fn a_target_of_its_own() {
    let host = toolchain::host();
    let with = |sandbox: &Sandbox, project: &Project| {
        cargo(sandbox, project, &format!("build --target {host}"))
    };
    // Build scripts and proc macros are the host's in both.
    keyed_in(|root| samples::whole(root), &plain, &with, true);
}

/// Coverage maps hold paths, perhaps compressed: another checkout must not show the first one's.
#[test]
fn coverage_maps_of_another_checkout() {
    let sandbox = Sandbox::new();
    let first = samples::plain(sandbox.path("one"));
    let second = first.checkout(sandbox.path("elsewhere/the-second-checkout"));
    let build = |project: &Project| {
        sandbox.mount(project.target());
        let cargo = sandbox.cargo(project, "build --message-format=json");
        sandbox.during(|| cargo.env("RUSTFLAGS", "-Cinstrument-coverage").ok())
    };
    let _ = build(&first);
    let (seen, built) = build(&second);
    seen.assert_all_hit(Messages::of(&built).units());
    // Compiled here by the same flags it is the same, so nothing in it is of the first.
    let outputs = |project: &Project| {
        let mut outputs = tree::deps_of_any_run(&project.target());
        outputs.retain(|path, _| path.extension().is_none_or(|extension| extension != "d"));
        outputs
    };
    let shared = outputs(&second);
    sandbox.unmount(second.target());
    let store = sandbox.path("another-store");
    let _ = sandbox
        .kachefs("--store")
        .arg(&store)
        .arg("mount")
        .arg(second.target())
        .ok();
    let cargo = sandbox.cargo(&second, "build").env("KACHEFS_STORE", &store);
    let _ = cargo.env("RUSTFLAGS", "-Cinstrument-coverage").ok();
    tree::assert_same_outputs(&shared, &outputs(&second), "compiled here");
    let _ = sandbox
        .kachefs("--store")
        .arg(&store)
        .args(["unmount", "--all"])
        .ok();
    let _ = sandbox
        .kachefs("--store")
        .arg(&store)
        .args(["daemon", "stop"])
        .ok();
}

#[test]
fn a_specification_of_a_target() {
    let lib = "#![feature(no_core, lang_items)]\n#![no_core]\n\
        #[lang = \"pointee_sized\"] pub trait PointeeSized {}\n\
        #[lang = \"meta_sized\"] pub trait MetaSized: PointeeSized {}\n\
        #[lang = \"sized\"] pub trait Sized: MetaSized {}\n\
        #[lang = \"copy\"] pub trait Copy {}\n\
        pub fn nothing() {}\n";
    let project = |root: &Path| Project::new(root, &[Package::new("bare").lib(lib)]);
    let with = |cpu: &'static str| {
        move |sandbox: &Sandbox, project: &Project| {
            let printed = sandbox
                .command("rustc")
                .args([
                    "--print",
                    "target-spec-json",
                    "-Zunstable-options",
                    "--target",
                ])
                .arg(toolchain::host())
                .env("RUSTC_BOOTSTRAP", "1")
                .ok();
            let mut spec: serde_json::Value =
                serde_json::from_str(&printed.stdout).must("a specification");
            spec["cpu"] = cpu.into();
            project.write("mine.json", &spec.to_string());
            let words = "build -Zjson-target-spec --target mine.json";
            cargo(sandbox, project, words).env("RUSTC_BOOTSTRAP", "1")
        }
    };
    keyed_in(project, &with("x86-64"), &with("x86-64-v3"), false);
}

#[test]
fn a_place_where_targets_are_looked_for_is_refused() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let words = format!("build --target {}", toolchain::host());
    let cargo = cargo(&sandbox, &project, &words).env("RUST_TARGET_PATH", sandbox.root());
    let built = emptied(&sandbox, &project, cargo);
    assert_eq!(
        built.seen.reason_names(),
        ["target-path"],
        "{:?}",
        built.seen
    );
}

#[test]
fn doctests_work() {
    let sandbox = Sandbox::new();
    let source = |number: u32| {
        format!(
            "//! ```\n//! assert_eq!(doc::number(), {number});\n//! ```\npub fn number() -> u32 {{ {number} }}\n"
        )
    };
    let project = Project::new(
        sandbox.path("project"),
        &[Package::new("doc").lib(&source(1))],
    );
    sandbox.mount(project.target());
    for number in [1, 2, 1] {
        project.write("crates/doc/src/lib.rs", &source(number));
        sandbox.empty_view(project.target());
        let ran = sandbox.cargo(&project, "test --doc").ok();
        assert!(ran.stdout.contains("1 passed"), "{ran}");
    }
}

#[test]
fn documentation_works() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    for _ in 0..2 {
        sandbox.empty_view(project.target());
        let _ = sandbox.cargo(&project, "doc --workspace").ok();
        let page = fs::read_to_string(project.path("target/doc/greeting/index.html"));
        assert!(page.must("a page").contains("Greets."));
        // What the documented depend on is checked, and hits.
        let (idle, said) = sandbox.during(|| sandbox.cargo(&project, "doc --workspace").ok());
        assert_eq!((idle.hits, idle.misses), (0, 0), "{said}");
    }
}

#[test]
fn a_toolchain_updated_behind_an_unchanged_shim() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    // As rustup does it: a proxy that never changes, and a directory that is replaced.
    let toolchains = sandbox.make_dir("toolchains");
    for name in ["old", "new"] {
        toolchain::copy_to(&toolchains.join(name));
    }
    let library = toolchains.join("new/lib/rustlib/components");
    drop(fs::remove_file(&library));
    let rustc = toolchains.join("new/bin/rustc");
    let mut bytes = fs::read(&rustc).must("read");
    bytes.push(0);
    fs::remove_file(&rustc).must("remove");
    fs::write(&rustc, bytes).must("write");
    fs::set_permissions(&rustc, fs::Permissions::from_mode(0o755)).must("chmod");
    let shim = sandbox.path("shim");
    let current = toolchains.join("current");
    let text = format!("#!/bin/sh\nexec {}/bin/rustc \"$@\"\n", current.display());
    fs::write(&shim, text).must("write");
    fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).must("chmod");
    let build = |toolchain: &str| {
        drop(fs::remove_file(&current));
        symlink(toolchains.join(toolchain), &current).must("link");
        emptied(
            &sandbox,
            &project,
            plain(&sandbox, &project).env("RUSTC", &shim),
        )
    };
    assert_eq!(build("old").seen.hits, 0);
    build("old").seen.assert_all_hit(3);
    let updated = build("new").seen;
    assert_eq!((updated.hits, updated.misses), (0, 3), "{updated:?}");
    build("old").seen.assert_all_hit(3);
}

#[test]
fn a_linker_upgraded_in_its_place() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let linker = sandbox.path("ld.own");
    let real = sandbox
        .command("sh")
        .args(["-c", "readlink -f $(command -v ld)"])
        .ok();
    let install = |more: &[u8]| {
        let mut bytes = fs::read(real.stdout.trim()).must("read");
        bytes.extend_from_slice(more);
        drop(fs::remove_file(&linker));
        fs::write(&linker, bytes).must("write");
        fs::set_permissions(&linker, fs::Permissions::from_mode(0o755)).must("chmod");
    };
    let bin = sandbox.make_dir("own-bin");
    symlink(&linker, bin.join("ld")).must("link");
    let build = || {
        let cargo = plain(&sandbox, &project).env("COMPILER_PATH", &bin);
        emptied(&sandbox, &project, cargo)
    };
    install(b"");
    assert_eq!(build().seen.misses, 3);
    build().seen.assert_all_hit(3);
    install(b"upgraded");
    let upgraded = build().seen;
    assert_eq!((upgraded.hits, upgraded.misses), (2, 1), "{upgraded:?}");
}

#[test]
fn another_runner_of_tests() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let asked = sandbox.cargo(&project, "nextest --version").run();
    if !asked.stdout.contains("cargo-nextest") {
        eprintln!("skipped: no cargo-nextest");
        return;
    }
    let run = || {
        sandbox.empty_view(project.target());
        sandbox.during(|| sandbox.cargo(&project, "nextest run --workspace").ok())
    };
    let (cold, ran) = run();
    assert!(ran.stderr.contains("2 tests run: 2 passed"), "{ran}");
    assert!(cold.misses > 0, "{cold:?}");
    let (warm, ran) = run();
    assert!(ran.stderr.contains("2 tests run: 2 passed"), "{ran}");
    warm.assert_no_miss();
}
