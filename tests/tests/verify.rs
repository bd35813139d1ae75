//! `kachefs verify`: what was served is what the compiler makes, and where it is not that is said.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use harness::{Must, Outcome, Package, Project, Sandbox, samples};
use serde_json::Value;

/// A build whose compiles all hit.
fn warm(sandbox: &Sandbox, project: &Project) -> u64 {
    sandbox.mount(project.target());
    let _ = sandbox.cargo(project, "build").ok();
    again(sandbox, project)
}

fn again(sandbox: &Sandbox, project: &Project) -> u64 {
    sandbox.empty_view(project.target());
    let (counters, _) = sandbox.during(|| sandbox.cargo(project, "build").ok());
    assert_eq!(counters.misses, 0, "{counters:?}");
    counters.hits
}

#[track_caller]
fn json(outcome: &Outcome) -> Value {
    let report: Value = serde_json::from_str(&outcome.stdout).must(format!("JSON\n{outcome}"));
    assert_eq!(report["schema"], 1, "{report:#}");
    report
}

fn verify(sandbox: &Sandbox, project: &Project, words: &str) -> harness::Cmd {
    sandbox.kachefs(&format!("verify {words}")).in_dir(project)
}

#[test]
fn what_clippy_left_is_checked_too() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "clippy").ok();
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "clippy").ok());
    assert_eq!(seen.misses, 0, "{seen:?}");
    let report = json(&verify(&sandbox, &project, "--all --json").ok());
    assert_eq!(report["same"], seen.hits, "{report:#}");
}

#[test]
fn what_was_served_is_what_is_compiled() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let hits = warm(&sandbox, &project);
    let report = json(&verify(&sandbox, &project, "--all --json").ok());
    assert_eq!(report["hits"], hits, "{report:#}");
    assert_eq!(report["checked"], hits, "{report:#}");
    assert_eq!(report["same"], hits, "{report:#}");

    let sample = json(&verify(&sandbox, &project, "--sample 2 --json").ok());
    assert_eq!(
        (&sample["checked"], &sample["same"]),
        (&2.into(), &2.into())
    );
    let said = verify(&sandbox, &project, "").ok().stdout;
    assert!(
        said.contains(&format!("{hits} of {hits} compiles that hit")),
        "{said}"
    );
    // Nothing of it is left, or was seen by the cache.
    let left = fs::read_dir(sandbox.path("tmp")).must("tmp").flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert!(
        left.iter()
            .all(|name| !name.to_string_lossy().contains("verify")),
        "{left:?}"
    );
    let (idle, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    assert_eq!((idle.hits, idle.misses), (0, 0), "{idle:?}");

    // Another daemon knows the requests as well, and the second checkout has its own.
    sandbox.kill_daemon();
    let _ = verify(&sandbox, &project, "--sample 1").ok();
    let mode = fs::metadata(sandbox.store().join("index"))
        .must("the index")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700, "requests hold environments");
}

#[test]
fn another_checkout_is_compared_with_its_own_paths() {
    let sandbox = Sandbox::new();
    let one = samples::whole(sandbox.path("one"));
    sandbox.mount(one.target());
    let _ = sandbox.cargo(&one, "build").ok();
    let two = one.checkout(sandbox.path("elsewhere/two"));
    sandbox.mount(two.target());
    let (counters, _) = sandbox.during(|| sandbox.cargo(&two, "build").ok());
    assert!(counters.hits > 0, "{counters:?}");
    let report = json(&verify(&sandbox, &two, "--all --json").ok());
    assert_eq!(report["same"], counters.hits, "{report:#}");
}

