//! What a hit costs: no compiler, and little time of the daemon's.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use harness::{Must, Package, Project, Sandbox, samples, toolchain};

/// A program in the place of `rustc`: says who calls it and how, and becomes the real one beside it.
/// It says so through a pipe, because a compiler that changes a file is not cached.
const SHIM: &str = r#"
use std::io::Write;
use std::os::unix::process::CommandExt;
fn main() {
    let parent = std::os::unix::process::parent_id();
    let parent = std::fs::read_to_string(format!("/proc/{parent}/comm")).unwrap();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let own = std::env::current_exe().unwrap();
    let mut log = std::fs::OpenOptions::new().write(true)
        .open(own.with_file_name("spawned")).unwrap();
    let args_shown: String = args.join(" ").replace('\n', " ").chars().take(200).collect();
    log.write_all(format!("{} {args_shown}\n", parent.trim()).as_bytes()).unwrap();
    let error = std::process::Command::new(own.with_file_name("rustc.real")).args(&args).exec();
    panic!("{error}");
}
"#;

/// A pipe with a name that is always open to both sides.
fn pipe(path: &Path) -> File {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).must("a pipe");
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .must("opening the pipe")
}

/// What was written to it until now.
fn said(pipe: &mut File) -> String {
    let mut text = Vec::new();
    match pipe.read_to_end(&mut text) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        read => panic!("a pipe open for writing ends: {read:?}"),
    }
    String::from_utf8(text).must("text")
}

#[test]
fn no_compiler_is_spawned_on_a_hit() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let copy = sandbox.path("toolchain");
    toolchain::copy_to(&copy);
    let [shim, real, log] = ["rustc", "rustc.real", "spawned"].map(|n| copy.join("bin").join(n));
    fs::rename(&shim, &real).must("setting rustc aside");
    fs::write(sandbox.path("shim.rs"), SHIM).must("shim.rs");
    let _ = sandbox
        .command(toolchain::sysroot().join("bin/rustc"))
        .args(["shim.rs", "--edition", "2024", "-o"])
        .arg(&shim)
        .ok();
    fs::set_permissions(&shim, PermissionsExt::from_mode(0o755)).must("chmod");
    let mut log = pipe(&log);
    let path = format!("{}:/usr/bin:/bin", copy.join("bin").display());
    let path = format!("{}:{path}", sandbox.bin_dir().display());
    let mut build = || {
        // Kept from one build to the other would be what cargo knows of the compiler.
        sandbox.empty_view(project.target());
        let (counters, _) =
            sandbox.during(|| sandbox.cargo(&project, "build").env("PATH", &path).ok());
        let spawned = said(&mut log);
        let is_query = |line: &&str| line.contains("--print") || line.ends_with(" -vV");
        let (queries, compiles): (Vec<_>, Vec<_>) = spawned.lines().partition(is_query);
        let text = |lines: Vec<&str>| lines.iter().map(ToString::to_string).collect::<Vec<_>>();
        (counters, text(queries), text(compiles))
    };
    sandbox.mount(project.target());
    let (cold, _, compiles) = build();
    assert!(cold.misses > 0 && cold.hits == 0, "{cold:?}");
    assert_eq!(compiles.len() as u64, cold.misses, "{compiles:#?}");

    let (warm, queries, compiles) = build();
    warm.assert_all_hit(cold.misses);
    assert!(compiles.is_empty(), "{compiles:#?}");
    // Cargo's own questions are answered from memory.
    assert!(queries.is_empty(), "{queries:#?}");

    let cost = &sandbox.stats()["hit_cost_us"];
    let number = |name: &str| cost[name].as_u64().must(name);
    assert_eq!(number("count"), warm.hits + warm.script_hits, "{cost}");
    assert!(
        0 < number("p50") && number("p50") <= number("p99"),
        "{cost}"
    );
}

/// How many crates one program has.
const EXTERNS: usize = 50;

/// Far above what it is, for machines that do other things as well.
const AT_MOST_US: u64 = 50_000;

#[test]
fn fifty_externs_are_looked_at_quickly() {
    let sandbox = Sandbox::new();
    let name = |n: usize| format!("part{n}");
    let mut packages: Vec<_> = (0..EXTERNS)
        .map(|n| Package::new(&name(n)).lib(&format!("pub fn number() -> usize {{ {n} }}\n")))
        .collect();
    let terms: Vec<_> = (0..EXTERNS)
        .map(|n| format!("{}::number()", name(n)))
        .collect();
    let main = format!(
        "fn main() {{ println!(\"{{}}\", {}); }}\n",
        terms.join(" + ")
    );
    let all = (0..EXTERNS).fold(Package::new("all").bin(&main), |all, n| all.dep(&name(n)));
    packages.push(all);
    let project = Project::new(sandbox.path("project"), &packages);
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    for round in 0..3 {
        sandbox.empty_view(project.target());
        let (warm, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
        warm.assert_all_hit(EXTERNS as u64 + 1);
        let cost = &sandbox.stats()["hit_cost_us"];
        eprintln!("round {round}: {cost}");
        assert!(cost["p50"].as_u64().must("p50") < AT_MOST_US, "{cost}");
    }
    assert_eq!(
        sandbox.output_of(project.program("all")),
        format!("{}\n", EXTERNS * (EXTERNS - 1) / 2)
    );
}
