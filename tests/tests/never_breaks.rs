//! Whatever is wrong with kachefs, cargo builds; and no crash loses what a view held.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use harness::flip::{Case, macro_user, waiting_macro};
use harness::messages::Messages;
use harness::{Must, Package, Project, Sandbox, Tree, mounts, processes, samples};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Uid;

/// Builds with the wrapper in the environment, whatever is configured, and runs the program.
#[track_caller]
fn builds(sandbox: &Sandbox, project: &Project) {
    let wrapper = sandbox.wrapper();
    let _ = sandbox
        .cargo(project, "build")
        .env("RUSTC_WRAPPER", &wrapper)
        .ok();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
    let again = sandbox
        .cargo(project, "build --message-format=json")
        .env("RUSTC_WRAPPER", &wrapper);
    Messages::of(&again.ok()).assert_all_fresh();
}

#[test]
fn outside_a_mount_without_a_daemon() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    builds(&sandbox, &project);
    assert!(!sandbox.is_mounted(&project.target()));
}

#[test]
fn outside_a_mount_with_a_daemon() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.make_dir("other");
    sandbox.mount(sandbox.path("other/target"));
    let (seen, ()) = sandbox.during(|| builds(&sandbox, &project));
    assert_eq!(
        (seen.hits, seen.misses),
        (0, 0),
        "a plain directory is none of its business"
    );
}

#[test]
fn outside_a_mount_the_outputs_are_those_of_plain_cargo() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let _ = sandbox.plain_cargo(&project, "build").ok();
    let expected = harness::tree::deps_of_any_run(&project.target());
    fs::remove_dir_all(project.target()).must("remove");
    builds(&sandbox, &project);
    let outputs = harness::tree::deps_of_any_run(&project.target());
    harness::tree::assert_same_outputs(&expected, &outputs, "plain cargo and the wrapper");
}

#[test]
fn with_a_store_that_cannot_be_made() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    fs::write(sandbox.store(), "a file where the store should be").must("write");
    builds(&sandbox, &project);
    let outcome = sandbox.kachefs("mount").arg(project.target()).fails();
    outcome.one_line_error();
    builds(&sandbox, &project);
}

#[test]
fn with_a_killed_daemon_and_a_plain_target() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.make_dir("other");
    let other = sandbox.path("other/target");
    sandbox.mount(&other);
    sandbox.kill_daemon();
    builds(&sandbox, &project);
    // The dead mount can be taken away by the same command as a live one.
    let _ = sandbox.kachefs("unmount").arg(&other).ok();
    assert_eq!(mounts::at(&other), None);
}

#[test]
fn with_a_daemon_that_does_not_answer() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.make_dir("other");
    sandbox.mount(sandbox.path("other/target"));
    let pid = sandbox.stop_daemon();
    let wrapper = sandbox.wrapper();
    let built = sandbox
        .cargo(&project, "build")
        .env("RUSTC_WRAPPER", wrapper)
        .run();
    kill(pid, Signal::SIGCONT).must("SIGCONT");
    let _ = built.success();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn the_wrapper_passes_on_what_it_does_not_understand() {
    let sandbox = Sandbox::new();
    let rustc = |args: &[&str]| sandbox.command("rustc").args(args).run();
    let wrapped = |args: &[&str]| {
        sandbox
            .command(sandbox.wrapper())
            .arg("rustc")
            .args(args)
            .run()
    };
    for args in [
        &["-vV"][..],
        &["--version"],
        &["--print", "cfg"],
        &["--no-such-flag"],
        &["no-such-file.rs"],
        &["--explain", "E0308"],
        &[],
    ] {
        let (plain, through) = (rustc(args), wrapped(args));
        assert_eq!(through.status.code(), plain.status.code(), "{through}");
        assert_eq!(
            (&through.stdout, &through.stderr),
            (&plain.stdout, &plain.stderr),
            "{args:?}"
        );
    }
    // Without a compiler there is nothing to do, and it says so.
    let nothing = sandbox.command(sandbox.wrapper()).fails();
    nothing.one_line_error();
    let missing = sandbox
        .command(sandbox.wrapper())
        .args(["/no/such/rustc", "-vV"])
        .fails();
    missing.one_line_error();
}

