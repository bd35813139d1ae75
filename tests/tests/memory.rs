//! What the daemon keeps in memory: little for each name, whatever the files hold, and little for
//! each view.

use std::fs;
use std::path::Path;

use harness::{Must, Sandbox};

/// What a name may cost.
const PER_NAME: u64 = 300;
/// What may differ between two daemons that do the same.
const NOISE: u64 = 4_000_000;
/// Names of a unit, with its directory.
const UNIT: u64 = 8;

fn long() -> bool {
    std::env::var_os("KACHEFS_TEST_LONG").is_some()
}

fn memory(sandbox: &Sandbox) -> u64 {
    sandbox.counters();
    let stats = sandbox.stats();
    let bytes = stats["daemon"]["rss_bytes"].as_u64();
    bytes.must("rss_bytes")
}

/// Names and small files as cargo and rustc leave them for one unit.
fn make_unit(target: &Path, number: u64) {
    let stem = format!("some-crate-{number:016x}");
    let fingerprint = target.join("debug/.fingerprint").join(&stem);
    fs::create_dir(&fingerprint).must("mkdir");
    for (name, size) in [
        ("lib-some-crate", 16),
        ("lib-some-crate.json", 900),
        ("dep-lib-some-crate", 70),
        ("invoked.timestamp", 48),
    ] {
        fs::write(fingerprint.join(name), vec![b'x'; size]).must("write");
    }
    let deps = target.join("debug/deps");
    for (name, size) in [
        (format!("{stem}.d"), 3000),
        (format!("lib{stem}.rmeta"), 2000),
    ] {
        fs::write(deps.join(name), vec![b'x'; size]).must("write");
    }
    let made = deps.join(format!("lib{stem}.rmeta"));
    fs::hard_link(made, target.join("debug").join(format!("lib{stem}.rmeta"))).must("link");
}

#[test]
fn a_name_costs_little_memory() {
    let sandbox = Sandbox::new();
    let [large, small] = ["large", "small"].map(|name| sandbox.make_dir(name).join("target"));
    sandbox.mount(&large);
    for dir in ["debug/.fingerprint", "debug/deps"] {
        fs::create_dir_all(large.join(dir)).must("mkdir");
    }
    let units = if long() { 25_000 } else { 5_000 };
    for number in 0..units {
        make_unit(&large, number);
    }
    let written = memory(&sandbox);
    let names = units * UNIT;
    sandbox.unmount(&large);
    let _ = sandbox.kachefs("daemon stop").ok();

    sandbox.mount(&small);
    let before = memory(&sandbox);
    sandbox.mount(&large);
    let after = memory(&sandbox);
    let each = after.saturating_sub(before) / names;
    eprintln!(
        "{names} names: {written} bytes written, {before} before, {after} after: {each} each"
    );
    assert!(
        after <= before + names * PER_NAME + NOISE,
        "{each} bytes of memory for each of {names} names"
    );
    let file = large.join("debug/deps/some-crate-0000000000000007.d");
    assert!(fs::read(file).must("read") == vec![b'x'; 3000]);
}

#[test]
fn a_view_costs_little_memory() {
    let sandbox = Sandbox::new();
    let target = |number: u32| sandbox.path(&format!("project-{number}")).join("target");
    let views = 24;
    for number in 0..views {
        let target = target(number);
        fs::create_dir_all(target.parent().must("a parent")).must("mkdir");
        sandbox.mount(&target);
        // Both of its threads have read and written as much as the kernel asks for at once.
        let bytes = vec![7; 3_000_000];
        fs::write(target.join("file"), &bytes).must("write");
    }
    let _ = sandbox.kachefs("unmount --all").ok();
    for number in 0..views {
        let target = target(number);
        sandbox.mount(&target);
        assert_eq!(fs::read(target.join("file")).must("read").len(), 3_000_000);
    }
    let used = memory(&sandbox);
    eprintln!("{used} bytes with {views} views");
    assert!(
        used <= 60_000_000,
        "{used} bytes of memory for {views} views"
    );
}