#[test]
fn a_changed_blob_is_found() {
    let sandbox = Sandbox::new();
    let source = "pub fn text() -> &'static str { \"to be found in the library\" }\n";
    let project = Project::new(sandbox.path("project"), &[Package::new("one").lib(source)]);
    warm(&sandbox, &project);
    let needle = b"to be found in the library";
    let mut changed = 0;
    for directory in fs::read_dir(sandbox.store().join("blobs"))
        .must("blobs")
        .flatten()
    {
        for blob in fs::read_dir(directory.path()).must("blobs").flatten() {
            let path = blob.path();
            let mut bytes = fs::read(&path).must("a blob");
            let Some(at) = bytes.windows(needle.len()).position(|part| part == needle) else {
                continue;
            };
            bytes[at] ^= 1;
            fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).must("chmod");
            fs::write(&path, &bytes).must("changing a blob");
            // As it is after it was sealed: nobody looks at what it holds.
            std::thread::sleep(std::time::Duration::from_millis(50));
            fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).must("chmod");
            changed += 1;
        }
    }
    assert!(changed > 0, "no blob holds the text");
    let outcome = verify(&sandbox, &project, "--json").fails();
    let report = json(&outcome);
    assert_eq!(report["different"][0]["crate"], "one", "{report:#}");
    let file = &report["different"][0]["files"][0];
    assert!(file["first_difference"].as_u64().is_some(), "{report:#}");
    let said = verify(&sandbox, &project, "").fails().stdout;
    assert!(said.contains("DIFFERENT"), "{said}");
}

#[test]
fn a_compiler_that_disagrees_with_itself_is_told_apart() {
    let sandbox = Sandbox::new();
    let clock = "use proc_macro::TokenStream;\n#[proc_macro]\n\
        pub fn now(_: TokenStream) -> TokenStream {\n    \
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();\n    \
        format!(\"{}u128\", now.as_nanos()).parse().unwrap()\n}\n";
    let project = Project::new(
        sandbox.path("project"),
        &[
            Package::new("clock").proc_macro(clock),
            Package::new("hour")
                .dep("clock")
                .lib("pub const T: u128 = clock::now!();\n"),
        ],
    );
    warm(&sandbox, &project);
    let report = json(&verify(&sandbox, &project, "--all --json").ok());
    assert_eq!(report["not_reproducible"][0]["crate"], "hour", "{report:#}");
    assert_eq!(report["different"], Value::Array(Vec::new()), "{report:#}");
    assert_eq!(report["same"], 1, "{report:#}");
}

#[test]
fn what_changed_since_is_skipped() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let hits = warm(&sandbox, &project);
    let edited = "crates/greeting/src/lib.rs";
    project.write(edited, &format!("{}\n// edited\n", project.read(edited)));
    let report = json(&verify(&sandbox, &project, "--all --json").ok());
    let skipped = report["skipped"].as_array().must("skipped");
    assert_eq!(skipped[0]["crate"], "greeting", "{report:#}");
    assert_eq!(report["checked"], hits - skipped.len() as u64, "{report:#}");
}

#[test]
fn nobody_runs_what_another_users_store_says() {
    let sandbox = Sandbox::unprivileged();
    if sandbox.user_prefix().is_empty() {
        // Without privileges there is no other user to be.
        return;
    }
    sandbox.make_dir("store");
    let kachefs = sandbox.bin_dir().join("kachefs");
    let outcome = sandbox.privileged(kachefs).arg("verify").fails();
    assert!(
        outcome.stderr.contains("belongs to another user"),
        "{outcome}"
    );
}

#[test]
fn bad_questions_get_one_line() {
    let sandbox = Sandbox::new();
    let project = Project::new(
        sandbox.path("project"),
        &[Package::new("one").lib("pub const N: u32 = 1;\n")],
    );
    let complains = |words: &str, about: &str| {
        let outcome = verify(&sandbox, &project, words).fails();
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert!(outcome.stderr.contains(about), "{outcome}");
    };
    complains("", "no daemon is running");
    sandbox.mount(project.target());
    complains("", "nothing was built in");
    let _ = sandbox.cargo(&project, "build").ok();
    complains("", "nothing hit");
    complains("--sample 0", "looks at nothing");
    complains("--sample many", "many");
    complains("--sample 1 --all", "--all");
}
