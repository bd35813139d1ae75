//! Somebody who asks the daemon all the time how it is, and expects an answer.

use std::thread;
use std::time::Duration;

use harness::{Must, Outcome};
use serde_json::Value;

use crate::watchdog::{COMMAND, Hand};
use crate::{World, invariants};

const PAUSE: Duration = Duration::from_millis(700);

/// Asks until the time is over.
pub fn play(world: &World, hand: &Hand) {
    let ask = |words: &str| hand.run(words, COMMAND, world.sandbox.kachefs(words));
    while !world.is_over() {
        let _ = ask("daemon status").success();
        healthy(&ask("doctor --json"));
        let stats = ask("stats --json").success();
        let stats: Value = serde_json::from_str(&stats.stdout).must("stats are JSON");
        invariants::live(world, &stats);
        world.did("times asked");
        thread::sleep(PAUSE);
    }
}

/// Everything is well, but for mounts of others on this machine whose daemon is gone.
#[track_caller]
fn healthy(doctor: &Outcome) {
    let report: Value = serde_json::from_str(&doctor.stdout).must(doctor);
    let checks = report["checks"].as_array().must("checks");
    let problems: Vec<_> = checks
        .iter()
        .filter(|check| check["ok"] != true && check["name"] != "mounts")
        .collect();
    assert!(!checks.is_empty() && problems.is_empty(), "{problems:#?}");
}
