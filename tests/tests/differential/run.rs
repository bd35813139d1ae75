//! A plan carried out: after each step both builds, compared; where they differ, a third one from
//! nothing says who is right.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use harness::{Must, Sandbox};

use crate::builds::{Build, Mode, Tools, Way, build, difference};
use crate::checkout::Checkout;
use crate::steps::{COMMANDS, DELETIONS, Step, after};
use crate::world::World;

/// After so many steps a build must find nothing to do.
const NOTHING_TO_DO: usize = 4;

/// Where copies of a checkout go: of different lengths, so that no path can hide in another, and not
/// all of them simple.
const COPIES: [&str; 3] = ["copy/checkout", "a copy/of it ($1)", "c/ä.{2}"];

/// What was wrong, and after which step.
#[derive(Debug)]
pub struct Failure {
    pub step: usize,
    pub what: String,
}

/// What a plan that went well did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub steps: usize,
    pub failed_builds: usize,
    pub programs: usize,
    /// Differences where plain cargo was behind.
    pub cargo_behind: usize,
    /// Builds with nothing to do.
    pub idle: usize,
    /// Those of them that came after a build of what was cached in an emptied view.
    pub idle_after_hits: usize,
    pub hits: u64,
    pub misses: u64,
    pub uncacheable: u64,
    pub script_hits: u64,
    pub script_misses: u64,
}

impl std::ops::AddAssign<&Report> for Report {
    fn add_assign(&mut self, other: &Report) {
        self.steps += other.steps;
        self.failed_builds += other.failed_builds;
        self.programs += other.programs;
        self.cargo_behind += other.cargo_behind;
        self.idle += other.idle;
        self.idle_after_hits += other.idle_after_hits;
        self.hits += other.hits;
        self.misses += other.misses;
        self.uncacheable += other.uncacheable;
        self.script_hits += other.script_hits;
        self.script_misses += other.script_misses;
    }
}

/// One plan under way.
pub struct Run {
    pub sandbox: Sandbox,
    mode: Mode,
    tools: Tools,
    checkouts: Vec<Checkout>,
    current: usize,
    world: World,
    /// Whether the last build in the view did.
    succeeded: bool,
    report: Report,
}

impl Run {
    /// Writes the first world, mounts its view.
    #[track_caller]
    pub fn new(world: &World, mode: Mode, limit: Duration) -> Self {
        let sandbox = Sandbox::with_limit(limit);
        let tools = Tools::new(&sandbox);
        let first = Checkout::new(sandbox.path("checkout"), world);
        sandbox.mount(first.target());
        Self {
            sandbox,
            mode,
            tools,
            checkouts: vec![first],
            current: 0,
            world: world.clone(),
            succeeded: false,
            report: Report::default(),
        }
    }

    /// Carries out all steps.
    pub fn all(mut self, steps: &[Step]) -> Result<Report, Failure> {
        self.compare(0)?;
        assert_eq!(self.report.failed_builds, 0, "the first state compiles");
        for (number, step) in steps.iter().enumerate() {
            let number = number + 1;
            let began = Instant::now();
            self.take(step);
            match step {
                Step::Copy => self.copied(number)?,
                _ => self.compare(number)?,
            }
            if number % NOTHING_TO_DO == 0 {
                self.nothing_to_do(number)?;
                self.nothing_to_do_after_hits(number)?;
            }
            self.report.steps += 1;
            if tells() {
                eprintln!(
                    "step {number}, {:?}: {} {}",
                    began.elapsed(),
                    COMMANDS[self.world.command],
                    describe(step)
                );
            }
        }
        let counters = self.sandbox.counters();
        self.report.hits = counters.hits;
        self.report.misses = counters.misses;
        self.report.uncacheable = counters.uncacheable;
        self.report.script_hits = counters.script_hits;
        self.report.script_misses = counters.script_misses;
        Ok(self.report)
    }

    fn checkout(&self) -> &Checkout {
        &self.checkouts[self.current]
    }

