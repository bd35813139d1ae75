//! A hit writes no blob bytes: it references them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use harness::{Sandbox, processes, tree};

#[test]
fn a_hit_build_of_ripgrep_writes_less_than_one_percent() {
    let sandbox = Sandbox::with_limit(Duration::from_mins(15));
    let project = sandbox.fetch_crate("ripgrep", "15.2.0", "ripgrep");
    sandbox.mount(project.target());
    let build = || {
        sandbox
            .cargo(&project, "build --locked")
            .timeout(Duration::from_mins(10))
            .ok()
    };
    let _ = build();
    sandbox.counters();
    sandbox.empty_view(project.target());
    sandbox.counters();

    let store = sandbox.store();
    let blobs = || -> BTreeSet<PathBuf> { tree::files(&store.join("blobs")).into_iter().collect() };
    let (blobs_before, size_before) = (blobs(), tree::total_size(&store));
    let pid = sandbox.daemon_pid();
    let written_before = processes::counter(pid, "write_bytes");
    let talk_before = processes::counter(pid, "wchar");

    let (seen, _) = sandbox.during(build);

    seen.assert_no_miss();
    assert_eq!(sandbox.daemon_pid(), pid, "one daemon all along");
    let written = processes::counter(pid, "write_bytes") - written_before;
    let talk = processes::counter(pid, "wchar") - talk_before;
    let grown = tree::total_size(&store).saturating_sub(size_before);
    let referenced = seen.bytes_referenced;
    println!(
        "referenced {referenced}, written to the disk {written}, store grown by {grown}, \
         written in all (answers to the kernel included) {talk}"
    );
    let outputs: u64 = tree::deps(&project.target())
        .values()
        .map(|(length, ..)| length)
        .sum();
    assert!(
        referenced >= outputs / 10 * 9,
        "what a hit brings is referenced: {referenced} of {outputs} bytes"
    );
    assert!(
        written * 100 < referenced,
        "written {written} of {referenced} referenced bytes"
    );
    assert!(
        grown * 100 < referenced,
        "grown by {grown}, {referenced} referenced bytes"
    );
    assert_eq!(blobs(), blobs_before, "no blob appears or vanishes");
    assert_eq!(
        (seen.bytes_ingested, seen.bytes_stored),
        (0, 0),
        "nothing is ingested: {seen:?}"
    );
}
