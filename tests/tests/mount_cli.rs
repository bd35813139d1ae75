//! The commands do what they say, in one line when they fail, and mounting loses nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::{Must, Sandbox, Tree, mounts, processes};
use nix::fcntl::AT_FDCWD;
use nix::sys::signal::Signal;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use serde_json::Value;

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = TimeSpec::new(seconds, nanoseconds);
    utimensat(
        AT_FDCWD,
        path,
        &time,
        &time,
        UtimensatFlags::NoFollowSymlink,
    )
    .must("utimensat");
}

#[test]
fn mount_creates_the_target_and_answers_when_it_returns() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    assert!(!target.exists());
    sandbox.mount(&target);
    fs::write(target.join("file"), "first words").must("the mount answers at once");
    assert_eq!(
        fs::read_to_string(target.join("file")).must("read"),
        "first words"
    );
    assert_eq!(Tree::of(&target).0.len(), 1, "a new view is empty");
}

#[test]
fn mount_without_a_target_means_target_in_the_current_directory() {
    let sandbox = Sandbox::new();
    let project = sandbox.make_dir("project");
    let _ = sandbox.kachefs("mount").in_dir(&project).ok();
    assert!(sandbox.is_mounted(&project.join("target")));
    let _ = sandbox.kachefs("unmount").in_dir(&project).ok();
    assert!(!sandbox.is_mounted(&project.join("target")));
}

#[test]
fn a_target_is_one_view_however_it_is_spelled() {
    let sandbox = Sandbox::new();
    let project = sandbox.make_dir("a project");
    let target = project.join("target");
    symlink(&project, sandbox.path("link")).must("symlink");
    sandbox.mount(&target);
    let _ = sandbox
        .kachefs("mount")
        .arg("./target/")
        .in_dir(&project)
        .ok();
    let _ = sandbox
        .kachefs("mount")
        .arg(sandbox.path("link/target"))
        .ok();
    assert_eq!(
        mounts::below(sandbox.root()).len(),
        1,
        "{:?}",
        mounts::below(sandbox.root())
    );
    let views = sandbox.stats()["views"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    assert_eq!(views.len(), 1, "{views:?}");
    assert_eq!(views[0]["path"], target.to_str().must("a text path"));
}

#[test]
fn a_second_mount_says_so_and_succeeds() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    fs::write(target.join("file"), "kept").must("write");
    let pid = sandbox.daemon_pid();
    let second = sandbox.mount(&target);
    assert!(second.said().contains("already"), "it says so\n{second}");
    assert_eq!(mounts::below(sandbox.root()).len(), 1, "one mount");
    assert_eq!(sandbox.daemon_pid(), pid, "one daemon");
    assert_eq!(fs::read_to_string(target.join("file")).must("read"), "kept");
}

#[test]
fn two_mounts_share_one_daemon() {
    let sandbox = Sandbox::new();
    sandbox.make_dir("one");
    sandbox.make_dir("two");
    sandbox.mount(sandbox.path("one/target"));
    let pid = sandbox.daemon_pid();
    sandbox.mount(sandbox.path("two/target"));
    assert_eq!(sandbox.daemon_pid(), pid);
    fs::write(sandbox.path("one/target/file"), "one").must("write");
    assert!(
        !sandbox.path("two/target/file").exists(),
        "views are separate"
    );
}

#[test]
fn mounts_started_at_once_start_one_daemon() {
    let sandbox = Sandbox::new();
    let targets: Vec<_> = (0..4)
        .map(|index| sandbox.make_dir(&format!("project{index}")).join("target"))
        .collect();
    let running: Vec<_> = targets
        .iter()
        .map(|target| sandbox.kachefs("mount").arg(target).spawn())
        .collect();
    for command in running {
        let _ = command.finish().success();
    }
    for target in &targets {
        assert!(sandbox.is_mounted(target), "{}", target.display());
        fs::write(target.join("file"), "x").must("write");
    }
    let views = sandbox.stats()["views"].as_array().map_or(0, Vec::len);
    assert_eq!(views, 4, "one daemon knows all views");
}

