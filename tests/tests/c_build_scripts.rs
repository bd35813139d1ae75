//! Build scripts that compile C with the `cc` crate: their objects are cached, and their own runs stay
//! what they are without that.

use std::fs;
use std::os::unix::fs::symlink;

use harness::unprivileged::can_mount_unprivileged;
use harness::{Cmd, Counters, Must, Package, Project, Sandbox, toolchain, tree};

/// How many sources the script compiles.
const SOURCES: u64 = 3;

struct Case {
    sandbox: Sandbox,
    project: Project,
}

impl Case {
    /// A program that prints the sum of what its C functions return.
    fn new() -> Self {
        Self::with(&[package()])
    }

    fn with(packages: &[Package]) -> Self {
        Self::of_user(Sandbox::new(), packages)
    }

    fn of_user(sandbox: Sandbox, packages: &[Package]) -> Self {
        let (real, own) = (
            toolchain::real_cargo_home().join("registry"),
            sandbox.make_dir("cargo/registry"),
        );
        for part in ["index", "cache"] {
            symlink(real.join(part), own.join(part)).must("sharing the cargo registry");
        }
        let project = Project::new(sandbox.path("project"), packages);
        sandbox.hand_over(project.root());
        sandbox.mount(project.target());
        Self { sandbox, project }
    }

    fn cargo(&self, compiler: &str) -> Cmd {
        self.sandbox
            .cargo(&self.project, "build")
            .env("CC", format!("kachefs-cc {compiler}"))
            .env("CC_KNOWN_WRAPPER_CUSTOM", "kachefs-cc")
    }

    #[track_caller]
    fn build(&self, compiler: &str, sum: &str) -> Counters {
        let (seen, built) = self.sandbox.during(|| self.cargo(compiler).ok());
        let printed = self.sandbox.output_of(self.project.program("app"));
        assert_eq!(printed.trim_end(), sum, "{seen:?}\n{built}");
        seen
    }
}

fn package() -> Package {
    let script = "fn main() {\n\
        let mut build = cc::Build::new();\n\
        for source in [\"src/a.c\", \"src/b.c\", \"src/c.c\"] {\n\
            println!(\"cargo:rerun-if-changed={source}\");\n\
            build.file(source);\n\
        }\n\
        println!(\"cargo:rerun-if-changed=build.rs\");\n\
        println!(\"cargo:rerun-if-changed=include\");\n\
        build.include(\"include\").compile(\"parts\");\n}\n";
    let main = "unsafe extern \"C\" { fn a() -> i32; fn b() -> i32; fn c() -> i32; }\n\
        fn main() { println!(\"{}\", unsafe { a() + b() + c() }); }\n";
    Package::new("app")
        .bin(main)
        .build_script(script)
        .manifest("[build-dependencies]\ncc = \"1\"\n")
        .file(
            "src/a.c",
            "#include \"value.h\"\nint a(void) { return VALUE; }\n",
        )
        .file("src/b.c", "int b(void) { return 20; }\n")
        .file("src/c.c", "int c(void) { return 300; }\n")
        .file("include/value.h", "#define VALUE 1\n")
}

/// Counts as (hits, misses) of objects and of scripts.
fn counts(seen: &Counters) -> [(u64, u64); 2] {
    [
        (seen.cc_hits, seen.cc_misses),
        (seen.script_hits, seen.script_misses),
    ]
}

