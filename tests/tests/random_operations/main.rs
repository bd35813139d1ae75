//! Random operations on a view, on the disk and on a model, side by side: same results, same error
//! numbers, same bytes, same attributes, no file newer than it may be.
//!
//! 300 sequences, or 10,000 with `KACHEFS_TEST_LONG=1`. A failing sequence is shrunk and printed
//! with the seed; `KACHEFS_TEST_SEED=<64 hex digits>` runs that one again.

mod model;
mod operation;
mod real;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use harness::{Must, Sandbox};
use model::Model;
use nix::sys::stat::Mode;
use operation::{Op, Seen, op, prelude};
use proptest::test_runner::{
    Config, RngAlgorithm, TestCaseError, TestCaseResult, TestError, TestRng, TestRunner,
};
use real::{Real, Stamp};

const SEQUENCES: u32 = 300;
const LONG_SEQUENCES: u32 = 10_000;
const LONGEST: usize = 80;
/// Times before this were set by the sequence, later ones come from the clock.
const NOW: i64 = 1_600_000_000;
/// After so many sequences the view is unmounted and mounted: the daemon must remember.
const REMOUNT: u32 = 100;

fn long() -> bool {
    std::env::var_os("KACHEFS_TEST_LONG").is_some_and(|value| value == "1")
}

fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    let Ok(text) = std::env::var("KACHEFS_TEST_SEED") else {
        let random = fs::File::open("/dev/urandom").must("/dev/urandom");
        std::io::Read::read_exact(&mut &random, &mut seed).must("/dev/urandom");
        return seed;
    };
    assert!(
        text.len() == 64 && text.is_ascii(),
        "KACHEFS_TEST_SEED: 64 hex digits"
    );
    for (byte, digits) in seed.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digits = str::from_utf8(digits).must("ASCII");
        *byte = u8::from_str_radix(digits, 16).must("KACHEFS_TEST_SEED: hex digits");
    }
    seed
}

macro_rules! same {
    ($view:expr, $disk:expr, $($what:tt)+) => {
        if $view != $disk {
            return Err(TestCaseError::fail(format!(
                "{}\n   view: {:?}\n   disk: {:?}",
                format_args!($($what)+), $view, $disk
            )));
        }
    };
}

/// Asks for things that would wait for another process, or that mean nothing.
fn is_left_out(op: &Op, model: &Model, disk: &Real) -> bool {
    match op {
        Op::Open(_, place, ..) | Op::Truncate(place, _) => disk.is_fifo(place),
        Op::SeekData(slot, _) | Op::SeekHole(slot, _) | Op::Seek(slot, _) => {
            model.holds_directory(*slot)
        }
        _ => false,
    }
}

/// How often each operation succeeded and failed, to see that the sequences do something.
#[derive(Default)]
struct Tally(BTreeMap<String, [u32; 2]>);

impl Tally {
    fn add(&mut self, op: &Op, seen: &Seen) {
        let name = format!("{op:?}");
        let name = name.split('(').next().unwrap_or_default();
        self.0.entry(name.to_owned()).or_default()[usize::from(seen.is_err())] += 1;
    }

    /// Every operation went well at times, and failed at times.
    fn assert_varied(&self) {
        // The rarest of them comes to some thirty, give or take what chance does.
        let poor = |[well, badly]: &[u32; 2]| *well < 5 || *badly < 5;
        let poor: Vec<_> = self.0.iter().filter(|(_, counts)| poor(counts)).collect();
        assert!(poor.is_empty(), "hardly tested (ok, failed): {poor:?}");
    }
}

/// One sequence in three worlds. The directories stay, for a look at them after a remount.
fn run(ops: &[Op], view: &Path, disk: &Path, tally: &mut Tally) -> TestCaseResult {
    let mut model = Model::new();
    let [mut seen, mut expected] = [view, disk].map(|root| Real::new(root.to_owned()));
    for (index, op) in prelude().iter().chain(ops).enumerate() {
        if is_left_out(op, &model, &expected) {
            continue;
        }
        let on_disk = expected.apply(op);
        let in_view = seen.apply(op);
        let in_model = model.apply(op);
        tally.add(op, &in_view);
        same!(in_view, on_disk, "operation {index}, {op:?}");
        same!(
            in_model,
            on_disk,
            "operation {index}, {op:?} (the model, not the view)"
        );
    }
    let (on_disk, disk_times) = expected.finish();
    let (in_view, view_times) = seen.finish();
    for (name, row) in &on_disk {
        same!(in_view.get(name), Some(row), "{name:?} in the end");
    }
    same!(in_view.len(), on_disk.len(), "number of names");
    same!(
        model.picture().len(),
        on_disk.len(),
        "number of names (the model, not the view)"
    );
    for (name, row) in &model.picture() {
        same!(
            Some(row),
            on_disk.get(name),
            "{name:?} in the end (the model, not the view)"
        );
    }
    compare_times(&view_times, &disk_times)
}