#[test]
fn unmount_ends_the_mount_and_all_ends_every_mount() {
    let sandbox = Sandbox::new();
    let targets: Vec<_> = ["one", "two", "three"]
        .map(|name| sandbox.make_dir(name).join("target"))
        .into();
    for target in &targets {
        sandbox.mount(target);
    }
    sandbox.unmount(&targets[0]);
    assert!(sandbox.is_mounted(&targets[1]) && sandbox.is_mounted(&targets[2]));
    let _ = sandbox.kachefs("unmount --all").ok();
    assert_eq!(mounts::below(sandbox.root()), []);
}

#[test]
fn unmount_of_what_is_not_mounted_is_one_line_and_an_error() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project/target");
    // Once without a daemon, once with one.
    for _ in 0..2 {
        let outcome = sandbox.kachefs("unmount").arg(&target).fails();
        let line = outcome.one_line_error();
        assert!(line.contains("not mounted"), "{outcome}");
        assert!(
            line.contains(target.to_str().must("a text path")),
            "{outcome}"
        );
        sandbox.make_dir("other");
        sandbox.mount(sandbox.path("other/target"));
    }
}

#[test]
fn unmount_and_mount_show_the_same_tree() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    write_everything(&target);
    let before = Tree::of(&target);
    sandbox.unmount(&target);
    sandbox.mount(&target);
    before.assert_same(&Tree::of(&target), "after unmount and mount");
}

#[test]
fn existing_contents_are_imported_byte_for_byte() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project/target");
    write_everything(&target);
    let before = Tree::of(&target);
    assert!(before.0.len() >= 12, "the test has something to lose");
    sandbox.mount(&target);
    before.assert_same(&Tree::of(&target), "after the import");

    // What was imported is the view's own: it can be changed, and stays.
    fs::write(target.join("deep/er/middle"), "new").must("write to an imported file");
    fs::remove_file(target.join("tiny")).must("remove an imported file");
    let changed = Tree::of(&target);
    sandbox.unmount(&target);
    sandbox.mount(&target);
    changed.assert_same(&Tree::of(&target), "after unmount and mount");
}

#[test]
fn a_file_that_is_also_named_outside_is_copied() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project/target");
    let outside = sandbox.path("project/outside");
    fs::write(&outside, vec![b'o'; 50_000]).must("write");
    fs::hard_link(&outside, target.join("inside")).must("link");
    fs::write(target.join("pair"), vec![b'p'; 50_000]).must("write");
    fs::hard_link(target.join("pair"), target.join("twin")).must("link");
    sandbox.mount(&target);
    fs::write(target.join("inside"), "changed through the view").must("write");
    assert_eq!(fs::read(&outside).must("read"), vec![b'o'; 50_000]);
    fs::write(target.join("pair"), "changed").must("write");
    assert_eq!(
        fs::read_to_string(target.join("twin")).must("read"),
        "changed"
    );
}