    /// Does what a step says, without building.
    #[track_caller]
    pub fn take(&mut self, step: &Step) {
        self.world = after(&self.world, step);
        match step {
            Step::Copy => {
                let name = COPIES[(self.checkouts.len() - 1) % COPIES.len()];
                let copy = self.checkout().copy(self.sandbox.path(name));
                self.sandbox.mount(copy.target());
                self.current = self.checkouts.len();
                self.checkouts.push(copy);
            }
            Step::Return(number) => self.current = (*number).min(self.checkouts.len() - 1),
            _ => {}
        }
        let checkout = &mut self.checkouts[self.current];
        checkout.show(&self.world);
        let checkout = self.checkout();
        match step {
            Step::Touch(name) => checkout.touch_package(name),
            Step::CleanPackage(name) => self.clean(&format!("clean -p {name}")),
            Step::CleanAll => self.clean("clean"),
            // After `cargo clean` it is mounted by the next build only.
            Step::EmptyView if self.sandbox.is_mounted(&checkout.target()) => {
                self.sandbox.empty_view(checkout.target());
            }
            Step::Delete(number) => {
                for target in [checkout.target(), checkout.plain()] {
                    delete(&target, DELETIONS[*number]);
                }
            }
            Step::KillDaemon => self.sandbox.kill_daemon(),
            Step::Remount if self.sandbox.is_mounted(&checkout.target()) => {
                self.sandbox.unmount(checkout.target());
                self.sandbox.mount(checkout.target());
            }
            _ => {}
        }
    }

    #[track_caller]
    fn clean(&self, words: &str) {
        let checkout = self.checkout();
        // A package that is not there is an error in both.
        let _ = self.sandbox.cargo(&checkout.root, words).run();
        let plain = self.sandbox.plain_cargo(&checkout.root, words);
        let _ = plain.arg("--target-dir").arg(checkout.plain()).run();
    }

    #[track_caller]
    pub fn build(&self, way: Way) -> Build {
        let both = (way, self.mode);
        let build = || {
            build(
                &self.sandbox,
                &self.tools,
                self.checkout(),
                &self.world,
                both,
            )
        };
        if both == (Way::Plain, Mode::Exact) {
            self.in_place_of_the_view(build)
        } else {
            build()
        }
    }

    /// Has the target directory of plain cargo lie where the view does, for one build.
    #[track_caller]
    fn in_place_of_the_view(&self, build: impl FnOnce() -> Build) -> Build {
        let (target, plain) = (self.checkout().target(), self.checkout().plain());
        if self.sandbox.is_mounted(&target) {
            self.sandbox.unmount(&target);
        }
        if target.exists() {
            fs::remove_dir(&target).must("the mountpoint is empty");
        }
        fs::create_dir_all(&plain).must(plain.display());
        fs::rename(&plain, &target).must("the plain directory takes its place");
        let build = build();
        fs::rename(&target, &plain).must("and leaves it");
        self.sandbox.mount(&target);
        build
    }

    /// Both builds, compared.
    pub fn compare(&mut self, step: usize) -> Result<(), Failure> {
        let view = self.build(Way::View);
        self.succeeded = view.seen.success;
        self.judge(step, &view)
    }

    /// The first build of a copy finds what the first checkout built.
    fn copied(&mut self, step: usize) -> Result<(), Failure> {
        // The second and later ones have paths that share with nobody.
        let built_before = self.succeeded && self.current == 1;
        let built_before = built_before && !COMMANDS[self.world.command].contains("-p ");
        let before = self.sandbox.counters();
        self.compare(step)?;
        let counters = self.sandbox.counters() - &before;
        let shares = self.mode == Mode::Portable && self.world.has_portable_package();
        if built_before && shares && counters.hits == 0 {
            let what = format!("a copy that was built before hits nothing: {counters:?}");
            return Err(Failure { step, what });
        }
        Ok(())
    }