#[test]
fn a_killed_daemon_leaves_the_view_as_it_was() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let target = project.target();
    sandbox.mount(&target);
    let _ = sandbox.cargo(&project, "build").ok();
    fs::write(target.join("last words"), "written just before").must("write");
    fs::rename(target.join("last words"), target.join("renamed")).must("rename");
    fs::create_dir(target.join("empty")).must("mkdir");
    let before = Tree::of(&target);
    sandbox.kill_daemon();

    sandbox.mount(&target);
    before.assert_same(&Tree::of(&target), "after kill -9 and mount");
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    Messages::of(&again).assert_all_fresh();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );

    // What was stored is still there as well.
    sandbox.empty_view(&target);
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();
}

#[test]
fn a_daemon_killed_while_cargo_builds() {
    let sandbox = Sandbox::new();
    let project = samples::many(sandbox.path("project"), 8, "");
    let target = project.target();
    sandbox.mount(&target);
    let build = sandbox.cargo(&project, "build").spawn();
    let started = || {
        target
            .join("debug/deps")
            .read_dir()
            .is_ok_and(|names| names.count() > 3)
    };
    assert!(
        processes::wait_for(Duration::from_mins(1), started),
        "the build starts"
    );
    sandbox.kill_daemon();
    // Its target is gone: this build may fail, but it ends.
    let _ = build.finish();

    sandbox.mount(&target);
    let _ = sandbox.cargo(&project, "build").ok();
    assert_eq!(sandbox.output_of(project.program("app")), "sum 8\n");
    // What was compiled just before may be in the view and not in the store: once more.
    sandbox.empty_view(&target);
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.counters();
    sandbox.empty_view(&target);
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();
    assert_eq!(sandbox.output_of(project.program("app")), "sum 8\n");
}

