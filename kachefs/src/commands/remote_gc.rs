//! `kachefs remote gc`: removes from a remote what nothing names.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use remote::Limits;
use serde::Serialize;
use store::StoreDir;

use super::stats::bytes;
use crate::lazy::gc::{Collected, Gc, KEPT};
use crate::remote_config::RemoteConfig;

/// How long results are kept unless told otherwise.
const KEEP: Duration = Duration::from_hours(30 * 24);

/// How long a call may take: nobody builds meanwhile.
const CALL: Duration = Duration::from_mins(1);

/// Remove from the remote what nothing names.
///
/// What published trees, leases, build manifests and results name is kept, and everything that was
/// written less than the grace ago (`remote set --grace`). Machines may build, upload and publish meanwhile.
#[derive(Debug, Args)]
pub struct RemoteGc {
    /// How long results and build manifests are kept that nobody uploads again: `14days` [default: 30days,
    /// or three graces where that is longer]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    keep: Option<Duration>,
    /// Remove nothing, and say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    schema: u32,
    dry_run: bool,
    #[serde(flatten)]
    collected: Collected,
}

impl RemoteGc {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let config = RemoteConfig::load(dir)?.context(super::remote::NONE)?;
        if config.read_only {
            bail!("{} is only read here", config.location);
        }
        let least = config.grace * KEPT;
        let keep = self.keep.unwrap_or_else(|| KEEP.max(least));
        if keep < least {
            let least = humantime::format_duration(least);
            bail!("--keep is too short: {least} at least, three times the grace");
        }
        let collected = self.collect(&config, keep)?;
        if self.json {
            let report = Report {
                schema: 1,
                dry_run: self.dry_run,
                collected,
            };
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(ExitCode::SUCCESS);
        }
        self.print(&collected, config.grace);
        Ok(ExitCode::SUCCESS)
    }

    fn collect(&self, config: &RemoteConfig, keep: Duration) -> Result<Collected> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let limits = Limits {
            call: CALL,
            ..Limits::default()
        };
        let shows = std::io::stderr().is_terminal();
        let say = |text: &str| {
            if shows {
                // Who cannot be shown what is done waits all the same.
                let _ = write!(std::io::stderr(), "\r\x1b[K{text} ");
            }
        };
        let collected = runtime.block_on(async {
            let remote = remote::open(&config.location, limits).await?;
            let gc = Gc {
                remote: &remote,
                grace: config.grace,
                keep,
                dry_run: self.dry_run,
                say: &say,
            };
            gc.collect().await
        });
        // A directory that hangs holds a thread.
        runtime.shutdown_background();
        if shows {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
        Ok(collected?)
    }

    fn print(&self, collected: &Collected, own: Duration) {
        let grace = Duration::from_millis(collected.grace_ms);
        if grace > own {
            let grace = humantime::format_duration(grace);
            println!("the grace of another machine is kept to: {grace}");
        }
        let verb = if self.dry_run { "would go" } else { "removed" };
        for (what, count) in &collected.removed {
            let size = bytes(count.bytes);
            println!("{verb}  {what:<18}{:>8}  {size:>10}", count.objects);
        }
        if collected.removed.is_empty() {
            println!("nothing to remove");
        }
        let kept = &collected.kept;
        let size = bytes(kept.bytes);
        println!(
            "{:<8}  {:<18}{:>8}  {size:>10}",
            "kept", "blobs and packs", kept.objects
        );
        if collected.cut_short {
            println!("it took too long: run it again for the rest");
        }
    }
}
