//! Random workspaces changed at random, built in a view and by cargo alone: after each step both
//! builds must succeed or fail alike, say the same, and make programs that print the same.
//!
//! 60 steps, or 2,000 with `KACHEFS_TEST_LONG=1`. A failure prints its seed and its steps;
//! `KACHEFS_FUZZ_SEED` (with `KACHEFS_FUZZ_STEPS`, a number) runs that plan again,
//! `KACHEFS_FUZZ_ONLY=1,4,7` only these steps of it, and `KACHEFS_FUZZ_TRACE=1` tells each step,
//! and `KACHEFS_FUZZ_MINIMISE=1` leaves out of a failing plan whatever it does not need.

mod builds;
mod checkout;
mod gaps;
mod grow;
mod inputs;
mod pieces;
mod render;
mod run;
mod scripts;
mod self_check;
mod steps;
mod world;

use std::fmt::Write as _;
use std::time::Duration;

use builds::Mode;
use harness::{Chance, Must};
use run::{Failure, Report, Run, describe};
use steps::{Step, plan};
use world::World;

const SEEDS: usize = 5;
const STEPS: usize = 12;
const LONG_SEEDS: usize = 50;
const LONG_STEPS: usize = 40;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().must(format!("{name} is a number")))
}

fn long() -> bool {
    std::env::var_os("KACHEFS_TEST_LONG").is_some_and(|value| value == "1")
}

/// The steps that `KACHEFS_FUZZ_ONLY` leaves.
fn chosen(steps: Vec<Step>) -> Vec<Step> {
    let Ok(only) = std::env::var("KACHEFS_FUZZ_ONLY") else {
        return steps;
    };
    let only: Vec<usize> = only
        .split(',')
        .map(|number| number.parse().must("KACHEFS_FUZZ_ONLY: numbers"))
        .collect();
    let numbered = steps.into_iter().enumerate();
    let left = numbered.filter(|(number, _)| only.contains(&(number + 1)));
    left.map(|(_, step)| step).collect()
}

fn carry_out(world: &World, mode: Mode, steps: &[Step]) -> Result<Report, Failure> {
    let limit = Duration::from_secs(120 + 40 * steps.len() as u64);
    Run::new(world, mode, limit).all(steps)
}

/// Leaves out every step without which something is still wrong, and tells what is left.
fn minimise(world: &World, mode: Mode, mut steps: Vec<Step>) {
    for place in (0..steps.len()).rev() {
        if place >= steps.len() {
            continue;
        }
        let mut fewer = steps.clone();
        let left_out = fewer.remove(place);
        match carry_out(world, mode, &fewer) {
            Ok(_) => eprintln!("needed: {}", describe(&left_out)),
            Err(Failure { step, .. }) => {
                fewer.truncate(step);
                steps = fewer;
            }
        }
    }
    eprintln!("{world:#?}");
    for step in &steps {
        eprintln!("  {step:?}");
    }
}

#[test]
fn random_workspaces_build_as_without_kachefs() {
    let seeds = if long() { LONG_SEEDS } else { SEEDS };
    compare_many(Mode::Portable, seeds);
}

/// In exact mode, at one path in turn.
#[test]
fn random_workspaces_are_byte_for_byte_plain_cargos() {
    let seeds = if long() { LONG_SEEDS } else { SEEDS };
    compare_many(Mode::Exact, seeds / 5);
}

fn compare_many(mode: Mode, count: usize) {
    let given = number("KACHEFS_FUZZ_SEED");
    let length = if long() { LONG_STEPS } else { STEPS };
    let length = number("KACHEFS_FUZZ_STEPS")
        .map_or(length, |steps| usize::try_from(steps).must("few steps"));
    let seeds = given.map_or_else(
        || {
            let mut chance = Chance::new();
            (0..count).map(|_| chance.number() >> 32).collect()
        },
        |seed| vec![seed],
    );
    println!("{mode:?}, seeds: {seeds:?}, {length} steps each");
    let mut total = Report::default();
    for seed in seeds {
        let (world, steps) = plan(seed, length);
        let steps = chosen(steps);
        match carry_out(&world, mode, &steps) {
            Ok(report) => total += &report,
            Err(Failure { step, what }) => {
                if std::env::var_os("KACHEFS_FUZZ_MINIMISE").is_some() {
                    minimise(&world, mode, steps[..step].to_vec());
                }
                let mut list = String::new();
                for (number, step) in steps.iter().enumerate().take(step) {
                    let _ = writeln!(list, "  {}: {}", number + 1, describe(step));
                }
                panic!(
                    "KACHEFS_FUZZ_SEED={seed} KACHEFS_FUZZ_STEPS={length}, after step {step}:\n\
                     {what}\n--- steps\n{list}"
                );
            }
        }
    }
    println!("no difference: {total:?}");
    assert!(
        total.programs > 0 || given.is_some(),
        "programs ran: {total:?}"
    );
}