#[test]
fn a_large_read_only_file_is_imported_for_an_ordinary_user() {
    if let Err(why) = harness::unprivileged::can_mount_unprivileged() {
        eprintln!("skipped: {why}");
        return;
    }
    let sandbox = Sandbox::unprivileged();
    let target = sandbox.make_dir("project/target");
    let path = target.join("read-only");
    fs::write(&path, vec![b'r'; 50_000]).must("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).must("chmod");
    sandbox.hand_over(&target);
    sandbox.mount(&target);
    let seen = sandbox.command("sha256sum").arg(&path).ok();
    sandbox.unmount(&target);
    sandbox.mount(&target);
    let again = sandbox.command("sha256sum").arg(&path).ok();
    assert_eq!(seen.stdout, again.stdout);
    let _ = sandbox
        .command("sh")
        .args([
            "-c",
            "test ! -w \"$0\" && chmod u+w \"$0\" && echo more >> \"$0\"",
        ])
        .arg(&path)
        .ok();
    let _ = sandbox.command("grep").args(["-q", "more"]).arg(&path).ok();
}

#[test]
fn an_imported_build_is_fresh() {
    let sandbox = Sandbox::new();
    let project = harness::samples::whole(sandbox.path("project"));
    let _ = sandbox.plain_cargo(&project, "build").ok();
    sandbox.mount(project.target());
    let again = sandbox
        .plain_cargo(&project, "build --message-format=json")
        .ok();
    harness::messages::Messages::of(&again).assert_all_fresh();
}

/// Every kind of name a target directory may hold.
fn write_everything(target: &Path) {
    let write = |name: &str, bytes: &[u8]| {
        let path = target.join(name);
        fs::create_dir_all(path.parent().must("a parent")).must("mkdir");
        fs::write(path, bytes).must(name);
    };
    let pattern: Vec<u8> = (0..100_000_u32)
        .map(|byte| (byte * 7 % 251) as u8)
        .collect();
    write("tiny", b"abc");
    write("empty", b"");
    write("big", &pattern.repeat(30));
    write("deep/er/middle", &pattern);
    write("debug/.fingerprint/app-1/dep-bin-app", b"\x01\x00\x00");
    write("script", b"#!/bin/sh\necho ran\n");
    write("private", b"secret");
    write("name with \n newline and \u{e9}", b"odd");
    fs::create_dir_all(target.join("empty directory/inside")).must("mkdir");
    fs::hard_link(target.join("deep/er/middle"), target.join("linked")).must("link");
    fs::hard_link(target.join("tiny"), target.join("deep/tiny too")).must("link");
    symlink("deep/er/middle", target.join("to middle")).must("symlink");
    symlink("/nonexistent/place", target.join("dangling")).must("symlink");
    for (name, mode) in [
        ("script", 0o755),
        ("private", 0o600),
        ("empty", 0o444),
        ("deep", 0o700),
    ] {
        fs::set_permissions(target.join(name), fs::Permissions::from_mode(mode)).must(name);
    }
    for (index, name) in (0..).zip(["tiny", "big", "to middle", "script", "private"]) {
        set_mtime(&target.join(name), 1_600_000_000 + index, 123_456_789);
    }
    set_mtime(&target.join("deep/er"), 1_500_000_000, 987_654_321);
    let script = target.join("script");
    assert_eq!(
        script.metadata().must("stat").mtime_nsec(),
        123_456_789,
        "the file system keeps ns"
    );
}

#[test]
fn a_target_that_is_a_file_is_refused_in_one_line() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    fs::write(&target, "not a directory").must("write");
    let outcome = sandbox.kachefs("mount").arg(&target).fails();
    assert!(outcome.one_line_error().contains("directory"), "{outcome}");
    assert_eq!(fs::read_to_string(&target).must("read"), "not a directory");
    assert!(!sandbox.is_mounted(&target));
}

#[test]
fn first_mount_configures_cargo_and_says_so_once() {
    let sandbox = Sandbox::new();
    let config = sandbox.cargo_home().join("config.toml");
    sandbox.make_dir("project");
    assert!(!config.exists());
    let first = sandbox.mount(sandbox.path("project/target"));
    assert!(
        first.said().contains("config.toml"),
        "it says what it wrote\n{first}"
    );
    let text = fs::read_to_string(&config).must("config.toml");
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with("rustc-wrapper"));
    let line = line.must(format!("no rustc-wrapper in\n{text}"));
    assert!(
        text.contains("[build]") && line.contains("kachefs-rustc"),
        "{text}"
    );

    let second = sandbox.mount(sandbox.path("project/target"));
    assert!(
        !second.said().contains("config.toml"),
        "nothing left to say\n{second}"
    );
    assert_eq!(
        fs::read_to_string(&config).must("config.toml"),
        text,
        "written once"
    );
}

#[test]
fn existing_configuration_keeps_every_line() {
    let originals = [
        "# my settings\n\n[build] # of builds\njobs = 2   # few\n\n[net]\nretry = 3\n",
        "[term]\nquiet = false # loud\n\n# the end\n",
        "build.jobs = 2 # dotted\n",
        "",
    ];
    for original in originals {
        let sandbox = Sandbox::new();
        let config = sandbox.cargo_home().join("config.toml");
        fs::write(&config, original).must("write");
        sandbox.make_dir("project");
        sandbox.mount(sandbox.path("project/target"));
        let text = fs::read_to_string(&config).must("config.toml");
        assert!(text.contains("kachefs-rustc"), "configured:\n{text}");
        let mut added = text.lines();
        for line in original.lines() {
            assert!(
                added.any(|new| new == line),
                "{line:?} is kept, in order:\n{text}"
            );
        }
        // cargo agrees that it is a valid file.
        let project = harness::samples::plain(sandbox.path("project"));
        let _ = sandbox.cargo(&project, "check").ok();
        assert!(
            sandbox.counters().misses > 0,
            "cargo uses the wrapper:\n{text}"
        );
    }
}