#[test]
fn a_script_that_runs_again_compiles_what_changed() {
    for compiler in ["gcc", "clang"] {
        let case = Case::new();
        let cold = case.build(compiler, "321");
        assert_eq!(
            counts(&cold),
            [(0, SOURCES), (0, 1)],
            "{compiler}: {cold:?}"
        );
        // What an earlier run left is in OUT_DIR: this run is not watched.
        case.project
            .write("crates/app/src/b.c", "int b(void) { return 30; }\n");
        let seen = case.build(compiler, "331");
        assert_eq!(counts(&seen)[0], (SOURCES - 1, 1), "{compiler}: {seen:?}");
        // These are.
        case.sandbox.empty_view(case.project.target());
        case.project
            .write("crates/app/include/value.h", "#define VALUE 2\n");
        let seen = case.build(compiler, "332");
        assert_eq!(
            counts(&seen),
            [(SOURCES - 1, 1), (0, 1)],
            "{compiler}: {seen:?}"
        );
        case.sandbox.empty_view(case.project.target());
        case.project
            .write("crates/app/src/b.c", "int b(void) { return 20; }\n");
        let seen = case.build(compiler, "322");
        assert_eq!(
            counts(&seen),
            [(SOURCES, 0), (0, 1)],
            "{compiler}: {seen:?}"
        );
    }
}

#[test]
fn a_watched_script_stays_storable() {
    let case = Case::new();
    let cold = case.build("gcc", "321");
    assert_eq!(counts(&cold)[1], (0, 1), "{cold:?}");
    let made = tree::files(&case.project.path("target/debug/build"));
    case.sandbox.empty_view(case.project.target());
    let warm = case.build("gcc", "321");
    assert_eq!(counts(&warm), [(0, 0), (1, 0)], "{warm:?}");
    assert_eq!(tree::files(&case.project.path("target/debug/build")), made);
}

#[test]
fn a_watched_script_has_the_inputs_of_its_objects() {
    let case = Case::new();
    let header = |value: i32| {
        let text = format!("#define VALUE {value}\n");
        case.project.write("crates/app/include/value.h", &text);
    };
    let again = |sum: &str| {
        case.sandbox.empty_view(case.project.target());
        case.build("gcc", sum)
    };
    case.build("gcc", "321");
    // Objects that are in the store, and a run of the script that is not.
    header(2);
    case.build("gcc", "322");
    let hits = again("322");
    assert_eq!(counts(&hits), [(SOURCES, 0), (0, 1)], "{hits:?}");

    // The run is stored: what its objects hit on counts among what it read.
    let warm = again("322");
    assert_eq!(counts(&warm), [(0, 0), (1, 0)], "{warm:?}");
    header(3);
    let changed = again("323");
    assert_eq!(changed.script_hits, 0, "{changed:?}");
    header(2);
    assert_eq!(again("322").script_hits, 1);

    // So does a header that would come before.
    case.project
        .write("crates/app/src/value.h", "#define VALUE 9\n");
    let shadowed = again("329");
    assert_eq!(shadowed.script_hits, 0, "{shadowed:?}");
    fs::remove_file(case.project.path("crates/app/src/value.h")).must("remove");
    assert_eq!(again("322").script_hits, 1);
}

/// A package whose script compiles `a.c` to `d.c` at the same time, each with a header of its own.
fn at_the_same_time() -> Package {
    let script = "use std::process::Command;\n\
        fn main() {\n\
        let out = std::env::var(\"OUT_DIR\").unwrap();\n\
        let mut compiles: Vec<_> = [\"a\", \"b\", \"c\", \"d\"].iter().map(|name| {\n\
            let mut compile = Command::new(\"kachefs-cc\");\n\
            compile.args([\"gcc\", \"-O2\", \"-c\", &format!(\"{name}.c\")]);\n\
            compile.args([\"-o\", &format!(\"{out}/{name}.o\")]).spawn().unwrap()\n\
        }).collect();\n\
        for compile in &mut compiles { assert!(compile.wait().unwrap().success()); }\n\
        println!(\"cargo:rerun-if-changed=build.rs\");\n}\n";
    let mut app = Package::new("app").bin("fn main() { println!(\"1\"); }\n");
    app = app.build_script(script);
    for name in ["a", "b", "c", "d"] {
        let source = format!("#include <stdio.h>\n#include \"{name}.h\"\nint {name} = VALUE;\n");
        app = app.file(&format!("{name}.c"), &source);
        app = app.file(&format!("{name}.h"), "#define VALUE 1\n");
    }
    app
}