#[test]
fn flags_not_understood_compile_and_are_counted() {
    let sandbox = Sandbox::new();
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let (normal, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    for (flags, extension) in [("--emit asm", "s"), ("-C save-temps", "o")] {
        // Twice, from nothing: never stored, so never hit.
        for _ in 0..2 {
            sandbox.empty_view(project.target());
            let words = format!("rustc -p app -- {flags}");
            let (seen, _) = sandbox.during(|| sandbox.cargo(&project, &words).ok());
            assert_eq!(
                sandbox.output_of(project.program("app")),
                samples::PLAIN_OUTPUT
            );
            let names = fs::read_dir(project.path("target/debug/deps"))
                .must("deps")
                .flatten();
            let extra =
                names.filter(|name| name.path().extension().is_some_and(|e| e == extension));
            assert!(extra.count() > 0, "{flags} leaves its .{extension} files");
            assert!(seen.uncacheable > 0, "{flags}: {seen:?}");
            let known = normal.reason_names();
            let named = seen
                .reason_names()
                .iter()
                .any(|reason| !known.contains(reason));
            assert!(
                named,
                "{flags} has a reason of its own: {seen:?}, normally {known:?}"
            );
        }
    }
}

#[test]
fn a_failing_compile_says_what_plain_cargo_says() {
    let sandbox = Sandbox::new();
    let project = Project::new(
        sandbox.path("project"),
        &[Package::new("app").bin("fn main() { let number: u32 = \"text\"; missing(); }\n")],
    );
    let lines = |stderr: &str| {
        let lines = stderr
            .lines()
            .filter(|line| !line.trim_start().starts_with("Compiling"));
        lines.map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    let plain = sandbox
        .plain_cargo(&project, "build --target-dir plain")
        .fails();
    assert!(
        plain.stderr.contains("E0308") && plain.stderr.contains("E0425"),
        "{plain}"
    );

    sandbox.mount(project.target());
    let blobs = sandbox.counters().blobs;
    for _ in 0..2 {
        let (seen, cached) = sandbox.during(|| sandbox.cargo(&project, "build").fails());
        assert_eq!(cached.status.code(), plain.status.code());
        assert_eq!(lines(&cached.stderr), lines(&plain.stderr));
        assert_eq!(
            (seen.hits, seen.failed),
            (0, 1),
            "compiled again, never stored: {seen:?}"
        );
    }
    assert_eq!(
        sandbox.counters().blobs,
        blobs,
        "a failed compile stores nothing"
    );

    project.write(
        "crates/app/src/main.rs",
        "fn main() { println!(\"fixed\"); }\n",
    );
    let _ = sandbox.cargo(&project, "build").ok();
    assert_eq!(sandbox.output_of(project.program("app")), "fixed\n");
}

#[test]
fn a_compiler_killed_by_a_signal_is_a_failed_compile() {
    let sandbox = Sandbox::new();
    let project = Project::new(
        sandbox.path("project"),
        &[
            Package::new("boom").proc_macro(
                "#[proc_macro]\n\
                 pub fn boom(_: proc_macro::TokenStream) -> proc_macro::TokenStream {\n\
                     std::process::abort()\n\
                 }\n",
            ),
            Package::new("app")
                .dep("boom")
                .bin("fn main() { boom::boom!(); }\n"),
        ],
    );
    sandbox.mount(project.target());
    for _ in 0..2 {
        let (seen, built) = sandbox.during(|| sandbox.cargo(&project, "build").fails());
        assert!(
            built.stderr.contains("signal: 6"),
            "cargo sees the signal\n{built}"
        );
        assert_eq!(seen.failed, 1, "{seen:?}");
    }
}

/// A tiny file system mounted over a directory and filled to the last byte.
struct Full<'a>(&'a Path);

impl<'a> Full<'a> {
    fn over(dir: &'a Path) -> Self {
        let options = Some("size=64k,mode=700");
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), options).must("mounting tmpfs");
        let full = Self(dir);
        let mut filler = fs::File::create(dir.join("filler")).must("create");
        while filler.write_all(&[1; 4096]).is_ok() {}
        full
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        // If it is gone already, the sandbox finds nothing to complain about.
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn with_a_full_store() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: filling the store takes a mount of its own, and we are not root");
        return;
    }
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let blobs = sandbox.store().join("blobs");
    let full = Full::over(&blobs);
    for _ in 0..2 {
        let _ = sandbox.cargo(&project, "build").ok();
        assert_eq!(
            sandbox.output_of(project.program("app")),
            samples::WHOLE_OUTPUT
        );
        sandbox.counters();
        assert_eq!(
            sandbox.output_of(project.program("app")),
            samples::WHOLE_OUTPUT
        );
        let again = sandbox.cargo(&project, "build --message-format=json").ok();
        Messages::of(&again).assert_all_fresh();
        sandbox.empty_view(project.target());
    }
    drop(full);

    // With room again, it stores again.
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.counters();
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn a_full_disk_below_the_whole_store_stops_writing_and_nothing_else() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: filling the store takes a mount of its own, and we are not root");
        return;
    }
    let sandbox = Sandbox::new();
    let store = sandbox.make_dir("store");
    // The sandbox detaches it. Larger than what RocksDB wants free before it writes again.
    let options = Some("size=400m,mode=700");
    mount(
        Some("tmpfs"),
        &store,
        Some("tmpfs"),
        MsFlags::empty(),
        options,
    )
    .must("mounting tmpfs");
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    fs::write(target.join("before"), "kept").must("write");

    // The log, the index and the scratch area are all on it.
    let filler = store.join("filler");
    let mut file = fs::File::create(&filler).must("create");
    while file.write_all(&[1; 4096]).is_ok() {}
    let mut refused = 0;
    for number in 0..2_000 {
        let small = fs::write(target.join(format!("small{number}")), [2; 4_000]);
        let large = fs::write(target.join("large"), vec![3; 100_000]);
        for error in [small, large].into_iter().filter_map(Result::err) {
            assert_eq!(error.raw_os_error(), Some(nix::libc::ENOSPC), "{error}");
            refused += 1;
        }
        if refused > 50 {
            break;
        }
    }
    assert!(refused > 50, "the disk is full");
    assert_eq!(
        fs::read_to_string(target.join("before")).must("read"),
        "kept"
    );
    assert!(fs::read_dir(&target).must("list").count() > 0);

    fs::remove_file(&filler).must("make room");
    // RocksDB looks every few seconds whether there is room again.
    let patience = Instant::now() + Duration::from_mins(1);
    while let Err(error) = fs::write(target.join("after"), "written") {
        assert!(Instant::now() < patience, "with room again: {error}");
        thread::sleep(Duration::from_millis(200));
    }
    sandbox.unmount(&target);
    sandbox.mount(&target);
    assert_eq!(
        fs::read_to_string(target.join("before")).must("read"),
        "kept"
    );
    assert_eq!(
        fs::read_to_string(target.join("after")).must("read"),
        "written"
    );
    let _ = sandbox.kachefs("daemon stop").ok();
    umount2(&store, MntFlags::MNT_DETACH).must("unmount the disk");
}

