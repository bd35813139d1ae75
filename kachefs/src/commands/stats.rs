//! `kachefs stats`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use store::StoreDir;
use wrapper::protocol::{Answer, Control};

use super::{last_build, mountpoint};
use crate::daemon::{client, stats};

/// Show what the cache did: hits, misses and why, bytes, views.
#[derive(Debug, Args)]
pub struct Stats {
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
    /// Show only the view mounted here
    #[arg(long, value_name = "TARGET")]
    view: Option<PathBuf>,
    /// Show the last build in a target directory: `target` here or above, or the view
    #[arg(long)]
    last_build: bool,
}

impl Stats {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        if self.last_build {
            last_build::stats(dir, self.view.as_deref(), self.json)?;
            return Ok(ExitCode::SUCCESS);
        }
        let view = self.view.map(|target| mountpoint(&target)).transpose()?;
        let request = Control::Stats {
            view: view.map(|path| path.into_os_string().into_encoded_bytes()),
        };
        let json = match client::ask(dir, request)? {
            Some(Answer::Stats(json)) => json,
            Some(Answer::Failed(why)) => bail!(why),
            None => bail!("no daemon is running for this store; `kachefs mount` starts one"),
            other => bail!("unexpected answer from the daemon: {other:?}"),
        };
        if self.json {
            println!("{json}");
        } else {
            print!("{}", table(&serde_json::from_str(&json)?));
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn table(stats: &stats::Stats) -> String {
    use std::fmt::Write;
    let actions = &stats.actions;
    let asked = actions.hits + actions.misses;
    let rate = (actions.hits * 100).checked_div(asked).unwrap_or(0);
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<16}{value}");
    };
    row("hits", format!("{} of {asked} ({rate} %)", actions.hits));
    row("misses", actions.misses.to_string());
    let scripts = &stats.scripts;
    let runs = scripts.hits + scripts.misses;
    row("build scripts", format!("{} of {runs} hit", scripts.hits));
    let objects = stats.cc.hits + stats.cc.misses;
    if objects > 0 {
        row("C objects", format!("{} of {objects} hit", stats.cc.hits));
    }
    row("failed", actions.failed.to_string());
    row("uncacheable", actions.uncacheable.to_string());
    for (reason, count) in &actions.uncacheable_reasons {
        row("", format!("{count} {reason}"));
    }
    row(
        "compile saved",
        format!(
            "{}.{} s",
            actions.saved_ms / 1000,
            actions.saved_ms / 100 % 10
        ),
    );
    if actions.recomputed > 0 {
        let made = actions.recomputed;
        row(
            "recomputed",
            format!("{made} compiles whose outputs were lost"),
        );
    }
    row("referenced", bytes(stats.bytes.referenced));
    row("stored", bytes(stats.bytes.stored));
    row(
        "blobs",
        format!("{}, {}", stats.blobs.count, bytes(stats.blobs.local_bytes)),
    );
    let cost = &stats.hit_cost_us;
    if cost.count > 0 {
        row("cost of a hit", median(cost));
    }
    if let Some(remote) = &stats.remote {
        remote_rows(remote, &mut row);
    }
    if stats.quarantine.files > 0 {
        let (files, size) = (stats.quarantine.files, bytes(stats.quarantine.bytes));
        row("quarantine", format!("{files} files, {size}"));
    }
    for view in &stats.views {
        let size = bytes(view.logical_bytes);
        row(
            "view",
            format!("{} ({} names, {size})", view.path, view.names),
        );
    }
    let daemon = &stats.daemon;
    let memory = bytes(daemon.rss_bytes);
    row(
        "daemon",
        format!("pid {}, {memory}, up {} s", daemon.pid, daemon.uptime_s),
    );
    if let Some(pid) = daemon.keeper_pid {
        row("keeper", format!("pid {pid}, {} restarts", daemon.restarts));
    }
    text
}

fn remote_rows(remote: &stats::RemoteStats, row: &mut impl FnMut(&str, String)) {
    let answers = if remote.answers {
        ""
    } else {
        " (does not answer, left alone for a while)"
    };
    row("remote", format!("{}{answers}", remote.url));
    let faulted = bytes(remote.bytes_faulted);
    row("faults", format!("{} blobs, {faulted}", remote.faults));
    if remote.prefetched > 0 {
        let (fetched, read) = (remote.prefetched, remote.prefetched_read);
        let size = bytes(remote.bytes_prefetched);
        let wasted = bytes(
            remote
                .bytes_prefetched
                .saturating_sub(remote.bytes_prefetched_read),
        );
        row(
            "prefetched",
            format!("{fetched} blobs of these, {size}; {read} read, {wasted} not"),
        );
    }
    let (sent, waiting) = (remote.results_uploaded, remote.results_waiting);
    let held_back = match remote.results_held_back {
        0 => String::new(),
        count => format!(", {count} kept here (they hold a secret or a home)"),
    };
    row(
        "uploads",
        format!("{sent} results, {waiting} waiting{held_back}"),
    );
    let traffic = &remote.traffic;
    let (received, sent) = (bytes(traffic.bytes_received), bytes(traffic.bytes_sent));
    let requests = traffic.requests;
    row(
        "traffic",
        format!("{requests} requests, {received} received, {sent} sent"),
    );
}

/// What a hit costs, for people.
pub(super) fn median(cost: &stats::HitCostStats) -> String {
    format!("{} us (p50), {} us (p99)", cost.p50, cost.p99)
}

/// A number of bytes for people, in binary units with one decimal.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut tenths = n.saturating_mul(10);
    while tenths >= 10 * 1024 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn bytes_for_people() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
    }
}