#[test]
fn compiles_at_the_same_time_are_kept_apart() {
    let case = Case::with(&[at_the_same_time()]);
    let cold = case.build("gcc", "1");
    assert_eq!(counts(&cold), [(0, 4), (0, 1)], "{cold:?}");
    assert_eq!(cold.reason_names(), [""; 0], "{cold:?}");
    for name in ["a", "b", "c", "d"] {
        let header = format!("crates/app/{name}.h");
        case.project.write(&header, "#define VALUE 2\n");
        case.sandbox.empty_view(case.project.target());
        let seen = case.build("gcc", "1");
        assert_eq!(counts(&seen), [(3, 1), (0, 1)], "{name}: {seen:?}");
    }
}

#[test]
fn a_script_that_asks_the_daemon_itself_is_not_stored() {
    let script = "fn main() {\n\
        let said = std::process::Command::new(\"kachefs\").args([\"stats\", \"--json\"]).output();\n\
        println!(\"cargo:rerun-if-changed=build.rs\");\n\
        assert!(said.unwrap().status.success());\n}\n";
    let app = Package::new("app").bin("fn main() { println!(\"1\"); }\n");
    let case = Case::with(&[app.build_script(script)]);
    let seen = case.build("gcc", "1");
    assert_eq!(seen.reason_names(), ["network"], "{seen:?}");
}

#[test]
fn a_watched_script_that_compiles_elsewhere_is_not_stored() {
    // An object beside OUT_DIR, in the same view, made twice: the second time from the store.
    let script = "fn main() {\n\
        let out = std::env::var(\"OUT_DIR\").unwrap();\n\
        std::fs::write(format!(\"{out}/left\"), \"\").unwrap();\n\
        let elsewhere = std::path::Path::new(&out).join(\"../../../elsewhere.o\");\n\
        let compiled = std::process::Command::new(\"kachefs-cc\").args([\"gcc\", \"-c\", \"a.c\", \"-o\"])\n\
            .arg(elsewhere.parent().unwrap().canonicalize().unwrap().join(\"elsewhere.o\"))\n\
            .status().unwrap();\n\
        assert!(compiled.success());\n\
        println!(\"cargo:rerun-if-changed=a.c\");\n}\n";
    let app = Package::new("app").bin("fn main() { println!(\"1\"); }\n");
    let case = Case::with(&[app.build_script(script).file("a.c", "int a;\n")]);
    let object = case.project.path("target/debug/elsewhere.o");
    case.build("gcc", "1");
    // A run that is not watched, because an earlier one's directory is still there.
    case.project.write("crates/app/a.c", "int a = 2;\n");
    let recorded = case.build("gcc", "1");
    assert_eq!(counts(&recorded)[0], (0, 1), "{recorded:?}");
    for _ in 0..2 {
        case.sandbox.empty_view(case.project.target());
        let seen = case.build("gcc", "1");
        assert_eq!(counts(&seen), [(1, 0), (0, 1)], "{seen:?}");
        assert!(object.exists());
    }
}

#[test]
fn a_header_the_script_makes() {
    let script = "fn main() {\n\
        let out = std::env::var(\"OUT_DIR\").unwrap();\n\
        let value = std::env::var(\"VALUE\").unwrap();\n\
        std::fs::write(format!(\"{out}/made.h\"), format!(\"#define VALUE {value}\")).unwrap();\n\
        std::thread::sleep(std::time::Duration::from_millis(50));\n\
        cc::Build::new().file(\"a.c\").include(out).compile(\"made\");\n\
        println!(\"cargo:rerun-if-env-changed=VALUE\");\n}\n";
    let main = "unsafe extern \"C\" { fn a() -> i32; }\n\
        fn main() { println!(\"{}\", unsafe { a() }); }\n";
    let app = Package::new("app").bin(main).build_script(script);
    let app = app.manifest("[build-dependencies]\ncc = \"1\"\n").file(
        "a.c",
        "#include \"made.h\"\nint a(void) { return VALUE; }\n",
    );
    let case = Case::with(&[app]);
    // Another script run each time, but one of two objects.
    for (run, (value, objects)) in [("1", (0, 1)), ("2", (0, 1)), ("1", (1, 0)), ("2", (1, 0))]
        .into_iter()
        .enumerate()
    {
        case.sandbox.empty_view(case.project.target());
        let cargo = case.cargo("gcc").env("VALUE", value);
        let (seen, built) = case
            .sandbox
            .during(|| cargo.env("RUN", run.to_string()).ok());
        let printed = case.sandbox.output_of(case.project.program("app"));
        assert_eq!(printed.trim_end(), value, "{seen:?}\n{built}");
        assert_eq!(counts(&seen), [objects, (0, 1)], "run {run}: {seen:?}");
    }
}

