//! An output that somebody still writes to when the compiler is gone never gets into the store.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use harness::flip::{Case, State};
use harness::{Must, Package};

/// Seconds the child of the linker holds on to the output.
const LINGER: u64 = 4;

#[test]
fn a_linker_that_leaves_a_writer_behind() {
    let case = Case::new(&[Package::new("app").bin("fn main() { println!(\"here\"); }\n")]);
    let linker = case.sandbox.path("linker");
    let marker = case.sandbox.path("linger");
    let script = format!(
        "#!/bin/sh\n\
         cc \"$@\" || exit\n\
         [ -e '{marker}' ] || exit 0\n\
         while [ \"$1\" != -o ]; do shift; done\n\
         (exec 3<>\"$2\"; : >'{marker}'.held; exec sleep {LINGER}) </dev/null >/dev/null 2>&1 &\n\
         while [ ! -e '{marker}'.held ]; do sleep 0.01; done\n",
        marker = marker.display()
    );
    fs::write(&linker, script).must("write the linker");
    fs::set_permissions(&linker, fs::Permissions::from_mode(0o755)).must("make it run");
    let state = State::printing("here").env("RUSTFLAGS", format!("-Clinker={}", linker.display()));

    stored_only_when_finished(&case, &state, &marker);
    assert!(marker.with_extension("held").exists(), "it lingered");
}

/// Builds while the linker, asked by `marker`, leaves a writer behind, and twice without.
#[track_caller]
fn stored_only_when_finished(case: &Case, state: &State, marker: &Path) {
    fs::write(marker, "").must("ask it to linger");
    // It cannot be run yet, either: the kernel calls it busy.
    let (first, _) = case.sandbox.during(|| case.cargo(state).ok());
    assert_eq!(first.misses + first.uncacheable, 1, "{first:?}");
    fs::remove_file(marker).must("no more lingering");
    std::thread::sleep(Duration::from_secs(LINGER));

    let second = case.build(state, true, "with nobody writing");
    assert_eq!(
        second.hits, 0,
        "an unfinished output was stored: {second:?}"
    );
    let third = case.build(state, true, "once more");
    third.assert_all_hit(1);
}

/// Writes the program through a shared mapping, closes the file, and leaves a child with the
/// mapping. The mapping is the only thing that says so.
const MAPPING_LINKER: &str = r#"
import mmap, os, subprocess, sys, time
args = sys.argv[2:]
marker = sys.argv[1]
out = args[args.index("-o") + 1]
aside = marker + ".aside"
subprocess.run(["cc"] + [aside if a == out else a for a in args], check=True)
data = open(aside, "rb").read()
os.unlink(aside)
if os.path.exists(out):
    os.unlink(out)
fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o755)
os.ftruncate(fd, len(data))
view = mmap.mmap(fd, len(data))
os.close(fd)
view[:] = data
if os.path.exists(marker) and os.fork() == 0:
    for std in range(3):
        os.close(std)
    time.sleep(LINGER)
    view[0:4] = view[0:4]
    os._exit(0)
"#;

#[test]
fn a_linker_that_leaves_a_mapping_behind() {
    let case = Case::new(&[Package::new("app").bin("fn main() { println!(\"here\"); }\n")]);
    let linker = case.sandbox.path("linker");
    let marker = case.sandbox.path("linger");
    // Python lists the directory of its script, where nothing may come and go.
    let script = case.sandbox.path("script/linker.py");
    fs::create_dir(case.sandbox.path("script")).must("make the directory");
    fs::write(
        &script,
        MAPPING_LINKER.replace("LINGER", &LINGER.to_string()),
    )
    .must("write the script");
    let shell = format!(
        "#!/bin/sh\nexec python3 '{}' '{}' \"$@\"\n",
        script.display(),
        marker.display()
    );
    fs::write(&linker, shell).must("write the linker");
    fs::set_permissions(&linker, fs::Permissions::from_mode(0o755)).must("make it run");
    let state = State::printing("here").env("RUSTFLAGS", format!("-Clinker={}", linker.display()));

    stored_only_when_finished(&case, &state, &marker);
}
