//! What a build will read is fetched before it asks, as far as that is known and wanted.

use std::fs;
use std::time::{Duration, Instant};

use harness::{Must, Project, Sandbox, samples, tree};

/// A bucket that knows a build, and what a build with an edit has read.
struct Bucket {
    shared: tempfile::TempDir,
    project: Project,
    _machines: [Sandbox; 2],
}

const LIBRARIES: usize = 12;

impl Bucket {
    fn new() -> Self {
        let shared = tempfile::tempdir().must("a directory");
        let warm = Sandbox::new();
        let cold = Sandbox::new();
        for machine in [&warm, &cold] {
            set(machine, &shared, "");
        }
        let project = samples::many(warm.path("project"), LIBRARIES, "");
        warm.mount(project.target());
        warm.cargo(&project, "build").ok();
        warm.kachefs("push --wait").ok();
        let checkout = checkout(&cold, &project);
        cold.cargo(&checkout, "build").ok();
        edit_and_build(&cold, &checkout, "one");
        cold.kachefs("push --wait").ok();
        assert!(number(&cold, "faults") > 0);
        assert_eq!(number(&cold, "prefetched"), 0, "nobody has read anything");
        Self {
            shared,
            project,
            _machines: [warm, cold],
        }
    }

    /// A machine that has built nothing, with a checkout.
    fn machine(&self, options: &str) -> (Sandbox, Project) {
        let machine = Sandbox::new();
        set(&machine, &self.shared, options);
        let checkout = checkout(&machine, &self.project);
        (machine, checkout)
    }
}

fn set(machine: &Sandbox, shared: &tempfile::TempDir, options: &str) {
    let shared = shared.path().display();
    machine
        .kachefs(&format!("remote set {shared} --wait 2 {options}"))
        .ok();
}

fn checkout(machine: &Sandbox, project: &Project) -> Project {
    let checkout = project.checkout(machine.path("checkout"));
    machine.mount(checkout.target());
    checkout
}

/// Changes the program and the last library; everything below is as it was.
fn edit_and_build(machine: &Sandbox, checkout: &Project, text: &str) {
    let library = format!("crates/part{}/src/lib.rs", LIBRARIES - 1);
    let source = checkout.read(&library);
    checkout.write(&library, &format!("{source}// {text}\n"));
    let main = checkout.read("crates/app/src/main.rs");
    let main = main.replace("fn main() {", &format!("fn main() {{ print!(\"{text} \");"));
    checkout.write("crates/app/src/main.rs", &main);
    let (seen, _) = machine.during(|| machine.cargo(checkout, "build").ok());
    assert_eq!((seen.misses, seen.failed), (2, 0), "{seen:?}");
    let output = machine.output_of(checkout.program("app"));
    assert_eq!(output, format!("{text} sum {LIBRARIES}\n"));
}

fn number(machine: &Sandbox, name: &str) -> u64 {
    machine.stats()["remote"][name].as_u64().must(name)
}

#[test]
fn what_others_have_read_is_fetched_once_something_is_compiled() {
    let bucket = Bucket::new();
    let (machine, checkout) = bucket.machine("");
    machine.cargo(&checkout, "build").ok();
    assert_eq!(
        number(&machine, "faults"),
        0,
        "who hits everything reads nothing"
    );
    edit_and_build(&machine, &checkout, "two");
    let (fetched, read) = (
        number(&machine, "prefetched"),
        number(&machine, "prefetched_read"),
    );
    assert!(fetched > 0, "{:#}", machine.stats());
    // Nothing else changed: what the other one has read is what this one reads.
    assert_eq!(read, fetched, "{:#}", machine.stats());
    assert!(number(&machine, "faults") >= fetched);
    let text = machine.kachefs("stats").ok().stdout;
    assert!(text.contains("prefetched"), "{text}");
}

#[test]
fn nothing_is_fetched_early_where_nobody_wants_it() {
    let bucket = Bucket::new();
    let (machine, checkout) = bucket.machine("--prefetch off");
    machine.cargo(&checkout, "build").ok();
    edit_and_build(&machine, &checkout, "two");
    assert_eq!(number(&machine, "prefetched"), 0);
}

#[test]
fn who_wants_everything_needs_the_remote_no_more() {
    let bucket = Bucket::new();
    let (machine, checkout) = bucket.machine("--prefetch all");
    let (seen, _) = machine.during(|| machine.cargo(&checkout, "build").ok());
    seen.assert_no_miss();
    let deadline = Instant::now() + Duration::from_secs(30);
    // Dep-info has no blob.
    let all = seen.bytes_referenced / 100 * 99;
    while number(&machine, "bytes_prefetched") < all {
        assert!(Instant::now() < deadline, "{:#}", machine.stats());
        std::thread::sleep(Duration::from_millis(100));
    }
    for object in tree::files(bucket.shared.path()) {
        fs::remove_file(object).must("removes");
    }
    edit_and_build(&machine, &checkout, "two");
}

#[test]
fn never_more_than_the_budget() {
    let bucket = Bucket::new();
    let budget = 300_000;
    let (machine, checkout) =
        bucket.machine(&format!("--prefetch all --prefetch-budget {budget}B"));
    machine.cargo(&checkout, "build").ok();
    edit_and_build(&machine, &checkout, "two");
    let fetched = number(&machine, "bytes_prefetched");
    assert!(
        fetched > 0 && fetched <= 2 * budget,
        "{fetched} for two builds"
    );
}
