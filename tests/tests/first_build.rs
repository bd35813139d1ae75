//! What the first build after `kachefs mount` need not wait for.

use std::thread;
use std::time::Duration;

use harness::{Package, Project, Sandbox, processes};

/// How long nothing is read once everything has been.
const REST: Duration = Duration::from_secs(1);

/// Compiler and standard library have hundreds of megabytes; what a build of nothing makes and reads
/// besides has not.
const TOOLCHAIN: u64 = 200 << 20;

fn project(sandbox: &Sandbox) -> Project {
    let package = Package::new("it").bin("fn main() {}\n");
    Project::new(sandbox.path("project"), &[package])
}

/// How many bytes the daemon has read.
fn read(sandbox: &Sandbox) -> u64 {
    processes::counter(sandbox.daemon_pid(), "rchar")
}

/// The same, once it reads no more.
fn read_at_rest(sandbox: &Sandbox) -> u64 {
    let mut before = read(sandbox);
    loop {
        thread::sleep(REST);
        let now = read(sandbox);
        // Asking it is reading a little.
        if now - before < 1 << 20 {
            return now;
        }
        before = now;
    }
}

#[test]
fn the_toolchain_is_read_when_a_view_is_mounted_and_only_once() {
    let waiting = Sandbox::new();
    let it = project(&waiting);
    waiting.mount(it.target());
    let before = read_at_rest(&waiting);
    assert!(before > TOOLCHAIN, "{before} bytes at the mount");
    waiting.cargo(&it, "build").ok();
    let more = read_at_rest(&waiting) - before;
    assert!(more < TOOLCHAIN / 4, "{more} bytes in the build");

    let hasty = Sandbox::new();
    let it = project(&hasty);
    hasty.mount(it.target());
    hasty.cargo(&it, "build").ok();
    let all = read_at_rest(&hasty);
    assert!(
        all < before + TOOLCHAIN / 2,
        "{all} bytes, {before} at a mount"
    );
}
