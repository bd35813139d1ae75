//! Compilers write to a directory of the store, and what they have made gets its names in the view.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use harness::aside::{assert_none_left, compilers, looking, sessions};
use harness::messages::Messages;
use harness::{Cmd, Must, Package, Project, Running, Sandbox, processes};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A program that needs a library, of which the compiler takes some seconds to think before there is
/// metadata.
fn slow(sandbox: &Sandbox) -> Project {
    let library = "#![allow(long_running_const_eval)]\n\
         pub static STEPS: u64 = { let mut i = 0; while i < 10_000_000 { i += 1; } i };\n\
         pub fn number() -> u64 { STEPS / 10_000_000 + 6 }\n";
    program_with(sandbox, library)
}

/// The same, but it takes its time when metadata is there, which is too large for the index.
fn slow_to_end(sandbox: &Sandbox) -> Project {
    let functions = (0..8000).map(|n| {
        format!(
            "pub fn f{n}(x: u64) -> u64 {{ let mut v = vec![x; 3]; v.push({n}); v.iter().sum() }}\n"
        )
    });
    let library: String = functions.collect();
    program_with(sandbox, &(library + "pub fn number() -> u64 { f1(2) }\n"))
}

fn program_with(sandbox: &Sandbox, library: &str) -> Project {
    let library = Package::new("slow").lib(library);
    // It starts when there is metadata.
    let next = Package::new("next").dep("slow");
    let next = next.lib("pub fn number() -> u64 { slow::number() }\n");
    let app = Package::new("app").dep("next");
    let app = app.bin("fn main() { println!(\"{}\", next::number()); }\n");
    Project::new(sandbox.path("project"), &[library, next, app])
}

/// Names in `deps` that begin so.
fn outputs(project: &Project, beginning: &str) -> Vec<String> {
    let mut names = sorted(&project.target());
    names.retain(|name| name.starts_with(beginning));
    names
}

/// Without incremental state.
fn cargo(sandbox: &Sandbox, project: &Project, words: &str) -> Cmd {
    let cargo = sandbox.cargo(project, words);
    cargo.env("CARGO_INCREMENTAL", "0")
}

/// Builds until the library is being compiled.
fn begin(sandbox: &Sandbox, project: &Project) -> Running {
    let build = cargo(sandbox, project, "build --message-format=json").spawn();
    let begun = || compilers(sandbox) > 0;
    assert!(
        processes::wait_for(Duration::from_mins(1), begun),
        "no compiler writes aside"
    );
    build
}

/// The compilers of the library that run now.
fn running(sandbox: &Sandbox) -> impl Iterator<Item = Pid> {
    let is_one = |pid: &Pid| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|byte| *byte == 0);
        let is_compiler = arguments
            .next()
            .is_some_and(|name| name.ends_with(b"/rustc"));
        is_compiler && arguments.any(|argument| argument == b"slow")
    };
    processes::naming(sandbox.root()).into_iter().filter(is_one)
}

/// Does something meanwhile, and says how many compilers of the library there were.
fn counting<R>(sandbox: &Sandbox, work: impl FnOnce() -> R) -> (R, usize) {
    let mut compilers = BTreeSet::new();
    let result = looking(|| compilers.extend(running(sandbox)), work);
    (result, compilers.len())
}

#[test]
fn only_what_is_made_gets_into_the_view() {
    let sandbox = Sandbox::new();
    let project = slow(&sandbox);
    sandbox.mount(project.target());
    let build = begin(&sandbox, &project);
    assert!(outputs(&project, "libslow-").is_empty());
    let built = build.finish().success();
    assert!(!built.stdout.contains("/aside/"), "{built}");
    assert_none_left(&sandbox);
    assert_eq!(sandbox.output_of(project.program("app")), "7\n");
    let made = outputs(&project, "libslow-");
    let ends: Vec<_> = made.iter().map(|name| name.rsplit('.').next()).collect();
    assert_eq!(ends, [Some("rlib"), Some("rmeta")], "{made:?}");
    let info = outputs(&project, "slow-");
    assert_eq!(info.len(), 1, "{info:?}");
    let info = project.read(&format!("target/debug/deps/{}", info[0]));
    let rule = format!("{}/debug/deps/{}: ", project.target().display(), made[0]);
    assert!(info.contains(&rule) && !info.contains("/aside/"), "{info}");

    sandbox.empty_view(project.target());
    let again = cargo(&sandbox, &project, "build");
    let (seen, _) = sandbox.during(|| again.ok());
    seen.assert_no_miss();
}

