//! A machine that has built nothing uses what another has uploaded, and fetches what it reads.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::machines::{number, remote};
use harness::{
    Counters, Machines, Must, Package, Project, Sandbox, Seaweed, processes, samples, tree,
};

fn error_of<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[track_caller]
fn assert_warm(counters: &Counters) {
    counters.assert_no_miss();
    assert_eq!(counters.script_misses, 0, "{counters:?}");
    assert_eq!(counters.failed + counters.uncacheable, 0, "{counters:?}");
}

#[test]
fn everything_hits_and_only_what_is_read_is_fetched() {
    let (machines, checkout) = Machines::built(samples::whole);
    let cold = &machines.cold;
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    assert_warm(&seen);
    assert!(seen.script_hits > 0, "{seen:?}");
    assert_eq!(number(cold, "faults"), 0, "cargo reads no output");

    let program = checkout.program("app");
    let size = fs::metadata(&program).must("the program").len();
    assert!(size > 100_000, "its size is known: {size}");
    assert_eq!(cold.output_of(&program), samples::WHOLE_OUTPUT);
    assert_eq!(number(cold, "faults"), 1, "only the program");
    let fetched = number(cold, "bytes_faulted");
    assert!(fetched > 0 && fetched <= size, "{fetched} of {size}");
    let plain = cold.plain_cargo(&checkout, "build --target-dir plain");
    plain.ok();
    assert_eq!(cold.output_of(&program), samples::WHOLE_OUTPUT);
    cold.cargo(&checkout, "build").ok();
    assert_eq!(number(cold, "faults"), 1);
}

#[test]
fn one_request_tells_all_results_of_a_build() {
    let machines = Machines::new();
    let project = samples::many(machines.warm.path("project"), 24, "");
    machines.build(&project, "build");
    assert_eq!(machines.objects("builds").len(), 1);
    let checkout = machines.checkout(&project);
    let cold = &machines.cold;
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    assert_warm(&seen);
    assert_eq!(number(cold, "requests"), 1, "{:#}", remote(cold));
}

#[test]
fn without_the_manifest_each_result_is_asked_for() {
    let machines = Machines::new();
    let project = samples::plain(machines.warm.path("project"));
    machines.build(&project, "build");
    for manifest in machines.objects("builds") {
        fs::remove_file(manifest).must("remove");
    }
    let checkout = machines.checkout(&project);
    let cold = &machines.cold;
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    assert_warm(&seen);
    assert_eq!(number(cold, "requests"), 1 + seen.hits);
}

#[test]
fn a_file_from_elsewhere_can_be_changed() {
    let (machines, checkout) = Machines::built(samples::plain);
    let cold = &machines.cold;
    cold.cargo(&checkout, "build").ok();
    let program = checkout.program("app");
    let mut file = OpenOptions::new().append(true).open(&program).must("open");
    file.write_all(b"end").must("write");
    drop(file);
    assert_eq!(cold.output_of(&program), samples::PLAIN_OUTPUT);
    assert!(fs::read(&program).must("read").ends_with(b"end"));
    let rlib = tree::files(&checkout.path("target/debug/deps"))
        .into_iter()
        .find(|path| path.extension().is_some_and(|ending| ending == "rlib"))
        .must("an rlib");
    let file = OpenOptions::new().write(true).open(&rlib).must("open");
    file.set_len(7).must("truncate");
    assert_eq!(fs::read(&rlib).must("read"), b"!<arch>");
}

#[test]
fn a_server_of_s3_works_like_a_directory() {
    let (warm, cold) = (Sandbox::new(), Sandbox::new());
    let seaweed = Seaweed::start(&warm);
    seaweed.make_bucket("cache");
    let set = format!(
        "remote set s3://cache/team --endpoint {}",
        seaweed.endpoint()
    );
    for machine in [&warm, &cold] {
        machine.kachefs(&format!("{set} --anonymous")).ok();
    }
    let project = samples::whole(warm.path("project"));
    warm.mount(project.target());
    warm.cargo(&project, "build").ok();
    warm.kachefs("push --wait").ok();
    let checkout = project.checkout(cold.path("somewhere/else"));
    cold.mount(checkout.target());
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    assert_warm(&seen);
    let program = checkout.program("app");
    assert_eq!(cold.output_of(&program), samples::WHOLE_OUTPUT);
    drop(seaweed);
    // Nobody there: what was not fetched is compiled.
    checkout.write(
        "crates/app/src/main.rs",
        "fn main() { println!(\"new\"); }\n",
    );
    let began = Instant::now();
    let first = cold.cargo(&checkout, "build").run();
    if !first.status.success() {
        cold.cargo(&checkout, "build").ok();
    }
    assert!(began.elapsed() < Duration::from_secs(90));
    assert_eq!(cold.output_of(&program), "new\n");
}

