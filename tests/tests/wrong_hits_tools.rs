//! Compilers and linkers are known by all they are made of, wherever it lies.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use harness::flip::{Case, waiting_macro};
use harness::{Must, Package, Project, Sandbox, toolchain};
use nix::unistd::Uid;

/// Replaces `from` by `to`, of the same length, at its only place in `bytes`.
#[track_caller]
fn patch(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let mut places = bytes
        .windows(from.len())
        .enumerate()
        .filter_map(|(at, part)| (part == from).then_some(at));
    let at = places.next().must("nothing to patch");
    assert_eq!(places.next(), None, "more than one place to patch");
    bytes[at..at + to.len()].copy_from_slice(to);
}

/// Puts a file in place of another, which may be a link to one that is not ours.
#[track_caller]
fn put(path: &Path, bytes: &[u8]) {
    let next = path.with_extension("next");
    fs::write(&next, bytes).must("write");
    fs::set_permissions(&next, fs::Permissions::from_mode(0o755)).must("chmod");
    fs::rename(&next, path).must("rename");
}

/// A toolchain whose compiler lies in no `lib` beside `bin`, as where a distribution keeps it with
/// the system's libraries. Returns the directory of the compiler's own library, and its name.
fn scattered_toolchain(root: &Path) -> (PathBuf, String) {
    toolchain::copy_to(root);
    let elsewhere = root.join("sys");
    fs::create_dir(&elsewhere).must("mkdir");
    let name = fs::read_dir(root.join("lib"))
        .must("lib")
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name.starts_with("librustc_driver-"))
        .must("a compiler");
    fs::rename(root.join("lib").join(&name), elsewhere.join(&name)).must("rename");
    let rustc = root.join("bin/rustc");
    let mut bytes = fs::read(&rustc).must("rustc");
    patch(&mut bytes, b"$ORIGIN/../lib\0", b"$ORIGIN/../sys\0");
    put(&rustc, &bytes);
    (elsewhere, name)
}

#[test]
fn a_compiler_whose_library_lies_with_the_systems() {
    let sandbox = Sandbox::new();
    let app = Package::new("app").bin("fn main() { let word = 1; }\n");
    let project = Project::new(sandbox.path("project"), &[app]);
    sandbox.mount(project.target());
    let root = sandbox.path("toolchain");
    let (elsewhere, name) = scattered_toolchain(&root);
    // Its cargo as well: another one would lend it another compiler (LD_LIBRARY_PATH).
    let path = format!("{}:/usr/bin:/bin", root.join("bin").display());
    let build = || sandbox.cargo(&project, "build").env("PATH", &path);
    let (seen, first) = sandbox.during(|| build().ok());
    assert_eq!(seen.misses, 1, "{seen:?}\n{first}");
    assert!(first.stderr.contains("unused variable: `word`"), "{first}");
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| build().ok());
    assert_eq!((seen.hits, seen.misses), (1, 0), "{seen:?}");

    // The same program with the same version: only what it loads is another.
    let library = elsewhere.join(name);
    let mut bytes = fs::read(&library).must("the compiler's library");
    patch(&mut bytes, b"unused variable: `", b"unread variable: `");
    put(&library, &bytes);
    sandbox.empty_view(project.target());
    let (seen, second) = sandbox.during(|| build().ok());
    assert!(
        second.stderr.contains("unread variable: `word`"),
        "what another compiler said: {seen:?}\n{second}"
    );
}

/// Compiles a C function to a shared library.
fn shared_library(sandbox: &Sandbox, dir: &Path, name: &str, source: &str, args: &[&str]) {
    fs::create_dir_all(dir).must("mkdir");
    let path = dir.join(format!("{name}.c"));
    fs::write(&path, source).must("write");
    let _ = sandbox
        .command("cc")
        .args(["-shared", "-fPIC"])
        .arg(&path)
        .args(args)
        .arg("-o")
        .arg(dir.join(format!("lib{name}.so")))
        .ok();
}