#[test]
fn a_compiler_whose_daemon_dies_ends_well() {
    let sandbox = Sandbox::new();
    let project = slow(&sandbox);
    sandbox.mount(project.target());
    let (_, compiled) = counting(&sandbox, || {
        let build = begin(&sandbox, &project);
        sandbox.kill_daemon();
        build.finish().success()
    });
    assert_eq!(compiled, 1);
    assert_eq!(sandbox.output_of(project.program("app")), "7\n");
    // The next daemon left it to the compiler, and that took it away.
    assert_none_left(&sandbox);
    let again = cargo(&sandbox, &project, "build");
    assert!(!again.ok().stderr.contains("Compiling"));
}

/// What takes the compiler some seconds to think.
const SLOW: &str = "#![allow(long_running_const_eval)]\n\
     static STEPS: u64 = { let mut i = 0; while i < 10_000_000 { i += 1; } i };\n\
     fn main() { println!(\"{}\", STEPS / 10_000_000 + 6); }\n";

/// Programs can be run also where the wrapper places them.
#[test]
fn a_program_whose_daemon_dies_can_be_run() {
    let run = |package: Package, incremental: &str| {
        let sandbox = Sandbox::new();
        let project = Project::new(sandbox.path("project"), &[package]);
        sandbox.mount(project.target());
        let build = sandbox
            .cargo(&project, "build")
            .env("CARGO_INCREMENTAL", incremental);
        let build = build.spawn();
        let begun = || compilers(&sandbox) > 0;
        assert!(processes::wait_for(Duration::from_mins(1), begun));
        sandbox.kill_daemon();
        let _ = build.finish().success();
        sandbox.output_of(project.program("slow"))
    };
    assert_eq!(run(Package::new("slow").bin(SLOW), "0"), "7\n");
    assert_eq!(run(Package::new("slow").bin(SLOW), "1"), "7\n");
    let script = Package::new("slow").bin("fn main() { println!(\"8\"); }\n");
    assert_eq!(run(script.build_script(SLOW), "0"), "8\n");
}

