//! What the commands about the last build have in common, and `kachefs stats --last-build`.

use std::env;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use store::StoreDir;
use wrapper::protocol::{Answer, Control};

use super::explain::name;
use super::mountpoint;
use super::stats::median;
use crate::daemon::builds::{Ends, LastBuild};
use crate::daemon::client;

/// The target directories a person may mean, nearest first: the one named, or `target` here or above.
pub(super) fn targets(named: Option<&Path>) -> Result<Vec<Vec<u8>>> {
    let bytes = |path: std::path::PathBuf| path.into_os_string().into_encoded_bytes();
    if let Some(named) = named {
        return Ok(vec![bytes(mountpoint(named)?)]);
    }
    let here = env::current_dir().context("no current directory")?;
    let targets = here
        .ancestors()
        .map(|above| mountpoint(&above.join("target")));
    targets.map(|target| target.map(bytes)).collect()
}

/// Asks the daemon for a report.
pub(super) fn report(dir: &StoreDir, control: Control) -> Result<String> {
    match client::ask(dir, control)? {
        Some(Answer::Report(json)) => Ok(json),
        Some(Answer::Failed(why)) => bail!(why),
        None => bail!("no daemon is running for this store; `kachefs mount` starts one"),
        other => bail!("unexpected answer from the daemon: {other:?}"),
    }
}

/// Milliseconds for people.
pub(super) fn seconds(ms: u64) -> String {
    if ms < 1000 {
        format!("{ms} ms")
    } else {
        format!("{}.{} s", ms / 1000, ms / 100 % 10)
    }
}

/// `kachefs stats --last-build`.
pub(super) fn stats(dir: &StoreDir, view: Option<&Path>, json: bool) -> Result<()> {
    let targets = targets(view)?;
    let report = report(dir, Control::LastBuild { targets })?;
    if json {
        println!("{report}");
    } else {
        print!("{}", table(&serde_json::from_str(&report)?));
    }
    Ok(())
}

fn table(build: &LastBuild) -> String {
    let mut text = format!("last build of {}\n", build.view);
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<16}{value}");
    };
    let told = |ends: &Ends| {
        let Ends {
            hits,
            misses,
            failed,
            ..
        } = ends;
        format!("{hits} hits, {misses} misses, {failed} failed")
    };
    row("compiles", told(&build.actions));
    row("build scripts", told(&build.scripts));
    for ends in [&build.actions, &build.scripts] {
        for (reason, count) in &ends.uncacheable_reasons {
            row("not cached", format!("{count} {reason}"));
        }
    }
    row("time saved", seconds(build.saved_ms));
    let cost = &build.hit_cost_us;
    if cost.count > 0 {
        row("cost of a hit", median(cost));
    }
    for (at, slow) in build.slowest.iter().enumerate() {
        let title = if at == 0 { "slowest" } else { "" };
        row(
            title,
            format!("{} {}", seconds(slow.ran_ms), name(&slow.unit)),
        );
    }
    text
}
