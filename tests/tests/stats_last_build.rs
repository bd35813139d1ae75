//! `kachefs stats --last-build`: the numbers of one build.

use harness::{Must, Project, Sandbox, samples};
use serde_json::Value;

#[track_caller]
fn last_build(sandbox: &Sandbox, project: &Project) -> Value {
    let outcome = sandbox
        .kachefs("stats --last-build --json")
        .in_dir(project)
        .ok();
    let stats: Value = serde_json::from_str(&outcome.stdout).must(format!("JSON\n{outcome}"));
    assert_eq!(stats["schema"], 1, "{stats:#}");
    stats
}

#[track_caller]
fn number(stats: &Value, pointer: &str) -> u64 {
    let number = stats.pointer(pointer).and_then(Value::as_u64);
    number.must(format!("no number at {pointer}: {stats:#}"))
}

#[test]
fn the_numbers_are_those_of_one_build() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let (cold, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    let stats = last_build(&sandbox, &project);
    assert_eq!(number(&stats, "/actions/misses"), cold.misses, "{stats:#}");
    assert_eq!(number(&stats, "/scripts/misses"), cold.script_misses);
    assert_eq!(number(&stats, "/actions/hits"), 0);
    assert_eq!(number(&stats, "/hit_cost_us/count"), 0);
    let slowest = stats["slowest"].as_array().must("slowest");
    let times: Vec<_> = slowest.iter().map(|slow| number(slow, "/ran_ms")).collect();
    assert!(times.iter().rev().is_sorted() && times[0] > 0, "{stats:#}");

    sandbox.empty_view(project.target());
    let (warm, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    let stats = last_build(&sandbox, &project);
    assert_eq!(number(&stats, "/actions/hits"), warm.hits, "{stats:#}");
    assert_eq!(number(&stats, "/scripts/hits"), warm.script_hits);
    assert_eq!(number(&stats, "/actions/misses"), 0);
    assert!(number(&stats, "/saved_ms") > 0, "{stats:#}");
    let hits = warm.hits + warm.script_hits;
    assert_eq!(number(&stats, "/hit_cost_us/count"), hits, "{stats:#}");
    let (p50, p99) = (
        number(&stats, "/hit_cost_us/p50"),
        number(&stats, "/hit_cost_us/p99"),
    );
    assert!(0 < p50 && p50 <= p99, "{stats:#}");

    // A build that asks for nothing is none.
    let _ = sandbox.cargo(&project, "build").ok();
    assert_eq!(last_build(&sandbox, &project), stats);

    let flags = "-C save-temps";
    let _ = sandbox
        .cargo(&project, "build")
        .env("RUSTFLAGS", flags)
        .ok();
    let stats = last_build(&sandbox, &project);
    let counted = number(&stats, "/actions/uncacheable_reasons/save-temps");
    assert_eq!(number(&stats, "/actions/uncacheable"), counted, "{stats:#}");
    assert!(counted > 0, "{stats:#}");

    let text = sandbox.kachefs("stats --last-build").in_dir(&project).ok();
    for part in ["last build of", "compiles", "save-temps"] {
        assert!(text.stdout.contains(part), "{text}");
    }
    sandbox.empty_view(project.target());
    let _ = sandbox.cargo(&project, "build --release").ok();
    let text = sandbox.kachefs("stats --last-build").in_dir(&project).ok();
    assert!(text.stdout.contains("slowest"), "{text}");
}

#[test]
fn every_view_has_its_own() {
    let sandbox = Sandbox::new();
    let one = samples::whole(sandbox.path("one"));
    let two = one.checkout(sandbox.path("two"));
    for project in [&one, &two] {
        sandbox.mount(project.target());
        let _ = sandbox.cargo(project, "build").ok();
    }
    assert_eq!(number(&last_build(&sandbox, &one), "/actions/hits"), 0);
    assert!(number(&last_build(&sandbox, &two), "/actions/hits") > 0);
    let target = one.target();
    let named = sandbox
        .kachefs("stats --last-build --json --view")
        .arg(target);
    let named: Value = serde_json::from_str(&named.ok().stdout).must("JSON");
    assert_eq!(named, last_build(&sandbox, &one));
    // Unmounted, it is still known.
    sandbox.unmount(one.target());
    assert_eq!(named, last_build(&sandbox, &one));
}

#[test]
fn without_a_build_there_are_no_numbers() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let outcome = sandbox
        .kachefs("stats --last-build")
        .in_dir(&project)
        .fails();
    assert!(outcome.stderr.contains("nothing was built in"), "{outcome}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
}