#[test]
fn only_what_trusted_keys_have_signed_is_used() {
    let machines = Machines::new();
    let (warm, cold) = (&machines.warm, &machines.cold);
    let key = warm.kachefs("key generate").ok().stdout.trim().to_owned();
    let stranger = cold.kachefs("key generate").ok().stdout.trim().to_owned();
    let project = samples::plain(warm.path("project"));
    machines.build(&project, "build");

    machines.set(cold, &format!("--trust {stranger}"));
    let checkout = machines.checkout(&project);
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    assert_eq!((seen.hits, seen.misses > 0), (0, true), "{seen:?}");

    let believer = Sandbox::new();
    machines.set(&believer, &format!("--trust {stranger} --trust {key}"));
    let checkout = project.checkout(believer.path("project"));
    believer.mount(checkout.target());
    let (seen, _) = believer.during(|| believer.cargo(&checkout, "build").ok());
    assert_warm(&seen);
}

#[test]
fn secrets_stay_at_home() {
    const SECRET: &str = "sesame-sesame-sesame";
    let machines = Machines::new();
    let (warm, cold) = (&machines.warm, &machines.cold);
    let leaky =
        Package::new("leaky").lib("pub const T: Option<&str> = option_env!(\"MY_TOKEN\");\n");
    let script = Package::new("script")
        .build_script(
            "fn main() {\n\
                 let token = std::env::var(\"MY_TOKEN\").unwrap_or_default();\n\
                 let home = std::env::var(\"HOME\").unwrap_or_default();\n\
                 println!(\"cargo::rerun-if-env-changed=MY_TOKEN\");\n\
                 println!(\"cargo::rustc-env=TOKEN_AGAIN={token}\");\n\
                 println!(\"cargo::rustc-env=HOME_AGAIN={home}/x\");\n\
             }\n",
        )
        .lib("pub const T: &str = concat!(env!(\"TOKEN_AGAIN\"), env!(\"HOME_AGAIN\"));\n");
    let clean = Package::new("clean").lib("pub const N: u32 = 7;\n");
    let app = Package::new("app")
        .dep("leaky")
        .dep("script")
        .dep("clean")
        .bin("fn main() { println!(\"{} {:?} {}\", clean::N, leaky::T, script::T); }\n");
    let project = Project::new(warm.path("project"), &[leaky, script, clean, app]);
    warm.mount(project.target());
    warm.kachefs("key generate").ok();
    warm.cargo(&project, "build").env("MY_TOKEN", SECRET).ok();
    warm.kachefs("push --wait").ok();
    for kind in ["actions", "builds"] {
        assert!(!machines.objects(kind).is_empty(), "no {kind} are uploaded");
    }
    let home = warm.path("home").display().to_string();
    let key = fs::read_to_string(warm.store().join("signing.key")).must("the key");
    let key = key.split_whitespace().next_back().must("a key");
    let bytes_of_key = blake3::Hash::from_hex(key).must("hexadecimal");
    let home = format!("{home}/");
    for object in tree::files(machines.shared.path()) {
        let bytes = unpacked(&object);
        for (name, secret) in [
            ("the token", SECRET.as_bytes()),
            ("the home", home.as_bytes()),
            ("the key", key.as_bytes()),
            ("the key", bytes_of_key.as_bytes()),
        ] {
            let found = bytes.windows(secret.len()).any(|part| part == secret);
            assert!(!found, "{name} is in {}", object.display());
        }
    }
    let checkout = machines.checkout(&project);
    let build = || cold.cargo(&checkout, "build").env("MY_TOKEN", SECRET).ok();
    let (seen, _) = cold.during(build);
    assert!(seen.hits > 0 && seen.misses > 0, "{seen:?}");
    let text = cold.output_of(checkout.program("app"));
    assert!(text.contains(SECRET), "{text}");
}

/// What a frame starts with (RFC 8878, 3.1.1).
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What an object holds, with everything in it that is compressed unpacked.
fn unpacked(object: &Path) -> Vec<u8> {
    let bytes = fs::read(object).must("read");
    let starts = bytes
        .windows(4)
        .enumerate()
        .filter(|(_, part)| *part == ZSTD);
    let mut all = bytes.clone();
    for (at, _) in starts {
        let mut decoder = zstd::Decoder::new(&bytes[at..])
            .must("a decoder")
            .single_frame();
        // What only looks like a frame does not unpack.
        let _ = std::io::copy(&mut decoder, &mut all);
    }
    all
}

