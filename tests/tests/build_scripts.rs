//! Runs of build scripts: replayed when what they read is what it was, run otherwise.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::thread;
use std::time::Duration;

use harness::flip::{Case, Noticed, State};
use harness::{Must, Package, Project, Sandbox, processes, tree};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// What a test waits for takes at most this long.
const PATIENCE: Duration = Duration::from_mins(1);

/// A program that prints what its build script made of `word` and `list`, neither of which the
/// script declares; and what it set.
fn words() -> Package {
    let script = "use std::{env, fs, path::Path};\n\
        fn main() {\n\
            let word = fs::read_to_string(\"../../word\").unwrap_or(\"none\".into());\n\
            let mut names: Vec<_> = fs::read_dir(\"list\").unwrap()\n\
                .map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();\n\
            names.sort();\n\
            let out = env::var(\"OUT_DIR\").unwrap();\n\
            let out = Path::new(&out).join(\"deep\");\n\
            fs::create_dir_all(&out).unwrap();\n\
            fs::write(out.join(\"words.rs\"), format!(\"({word:?}, &{names:?})\")).unwrap();\n\
            println!(\"cargo:rerun-if-changed=build.rs\");\n\
            println!(\"cargo:rustc-env=FLAVOUR={}\", env::var(\"FLAVOUR\").unwrap_or_default());\n\
        }\n";
    let main = "const WORDS: (&str, &[&str]) =\n\
            include!(concat!(env!(\"OUT_DIR\"), \"/deep/words.rs\"));\n\
        fn main() { println!(\"{WORDS:?} {}\", env!(\"FLAVOUR\")); }\n";
    let app = Package::new("app").bin(main).build_script(script);
    app.file("list/one", "")
}

#[test]
fn a_second_build_runs_no_script() {
    let case = Case::new(&[words()]);
    let state = State::printing("(\"none\", [\"one\"])");
    let cold = case.build(&state, true, "cold");
    assert_eq!((cold.script_hits, cold.script_misses), (0, 1), "{cold:?}");
    let made = tree::files(&case.project.path("target/debug/build"));

    let warm = case.build(&state, true, "warm");
    assert_eq!((warm.script_hits, warm.script_misses), (1, 0), "{warm:?}");
    warm.assert_all_hit(2);
    assert_eq!(tree::files(&case.project.path("target/debug/build")), made);

    let idle = case.build(&state, false, "again");
    assert_eq!(
        (idle.hits, idle.misses, idle.script_hits),
        (0, 0, 0),
        "{idle:?}"
    );
}

#[test]
fn a_file_the_script_looks_for_and_does_not_declare() {
    let case = Case::new(&[words()]);
    let word = case.project.path("word");
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("(\"none\", [\"one\"])").after(|| drop(fs::remove_file(&word))),
        &State::printing("(\"hello\", [\"one\"])")
            .after(|| fs::write(&word, "hello").must("write")),
    );
}

#[test]
fn a_file_added_to_a_directory_the_script_lists() {
    let case = Case::new(&[words()]);
    let added = case.project.path("crates/app/list/two");
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("(\"none\", [\"one\"])").after(|| drop(fs::remove_file(&added))),
        &State::printing("(\"none\", [\"one\", \"two\"])")
            .after(|| fs::write(&added, "").must("write")),
    );
}

#[test]
fn a_variable_the_script_reads_and_does_not_declare() {
    let case = Case::new(&[words()]);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("(\"none\", [\"one\"]) sweet").env("FLAVOUR", "sweet"),
        &State::printing("(\"none\", [\"one\"]) sour").env("FLAVOUR", "sour"),
    );
}

/// A program that prints what its build script made of running this in a shell.
fn shell(script: &str) -> Package {
    let build = format!(
        "fn main() {{\n\
            let made = std::process::Command::new(\"sh\").args([\"-ec\", {script:?}]).output().unwrap();\n\
            println!(\"cargo:rustc-env=MADE={{}}\", String::from_utf8(made.stdout).unwrap().trim());\n\
            println!(\"cargo:rerun-if-changed=build.rs\");\n\
        }}\n"
    );
    let main = "fn main() { println!(\"{}\", env!(\"MADE\")); }\n";
    Package::new("app").bin(main).build_script(&build)
}

