//! A mount that cannot be made, or should not be, changes nothing: files stay where they were.

use std::fs;
use std::path::Path;

use harness::{Must, Sandbox, Tree};
use nix::unistd::Uid;

/// A target as a build without kachefs leaves it.
fn old_target(sandbox: &Sandbox, name: &str) -> std::path::PathBuf {
    let target = sandbox.make_dir(name).join("target");
    fs::create_dir_all(target.join("debug")).must("mkdir");
    fs::write(target.join("debug/small"), "small").must("write");
    fs::write(target.join("debug/large"), vec![7; 100_000]).must("write");
    sandbox.hand_over(&target);
    target
}

/// `kachefs mount` with a store of its own fails in one line, and ends the daemon it started.
#[track_caller]
fn refused(sandbox: &Sandbox, store: &Path, target: &Path) -> String {
    let outcome = sandbox
        .kachefs("mount")
        .arg(target)
        .env("KACHEFS_STORE", store)
        .fails();
    let line = outcome.one_line_error().to_owned();
    assert!(!sandbox.is_mounted(target), "{line}");
    let _ = sandbox
        .kachefs("daemon stop")
        .env("KACHEFS_STORE", store)
        .ok();
    line
}

#[test]
fn target_and_store_never_lie_in_each_other() {
    let sandbox = Sandbox::new();
    let target = old_target(&sandbox, "project");
    let before = Tree::of(&target.join("debug"));
    for store in [target.join("store"), target.clone()] {
        let line = refused(&sandbox, &store, &target);
        assert!(line.contains("lie in each other"), "{line}");
        assert_eq!(Tree::of(&target.join("debug")), before, "nothing was taken");
    }
    let store = sandbox.make_dir("other-store");
    let line = refused(&sandbox, &store, &store.join("blobs"));
    assert!(line.contains("lie in each other"), "{line}");
}

#[test]
fn a_checkout_is_not_taken_over() {
    let sandbox = Sandbox::new();
    let checkout = sandbox.make_dir("checkout");
    for name in ["Cargo.toml", ".git"] {
        fs::write(checkout.join(name), "here").must("write");
        let outcome = sandbox.kachefs("mount").arg(&checkout).fails();
        assert!(outcome.one_line_error().contains(name), "{outcome}");
        assert!(!sandbox.is_mounted(&checkout));
        assert_eq!(fs::read_to_string(checkout.join(name)).must("read"), "here");
        fs::remove_file(checkout.join(name)).must("remove");
    }
}

#[test]
fn views_do_not_nest() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    sandbox.mount(&target);
    fs::create_dir(target.join("debug")).must("mkdir");
    for place in [target.join("debug"), sandbox.path("project")] {
        let outcome = sandbox.kachefs("mount").arg(&place).fails();
        assert!(
            outcome.one_line_error().contains("lie in each other"),
            "{outcome}"
        );
    }
    assert!(target.join("debug").is_dir());
}

#[test]
fn without_fuse_everything_stays_where_it_was() {
    let sandbox = Sandbox::new();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: hiding /dev/fuse takes root");
        return;
    }
    let target = old_target(&sandbox, "project");
    let before = Tree::of(&target);
    let kachefs = sandbox.bin_dir().join("kachefs");
    let script = format!(
        "mount --bind /dev/null /dev/fuse && exec '{}' mount '{}'",
        kachefs.display(),
        target.display()
    );
    let outcome = sandbox
        .command("unshare")
        .args(["--mount", "sh", "-c", &script])
        .fails();
    outcome.one_line_error();
    assert_eq!(Tree::of(&target), before, "{outcome}");
    let _ = sandbox.kachefs("daemon stop").ok();
    sandbox.mount(&target);
    assert_eq!(
        Tree::of(&target),
        before,
        "taken over when there is a mount"
    );
}

#[test]
fn a_configuration_nobody_understands_stops_the_mount() {
    let sandbox = Sandbox::new();
    let target = old_target(&sandbox, "project");
    let config = sandbox.cargo_home().join("config.toml");
    for text in ["[build\n", "build = 3\n", "a = 1\na = 2\n"] {
        fs::write(&config, text).must("write");
        let outcome = sandbox.kachefs("mount").arg(&target).fails();
        outcome.one_line_error();
        assert!(!sandbox.is_mounted(&target), "{outcome}");
        assert_eq!(fs::read_to_string(&config).must("read"), text);
    }
    // A wrapper we would not have written is somebody's.
    for text in [
        "[build]\nrustc-wrapper = 3\n",
        "[build]\nrustc-wrapper = { value = \"x\" }\n",
    ] {
        fs::write(&config, text).must("write");
        let outcome = sandbox.mount(&target);
        assert!(outcome.said().contains("left as it is"), "{outcome}");
        assert_eq!(fs::read_to_string(&config).must("read"), text);
        sandbox.unmount(&target);
    }
}

#[test]
fn a_projects_own_wrapper_is_noticed() {
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    let config = sandbox.make_dir("project/.cargo").join("config.toml");
    fs::write(&config, "[build]\nrustc-wrapper = \"sccache\"\n").must("write");
    let outcome = sandbox.mount(&target);
    assert!(outcome.said().contains("sccache"), "{outcome}");
    assert!(!sandbox.cargo_home().join("config.toml").exists());
}

#[test]
fn a_daemon_in_another_mount_namespace_mounts_nothing_here() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: a namespace of our own takes root");
        return;
    }
    let sandbox = Sandbox::new();
    let target = sandbox.make_dir("project").join("target");
    let kachefs = sandbox.bin_dir().join("kachefs");
    let _ = sandbox
        .command("unshare")
        .args(["-m", "--propagation", "private"])
        .arg(kachefs)
        .args(["mount", "--no-init"])
        .arg(&target)
        .ok();
    let refused = sandbox.kachefs("mount --no-init").arg(&target).fails();
    let line = refused.one_line_error();
    assert!(line.contains("another mount namespace"), "{line}");
}