#[test]
fn what_is_gone_from_the_remote_is_made_again() {
    let (machines, checkout) = Machines::built(samples::whole);
    let cold = &machines.cold;
    cold.cargo(&checkout, "build").ok();
    for object in machines
        .objects("blobs")
        .into_iter()
        .chain(machines.objects("packs"))
    {
        fs::remove_file(object).must("remove");
    }
    let program = checkout.program("app");
    assert_eq!(error_of(fs::read(&program)), Some(nix::libc::EIO));
    let patience = Duration::from_secs(10);
    assert!(
        processes::wait_for(patience, || !program.exists()),
        "its name goes"
    );
    // So does that of everything else that is gone, before anybody reads it.
    let rlib = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "rlib");
    let rlibs = || {
        tree::files(&checkout.path("target/debug/deps"))
            .iter()
            .any(rlib)
    };
    assert!(processes::wait_for(patience, || !rlibs()), "libraries");
    cold.cargo(&checkout, "build").ok();
    assert_eq!(cold.output_of(&program), samples::WHOLE_OUTPUT);
}

#[test]
fn damaged_blobs_are_not_believed() {
    let machines = Machines::new();
    let project = samples::plain(machines.warm.path("project"));
    machines.build(&project, "build");
    for object in machines
        .objects("blobs")
        .into_iter()
        .chain(machines.objects("packs"))
    {
        let mut bytes = fs::read(&object).must("read");
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::remove_file(&object).must("remove");
        fs::write(&object, bytes).must("write");
    }
    let checkout = machines.checkout(&project);
    let cold = &machines.cold;
    cold.cargo(&checkout, "build").ok();
    let program = checkout.program("app");
    assert_eq!(error_of(fs::read(&program)), Some(nix::libc::EIO));
}

#[test]
fn uploads_survive_the_daemon() {
    let machines = Machines::new();
    let warm = &machines.warm;
    let away = machines.shared.path().with_extension("away");
    fs::rename(machines.shared.path(), &away).must("take the remote away");
    let project = samples::plain(warm.path("project"));
    warm.mount(project.target());
    warm.cargo(&project, "build").ok();
    warm.counters();
    let waiting = number(warm, "results_waiting");
    assert!(waiting > 0);
    let error = warm.kachefs("push --wait").fails();
    assert!(error.one_line_error().contains("not uploaded"), "{error}");
    warm.kill_daemon();
    fs::rename(&away, machines.shared.path()).must("bring it back");
    assert_eq!(number(warm, "results_waiting"), waiting);
    warm.kachefs("push --wait").ok();
    assert_eq!(number(warm, "results_waiting"), 0);
    let checkout = machines.checkout(&project);
    let cold = &machines.cold;
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    assert_warm(&seen);
}

#[test]
fn a_remote_that_is_only_read_gets_nothing() {
    let machines = Machines::new();
    machines.set(&machines.warm, "--read-only");
    let project = samples::plain(machines.warm.path("project"));
    machines.warm.mount(project.target());
    machines.warm.cargo(&project, "build").ok();
    let error = machines.warm.kachefs("push --wait").fails();
    assert!(error.one_line_error().contains("only read"), "{error}");
    // What was made when it was set.
    let files = tree::files(machines.shared.path());
    assert_eq!(files, [machines.shared.path().join("v1/.kachefs")]);
}

#[test]
fn a_bucket_that_is_not_there_costs_no_upload() {
    let machine = Sandbox::new();
    let seaweed = Seaweed::start(&machine);
    let set = format!("remote set s3://cache --endpoint {}", seaweed.endpoint());
    machine.kachefs(&format!("{set} --anonymous --wait 2")).ok();
    let project = samples::plain(machine.path("project"));
    machine.mount(project.target());
    machine.cargo(&project, "build").ok();
    machine.counters();
    let waiting = number(&machine, "results_waiting");
    assert!(waiting > 0);
    let error = machine.kachefs("push --wait").fails();
    assert!(error.one_line_error().contains("not uploaded"), "{error}");
    assert_eq!(number(&machine, "results_waiting"), waiting);
    seaweed.make_bucket("cache");
    machine.kachefs("push --wait").ok();
    assert_eq!(number(&machine, "results_waiting"), 0);
}

#[test]
fn no_more_is_sent_than_may_be() {
    let machines = Machines::new();
    let warm = &machines.warm;
    machines.set(warm, "--upload-limit 256KiB");
    let project = samples::plain(warm.path("project"));
    warm.mount(project.target());
    let began = Instant::now();
    warm.cargo(&project, "build").ok();
    warm.kachefs("push --wait").ok();
    let took = began.elapsed().as_secs_f64();
    let sent = number(warm, "bytes_sent");
    // What goes last takes its time only after it went.
    let largest = machines.objects("blobs").into_iter();
    let largest = largest
        .map(|path| fs::metadata(path).must("meta").len())
        .max();
    let slow = sent.saturating_sub(largest.must("a blob"));
    assert!(slow > 0, "{sent}");
    let least = u32::try_from(slow).must("little");
    assert!(
        took > f64::from(least) / f64::from(256 << 10),
        "{sent} bytes in {took} s"
    );
}