#[test]
fn a_link_the_script_goes_through() {
    let app = shell("cd ../../current; cat word")
        .file("one/word", "one")
        .file("two/word", "two");
    let case = Case::new(&[app]);
    let current = case.project.path("current");
    let lead_to = |place: &str| {
        let _ = fs::remove_file(&current);
        symlink(format!("crates/app/{place}"), &current).must("link");
    };
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one").after(|| lead_to("one")),
        &State::printing("two").after(|| lead_to("two")),
    );
}

#[test]
fn a_tool_that_becomes_executable() {
    let app = shell("if test -x tool; then echo yes; else echo no; fi").file("tool", "text");
    let case = Case::new(&[app]);
    let tool = case.project.path("crates/app/tool");
    let mode = |mode| {
        fs::set_permissions(&tool, fs::Permissions::from_mode(mode)).must("chmod");
    };
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("no").after(|| mode(0o644)),
        &State::printing("yes").after(|| mode(0o755)),
    );
}

#[test]
fn a_file_the_script_makes_for_itself_where_there_is_none() {
    let app = shell(
        "test -e own || { echo default > own; made=1; }; cat own; test -z \"$made\" || rm own",
    );
    let case = Case::new(&[app]);
    let own = case.project.path("crates/app/own");
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("default").after(|| drop(fs::remove_file(&own))),
        &State::printing("given").after(|| fs::write(&own, "given").must("write")),
    );
}

#[test]
fn the_interpreter_of_a_script_that_is_run() {
    let sandbox = Sandbox::new();
    let project = Project::new(sandbox.path("project"), &[shell("../../tool")]);
    let interpreter = project.path("interpreter");
    fs::write(
        project.path("tool"),
        format!("#!{}\n", interpreter.display()),
    )
    .must("write");
    let executable = |path: &Path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).must("chmod");
    };
    executable(&project.path("tool"));
    sandbox.mount(project.target());
    // A copy of a program: what the kernel opens, and nobody else.
    for (program, says) in [("/bin/echo", "../../tool"), ("/bin/cat", "#!")] {
        let _ = fs::remove_file(&interpreter);
        fs::copy(program, &interpreter).must("copy");
        executable(&interpreter);
        for _ in 0..2 {
            sandbox.empty_view(project.target());
            let _ = sandbox.cargo(&project, "build").ok();
            let printed = sandbox.output_of(project.program("app"));
            assert!(printed.starts_with(says), "{program}: {printed}");
        }
    }
}

#[test]
fn what_lies_above_the_checkout_is_this_ones() {
    let sandbox = Sandbox::new();
    let packages = [shell("cat ../../../version")];
    for name in ["first", "second"] {
        let project = Project::new(sandbox.path(&format!("{name}/ws")), &packages);
        fs::write(sandbox.path(&format!("{name}/version")), name).must("write");
        sandbox.mount(project.target());
        let above = sandbox.path(name);
        let _ = sandbox.cargo(&project, "build").env("PWD", above).ok();
        assert_eq!(sandbox.output_of(project.program("app")).trim_end(), name);
    }
}

#[test]
fn a_script_that_writes_elsewhere_runs_each_time() {
    let script = "fn main() { std::fs::write(\"../../log\", \"ran\").unwrap(); }\n";
    let app = Package::new("app").bin("fn main() { println!(\"here\"); }\n");
    let case = Case::new(&[app.build_script(script)]);
    let state = State::printing("here");
    for when in ["cold", "warm"] {
        let seen = case.build(&state, true, when);
        assert_eq!(seen.script_hits, 0, "{when}: {seen:?}");
        assert_eq!(
            seen.reason_names(),
            ["writes-elsewhere"],
            "{when}: {seen:?}"
        );
        fs::remove_file(case.project.path("log")).must("the script ran");
    }
}

