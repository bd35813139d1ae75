//! Whatever changes what a compiler would produce is seen: nothing stale ever comes out of the
//! store. And what comes back, comes out of it.
//!
//! Every test flips one influence back and forth between two states, in the same view and in an
//! emptied one, and runs the program each time.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use harness::flip::{Case, Noticed, State, macro_package, macro_user};
use harness::{Must, Package, Project, Sandbox, samples, toolchain};

#[test]
fn a_source_file() {
    let case = Case::new(&[Package::new("app").bin("fn main() { println!(\"one\"); }\n")]);
    let write = |word: &str| {
        let source = format!("fn main() {{ println!(\"{word}\"); }}\n");
        case.project.write("crates/app/src/main.rs", &source);
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

#[test]
fn a_module_of_a_library() {
    let lib = Package::new("lib").lib("mod inner;\npub use inner::word;\n");
    let app = Package::new("app")
        .dep("lib")
        .bin("fn main() { println!(\"{}\", lib::word()); }\n");
    let case = Case::new(&[lib.file("src/inner.rs", ""), app]);
    let write = |word: &str| {
        let source = format!("pub fn word() -> &'static str {{ \"{word}\" }}\n");
        case.project.write("crates/lib/src/inner.rs", &source);
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

#[test]
fn a_source_file_of_the_same_size_and_time() {
    let case = Case::new(&[Package::new("app").bin("")]);
    let write = |word: &str| {
        let name = "crates/app/src/main.rs";
        case.project
            .write(name, &format!("fn main() {{ println!(\"{word}\"); }}\n"));
        let file = fs::File::options()
            .write(true)
            .open(case.project.path(name))
            .must("open");
        let past = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        file.set_modified(past).must("set the time back");
    };
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

#[test]
fn a_module_that_appears_in_another_place() {
    // `mod inner;` is inner.rs or inner/mod.rs: a file that was not there is an input, too.
    let app = Package::new("app").bin("mod inner;\nfn main() { println!(\"{}\", inner::WORD); }\n");
    let case = Case::new(&[app]);
    let [flat, nested] = ["crates/app/src/inner.rs", "crates/app/src/inner/mod.rs"];
    let only = |there: &str, gone: &str, word: &str| {
        if case.project.path(gone).exists() {
            case.project.remove(gone);
        }
        case.project
            .write(there, &format!("pub const WORD: &str = \"{word}\";\n"));
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("flat").after(|| only(flat, nested, "flat")),
        &State::printing("nested").after(|| only(nested, flat, "nested")),
    );
}

#[test]
fn an_included_file() {
    let app = Package::new("app").bin(
        "const TEXT: &str = include_str!(\"../text.txt\");\n\
         const BYTES: &[u8] = include_bytes!(\"../../../bytes.bin\");\n\
         fn main() { println!(\"{TEXT} {}\", BYTES.len()); }\n",
    );
    let case = Case::new(&[app]);
    let write = |text: &str, bytes: &str| {
        case.project.write("crates/app/text.txt", text);
        case.project.write("bytes.bin", bytes);
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("one 1").after(|| write("one", "1")),
        &State::printing("two 1").after(|| write("two", "1")),
    );
    case.flip(
        Noticed::ByCargo,
        &State::printing("three 3").after(|| write("three", "333")),
        &State::printing("three 5").after(|| write("three", "55555")),
    );
}

#[test]
fn a_variable_read_by_env() {
    let lib = Package::new("lib").lib("pub const WORD: &str = env!(\"TEST_WORD\");\n");
    let app = Package::new("app")
        .dep("lib")
        .bin("fn main() { println!(\"{}\", lib::WORD); }\n");
    let case = Case::new(&[lib, app]);
    case.flip(
        Noticed::ByCargo,
        &State::printing("one").env("TEST_WORD", "one"),
        &State::printing("two").env("TEST_WORD", "two"),
    );
}

#[test]
fn a_variable_read_by_option_env() {
    let app =
        Package::new("app").bin("fn main() { println!(\"{:?}\", option_env!(\"TEST_WORD\")); }\n");
    let case = Case::new(&[app]);
    let unset = State::printing("None");
    let set = State::printing("Some(\"set\")").env("TEST_WORD", "set");
    case.flip(Noticed::ByCargo, &unset, &set);
    let empty = State::printing("Some(\"\")").env("TEST_WORD", "");
    let seen = case.build(&empty, true, "set to nothing");
    assert!(seen.misses > 0, "unset and empty differ: {seen:?}");
}

#[test]
fn a_feature() {
    let lib = Package::new("lib")
        .manifest("[features]\nloud = []\n")
        .lib("pub const LOUD: bool = cfg!(feature = \"loud\");\n");
    let app = Package::new("app")
        .dep("lib")
        .manifest("[features]\nloud = [\"lib/loud\"]\n")
        .bin("fn main() { println!(\"{} {}\", lib::LOUD, cfg!(feature = \"loud\")); }\n");
    let case = Case::new(&[lib, app]);
    case.flip(
        Noticed::ByCargo,
        &State::printing("false false"),
        &State::printing("true true").args("--features app/loud"),
    );
}

#[test]
fn a_profile_flag() {
    let app = Package::new("app").bin("fn main() { println!(\"{}\", cfg!(debug_assertions)); }\n");
    let case = Case::new(&[app]);
    let manifest = case.project.read("Cargo.toml");
    let profile = |flags: &str| {
        case.project
            .write("Cargo.toml", &format!("{manifest}\n{flags}"));
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("true").after(|| profile("[profile.dev]\n")),
        &State::printing("false").after(|| profile("[profile.dev]\ndebug-assertions = false\n")),
    );
}

#[test]
fn a_panic_strategy() {
    let app = Package::new("app")
        .bin("fn main() { println!(\"aborts: {}\", cfg!(panic = \"abort\")); }\n");
    let case = Case::new(&[app]);
    case.flip(
        Noticed::ByCargo,
        &State::printing("aborts: false"),
        &State::printing("aborts: true").env("CARGO_PROFILE_DEV_PANIC", "abort"),
    );
}

#[test]
fn rustflags() {
    let lib =
        Package::new("lib").lib("#![allow(unexpected_cfgs)]\npub const LOUD: bool = cfg!(loud);\n");
    let app = Package::new("app")
        .dep("lib")
        .bin("fn main() { println!(\"{}\", lib::LOUD); }\n");
    let case = Case::new(&[lib, app]);
    case.flip(
        Noticed::ByCargo,
        &State::printing("false"),
        &State::printing("true").env("RUSTFLAGS", "--cfg loud"),
    );
}

#[test]
fn target_cpu() {
    let app = Package::new("app")
        .bin("fn main() { println!(\"{}\", cfg!(target_feature = \"sse4.2\")); }\n");
    let case = Case::new(&[app]);
    if !cfg!(target_arch = "x86_64") {
        eprintln!("skipped: the feature asked for is one of x86_64");
        return;
    }
    case.flip(
        Noticed::ByCargo,
        &State::printing("false"),
        &State::printing("true").env("RUSTFLAGS", "-C target-feature=+sse4.2"),
    );
}

#[test]
fn a_cfg_in_the_cargo_configuration() {
    let app = Package::new("app")
        .bin("#![allow(unexpected_cfgs)]\nfn main() { println!(\"{}\", cfg!(loud)); }\n");
    let case = Case::new(&[app]);
    let config = |flags: &str| {
        let text = format!("[build]\nrustflags = [{flags}]\n");
        case.project.write(".cargo/config.toml", &text);
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("false").after(|| config("")),
        &State::printing("true").after(|| config("\"--cfg=loud\"")),
    );
}

#[test]
fn code_generated_by_a_build_script() {
    let generated = Package::new("generated")
        .build_script(
            "use std::{env, fs, path::Path};\n\
             fn main() {\n\
                 println!(\"cargo::rerun-if-changed=input.txt\");\n\
                 let word = fs::read_to_string(\"input.txt\").expect(\"input\");\n\
                 let out = env::var(\"OUT_DIR\").expect(\"OUT_DIR\");\n\
                 let code = format!(\"pub const WORD: &str = {word:?};\");\n\
                 fs::write(Path::new(&out).join(\"code.rs\"), code).expect(\"write\");\n\
             }\n",
        )
        .lib("include!(concat!(env!(\"OUT_DIR\"), \"/code.rs\"));\n");
    let app = Package::new("app")
        .dep("generated")
        .bin("fn main() { println!(\"{}\", generated::WORD); }\n");
    let case = Case::new(&[generated, app]);
    let write = |word: &str| case.project.write("crates/generated/input.txt", word);
    case.flip(
        Noticed::ByCargo,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

#[test]
fn a_variable_set_by_a_build_script() {
    let app = Package::new("app")
        .build_script(
            "fn main() {\n\
                 println!(\"cargo::rerun-if-changed=input.txt\");\n\
                 println!(\"cargo::rustc-check-cfg=cfg(is_two)\");\n\
                 let word = std::fs::read_to_string(\"input.txt\").expect(\"input\");\n\
                 println!(\"cargo::rustc-env=WORD={word}\");\n\
                 if word == \"two\" { println!(\"cargo::rustc-cfg=is_two\"); }\n\
             }\n",
        )
        .bin("fn main() { println!(\"{} {}\", env!(\"WORD\"), cfg!(is_two)); }\n");
    let case = Case::new(&[app]);
    let write = |word: &str| case.project.write("crates/app/input.txt", word);
    case.flip(
        Noticed::ByCargo,
        &State::printing("one false").after(|| write("one")),
        &State::printing("two true").after(|| write("two")),
    );
}

#[test]
fn the_build_script_itself() {
    let app = Package::new("app").bin("fn main() { println!(\"{}\", env!(\"WORD\")); }\n");
    let case = Case::new(&[app.build_script("")]);
    let write = |word: &str| {
        let source = format!("fn main() {{ println!(\"cargo::rustc-env=WORD={word}\"); }}\n");
        case.project.write("crates/app/build.rs", &source);
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("one").after(|| write("one")),
        &State::printing("two").after(|| write("two")),
    );
}

fn write_script(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().must("a parent")).must("mkdir");
    // A new file each time, never one some process may be running.
    let next = path.with_extension("next");
    fs::write(&next, text).must("write");
    fs::set_permissions(&next, fs::Permissions::from_mode(0o755)).must("chmod");
    fs::rename(&next, path).must("rename");
}

#[test]
fn a_script_in_place_of_rustc() {
    let app = Package::new("app")
        .bin("#![allow(unexpected_cfgs)]\nfn main() { println!(\"{}\", cfg!(from_shim)); }\n");
    let mut case = Case::new(&[app]);
    case.may_refuse = true;
    let shim = case.sandbox.path("shim/rustc");
    let rustc = toolchain::sysroot().join("bin/rustc");
    let write = |extra: &str| {
        write_script(
            &shim,
            &format!("#!/bin/sh\nexec '{}' {extra} \"$@\"\n", rustc.display()),
        );
    };
    let path = shim.to_str().must("a text path");
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("false")
            .after(|| write(""))
            .env("RUSTC", path),
        &State::printing("true")
            .after(|| write("--cfg from_shim"))
            .env("RUSTC", path),
    );
}

#[test]
fn the_contents_of_the_toolchain() {
    // The same path, the same `rustc -vV`, the same rustc: only a library in its sysroot changes.
    let app = Package::new("app")
        .bin("extern crate shiny;\nfn main() { println!(\"{}\", shiny::word()); }\n");
    let case = Case::new(&[app]);
    let sysroot = case.sandbox.path("toolchain");
    toolchain::copy_to(&sysroot);
    let rustc = sysroot.join("bin/rustc");
    let libraries = sysroot
        .join("lib/rustlib")
        .join(toolchain::host())
        .join("lib");
    let install = |word: &str| {
        let source = format!("pub fn word() -> &'static str {{ \"{word}\" }}\n");
        case.project.write("shiny.rs", &source);
        let next = case.sandbox.path("libshiny.rlib");
        let command = case
            .sandbox
            .command(&rustc)
            .args(["--crate-type=rlib", "--crate-name=shiny"]);
        let _ = command
            .arg("-o")
            .arg(&next)
            .arg(case.project.path("shiny.rs"))
            .ok();
        fs::rename(&next, libraries.join("libshiny.rlib")).must("rename");
    };
    // Its cargo as well: another one's LD_LIBRARY_PATH would lead rustc to another sysroot.
    let path = format!("{}:/usr/bin:/bin", sysroot.join("bin").display());
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("one")
            .after(|| install("one"))
            .env("PATH", &path),
        &State::printing("two")
            .after(|| install("two"))
            .env("PATH", &path),
    );
}

#[test]
fn a_private_function_two_libraries_below() {
    let leaf = Package::new("leaf").lib("");
    let middle = Package::new("middle")
        .dep("leaf")
        .lib("pub fn word() -> u32 { leaf::word() }\n");
    let app = Package::new("app")
        .dep("middle")
        .bin("fn main() { println!(\"{}\", middle::word()); }\n");
    let case = Case::new(&[leaf, middle, app]);
    // Same names, same types, same lines: only what is linked differs.
    let write = |number: u32| {
        let source = format!(
            "pub fn word() -> u32 {{ private() }}\n\
             #[inline(never)]\nfn private() -> u32 {{ {number} }}\n"
        );
        case.project.write("crates/leaf/src/lib.rs", &source);
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("11").after(|| write(11)),
        &State::printing("22").after(|| write(22)),
    );
}

/// The text of a C file with one function.
fn c_answer(number: u32) -> String {
    format!("int kachefs_answer(void) {{ return {number}; }}\n")
}

const PRINTS_ANSWER: &str = "unsafe extern \"C\" { fn kachefs_answer() -> i32; }\n\
     pub fn answer() -> i32 { unsafe { kachefs_answer() } }\n";

#[test]
fn a_native_library_built_by_a_build_script() {
    let native = Package::new("native").lib(PRINTS_ANSWER).build_script(
        "use std::{env, process::Command};\n\
         fn run(program: &str, args: &[&str]) {\n\
             assert!(Command::new(program).args(args).status().expect(program).success());\n\
         }\n\
         fn main() {\n\
             println!(\"cargo::rerun-if-changed=answer.c\");\n\
             let out = env::var(\"OUT_DIR\").expect(\"OUT_DIR\");\n\
             let object = format!(\"{out}/answer.o\");\n\
             let library = format!(\"{out}/libanswer.a\");\n\
             run(\"cc\", &[\"-c\", \"answer.c\", \"-o\", &object]);\n\
             let _ = std::fs::remove_file(&library);\n\
             run(\"ar\", &[\"crsD\", &library, &object]);\n\
             println!(\"cargo::rustc-link-search=native={out}\");\n\
             println!(\"cargo::rustc-link-lib=static=answer\");\n\
         }\n",
    );
    let app = Package::new("app")
        .dep("native")
        .bin("fn main() { println!(\"{}\", native::answer()); }\n");
    let case = Case::new(&[native, app]);
    let write = |number| {
        case.project
            .write("crates/native/answer.c", &c_answer(number));
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("11").after(|| write(11)),
        &State::printing("22").after(|| write(22)),
    );
}

/// Compiles the C function to an object and a static library in the sandbox, outside the project.
fn make_native(sandbox: &Sandbox, number: u32) {
    let dir = sandbox.make_dir("native");
    fs::write(dir.join("answer.c"), c_answer(number)).must("write");
    let run = |program: &str, args: &[&str]| {
        let _ = sandbox.command(program).args(args).in_dir(&dir).ok();
    };
    run("cc", &["-c", "answer.c", "-o", "answer.o"]);
    run("rm", &["-f", "libanswer.a"]);
    run("ar", &["crsD", "libanswer.a", "answer.o"]);
}

#[test]
fn a_native_library_that_lies_elsewhere() {
    // Linked by its name alone: nothing cargo sees ever changes.
    for kind in ["lib", "app"] {
        let sandbox = Sandbox::new();
        let script = format!(
            "fn main() {{\n\
                 println!(\"cargo::rerun-if-changed=build.rs\");\n\
                 println!(\"cargo::rustc-link-search=native={}\");\n\
                 println!(\"cargo::rustc-link-lib=static=answer\");\n\
             }}\n",
            sandbox.path("native").display()
        );
        let app = Package::new("app");
        let packages = if kind == "lib" {
            let native = Package::new("native")
                .lib(PRINTS_ANSWER)
                .build_script(&script);
            vec![
                native,
                app.dep("native")
                    .bin("fn main() { println!(\"{}\", native::answer()); }\n"),
            ]
        } else {
            let main = format!("{PRINTS_ANSWER}fn main() {{ println!(\"{{}}\", answer()); }}\n");
            vec![app.bin(&main).build_script(&script)]
        };
        let project = Project::new(sandbox.path("project"), &packages);
        sandbox.mount(project.target());
        let case = Case {
            sandbox,
            project,
            may_refuse: false,
        };
        case.flip(
            Noticed::InAnEmptiedView,
            &State::printing("11").after(|| make_native(&case.sandbox, 11)),
            &State::printing("22").after(|| make_native(&case.sandbox, 22)),
        );
    }
}

#[test]
fn an_object_named_by_a_link_argument() {
    let sandbox = Sandbox::new();
    let main = format!("{PRINTS_ANSWER}fn main() {{ println!(\"{{}}\", answer()); }}\n");
    let script = format!(
        "fn main() {{\n\
             println!(\"cargo::rerun-if-changed=build.rs\");\n\
             println!(\"cargo::rustc-link-arg={}\");\n\
         }}\n",
        sandbox.path("native/answer.o").display()
    );
    let app = Package::new("app").bin(&main).build_script(&script);
    let project = Project::new(sandbox.path("project"), &[app]);
    sandbox.mount(project.target());
    let case = Case {
        sandbox,
        project,
        may_refuse: false,
    };
    case.flip(
        Noticed::InAnEmptiedView,
        &State::printing("11").after(|| make_native(&case.sandbox, 11)),
        &State::printing("22").after(|| make_native(&case.sandbox, 22)),
    );
}

/// Two checkouts with one store, each with its own view, built alternately.
fn two_checkouts(packages: &[Package], change: impl Fn(&Project)) -> (Sandbox, [Project; 2]) {
    let sandbox = Sandbox::new();
    let one = Project::new(sandbox.path("checkout-one"), packages);
    let two = one.checkout(sandbox.path("checkout-two"));
    change(&two);
    for project in [&one, &two] {
        sandbox.mount(project.target());
    }
    (sandbox, [one, two])
}

#[track_caller]
fn built_output(sandbox: &Sandbox, project: &Project) -> String {
    let _ = sandbox.cargo(project, "build").ok();
    sandbox.counters();
    sandbox
        .output_of(project.program("app"))
        .trim_end()
        .to_owned()
}

#[test]
fn checkouts_that_differ_in_one_source_file() {
    let lib = Package::new("lib").lib("pub const WORD: &str = \"one\";\n");
    let app = Package::new("app")
        .dep("lib")
        .bin("fn main() { println!(\"{}\", lib::WORD); }\n");
    let (sandbox, [one, two]) = two_checkouts(&[lib, app], |two| {
        two.replace("crates/lib/src/lib.rs", "one", "two");
    });
    for _ in 0..2 {
        assert_eq!(built_output(&sandbox, &one), "one");
        assert_eq!(built_output(&sandbox, &two), "two");
        sandbox.empty_view(one.target());
        sandbox.empty_view(two.target());
    }
}

#[test]
fn checkouts_that_differ_in_a_file_included_by_absolute_path() {
    let app = Package::new("app")
        .bin(
            "const TEXT: &str = include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/text\"));\n\
             fn main() { println!(\"{TEXT}\"); }\n",
        )
        .file("text", "one");
    let (sandbox, [one, two]) = two_checkouts(&[app], |two| two.write("crates/app/text", "two"));
    for _ in 0..2 {
        assert_eq!(built_output(&sandbox, &one), "one");
        assert_eq!(built_output(&sandbox, &two), "two");
        sandbox.empty_view(one.target());
        sandbox.empty_view(two.target());
    }
}

#[test]
fn checkouts_whose_proc_macro_reads_their_own_files() {
    let body = "use std::fs;\n\
                let root = std::env::var(\"CARGO_MANIFEST_DIR\").expect(\"set by cargo\");\n\
                let text = fs::read_to_string(root.clone() + \"/text\").expect(\"the file\");\n\
                root + \" \" + &text";
    let app = macro_user().file("text", "one");
    let (sandbox, [one, two]) = two_checkouts(&[macro_package(body), app], |two| {
        two.write("crates/app/text", "two");
    });
    for _ in 0..2 {
        for (project, word) in [(&one, "one"), (&two, "two")] {
            let expected = format!("{} {word}", project.path("crates/app").display());
            assert_eq!(built_output(&sandbox, project), expected);
        }
        sandbox.empty_view(one.target());
        sandbox.empty_view(two.target());
    }
}

#[test]
fn the_path_of_the_checkout_in_the_program() {
    let lib = Package::new("lib")
        .build_script("fn main() { println!(\"cargo::rerun-if-changed=build.rs\"); }\n")
        .lib(
            "pub const ROOT: &str = env!(\"CARGO_MANIFEST_DIR\");\n\
             pub const OUT: &str = env!(\"OUT_DIR\");\n",
        );
    let app = Package::new("app")
        .dep("lib")
        .bin("fn main() { println!(\"{}\\n{}\", lib::ROOT, lib::OUT); }\n");
    let (sandbox, checkouts) = two_checkouts(&[lib, app], |_| ());
    for _ in 0..2 {
        for project in &checkouts {
            let output = built_output(&sandbox, project);
            let (root, out) = output.split_once('\n').must("two lines");
            assert_eq!(Path::new(root), project.path("crates/lib"));
            assert!(Path::new(out).starts_with(project.target()), "{out}");
            assert!(Path::new(out).is_dir(), "{out}");
            sandbox.empty_view(project.target());
        }
    }
    // Each checkout has its own, and finds it again.
    for project in &checkouts {
        let (seen, _) = sandbox.during(|| built_output(&sandbox, project));
        seen.assert_no_miss();
    }
}

#[test]
fn the_environment_cargo_sets() {
    // CARGO_PKG_* is part of the package, seen through env! and by nothing else.
    let app =
        Package::new("app").bin("fn main() { println!(\"{}\", env!(\"CARGO_PKG_VERSION\")); }\n");
    let case = Case::new(&[app]);
    let manifest = case.project.read("crates/app/Cargo.toml");
    let version = |version: &str| {
        case.project
            .write("crates/app/Cargo.toml", &manifest.replace("0.1.0", version));
    };
    case.flip(
        Noticed::ByCargo,
        &State::printing("0.1.0").after(|| version("0.1.0")),
        &State::printing("0.2.0").after(|| version("0.2.0")),
    );
}

#[test]
fn the_working_directory_of_file_names() {
    // `file!()` and panic messages name the file as plain cargo would.
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    project.write(
        "crates/app/src/main.rs",
        "fn main() { println!(\"{}\", file!()); let _ = middle::sentence(); panic!(\"here\"); }\n",
    );
    let _ = sandbox
        .plain_cargo(&project, "build --target-dir plain")
        .ok();
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    let plain = sandbox.command(project.path("plain/debug/app")).fails();
    let cached = sandbox.command(project.program("app")).fails();
    assert_eq!(cached.stdout, plain.stdout);
    let place = |text: &str| {
        text.lines()
            .find(|line| line.contains("panicked"))
            .map(|line| {
                line.split_once(" at ")
                    .map_or(line, |(_, place)| place)
                    .to_owned()
            })
    };
    assert_eq!(
        place(&cached.stderr),
        place(&plain.stderr),
        "{cached}\n{plain}"
    );
}