/// Those who read it go on with the same.
#[test]
fn metadata_that_is_there_stays_as_it_is_when_the_daemon_dies() {
    let sandbox = Sandbox::new();
    let project = slow_to_end(&sandbox);
    sandbox.mount(project.target());
    let mut build = begin(&sandbox, &project);
    let is_there = || outputs(&project, "libslow-").len() == 1;
    assert!(processes::wait_for(Duration::from_mins(1), is_there));
    let path = project
        .target()
        .join("debug/deps")
        .join(&outputs(&project, "libslow-")[0]);
    let state = || {
        let meta = fs::metadata(&path).must("metadata");
        (
            meta.ino(),
            meta.mode(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.len(),
        )
    };
    let (before, bytes) = (state(), fs::read(&path).must("read"));
    assert!(build.is_running(), "the compiler was too quick");
    assert!(bytes.len() > 8 * 1024);
    sandbox.kill_daemon();
    let _ = build.finish().success();
    assert_eq!(state(), before);
    assert!(fs::read(&path).must("read") == bytes);
    assert_eq!(sandbox.output_of(project.program("app")), "7\n");
    let again = cargo(&sandbox, &project, "build");
    assert!(!again.ok().stderr.contains("Compiling"));
}

/// It may have been given up while it slept, and must not touch what the wrapper has placed then.
#[test]
fn a_compiler_whose_daemon_is_silent_ends_well() {
    let sandbox = Sandbox::new();
    let project = slow(&sandbox);
    sandbox.mount(project.target());
    let (_, compiled) = counting(&sandbox, || {
        let build = begin(&sandbox, &project);
        let runs = || running(&sandbox).next().is_some();
        assert!(processes::wait_for(Duration::from_mins(1), runs));
        // It looks into the view before it thinks.
        thread::sleep(Duration::from_millis(500));
        let pid = sandbox.stop_daemon();
        let _ = processes::wait_for(Duration::from_mins(1), || !runs());
        // Longer than the wrapper waits for an answer.
        thread::sleep(Duration::from_secs(33));
        kill(pid, Signal::SIGCONT).must("SIGCONT");
        build.finish().success()
    });
    assert_eq!(compiled, 1);
    assert_eq!(sandbox.output_of(project.program("app")), "7\n");
    let made = outputs(&project, "libslow-").len();
    assert_eq!((made, outputs(&project, ".kachefs-").len()), (2, 0));
    let again = cargo(&sandbox, &project, "build");
    assert!(!again.ok().stderr.contains("Compiling"));
    // Its directory was left to the wrapper.
    assert_none_left(&sandbox);
}

#[test]
fn a_failing_compile_says_what_plain_cargo_says() {
    let sandbox = Sandbox::new();
    let project = program_with(&sandbox, "pub fn number() -> u64 { let x = 7; missing }\n");
    let plain = sandbox.plain_cargo(&project, "build --target-dir elsewhere");
    let plain = plain.env("CARGO_INCREMENTAL", "0").fails();
    sandbox.mount(project.target());
    let failed = cargo(&sandbox, &project, "build").fails();
    assert_eq!(said(&failed), said(&plain));
    assert_none_left(&sandbox);
}

#[test]
fn who_is_killed_leaves_nothing() {
    let sandbox = Sandbox::new();
    let project = slow(&sandbox);
    sandbox.mount(project.target());
    let build = begin(&sandbox, &project);
    let wrapper = sandbox.wrapper();
    let is_wrapper = |pid: &Pid| processes::program(*pid).is_some_and(|is| is == wrapper);
    // One that is killed may just have started the watcher.
    let all_are_gone = || {
        let mut wrappers = processes::naming(sandbox.root());
        wrappers.retain(is_wrapper);
        for pid in &wrappers {
            match kill(*pid, Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => panic!("killing {pid}: {error}"),
            }
        }
        wrappers.is_empty()
    };
    assert!(processes::wait_for(Duration::from_secs(20), all_are_gone));
    let _ = build.finish().failure();
    assert!(outputs(&project, "libslow-").is_empty());
    // The compiler has its directory until it asks for something, and the next one takes that away.
    let has_ended = || running(&sandbox).next().is_none();
    assert!(processes::wait_for(Duration::from_mins(1), has_ended));
    let _ = cargo(&sandbox, &project, "build").ok();
    assert_none_left(&sandbox);
}

#[test]
fn without_such_a_directory_compilers_write_where_they_are_told() {
    let sandbox = Sandbox::new();
    let project = slow(&sandbox);
    sandbox.mount(project.target());
    sandbox.kachefs("daemon stop").ok();
    let place = sandbox.store().join("aside");
    fs::remove_dir(&place).must("remove");
    fs::write(&place, "").must("write");
    sandbox.mount(project.target());
    let log = fs::read_to_string(sandbox.store().join("daemon.log")).must("log");
    assert!(log.contains("compilers write to the view"), "{log}");
    let build = || cargo(&sandbox, &project, "build");
    build().ok();
    assert_eq!(sandbox.output_of(project.program("app")), "7\n");
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| build().ok());
    seen.assert_no_miss();
}

/// Not what cargo says of itself, such as how it called the compiler.
fn said(failed: &harness::Outcome) -> Vec<&str> {
    let lines = failed.stderr.lines();
    lines
        .filter(|line| !line.contains("--crate-name"))
        .collect()
}