#[test]
fn a_script_that_cannot_be_watched_runs_each_time() {
    let case = Case::new(&[words()]);
    let state = State::printing("(\"none\", [\"one\"])").env("KACHEFS_UNWATCHED", "1");
    for when in ["cold", "warm"] {
        let seen = case.build(&state, true, when);
        assert_eq!(
            (seen.script_hits, seen.script_misses),
            (0, 1),
            "{when}: {seen:?}"
        );
        assert_eq!(seen.reason_names(), ["unwatched"], "{when}: {seen:?}");
    }
}

#[test]
fn what_a_script_says_names_this_checkout() {
    let sandbox = Sandbox::new();
    let script = "fn main() {\n\
        let here = std::env::var(\"CARGO_MANIFEST_DIR\").unwrap();\n\
        println!(\"cargo:rustc-env=HERE={here}\");\n\
        println!(\"cargo:warning=in {here}\");\n\
        println!(\"cargo:rerun-if-changed=build.rs\");\n}\n";
    let app = Package::new("app").bin("fn main() { println!(\"{}\", env!(\"HERE\")); }\n");
    let packages = [app.build_script(script)];
    for (name, hits) in [("first", 0), ("second", 1)] {
        let project = Project::new(sandbox.path(name), &packages);
        sandbox.mount(project.target());
        let (seen, built) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
        assert_eq!(seen.script_hits, hits, "{name}: {seen:?}");
        let here = project.path("crates/app").display().to_string();
        assert!(built.stderr.contains(&format!("in {here}")), "{built}");
        let printed = sandbox.output_of(project.program("app"));
        assert_eq!(printed.trim_end(), here);
    }
}

#[test]
fn a_failing_script_fails_each_time() {
    let script = "fn main() { eprintln!(\"no way\"); std::process::exit(3); }\n";
    let app = Package::new("app")
        .bin("fn main() {}\n")
        .build_script(script);
    let case = Case::new(&[app]);
    for _ in 0..2 {
        case.sandbox.empty_view(case.project.target());
        let (seen, failed) = case
            .sandbox
            .during(|| case.cargo(&State::printing("")).fails());
        assert!(failed.stderr.contains("no way"), "{failed}");
        assert!(failed.stderr.contains("exit status: 3"), "{failed}");
        assert_eq!((seen.script_hits, seen.failed), (0, 1), "{seen:?}");
    }
}

/// What a script has started may run on for long: a server, a watch.
#[test]
fn what_a_script_has_started_outlives_a_killed_launcher() {
    let app = shell(
        "( until test -e go; do sleep 0.05; done; cp build.rs answer ) >/dev/null 2>&1 & \
         echo > started; until test -e end; do sleep 0.05; done",
    );
    let case = Case::new(&[app]);
    let at = |name: &str| case.project.path("crates/app").join(name);
    let target = case.project.path("target");
    let build = case.sandbox.cargo(case.project.root(), "build").spawn();
    assert!(processes::wait_for(PATIENCE, || at("started").exists()));
    for launcher in launchers(&target) {
        signal::kill(launcher, Signal::SIGKILL).must("kill the launcher");
    }
    let _ = build.finish().failure();
    fs::write(at("end"), "").must("write");
    // The script ends; whoever answers has nobody left to tell.
    thread::sleep(Duration::from_secs(1));
    fs::write(at("go"), "").must("write");
    let answered = processes::wait_for(PATIENCE, || {
        fs::read(at("answer")).ok() == fs::read(at("build.rs")).ok()
    });
    assert!(answered, "its calls fail");
}

/// The launchers that cargo runs below a directory, but for what they start.
fn launchers(target: &Path) -> Vec<Pid> {
    let is_one = |pid: Pid| {
        let exe = processes::program(pid);
        exe.is_some_and(|exe| exe.starts_with(target) && exe.ends_with("build-script-build"))
    };
    let mut all = processes::naming(target);
    all.retain(|pid| is_one(*pid) && !processes::parent(*pid).is_some_and(is_one));
    all
}
