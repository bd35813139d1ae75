//! Builds at once: correct, without a deadlock, and the same compile runs once.

use std::thread;

use harness::messages::Messages;
use harness::{Must, Project, Sandbox, samples, tree};

const PARTS: usize = 12;
const UNITS: u64 = PARTS as u64 + 1;

fn output(project: &Project, sandbox: &Sandbox) -> String {
    sandbox.output_of(project.program("app"))
}

#[test]
fn two_checkouts_at_once_compile_each_unit_once() {
    let sandbox = Sandbox::new();
    let one = samples::many(sandbox.path("one"), PARTS, "");
    let two = one.checkout(sandbox.path("the-other"));
    for project in [&one, &two] {
        sandbox.mount(project.target());
    }
    let (seen, ()) = sandbox.during(|| {
        let running = [&one, &two].map(|project| sandbox.cargo(project, "build -j2").spawn());
        for build in running {
            let _ = build.finish().success();
        }
    });
    for project in [&one, &two] {
        assert_eq!(output(project, &sandbox), format!("sum {PARTS}\n"));
        let again = sandbox.cargo(project, "build --message-format=json").ok();
        Messages::of(&again).assert_all_fresh();
    }
    assert_eq!(seen.hits + seen.misses, 2 * UNITS, "{seen:?}");
    assert_eq!(seen.misses, UNITS, "each unit once: {seen:?}");
    assert_eq!(seen.failed, 0, "{seen:?}");
}

#[test]
fn when_the_first_of_two_equal_compiles_fails_both_say_so() {
    let sandbox = Sandbox::new();
    let one = samples::many(sandbox.path("one"), 1, "");
    let source = one.read("crates/part0/src/lib.rs");
    one.write(
        "crates/part0/src/lib.rs",
        &format!("{source}\nfn wrong() -> u32 {{ \"text\" }}\n"),
    );
    let two = one.checkout(sandbox.path("the-other"));
    for project in [&one, &two] {
        sandbox.mount(project.target());
    }
    let running = [&one, &two].map(|project| sandbox.cargo(project, "build").spawn());
    for build in running {
        let failed = build.finish().failure();
        assert!(failed.stderr.contains("E0308"), "{failed}");
    }
}

#[test]
fn a_waiter_outlives_the_build_it_waits_for() {
    // The build that compiles is killed; the one that waits for its result must go on alone.
    let sandbox = Sandbox::new();
    let one = samples::many(sandbox.path("one"), PARTS, "");
    let two = one.checkout(sandbox.path("the-other"));
    for project in [&one, &two] {
        sandbox.mount(project.target());
    }
    let first = sandbox.cargo(&one, "build").spawn();
    let started = || {
        tree::walk(&one.target())
            .iter()
            .any(|path| path.ends_with("deps"))
    };
    assert!(harness::processes::wait_for(
        std::time::Duration::from_mins(1),
        started
    ));
    let second = sandbox.cargo(&two, "build").spawn();
    thread::sleep(std::time::Duration::from_millis(300));
    drop(first); // kills its whole process group
    let _ = second.finish().success();
    assert_eq!(output(&two, &sandbox), format!("sum {PARTS}\n"));
    // And the killed one can be finished.
    let _ = sandbox.cargo(&one, "build").ok();
    assert_eq!(output(&one, &sandbox), format!("sum {PARTS}\n"));
}

#[test]
fn two_commands_in_one_view() {
    let sandbox = Sandbox::new();
    let project = samples::many(sandbox.path("project"), PARTS, "");
    sandbox.mount(project.target());
    for round in ["cold", "warm"] {
        let (seen, ()) = sandbox.during(|| {
            let commands = ["build", "check", "build --release", "test --no-run"];
            let running = commands.map(|words| sandbox.cargo(&project, words).spawn());
            for command in running {
                let _ = command.finish().success();
            }
        });
        assert_eq!(output(&project, &sandbox), format!("sum {PARTS}\n"));
        assert_eq!(
            sandbox.output_of(project.path("target/release/app")),
            format!("sum {PARTS}\n")
        );
        if round == "warm" {
            seen.assert_no_miss();
        }
        for words in ["build", "check", "build --release", "test --no-run"] {
            let words = format!("{words} --message-format=json");
            Messages::of(&sandbox.cargo(&project, &words).ok()).assert_all_fresh();
        }
        sandbox.empty_view(project.target());
    }
}

#[test]
fn four_projects_at_once() {
    let sandbox = Sandbox::new();
    let projects: Vec<_> = (0..4)
        .map(|index| {
            samples::many(
                sandbox.path(&format!("project{index}")),
                6,
                &format!("p{index} "),
            )
        })
        .collect();
    for project in &projects {
        sandbox.mount(project.target());
    }
    let mut expected = Vec::new();
    for round in ["cold", "warm"] {
        let (seen, ()) = sandbox.during(|| {
            let running: Vec<_> = projects
                .iter()
                .map(|project| sandbox.cargo(project, "build").spawn())
                .collect();
            for build in running {
                let _ = build.finish().success();
            }
        });
        assert_eq!(seen.hits + seen.misses, 4 * 7, "{round}: {seen:?}");
        let outputs: Vec<_> = projects
            .iter()
            .map(|project| tree::deps(&project.target()))
            .collect();
        for project in &projects {
            assert_eq!(output(project, &sandbox), "sum 6\n");
        }
        if round == "cold" {
            expected = outputs;
        } else {
            assert_eq!(seen.misses, 0, "{seen:?}");
            for (one, other) in expected.iter().zip(&outputs) {
                tree::assert_same_outputs(one, other, "cold and warm");
            }
        }
        for project in &projects {
            sandbox.empty_view(project.target());
        }
    }
}

#[test]
fn emptied_the_moment_the_build_ends() {
    // What the daemon does after a build must not depend on the names still being there.
    let sandbox = Sandbox::new();
    let project = samples::many(sandbox.path("project"), PARTS, "");
    sandbox.mount(project.target());
    for _ in 0..4 {
        let _ = sandbox.cargo(&project, "build").ok();
        assert_eq!(output(&project, &sandbox), format!("sum {PARTS}\n"));
        sandbox.empty_view(project.target());
    }
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_all_hit(UNITS);
    assert_eq!(output(&project, &sandbox), format!("sum {PARTS}\n"));
}

#[test]
fn commands_while_cargo_builds() {
    let sandbox = Sandbox::new();
    let project = samples::many(sandbox.path("project"), PARTS, "");
    sandbox.mount(project.target());
    let mut build = sandbox.cargo(&project, "build").spawn();
    let mut asked = 0;
    while build.is_running() {
        sandbox.stats();
        let name = format!("other{}", asked % 3);
        let other = sandbox.make_dir(&name).join("target");
        sandbox.mount(&other);
        std::fs::write(other.join("file"), "x").must("write");
        sandbox.unmount(&other);
        asked += 1;
    }
    let _ = build.finish().success();
    assert!(asked > 0, "the build took long enough to ask something");
    assert_eq!(output(&project, &sandbox), format!("sum {PARTS}\n"));
}
