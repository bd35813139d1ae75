//! A checkout that only got hits shows its own places: in backtraces, in a debugger, in messages and in
//! the files it was given. It lies elsewhere, with another `$CARGO_HOME` and another target.

use std::fs;
use std::path::{Path, PathBuf};

use harness::messages::Messages;
use harness::{Cmd, Must, Package, Project, Sandbox, tree};

/// A checkout, its `$CARGO_HOME` and its target.
struct Place {
    project: Project,
    home: PathBuf,
    target: PathBuf,
}

impl Place {
    fn cargo(&self, sandbox: &Sandbox, words: &str) -> Cmd {
        sandbox
            .cargo(&self.project, words)
            .env("CARGO_HOME", &self.home)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("RUSTC_WRAPPER", sandbox.wrapper())
    }

    fn program(&self) -> PathBuf {
        self.target.join("debug/app")
    }

    /// Every path that is this checkout's alone.
    fn paths(&self) -> [&Path; 3] {
        [self.project.root(), &self.home, &self.target]
    }
}

/// The program: a dependency from `$CARGO_HOME`, a library of the workspace that warns, and a panic.
fn packages() -> [Package; 2] {
    let lib = Package::new("leaf").lib(
        "pub fn pick(at: usize) -> u32 {\n    let unused = 1;\n    bought::pick(&[1, 2, 3], at)\n}\n",
    );
    let app = Package::new("app").dep("leaf").bin(
        "fn main() {\n    let at = std::env::args().count();\n    println!(\"{}\", leaf::pick(at));\n    \
         if at > 1 {\n        panic!(\"no {at}\");\n    }\n}\n",
    );
    [lib, app]
}

/// A `$CARGO_HOME` with one bought package.
fn cargo_home(path: &Path) {
    let package = path.join("vendor/bought");
    fs::create_dir_all(package.join("src")).must("mkdir");
    let write = |path: PathBuf, text: &str| fs::write(path, text).must("write");
    write(
        package.join("Cargo.toml"),
        "[package]\nname = \"bought\"\nversion = \"0.1.0\"\nedition = \"2024\"\n",
    );
    write(
        package.join("src/lib.rs"),
        "#[inline(never)]\npub fn pick(all: &[u32], at: usize) -> u32 {\n    all[at]\n}\n",
    );
    write(package.join(".cargo-checksum.json"), "{\"files\":{}}");
    let config = format!(
        "[source.crates-io]\nreplace-with = \"vendored\"\n[source.vendored]\ndirectory = \"{}\"\n",
        path.join("vendor").display()
    );
    write(path.join("config.toml"), &config);
}

/// Builds in one checkout, then in another, which only gets hits. Returns both.
#[track_caller]
fn built() -> (Sandbox, Place, Place) {
    let sandbox = Sandbox::new();
    let project = Project::new(sandbox.path("one"), &packages());
    project.replace(
        "crates/leaf/Cargo.toml",
        "[dependencies]\n",
        "[dependencies]\nbought = \"0.1.0\"\n",
    );
    let place = |project: Project, home: &str, target: PathBuf| {
        let home = sandbox.path(home);
        cargo_home(&home);
        sandbox.mount(&target);
        Place {
            project,
            home,
            target,
        }
    };
    let copy = project.checkout(sandbox.path("elsewhere/the-second-checkout"));
    let target = project.target();
    let first = place(project, "home-one", target);
    let second = place(copy, "other/home-of-two", sandbox.path("built-by-two"));
    let words = "build --message-format=json";
    let _ = first.cargo(&sandbox, words).ok();
    let (seen, built) = sandbox.during(|| second.cargo(&sandbox, words).ok());
    seen.assert_all_hit(Messages::of(&built).units());
    (sandbox, first, second)
}

#[test]
fn no_file_names_the_first_checkout() {
    let (_sandbox, first, second) = built();
    for path in first.paths() {
        let found = tree::files_holding(&second.target, path);
        assert!(found.is_empty(), "{} is in {found:#?}", path.display());
    }
}

#[test]
fn dep_info_names_this_checkout() {
    let (_sandbox, _, second) = built();
    let mut count = 0;
    for file in tree::files(&second.target.join("debug")) {
        if file.extension().is_none_or(|extension| extension != "d") {
            continue;
        }
        let text = fs::read_to_string(&file).must(file.display());
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (made, sources) = line.split_once(':').unwrap_or((line, ""));
            for path in sources.split_whitespace().chain([made]) {
                let exists = second.project.root().join(path).exists()
                    || second.home.join("vendor/bought").join(path).exists();
                assert!(path.is_empty() || exists, "{path} of {}", file.display());
            }
        }
        count += 1;
    }
    // Of three crates, and beside what cargo puts into the profile's directory.
    assert_eq!(count, 5);
}