#[test]
fn another_wrapper_is_left_alone_and_named() {
    let sandbox = Sandbox::new();
    let config = sandbox.cargo_home().join("config.toml");
    let original = "[build]\nrustc-wrapper = \"/opt/otherwrap\" # mine\n";
    fs::write(&config, original).must("write");
    sandbox.make_dir("project");
    let outcome = sandbox.mount(sandbox.path("project/target"));
    assert_eq!(fs::read_to_string(&config).must("config.toml"), original);
    let said = outcome.said();
    assert!(
        said.contains("otherwrap"),
        "it names the wrapper in the way\n{outcome}"
    );
    assert!(
        said.contains("kachefs-rustc"),
        "and what to set instead\n{outcome}"
    );
}

#[test]
fn no_init_never_touches_the_configuration() {
    let sandbox = Sandbox::new();
    sandbox.make_dir("project");
    let target = sandbox.path("project/target");
    let _ = sandbox.kachefs("mount --no-init").arg(&target).ok();
    assert!(sandbox.is_mounted(&target));
    assert!(!sandbox.cargo_home().join("config.toml").exists());

    // The environment does as well as the configuration.
    let project = harness::samples::plain(sandbox.path("project"));
    let build = || {
        let _ = sandbox
            .cargo(&project, "build")
            .env("RUSTC_WRAPPER", "kachefs-rustc")
            .ok();
    };
    let (first, ()) = sandbox.during(build);
    assert_eq!((first.hits, first.misses), (0, 3), "{first:?}");
}

#[test]
fn doctor_reports_what_it_checks() {
    let sandbox = Sandbox::new();
    sandbox.make_dir("project");
    let doctor = || -> Value {
        let outcome = sandbox.kachefs("doctor --json").run();
        serde_json::from_str(&outcome.stdout).must(format!("JSON from doctor\n{outcome}"))
    };
    let before = doctor();
    assert!(before.is_object(), "{before:#}");
    sandbox.mount(sandbox.path("project/target"));
    let after = doctor();
    for subject in ["fuse", "wrapper", "store"] {
        assert!(
            after.to_string().to_lowercase().contains(subject),
            "{subject} in {after:#}"
        );
    }
    assert_ne!(
        before, after,
        "doctor sees that the wrapper is configured now"
    );

    let human = sandbox.kachefs("doctor").run();
    // Tests that run beside this one have dead mounts, and it is right to name them.
    let problems = human
        .stdout
        .lines()
        .filter(|line| line.contains("PROBLEM") && !line.contains(" mounts "));
    assert_eq!(problems.count(), 0, "{human}");
    assert!(human.stdout.to_lowercase().contains("wrapper"), "{human}");
    assert!(
        human.stdout.contains(env!("CARGO_PKG_VERSION")),
        "it names its version\n{human}"
    );
}

#[test]
fn stats_describe_the_views() {
    let sandbox = Sandbox::new();
    for name in ["one", "two"] {
        sandbox.make_dir(name);
        sandbox.mount(sandbox.path(name).join("target"));
    }
    let target = sandbox.path("one/target");
    fs::create_dir(target.join("dir")).must("mkdir");
    fs::write(target.join("dir/file"), vec![7; 12_345]).must("write");
    let views = sandbox.stats()["views"].clone();
    let view = |views: &Value, path: &Path| -> Value {
        let all = views.as_array().must("views is a list");
        all.iter()
            .find(|view| view["path"] == path.to_str().must("text"))
            .cloned()
            .must(views)
    };
    let one = view(&views, &target);
    assert!(
        one["names"]
            .as_u64()
            .is_some_and(|names| (2..=3).contains(&names)),
        "{one}"
    );
    assert_eq!(one["logical_bytes"], 12_345, "{one}");
    let two = view(&views, &sandbox.path("two/target"));
    assert_eq!(two["logical_bytes"], 0, "{two}");

    let only = sandbox.kachefs("stats --json --view").arg(&target).ok();
    let only: Value = serde_json::from_str(&only.stdout).must("JSON");
    assert_eq!(only["views"].as_array().map(Vec::len), Some(1), "{only:#}");
    assert_eq!(
        only["views"][0]["path"],
        target.to_str().must("text"),
        "{only:#}"
    );

    let human = sandbox.kachefs("stats").ok();
    assert!(
        human.stdout.contains("hits") && human.stderr.is_empty(),
        "{human}"
    );
}