/// What cannot get its name fails where the compiler itself puts it.
#[test]
fn a_name_that_is_taken_by_a_directory() {
    let sandbox = Sandbox::new();
    let project = slow(&sandbox);
    sandbox.mount(project.target());
    let build = || cargo(&sandbox, &project, "build");
    let _ = build().ok();
    let mut made = outputs(&project, "libslow-").into_iter();
    let is_rlib = |name: &String| Path::new(name).extension() == Some("rlib".as_ref());
    let rlib = made.find(is_rlib).must("an rlib");
    let rlib = project.target().join("debug/deps").join(rlib);

    let library = "crates/slow/src/lib.rs";
    project.write(library, &project.read(library).replace("+ 6", "+ 7"));
    let (seen, failed) = sandbox.during(|| {
        let running = begin(&sandbox, &project);
        // Cargo has taken the old one away.
        fs::create_dir(&rlib).must("mkdir");
        running.finish().failure()
    });
    let shown = rlib.to_string_lossy();
    assert!(failed.stdout.contains(&*shown), "{failed}");
    assert!(!failed.stderr.contains("panicked"), "{failed}");
    assert_eq!(seen.reasons.get("outputs-not-placed"), Some(&1), "{seen:?}");
    assert_none_left(&sandbox);

    fs::remove_dir(&rlib).must("rmdir");
    let (seen, _) = sandbox.during(|| build().ok());
    // What reads the metadata may have been made.
    assert_eq!(seen.hits + seen.misses, 3, "{seen:?}");
    assert!(seen.misses >= 2, "{seen:?}");
    assert_eq!(sandbox.output_of(project.program("app")), "8\n");
}

/// Who has read metadata goes on with that, although it is made a second time.
#[test]
fn a_compiler_that_runs_again_makes_the_same() {
    let sandbox = Sandbox::new();
    let project = slow(&sandbox);
    sandbox.mount(project.target());
    let (seen, unfinished) = sandbox.during(|| {
        let running = begin(&sandbox, &project);
        let mut directories = fs::read_dir(sandbox.store().join("aside")).must("list");
        let directory = directories.next().must("one").must("a directory").path();
        // What somebody writes to gets no name.
        let unfinished = fs::File::create(directory.join("unfinished")).must("create");
        let _ = running.finish().success();
        unfinished
    });
    drop(unfinished);
    let refused = seen.reasons.get("outputs-not-placed");
    assert_eq!((refused, seen.misses), (Some(&1), 2), "{seen:?}");
    assert_eq!(sandbox.output_of(project.program("app")), "7\n");
    // Cargo finds those older that have read it before, once.
    let again = || cargo(&sandbox, &project, "build --message-format=json").ok();
    let _ = again();
    Messages::of(&again()).assert_all_fresh();
    assert_none_left(&sandbox);
}