#[test]
fn a_library_the_linker_finds_through_the_loaders_path() {
    let sandbox = Sandbox::new();
    let (outer, inner) = (sandbox.path("outer"), sandbox.path("inner"));
    shared_library(
        &sandbox,
        &inner,
        "inner",
        "int inner(void) { return 1; }",
        &[],
    );
    let search = format!("-L{}", inner.display());
    shared_library(
        &sandbox,
        &outer,
        "outer",
        "int inner(void); int outer(void) { return inner(); }",
        &[&search, "-linner"],
    );
    let script = format!(
        "fn main() {{ println!(\"cargo::rustc-link-search=native={}\"); \
         println!(\"cargo::rustc-link-lib=dylib=outer\"); }}\n",
        outer.display()
    );
    let app = Package::new("app").build_script(&script).bin(
        "unsafe extern \"C\" { fn outer() -> i32; }\n\
         fn main() { println!(\"{}\", unsafe { outer() }); }\n",
    );
    let project = Project::new(sandbox.path("project"), &[app]);
    sandbox.mount(project.target());
    let build = || {
        sandbox
            .cargo(&project, "build")
            .env("LD_LIBRARY_PATH", inner.to_str().must("a text path"))
            // The one that follows it.
            .env("RUSTFLAGS", "-Clink-arg=-fuse-ld=bfd")
    };
    let _ = build().ok();
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| build().ok());
    seen.assert_no_miss();
    fs::remove_file(inner.join("libinner.so")).must("remove");
    sandbox.empty_view(project.target());
    let failed = build().fails();
    assert!(failed.stderr.contains("inner"), "{failed}");
}

#[test]
fn a_linker_replaced_during_the_compile() {
    let app = Package::new("app").dep("looks").bin(
        "const WAITED: &str = looks::look!();\n\
         unsafe extern \"C\" { fn kachefs_answer() -> i32; }\n\
         fn main() { println!(\"{WAITED}{}\", unsafe { kachefs_answer() }); }\n",
    );
    let case = Case::new(&[waiting_macro(), app]);
    let dir = case.sandbox.make_dir("native");
    let linker = dir.join("linker");
    let install = |number: u32| {
        let object = dir.join(format!("{number}.o"));
        fs::write(
            dir.join("answer.c"),
            format!("int kachefs_answer(void) {{ return {number}; }}\n"),
        )
        .must("write");
        let _ = case
            .sandbox
            .command("cc")
            .args(["-c", "answer.c", "-o"])
            .arg(&object)
            .in_dir(&dir)
            .ok();
        let script = format!("#!/bin/sh\nexec cc \"$@\" '{}'\n", object.display());
        put(&linker, script.as_bytes());
    };
    let flags = format!("-Clinker={}", linker.display());
    let build = || case.waiting_cargo().env("RUSTFLAGS", &flags);
    install(1);
    case.build_meanwhile(build(), || install(2));
    // Whatever came out, it is not what the first linker makes.
    install(1);
    case.sandbox.empty_view(case.project.target());
    let _ = build().ok();
    let said = case.sandbox.output_of(case.project.program("app"));
    assert_eq!(said.trim_end(), "1", "a wrong hit");
}

#[test]
fn a_library_lent_to_the_compiler() {
    // Any byte of it may matter: here one behind its end, so that the compiler still works.
    let case = Case::new(&[Package::new("app").lib("pub fn nothing() {}\n")]);
    let lent = case.sandbox.make_dir("lent");
    let name = fs::read_dir(toolchain::sysroot().join("lib"))
        .must("lib")
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name.starts_with("libLLVM.so"))
        .must("LLVM");
    let mut bytes = fs::read(toolchain::sysroot().join("lib").join(&name)).must("LLVM");
    let build = || {
        case.sandbox.empty_view(case.project.target());
        let cargo = case.sandbox.cargo(&case.project, "build");
        let lent = lent.to_str().must("a text path");
        case.sandbox
            .during(|| cargo.env("LD_LIBRARY_PATH", lent).ok())
            .0
    };
    put(&lent.join(&name), &bytes);
    assert_eq!(build().misses, 1);
    assert_eq!(build().misses, 0);
    bytes.push(0);
    put(&lent.join(&name), &bytes);
    assert_eq!(build().misses, 1, "another compiler");
}

#[test]
fn files_of_another_mount_namespace() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: a namespace of our own takes root");
        return;
    }
    let case = Case::new(&[Package::new("app").bin("fn main() { println!(\"here\"); }\n")]);
    let _ = case.sandbox.cargo(&case.project, "build").ok();
    let source = case.project.path("crates/app/src");
    let other = case.sandbox.make_dir("other");
    fs::write(
        other.join("main.rs"),
        "fn main() { println!(\"there\"); }\n",
    )
    .must("write");
    case.sandbox.empty_view(case.project.target());
    let script = format!(
        "mount --bind '{}' '{}' && exec cargo build",
        other.display(),
        source.display()
    );
    let (seen, _) = case.sandbox.during(|| {
        case.sandbox
            .command("unshare")
            .args(["-m", "sh", "-c", &script])
            .in_dir(case.project.root())
            .ok()
    });
    let said = case.sandbox.output_of(case.project.program("app"));
    assert_eq!(said.trim_end(), "there", "a wrong hit: {seen:?}");
    assert_eq!(seen.reasons.get("other-namespace"), Some(&1), "{seen:?}");
}