#[test]
fn with_blobs_that_vanished() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.counters();
    sandbox.empty_view(project.target());
    let blobs = sandbox.store().join("blobs");
    let files = harness::tree::files(&blobs);
    assert!(!files.is_empty());
    for blob in files {
        fs::remove_file(&blob).must("remove a blob");
    }
    // A result whose bytes are gone is no result.
    let _ = sandbox.cargo(&project, "build").ok();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn a_source_changed_while_the_compiler_runs_is_not_stored() {
    // The build of `app` changes its own source after rustc has read it: by a proc macro, which
    // runs inside the compiler.
    let sandbox = Sandbox::new();
    let project = Project::new(
        sandbox.path("project"),
        &[
            Package::new("edits").proc_macro(
                "#[proc_macro]\n\
                 pub fn edits(_: proc_macro::TokenStream) -> proc_macro::TokenStream {\n\
                     let root = std::env::var(\"CARGO_MANIFEST_DIR\").expect(\"set by cargo\");\n\
                     if std::env::var_os(\"EDIT\").is_some() {\n\
                         let new = \"fn main() { edits::edits!(); println!(\\\"new\\\"); }\\n\";\n\
                         std::fs::write(root + \"/src/main.rs\", new).expect(\"write\");\n\
                     }\n\
                     proc_macro::TokenStream::new()\n\
                 }\n",
            ),
            Package::new("app")
                .dep("edits")
                .bin("fn main() { edits::edits!(); println!(\"old\"); }\n"),
        ],
    );
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").env("EDIT", "1").ok();
    assert_eq!(sandbox.output_of(project.program("app")), "old\n");
    sandbox.counters();
    sandbox.empty_view(project.target());
    let _ = sandbox.cargo(&project, "build").env("EDIT", "1").ok();
    assert_eq!(
        sandbox.output_of(project.program("app")),
        "new\n",
        "the torn result was stored"
    );
}

/// Without whoever answers them, all calls of a compiler fail.
#[test]
fn with_a_watcher_that_is_killed() {
    let case = Case::new(&[waiting_macro(), macro_user()]);
    case.build_meanwhile(case.waiting_cargo(), || {
        let wrapper = case.sandbox.wrapper();
        let is_wrapper = |pid| processes::program(pid).as_ref() == Some(&wrapper);
        let mut watchers = processes::naming(case.sandbox.root());
        watchers.retain(|pid| is_wrapper(*pid) && processes::parent(*pid).is_some_and(is_wrapper));
        assert!(!watchers.is_empty());
        for watcher in watchers {
            kill(watcher, Signal::SIGKILL).must("kill the watcher");
        }
    });
    let said = case.sandbox.output_of(case.project.program("app"));
    assert_eq!(said, "\n");
}