type Times = BTreeMap<String, [Stamp; 2]>;

/// Times that were set are equal. Times from the clock are in the same order: what is older on the
/// disk is not newer in the view.
fn compare_times(view: &Times, disk: &Times) -> TestCaseResult {
    for (name, [mtime, _]) in disk {
        let seen = view[name][0];
        if mtime.0 < NOW || seen.0 < NOW {
            same!(seen, *mtime, "mtime of {name:?}");
        }
    }
    for which in 0..2 {
        let now = |times: &Times, name: &String| times[name][which];
        let mut names: Vec<_> = disk.keys().collect();
        names.sort_by_key(|name| now(disk, name));
        let mut newest_older: Option<(&String, Stamp)> = None;
        let mut group: Vec<&String> = Vec::new();
        for name in names {
            if group
                .first()
                .is_some_and(|first| now(disk, first) < now(disk, name))
            {
                let newest = group.drain(..).max_by_key(|name| now(view, name));
                let newest = newest.map(|name| (name, now(view, name)));
                newest_older = newest_older.max_by_time(newest);
            }
            group.push(name);
            if let Some((older, time)) = newest_older
                && now(view, name) < time
            {
                let what = ["mtime", "ctime"][which];
                return Err(TestCaseError::fail(format!(
                    "{what}: on the disk {older:?} {:?} is older than {name:?} {:?}, in the view \
                     newer: {time:?}, {:?}",
                    now(disk, older),
                    now(disk, name),
                    now(view, name)
                )));
            }
        }
    }
    Ok(())
}

trait MaxByTime {
    fn max_by_time(self, other: Self) -> Self;
}

impl MaxByTime for Option<(&String, Stamp)> {
    fn max_by_time(self, other: Self) -> Self {
        match (self, other) {
            (Some(one), Some(two)) => Some(if two.1 > one.1 { two } else { one }),
            (one, two) => one.or(two),
        }
    }
}

#[test]
fn random_operations_equal_disk_and_model() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: the sequences change owners, which takes root");
        return;
    }
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    let limit = if long() { 60 } else { 7 };
    let sandbox = Sandbox::with_limit(Duration::from_mins(limit));
    let view = sandbox.make_dir("project").join("target");
    sandbox.mount(&view);
    let disk = sandbox.make_dir("disk");

    let seed = seed();
    let config = Config {
        cases: if long() { LONG_SEQUENCES } else { SEQUENCES },
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let (count, tally) = (Cell::new(0), RefCell::new(Tally::default()));
    let sequences = proptest::collection::vec(op(), 1..LONGEST);
    let result = runner.run(&sequences, |ops| {
        let number = count.get();
        count.set(number + 1);
        let [in_view, on_disk] = [&view, &disk].map(|dir| dir.join(format!("{number}")));
        run(&ops, &in_view, &on_disk, &mut tally.borrow_mut())?;
        if number % REMOUNT == 0 {
            remember(&sandbox, &view, &in_view)?;
        }
        for dir in [in_view, on_disk] {
            fs::remove_dir_all(&dir).must(dir.display());
        }
        Ok(())
    });
    match result {
        Ok(()) => {
            let tally = tally.take();
            println!("{} sequences, no difference: {:?}", count.get(), tally.0);
            tally.assert_varied();
        }
        Err(TestError::Fail(why, ops)) => {
            let hex: Vec<_> = seed.iter().map(|byte| format!("{byte:02x}")).collect();
            let ops: Vec<_> = ops.iter().map(|op| format!("    {op:?},")).collect();
            panic!(
                "{why}\nKACHEFS_TEST_SEED={}\nsequence:\n{}",
                hex.concat(),
                ops.join("\n")
            );
        }
        Err(error) => panic!("{error}"),
    }
}

/// Another daemon shows the same tree.
fn remember(sandbox: &Sandbox, view: &Path, dir: &Path) -> TestCaseResult {
    let before = Real::at(dir.to_owned()).picture();
    sandbox.unmount(view);
    sandbox.mount(view);
    let after = Real::at(dir.to_owned()).picture();
    same!(after, before, "after unmount and mount, {}", dir.display());
    Ok(())
}
