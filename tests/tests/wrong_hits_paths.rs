//! What is found under a name is what counts: paths that lead elsewhere, files that name files,
//! names that appear, and what a proc macro sees beside its sources.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use harness::flip::{Case, Noticed, State, macro_package, macro_user, waiting_macro};
use harness::{Must, Package, Project, Sandbox, processes};

/// A program that includes `current/data.txt` of the workspace, and whose compile waits.
fn slow_case() -> Case {
    let app = Package::new("app").dep("looks").bin(
        "const TEXT: &str = include_str!(\"../../../current/data.txt\");\n\
         const WAITED: &str = looks::look!();\n\
         fn main() { println!(\"{TEXT}{WAITED}\"); }\n",
    );
    let case = Case::new(&[waiting_macro(), app]);
    for version in ["one", "two"] {
        case.project.write(&format!("{version}/data.txt"), version);
    }
    case
}

/// Builds `one`, swaps in the middle of the compile, and sees what comes out for `two`.
#[track_caller]
fn swapped_meanwhile(case: &Case, swap: impl Fn()) {
    case.build_meanwhile(case.waiting_cargo(), swap);
    case.sandbox.empty_view(case.project.target());
    let _ = case.waiting_cargo().ok();
    let said = case.sandbox.output_of(case.project.program("app"));
    assert_eq!(said.trim_end(), "two", "a wrong hit");
}

#[test]
fn a_directory_renamed_during_the_compile() {
    let case = slow_case();
    let path = |name: &str| case.project.path(name);
    fs::rename(path("one"), path("current")).must("rename");
    swapped_meanwhile(&case, || {
        fs::rename(path("current"), path("one")).must("rename");
        fs::rename(path("two"), path("current")).must("rename");
    });
}

#[test]
fn a_link_replaced_during_the_compile() {
    let case = slow_case();
    let path = |name: &str| case.project.path(name);
    symlink("one", path("current")).must("symlink");
    swapped_meanwhile(&case, || {
        symlink("two", path("next")).must("symlink");
        fs::rename(path("next"), path("current")).must("rename");
    });
}

const PRINTS_ANSWER: &str = "unsafe extern \"C\" { fn kachefs_answer() -> i32; }\n\
     fn main() { println!(\"{}\", unsafe { kachefs_answer() }); }\n";

/// A program linked against what `script` says, with libraries elsewhere in the sandbox.
fn linked(script: impl Fn(&Sandbox) -> String) -> Case {
    let sandbox = Sandbox::new();
    let build = format!(
        "fn main() {{ println!(\"cargo::rerun-if-changed=build.rs\");\n{}\n}}\n",
        script(&sandbox)
    );
    let app = Package::new("app").bin(PRINTS_ANSWER).build_script(&build);
    let project = Project::new(sandbox.path("project"), &[app]);
    sandbox.mount(project.target());
    Case {
        sandbox,
        project,
        may_refuse: true,
    }
}

/// A static library in a directory of the sandbox.
fn make_library(sandbox: &Sandbox, directory: &str, library: &str, number: u32) {
    let dir = sandbox.make_dir(directory);
    let text = format!("int kachefs_answer(void) {{ return {number}; }}\n");
    fs::write(dir.join("answer.c"), text).must("write");
    let run = |program: &str, args: &[&str]| {
        let _ = sandbox.command(program).args(args).in_dir(&dir).ok();
    };
    run("cc", &["-c", "answer.c", "-o", "answer.o"]);
    run("rm", &["-f", library]);
    run("ar", &["crsD", library, "answer.o"]);
}

#[test]
fn a_library_named_by_a_script_in_a_searched_directory() {
    let case = linked(|sandbox| {
        let searched = sandbox.make_dir("searched");
        let script = format!("INPUT({})\n", sandbox.path("real/libreal.a").display());
        fs::write(searched.join("libanswer.so"), script).must("write");
        format!(
            "println!(\"cargo::rustc-link-search=native={}\");\n\
             println!(\"cargo::rustc-link-lib=dylib=answer\");",
            searched.display()
        )
    });
    let make = |number| make_library(&case.sandbox, "real", "libreal.a", number);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("11").after(|| make(11)),
        &State::printing("22").after(|| make(22)),
    );
}

#[test]
fn a_library_below_a_prefix_of_the_linker() {
    let case = linked(|sandbox| {
        format!(
            "println!(\"cargo::rustc-link-arg=-B{}\");\n\
             println!(\"cargo::rustc-link-arg=-lanswer\");",
            sandbox.path("prefix").display()
        )
    });
    let directory = format!("prefix/{}-linux-gnu", std::env::consts::ARCH);
    let make = |number| make_library(&case.sandbox, &directory, "libanswer.a", number);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("11").after(|| make(11)),
        &State::printing("22").after(|| make(22)),
    );
}

#[test]
fn a_library_that_appears_in_a_directory_that_was_not_there() {
    let case = linked(|_| "println!(\"cargo::rustc-link-arg=-lanswer\");".into());
    make_library(&case.sandbox, "second", "libanswer.a", 22);
    let path = format!(
        "{}:{}",
        case.sandbox.path("first").display(),
        case.sandbox.path("second").display()
    );
    let first = || case.sandbox.path("first");
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("22").env("LIBRARY_PATH", &path).after(|| {
            if first().exists() {
                fs::remove_dir_all(first()).must("remove");
            }
        }),
        &State::printing("11")
            .env("LIBRARY_PATH", &path)
            .after(|| make_library(&case.sandbox, "first", "libanswer.a", 11)),
    );
}