fn sorted(target: &Path) -> Vec<String> {
    let names = fs::read_dir(target.join("debug/deps")).must("list");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.must("a name").file_name();
    let mut names: Vec<_> = names
        .map(|entry| name(entry).to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_directory_named_from_where_the_compiler_runs() {
    let sandbox = Sandbox::new();
    let project = Project::at(sandbox.path("project"));
    project.write("lib.rs", "pub fn one() -> u32 { 1 }\n");
    project.write("Cargo.toml", "");
    sandbox.mount(project.target());
    fs::create_dir_all(project.target().join("debug/deps")).must("mkdir");
    let rustc = "rustc --crate-name one --crate-type lib --emit=dep-info,metadata,link \
                 --error-format=json --json=artifacts -Cmetadata=1 -Cextra-filename=-1 lib.rs \
                 --out-dir target/debug/deps";
    let compile = sandbox
        .command(sandbox.wrapper())
        .args(rustc.split_whitespace());
    let compiled = compile.in_dir(project.root()).ok();
    assert!(
        compiled
            .stderr
            .contains("\"target/debug/deps/libone-1.rlib\""),
        "{compiled}"
    );
    let made = sorted(&project.target());
    assert_eq!(made, ["libone-1.rlib", "libone-1.rmeta", "one-1.d"]);
    assert!(
        !project
            .read("target/debug/deps/one-1.d")
            .contains("/aside/")
    );
}

/// A proc macro sees how the compiler was called.
#[test]
fn a_proc_macro_sees_what_cargo_said() {
    let sandbox = Sandbox::new();
    let library = Package::new("called").proc_macro(
        "use proc_macro::TokenStream;\n\
         #[proc_macro] pub fn arguments(_: TokenStream) -> TokenStream {\n\
         let all: Vec<_> = std::env::args().collect();\n\
         format!(\"{:?}\", all.join(\" \")).parse().unwrap() }\n",
    );
    let user = Package::new("user").dep("called");
    let user = user.lib("pub const ARGUMENTS: &str = called::arguments!();\n");
    let app = Package::new("app").dep("user");
    let app = app.bin("fn main() { println!(\"{}\", user::ARGUMENTS); }\n");
    let project = Project::new(sandbox.path("project"), &[library, user, app]);
    sandbox.mount(project.target());
    let _ = cargo(&sandbox, &project, "build").ok();
    let said = sandbox.output_of(project.program("app"));
    let deps = project.target().join("debug/deps");
    let named = format!("--out-dir {} ", deps.display());
    assert!(said.contains(&named) && !said.contains("/aside/"), "{said}");
}

/// Many functions in modules of their own, and a program that is edited.
fn edited(sandbox: &Sandbox) -> Project {
    let modules = (0..12).map(|n| {
        format!("pub mod m{n} {{ pub fn f(x: u64) -> String {{ format!(\"{{x}}-{n}\") }} }}\n")
    });
    // Beside what is edited, for its object to be too large for the index.
    let beside = (0..100).map(|n| {
        format!("pub fn g{n}(x: &[u64]) -> Vec<String> {{ x.iter().map(|x| format!(\"{{x}}:{n}\")).collect() }}\n")
    });
    let library: String = modules.chain(beside).collect();
    let library = Package::new("parts").lib(&(library + "pub fn number() -> u64 { 1 }\n"));
    let app = Package::new("app").dep("parts");
    let app = app.bin("fn main() { println!(\"{} {}\", parts::number(), parts::m3::f(2)); }\n");
    Project::new(sandbox.path("project"), &[library, app])
}

fn edit(project: &Project, number: u32) {
    let text = project.read("crates/parts/src/lib.rs");
    let (modules, _) = text.split_once("pub fn number").must("the function");
    let text = format!("{modules}pub fn number() -> u64 {{ {number} }}\n");
    project.write("crates/parts/src/lib.rs", &text);
}

/// Builds after an edit, and says how many objects of the library were taken over from the compile before.
#[track_caller]
fn rebuild(sandbox: &Sandbox, project: &Project, number: u32) -> usize {
    edit(project, number);
    let _ = sandbox.cargo(project, "build").ok();
    let said = sandbox.output_of(project.program("app"));
    assert_eq!(said, format!("{number} 2-3\n"));
    assert_none_left(sandbox);
    let _ = sandbox.counters();
    let mut sessions = sessions(project, "parts-");
    let (last, before) = (sessions.pop().must("a session"), sessions.pop());
    assert!(sessions.is_empty(), "no session before the last but one");
    last.intersection(&before.unwrap_or_default()).count()
}

#[test]
fn an_edit_is_compiled_from_what_was_there() {
    let sandbox = Sandbox::new();
    let project = edited(&sandbox);
    sandbox.mount(project.target());
    let mut most = 0;
    let look = || most = most.max(compilers(&sandbox));
    assert_eq!(looking(look, || rebuild(&sandbox, &project, 1)), 0);
    assert!(most > 0, "written aside");
    assert!(rebuild(&sandbox, &project, 2) > 0);
    let reused = rebuild(&sandbox, &project, 3);
    assert!(reused > 0);
    // A daemon that knows nothing of it finds what the one before has left.
    sandbox.kill_daemon();
    assert_eq!(rebuild(&sandbox, &project, 4), reused);
    assert_eq!(rebuild(&sandbox, &project, 5), reused);

    // What fails leaves the last one as it is.
    let before = sessions(&project, "parts-");
    project.write(
        "crates/parts/src/lib.rs",
        "pub fn number() -> u64 { \"\" }\n",
    );
    let _ = sandbox.cargo(&project, "build").fails();
    assert_eq!(sessions(&project, "parts-"), before);
}

/// The files of all sessions of a crate, with what they hold.
fn held(project: &Project, of: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let crates = fs::read_dir(project.target().join("debug/incremental")).must("list");
    let crates = crates.map(|entry| entry.must("a crate").path());
    let is_its = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(of))
    };
    for path in crates.filter(is_its) {
        for session in fs::read_dir(path).must("list") {
            let session = session.must("a session").path();
            if session.is_dir() {
                for file in fs::read_dir(session).must("list") {
                    let path = file.must("a file").path();
                    files.insert(path.clone(), fs::read(path).must("read"));
                }
            }
        }
    }
    files
}