#[test]
fn an_ordinary_user_has_the_same() {
    if let Err(reason) = can_mount_unprivileged() {
        eprintln!("skipped: {reason}");
        return;
    }
    let case = Case::of_user(Sandbox::unprivileged(), &[at_the_same_time()]);
    let cold = case.build("gcc", "1");
    assert_eq!(counts(&cold), [(0, 4), (0, 1)], "{cold:?}");
    assert_eq!(cold.reason_names(), [""; 0], "{cold:?}");
    case.sandbox.empty_view(case.project.target());
    let replayed = case.build("gcc", "1");
    assert_eq!(counts(&replayed), [(0, 0), (1, 0)], "{replayed:?}");
    case.project.write("crates/app/b.h", "#define VALUE 2\n");
    case.sandbox.empty_view(case.project.target());
    let changed = case.build("gcc", "1");
    assert_eq!(counts(&changed), [(3, 1), (0, 1)], "{changed:?}");
}

#[test]
fn a_compiler_that_leaves_a_process_behind() {
    // Nobody knows what that one reads, or whose it is.
    let script = "use std::process::Command;\n\
        fn main() {\n\
        let out = std::env::var(\"OUT_DIR\").unwrap();\n\
        let mut compile = Command::new(\"kachefs-cc\");\n\
        compile.args([\"./gcc\", \"-c\", \"a.c\", \"-o\", &format!(\"{out}/a.o\")]);\n\
        assert!(compile.status().unwrap().success());\n\
        println!(\"cargo:rerun-if-changed=build.rs\");\n}\n";
    let app = Package::new("app").bin("fn main() { println!(\"1\"); }\n");
    let case = Case::with(&[app.build_script(script).file("a.c", "int a;\n")]);
    // A program of gcc's name that starts gcc, and something that goes on for a while.
    let source = case.sandbox.path("driver.c");
    let driver = "#include <unistd.h>\n#include <stdio.h>\n\
        int main(int argc, char **argv) {\n\
            if (!fork()) {\n\
                if (!fork()) {\n\
                    setsid();\n\
                    for (int i = 0; i < 40; i++) { usleep(50000); fclose(fopen(\"a.c\", \"r\")); }\n\
                }\n\
                _exit(0);\n\
            }\n\
            usleep(200000);\n\
            argv[0] = \"/usr/bin/gcc\";\n\
            execv(argv[0], argv);\n\
            return 1;\n\
        }\n";
    fs::write(&source, driver).must("write");
    let gcc = case.project.path("crates/app/gcc");
    let _ = case
        .sandbox
        .command("gcc")
        .arg(&source)
        .arg("-o")
        .arg(&gcc)
        .ok();
    for run in ["1", "2"] {
        case.sandbox.empty_view(case.project.target());
        let cargo = case.cargo("gcc").env("RUN", run);
        let (seen, _) = case.sandbox.during(|| cargo.ok());
        assert_eq!(counts(&seen)[0], (0, 1), "{seen:?}");
        assert!(
            seen.reason_names().contains(&"process-left-behind"),
            "{seen:?}"
        );
    }
}
