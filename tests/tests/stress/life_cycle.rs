//! A view that is unmounted and mounted again, in use and not, and shows the same tree each time.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use harness::{Chance, Must, Tree};

use crate::World;
use crate::builds::Builder;
use crate::watchdog::{CALLS, COMMAND, Hand};

/// How long the users of a view may count after they have ended.
const RELEASED: Duration = Duration::from_secs(20);

/// Plays until the time is over.
pub fn play(world: &World, hand: &Hand, builder: &Builder, chance: &mut Chance) {
    let target = builder.target();
    while !world.is_over() {
        let count = chance.below(60_000);
        let bytes = chance.bytes(count);
        fs::write(target.join("probe"), &bytes).must("write");
        let before = hand.during("read a tree", CALLS, || Tree::of(&target));
        match chance.below(4) {
            0 => unmount_in_use(world, hand, &target),
            1 => unmount_lazily(world, hand, &target, &bytes),
            _ => unmount(world, hand, &target),
        }
        mount(world, hand, &target);
        let after = hand.during("read a tree", CALLS, || Tree::of(&target));
        before.assert_same(&after, "unmounted and mounted");
        world.did("views unmounted and mounted");
        if chance.percent(40) {
            builder.build_and_run(world, hand);
        }
    }
    fs::remove_file(target.join("probe")).must("remove");
}

fn kachefs(world: &World, words: &str, target: &Path) -> harness::Cmd {
    world.sandbox.kachefs(words).arg(target)
}

fn unmount(world: &World, hand: &Hand, target: &Path) {
    until_free(world, hand, "unmount", target);
    assert!(!world.sandbox.is_mounted(target), "unmounted");
    let left = fs::read_dir(target).must("the plain directory").count();
    assert_eq!(left, 0, "nothing is below a view");
}

/// Refused while in use, and then not.
fn unmount_in_use(world: &World, hand: &Hand, target: &Path) {
    let file = File::open(target.join("probe")).must("open");
    let refused = hand.run("unmount in use", COMMAND, kachefs(world, "unmount", target));
    let refused = refused.failure();
    assert!(refused.one_line_error().contains("in use"), "{refused}");
    drop(file);
    unmount(world, hand, target);
}

/// Detached, its users go on, and it cannot be mounted until they have ended.
fn unmount_lazily(world: &World, hand: &Hand, target: &Path, bytes: &[u8]) {
    let mut file = File::open(target.join("probe")).must("open");
    let command = kachefs(world, "unmount --lazy", target);
    let _ = hand.run("unmount lazily", COMMAND, command).success();
    assert!(!world.sandbox.is_mounted(target), "detached");
    let refused = hand.run("mount in use", COMMAND, kachefs(world, "mount", target));
    assert!(refused.failure().one_line_error().contains("still in use"));
    let mut found = Vec::new();
    file.read_to_end(&mut found).must("read");
    assert!(found == bytes, "who has it open goes on");
    drop(file);
    until_free(world, hand, "mount", target);
}

/// Runs a command that is refused while the view is in use. What this process had open is in use a
/// little longer: other hands start programs, which have all of it until they run.
fn until_free(world: &World, hand: &Hand, words: &str, target: &Path) {
    let deadline = Instant::now() + RELEASED;
    loop {
        let done = hand.run(words, COMMAND, kachefs(world, words, target));
        if done.status.success() {
            return;
        }
        assert!(done.one_line_error().contains("in use"), "{done}");
        assert!(Instant::now() < deadline, "never free again\n{done}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn mount(world: &World, hand: &Hand, target: &Path) {
    let command = kachefs(world, "mount", target);
    let _ = hand.run("mount", COMMAND, command).success();
    assert!(world.sandbox.is_mounted(target), "mounted");
}