/// With optimisation rustc keeps what LTO was given, and writes to it in place: not through to the session
/// it went on from.
#[test]
fn what_a_compiler_writes_to_in_place_is_its_own() {
    let sandbox = Sandbox::new();
    let project = edited(&sandbox);
    sandbox.mount(project.target());
    let build = |number| {
        edit(&project, number);
        let cargo = sandbox.cargo(&project, "build");
        let _ = cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1").ok();
        let said = sandbox.output_of(project.program("app"));
        assert_eq!(said, format!("{number} 2-3\n"));
        assert_none_left(&sandbox);
    };
    build(1);
    let before = held(&project, "parts-");
    let kept = |path: &&PathBuf| path.to_string_lossy().ends_with(".pre-lto.bc");
    assert!(
        before.keys().filter(kept).count() > 0,
        "{:?}",
        before.keys()
    );
    build(2);
    // Nothing of it from what the kernel remembers.
    sandbox.unmount(project.target());
    sandbox.mount(project.target());
    let after = held(&project, "parts-");
    for (path, bytes) in &before {
        assert!(after.get(path) == Some(bytes), "{}", path.display());
    }
    assert!(after.len() > before.len());
    build(3);
}

/// A state that somebody has touched is no way into what the store holds.
#[test]
fn who_writes_into_incremental_state_changes_no_output() {
    let sandbox = Sandbox::new();
    let project = edited(&sandbox);
    sandbox.mount(project.target());
    rebuild(&sandbox, &project, 1);
    rebuild(&sandbox, &project, 2);
    let mut pending = vec![project.target().join("debug/incremental")];
    let mut written = 0;
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).must("list") {
            let path = entry.must("a name").path();
            if path.is_dir() {
                pending.push(path);
            } else {
                // In place, as nothing that knows what it does would.
                let file = fs::OpenOptions::new().write(true).open(&path);
                let written_to =
                    std::os::unix::fs::FileExt::write_all_at(&file.must("open"), b"overwritten", 0);
                written_to.must("write");
                written += 1;
            }
        }
    }
    assert!(written > 10, "{written}");
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();
    assert_eq!(sandbox.output_of(project.program("app")), "2 2-3\n");
}

/// Programs and proc macros are linked aside, and are what plain cargo makes.
#[test]
fn what_is_linked_is_what_plain_cargo_makes() {
    let sandbox = Sandbox::new();
    let macros = Package::new("macros").proc_macro(
        "#[proc_macro] pub fn seven(_: proc_macro::TokenStream) -> proc_macro::TokenStream \
         { \"7\".parse().unwrap() }\n",
    );
    let plain = Package::new("plain").bin("fn main() { println!(\"plain\"); }\n");
    let app = Package::new("app").dep("macros");
    let app = app.bin("fn main() { println!(\"{}\", macros::seven!()); }\n");
    let project = Project::new(sandbox.path("project"), &[macros, plain, app]);
    let exact = |cargo: Cmd| cargo.env("KACHEFS_MODE", "exact");
    let _ = sandbox
        .plain_cargo(&project, "build")
        .env("CARGO_INCREMENTAL", "0")
        .ok();
    let read = |name: &str| fs::read(project.program(name)).must("read");
    let expected = ["plain", "app"].map(read);
    fs::remove_dir_all(project.target()).must("empty");
    sandbox.mount(project.target());
    let _ = exact(cargo(&sandbox, &project, "build")).ok();
    assert!(["plain", "app"].map(read) == expected, "byte for byte");
    assert_none_left(&sandbox);
    assert_eq!(sandbox.output_of(project.program("app")), "7\n");
}