#[test]
fn daemon_status_and_stop() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    let none = sandbox.kachefs("daemon status").run();
    assert!(none.said().contains("not running"), "{none}");

    sandbox.mount(&target);
    fs::write(target.join("file"), "kept").must("write");
    let pid = sandbox.daemon_pid();
    let status = sandbox.kachefs("daemon status").ok();
    assert!(
        status.stdout.contains(&pid.to_string()),
        "it names the process\n{status}"
    );

    let _ = sandbox.kachefs("daemon stop").ok();
    assert!(
        processes::wait_gone(sandbox.root(), Duration::from_secs(10)),
        "it is gone"
    );
    assert_eq!(
        mounts::below(sandbox.root()),
        [],
        "and took its mounts along"
    );
    let none = sandbox.kachefs("daemon status").run();
    assert!(none.said().contains("not running"), "{none}");

    sandbox.mount(&target);
    assert_ne!(sandbox.daemon_pid(), pid);
    assert_eq!(fs::read_to_string(target.join("file")).must("read"), "kept");
}

#[test]
fn sigterm_is_a_clean_stop() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    fs::write(target.join("file"), "kept").must("write");
    sandbox.signal_daemon(Signal::SIGTERM);
    assert!(
        processes::wait_gone(sandbox.root(), Duration::from_secs(20)),
        "it is gone"
    );
    assert_eq!(mounts::below(sandbox.root()), []);
    sandbox.mount(&target);
    assert_eq!(fs::read_to_string(target.join("file")).must("read"), "kept");
}

#[test]
fn foreground_stays_until_interrupted_and_leaves_no_mount() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    let mut command = sandbox.kachefs("mount --foreground").arg(&target).spawn();
    let mounted = || sandbox.is_mounted(&target) && fs::write(target.join("file"), "x").is_ok();
    assert!(
        processes::wait_for(Duration::from_secs(30), mounted),
        "it mounts"
    );
    assert!(command.is_running(), "and stays");
    command.signal(Signal::SIGINT);
    let _ = command.finish();
    assert!(!sandbox.is_mounted(&target), "and cleans up");
}

#[test]
fn the_store_option_wins_over_the_environment() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    let elsewhere = sandbox.path("elsewhere");
    let with_store = |words: &str| sandbox.kachefs(words).arg("--store").arg(&elsewhere);
    let _ = with_store("mount").arg(&target).ok();
    assert!(elsewhere.join("blobs").is_dir(), "the store is there");
    assert!(!sandbox.store().exists(), "and not here");
    let _ = with_store("unmount").arg(&target).ok();
    let _ = with_store("daemon stop").ok();
}

#[test]
fn a_store_path_too_long_for_a_socket_is_no_obstacle_or_one_line() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    let long: PathBuf = sandbox.path(&"long".repeat(40));
    let outcome = sandbox
        .kachefs("mount")
        .arg(&target)
        .arg("--store")
        .arg(&long)
        .run();
    if outcome.status.success() {
        fs::write(target.join("file"), "x").must("the mount answers");
        let _ = sandbox.kachefs("daemon stop --store").arg(&long).ok();
    } else {
        outcome.one_line_error();
        assert!(!sandbox.is_mounted(&target));
    }
}

#[test]
fn bad_arguments_are_one_line() {
    let sandbox = Sandbox::new();
    for words in [
        "mount --no-such-option",
        "frobnicate",
        "stats --view",
        "mount one two three",
    ] {
        let outcome = sandbox.kachefs(words).fails();
        outcome.one_line_error();
    }
    assert!(!sandbox.store().exists(), "a mistake starts nothing");
}

#[test]
fn help_and_version_are_on_stdout() {
    let sandbox = Sandbox::new();
    let version = sandbox.kachefs("--version").ok();
    assert_eq!(
        version.stdout.trim(),
        concat!("kachefs ", env!("CARGO_PKG_VERSION"))
    );
    let help = sandbox.kachefs("--help").ok();
    for command in ["mount", "unmount", "stats", "daemon", "doctor"] {
        assert!(help.stdout.contains(command), "{command}\n{help}");
    }
}
