//! A directory of thousands of names, listed while it changes: what was there throughout is seen
//! exactly once.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use harness::{Chance, Must};

use crate::World;
use crate::watchdog::{CALLS, Hand};

/// Names that stay.
const STAYING: usize = 3000;
/// Names that may come and go.
const MOVING: usize = 1500;

/// Plays until the time is over.
pub fn play(world: &World, hand: &Hand, dir: &Path, chance: &mut Chance) {
    hand.during("fill a directory", 2 * CALLS, || fill(dir));
    let over = AtomicBool::new(false);
    let seed = chance.number();
    thread::scope(|scope| {
        let over = &over;
        let changing = scope.spawn(move || {
            let hand = world.watchdog.hand(&format!("{} (changes)", hand.name()));
            let mut chance = Chance::of(seed);
            while !over.load(Ordering::Relaxed) {
                hand.during("change a name", CALLS, || change(dir, &mut chance));
                world.did("names changed while listed");
            }
        });
        while !world.is_over() && !changing.is_finished() {
            hand.during("list what changes", CALLS, || list(dir));
            world.did("listings");
        }
        over.store(true, Ordering::Relaxed);
        changing.join().ok().must("who changes names");
    });
    hand.during("empty a directory", CALLS, || {
        fs::remove_dir_all(dir).must("remove");
    });
}

fn fill(dir: &Path) {
    fs::create_dir_all(dir).must("mkdir");
    for number in 0..STAYING {
        fs::write(dir.join(format!("staying-{number}")), "").must("write");
    }
}

/// A name comes, or goes, or becomes another.
fn change(dir: &Path, chance: &mut Chance) {
    let mut name = || dir.join(format!("moving-{}", chance.below(MOVING)));
    let (one, other) = (name(), name());
    if !one.exists() {
        fs::write(&one, "").must("write");
    } else if one == other || chance.percent(50) {
        fs::remove_file(&one).must("remove");
    } else {
        fs::rename(&one, &other).must("rename");
    }
}

fn list(dir: &Path) {
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for entry in fs::read_dir(dir).must("list") {
        let name = entry.must("list").file_name();
        *seen.entry(name.to_string_lossy().into_owned()).or_default() += 1;
    }
    let wrong: Vec<_> = (0..STAYING)
        .map(|number| format!("staying-{number}"))
        .filter(|name| seen.get(name) != Some(&1))
        .collect();
    assert!(
        wrong.is_empty(),
        "{} names not seen once, such as {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
    let foreign: Vec<_> = seen
        .keys()
        .filter(|name| !name.starts_with("staying-") && !name.starts_with("moving-"))
        .collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}