#[test]
fn the_branch_a_proc_macro_sees() {
    let body = "let root = std::env::var(\"CARGO_MANIFEST_DIR\").expect(\"set by cargo\");\n\
                std::fs::read_to_string(root + \"/.git/HEAD\").expect(\"HEAD\")";
    let case = Case::new(&[macro_package(body), macro_user()]);
    let head = |branch: &str| case.project.write("crates/app/.git/HEAD", branch);
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one").after(|| head("one")),
        &State::printing("two").after(|| head("two")),
    );
}

#[test]
fn what_asks_for_more_talk_and_a_proc_macro_reads() {
    let body = "std::env::var(\"RUST_LOG\").unwrap_or_default()\n\
                + &std::env::var(\"RUST_BACKTRACE\").unwrap_or_default()";
    let case = Case::new(&[macro_package(body), macro_user()]);
    let state = |text, log, trace| {
        State::printing(text)
            .env("RUST_LOG", log)
            .env("RUST_BACKTRACE", trace)
    };
    case.flip(
        Noticed::InAnEmptiedView,
        &state("off0", "off", "0"),
        &state("off1", "off", "1"),
    );
    let seen = case.build(&state("error1", "error", "1"), true, "another level");
    assert!(seen.misses > 0, "{seen:?}");
}

#[test]
fn the_directory_a_shell_stands_in_is_nobodys_input() {
    let case = Case::new(&[macro_package("\"word\".to_owned()"), macro_user()]);
    let state = |pwd: &str| State::printing("word").env("PWD", pwd);
    let first = case.build(&state("/one"), true, "from one directory");
    assert!(first.misses > 0, "{first:?}");
    let second = case.build(&state("/two"), true, "from another");
    assert_eq!(second.misses, 0, "{second:?}");
}

#[test]
fn a_second_file_for_one_module() {
    let app = Package::new("app")
        .bin("mod inner;\nmod other;\nfn main() { println!(\"{}\", inner::WORD); }\n");
    let case = Case::new(&[app
        .file("src/inner.rs", "pub const WORD: &str = \"flat\";\n")
        .file("src/other/mod.rs", "")]);
    let flat = State::printing("flat");
    let _ = case.build(&flat, true, "at first");
    for twin in ["crates/app/src/inner/mod.rs", "crates/app/src/other.rs"] {
        case.project.write(twin, "");
        case.sandbox.empty_view(case.project.target());
        let said = case.sandbox.cargo(&case.project, "build").fails();
        assert!(said.stderr.contains("E0761"), "{said}");
        case.project.remove(twin);
        let back = case.build(&flat, true, "as before");
        assert_eq!(back.misses, 0, "{back:?}");
    }
}

#[test]
fn what_was_changed_and_changed_back_during_the_compile() {
    let body = "let sync = std::path::PathBuf::from(std::env::var(\"TEST_SYNC\").expect(\"set\"));\n\
         let wait = |gone: &str| while sync.join(gone).exists() {\n\
             std::thread::sleep(std::time::Duration::from_millis(5));\n\
         };\n\
         let say = |word: &str| std::fs::write(sync.join(word), \"\").expect(\"write\");\n\
         say(\"reached\");\n\
         wait(\"hold\");\n\
         let root = std::env::var(\"CARGO_MANIFEST_DIR\").expect(\"set by cargo\");\n\
         let text = std::fs::read_to_string(root + \"/data\").expect(\"data\");\n\
         say(\"read\");\n\
         wait(\"hold-again\");\n\
         text";
    let case = Case::new(&[macro_package(body), macro_user().file("data", "one")]);
    let cargo = case.waiting_cargo();
    let sync = case.sandbox.path("sync");
    fs::write(sync.join("hold-again"), "").must("write");
    case.build_meanwhile(cargo, || {
        case.project.write("crates/app/data", "two");
        fs::remove_file(sync.join("hold")).must("remove");
        assert!(
            processes::wait_for(Duration::from_mins(1), || sync.join("read").exists()),
            "the macro reads"
        );
        case.project.write("crates/app/data", "one");
        fs::remove_file(sync.join("hold-again")).must("remove");
        fs::write(sync.join("hold"), "").must("write");
    });
    case.sandbox.empty_view(case.project.target());
    let _ = case.waiting_cargo().ok();
    let said = case.sandbox.output_of(case.project.program("app"));
    assert_eq!(said.trim_end(), "one", "a wrong hit");
}

#[test]
fn another_target_in_the_package_is_nobodys_input() {
    let user = macro_user();
    let case = Case::new(&[macro_package("\"word\".to_owned()"), user]);
    let build = |words: &str| {
        let cargo = case.sandbox.cargo(&case.project, words);
        case.sandbox.during(|| cargo.ok()).0
    };
    assert_eq!(build("build").misses, 2);
    build("build --target-dir crates/app/target-of-an-editor");
    case.sandbox.empty_view(case.project.target());
    let seen = build("build");
    assert_eq!((seen.hits, seen.misses), (2, 0), "{seen:?}");
}

#[test]
fn another_terminal_is_nobodys_input() {
    let case = Case::new(&[macro_package("\"word\".to_owned()"), macro_user()]);
    for (at, terminal) in ["one", "two"].iter().enumerate() {
        case.sandbox.empty_view(case.project.target());
        let cargo = case.sandbox.cargo(&case.project, "build");
        let build = cargo
            .env("STARSHIP_SESSION_KEY", terminal)
            .env("WT_SESSION", terminal)
            .env("SSH_TTY", terminal);
        let (seen, _) = case.sandbox.during(|| build.ok());
        assert_eq!(seen.misses, if at == 0 { 2 } else { 0 }, "{seen:?}");
    }
}