    /// Builds without kachefs what was built in the view.
    pub fn judge(&mut self, step: usize, view: &Build) -> Result<(), Failure> {
        let plain = self.build(Way::Plain);
        self.report.failed_builds += usize::from(!view.seen.success);
        self.report.programs += view.seen.programs.len();
        if view.seen == plain.seen {
            if tells() && !view.seen.success {
                eprintln!("both fail:\n{}", view.outcome.stderr);
            }
            return Ok(());
        }
        // Cargo goes by times, and may be behind; what it builds from nothing is the truth.
        let plain_dir = self.checkout().plain();
        if plain_dir.exists() {
            fs::remove_dir_all(&plain_dir).must(plain_dir.display());
        }
        let truth = self.build(Way::Plain);
        let Some(difference) = difference(&view.seen, &truth.seen) else {
            self.report.cargo_behind += 1;
            return Ok(());
        };
        let mut what = format!("< in the view, > by cargo alone, from nothing:\n{difference}");
        what.push_str(&self.again(&truth));
        let _ = write!(
            what,
            "--- in the view\n{}\n--- by cargo alone\n{}",
            view.outcome.stderr, plain.outcome.stderr
        );
        Err(Failure { step, what })
    }

    /// Tells a wrong hit from outputs that cargo did not look at again.
    fn again(&self, truth: &Build) -> String {
        let target = self.checkout().target();
        if !self.sandbox.is_mounted(&target) {
            return "(the view is not mounted)\n".to_owned();
        }
        self.sandbox.empty_view(target);
        match difference(&self.build(Way::View).seen, &truth.seen) {
            Some(_) => "built again in the emptied view: still different\n".to_owned(),
            None => "built again in the emptied view: right\n".to_owned(),
        }
    }

    /// The same in an emptied view, all of which is cached: what it then holds must be no older or newer
    /// than it should.
    fn nothing_to_do_after_hits(&mut self, step: usize) -> Result<(), Failure> {
        let target = self.checkout().target();
        if !self.sandbox.is_mounted(&target) {
            return Ok(());
        }
        self.sandbox.empty_view(target);
        let before = self.sandbox.counters();
        let built = self.build(Way::View);
        let counters = self.sandbox.counters() - &before;
        let idle = self.report.idle;
        self.nothing_to_do(step)?;
        let all_hit = built.seen.success && counters.misses == 0 && counters.uncacheable == 0;
        if all_hit {
            self.report.idle_after_hits += self.report.idle - idle;
        }
        Ok(())
    }

    /// A second build compiles nothing and asks for nothing.
    fn nothing_to_do(&mut self, step: usize) -> Result<(), Failure> {
        let before = self.sandbox.counters();
        let again = self.build(Way::View);
        if !again.seen.success {
            return Ok(());
        }
        self.report.idle += 1;
        let counters = self.sandbox.counters() - &before;
        let asked = counters.hits + counters.misses + counters.uncacheable;
        let asked = asked + counters.script_hits + counters.script_misses;
        if again.stale.is_empty() && asked == 0 {
            return Ok(());
        }
        // A script that declares a file that is not there runs each time.
        let mut plain = self.build(Way::Plain);
        plain.stale.sort();
        let mut stale = again.stale.clone();
        stale.sort();
        if stale == plain.stale {
            return Ok(());
        }
        let what = format!(
            "a build with nothing to do found stale {stale:?}, by cargo alone {:?}; {counters:?}\n{}",
            plain.stale, again.outcome.stderr
        );
        Err(Failure { step, what })
    }
}

/// Whether to tell each step.
fn tells() -> bool {
    std::env::var_os("KACHEFS_FUZZ_TRACE").is_some()
}

/// Removes what begins with a name.
fn delete(target: &std::path::Path, (dir, prefix): (&str, &str)) {
    let Ok(entries) = fs::read_dir(target.join(dir)) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(prefix) {
            let path = entry.path();
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.must(path.display());
        }
    }
}

/// A step in few words.
pub fn describe(step: &Step) -> String {
    match step {
        Step::Become(_) => "Become(an earlier state)".to_owned(),
        step => format!("{step:?}"),
    }
}