#[test]
fn backtraces_show_sources_of_this_checkout() {
    let (sandbox, _, second) = built();
    for (arguments, places) in [
        (
            vec!["x"],
            ["crates/app/src/main.rs:5", "crates/app/src/main.rs:5"],
        ),
        (
            vec!["x", "y"],
            ["vendor/bought/src/lib.rs:3", "crates/leaf/src/lib.rs:3"],
        ),
    ] {
        let ran = sandbox
            .command(second.program())
            .args(&arguments)
            .env("RUST_BACKTRACE", "1")
            .in_dir(&second.project)
            .fails();
        for place in places {
            assert!(ran.stderr.contains(place), "{place}\n{ran}");
        }
        // Every source of the workspace that is named is one that can be read from here.
        let named = ran.stderr.lines().filter_map(|line| {
            let path = line.trim_start().strip_prefix("at ")?.split(':').next()?;
            path.contains("crates/").then_some(path)
        });
        let mut count = 0;
        for path in named {
            let inside = path.strip_prefix("/proc/self/cwd/").unwrap_or(path);
            assert!(second.project.path(inside).exists(), "{path}\n{ran}");
            count += 1;
        }
        assert!(count > 0, "{ran}");
    }
}

#[test]
fn panics_are_where_plain_cargo_says() {
    let (sandbox, _, second) = built();
    let ran = |program: &Path, arguments: &[&str]| {
        let ran = sandbox
            .command(program)
            .args(arguments)
            .in_dir(&second.project)
            .fails();
        let place = ran.stderr.lines().find(|line| line.contains("panicked at"));
        let place = place.and_then(|line| line.split_once("panicked at "));
        place.must("a panic").1.to_owned()
    };
    let plain = sandbox.path("plain");
    let _ = second
        .cargo(&sandbox, "build")
        .env("RUSTC_WRAPPER", "")
        .env("CARGO_TARGET_DIR", &plain)
        .ok();
    let plain = plain.join("debug/app");
    let expected = ran(&plain, &["x"]);
    assert_eq!(expected, "crates/app/src/main.rs:5:9:");
    assert_eq!(ran(&second.program(), &["x"]), expected);
}

#[test]
fn a_debugger_finds_the_sources() {
    let (sandbox, _, second) = built();
    let debug = |place: &str, expressions: &[&str]| {
        let mut gdb = sandbox
            .command("gdb")
            .args(["-nx", "-batch", "-ex"])
            .arg(format!("break {place}"))
            .args(["-ex", "run"]);
        for expression in expressions {
            gdb = gdb.args(["-ex", expression]);
        }
        gdb.arg(second.program())
            .in_dir(&second.project)
            .ok()
            .stdout
    };
    let said = debug("crates/leaf/src/lib.rs:3", &["list", "up", "list"]);
    assert!(said.contains("Breakpoint 1, leaf::pick"), "{said}");
    for line in [
        "bought::pick(&[1, 2, 3], at)",
        "println!(\"{}\", leaf::pick(at));",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
}

/// What cargo says of a warning, as text and as a message.
#[test]
fn messages_name_this_checkout() {
    let (sandbox, first, second) = built();
    // A package of its own, where both build into one target each.
    for place in [&first, &second] {
        let beside = place.project.root().with_file_name("beside");
        fs::create_dir_all(beside.join("src")).must("mkdir");
        fs::write(
            beside.join("Cargo.toml"),
            "[package]\nname = \"beside\"\nversion = \"0.1.0\"\n[workspace]\n",
        )
        .must("write");
        fs::write(
            beside.join("src/lib.rs"),
            "pub fn f() { let unused = 1; }\n",
        )
        .must("write");
    }
    for (place, expected) in [(&first, 0), (&second, 1)] {
        let beside = place.project.root().with_file_name("beside");
        for (round, hits) in [expected, 0].into_iter().enumerate() {
            let words = "build --message-format=json";
            let cargo = || {
                let cargo = place.cargo(&sandbox, words).in_dir(&beside);
                cargo.ok()
            };
            let (seen, said) = sandbox.during(cargo);
            // Replayed by us, then by cargo from what it kept.
            assert_eq!(seen.hits, hits, "round {round}: {seen:?}");
            let found = Messages::of(&said).diagnostics();
            assert_eq!(found.len(), 1, "{said}");
            for other in [&first, &second] {
                let names = other.project.root().to_str().must("text");
                let own = other.project.root() == place.project.root();
                assert!(own || !said.stdout.contains(names), "{said}");
            }
        }
    }
}
