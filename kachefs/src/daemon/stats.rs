//! The numbers behind `kachefs stats`. The JSON is a contract with scripts: fields are added,
//! never renamed.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use store::quarantine::Contents;
use store::{Counter, Quarantine};

use super::Daemon;
use crate::lazy::TrafficNow;
use crate::service::hit_cost::Percentiles;

/// Version of the JSON form.
const SCHEMA: u32 = 1;

/// Everything `kachefs stats --json` prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct Stats {
    /// Version of this form.
    pub schema: u32,
    /// Compiler runs, over the life of the store.
    pub actions: Actions,
    /// Runs of build scripts, over the life of the store.
    #[serde(default)]
    pub scripts: Scripts,
    /// C compiles, over the life of the store.
    #[serde(default)]
    pub cc: CcCompiles,
    /// Bytes, over the life of the store.
    pub bytes: Bytes,
    /// Mounted views.
    pub views: Vec<ViewStats>,
    /// Blobs on this disk.
    pub blobs: Blobs,
    /// What was found damaged and moved away.
    #[serde(default)]
    pub quarantine: QuarantineStats,
    /// What hits cost on the daemon's side, over its life.
    #[serde(default)]
    pub hit_cost_us: HitCostStats,
    /// What only the remote holds, and what it was sent; `null` where the store has none.
    #[serde(default)]
    pub remote: Option<RemoteStats>,
    /// The daemon.
    pub daemon: DaemonStats,
}

/// The store's remote.
#[derive(Debug, Serialize, Deserialize)]
pub struct RemoteStats {
    /// Where it is.
    pub url: String,
    /// Whether it answers, as far as is known.
    pub answers: bool,
    /// Blobs fetched when they were first wanted, over the life of the store.
    pub faults: u64,
    /// Their bytes, as blobs.
    pub bytes_faulted: u64,
    /// Of these, blobs fetched before anybody wanted them.
    #[serde(default)]
    pub prefetched: u64,
    /// Their bytes.
    #[serde(default)]
    pub bytes_prefetched: u64,
    /// Of these, blobs that somebody read. The rest was fetched for nothing, so far.
    #[serde(default)]
    pub prefetched_read: u64,
    /// Their bytes.
    #[serde(default)]
    pub bytes_prefetched_read: u64,
    /// Results sent, over the life of the store.
    pub results_uploaded: u64,
    /// Results not sent, because they hold what must not leave the machine.
    pub results_held_back: u64,
    /// Results that wait to be sent.
    pub results_waiting: u64,
    /// What went over the wire since the daemon started.
    #[serde(flatten)]
    pub traffic: TrafficNow,
}

/// Microseconds from a request to its answer.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct HitCostStats {
    /// Half of the hits cost no more.
    pub p50: u64,
    /// Of a hundred hits, one costs more.
    pub p99: u64,
    /// How many hits there were.
    pub count: u64,
}

impl From<Percentiles> for HitCostStats {
    fn from(Percentiles { p50, p99, count }: Percentiles) -> Self {
        Self { p50, p99, count }
    }
}

/// Compiler runs.
#[derive(Debug, Serialize, Deserialize)]
pub struct Actions {
    /// Served without running a compiler.
    pub hits: u64,
    /// Cacheable, ran and succeeded.
    pub misses: u64,
    /// Ran because kachefs does not cache them.
    pub uncacheable: u64,
    /// Cacheable, ran and failed.
    pub failed: u64,
    /// The uncacheable ones by reason.
    pub uncacheable_reasons: BTreeMap<String, u64>,
    /// Milliseconds of compiling that hits spared.
    pub saved_ms: u64,
    /// Ran again because what they had made was lost.
    #[serde(default)]
    pub recomputed: u64,
    /// Results still being recorded.
    pub pending: usize,
}

/// Runs of build scripts. Those that are not cached count among the uncacheable actions.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Scripts {
    /// Served without running the script.
    pub hits: u64,
    /// Ran and succeeded.
    pub misses: u64,
}

/// C compiles of build scripts. Those that are not cached count among the uncacheable actions.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct CcCompiles {
    /// Served without running the compiler.
    pub hits: u64,
    /// Ran and succeeded.
    pub misses: u64,
}

/// Bytes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Bytes {
    /// Sizes of the outputs that hits pointed names at.
    pub referenced: u64,
    /// New bytes in the CAS.
    pub stored: u64,
    /// Bytes hashed on the way into the CAS, whether new or not.
    pub ingested: u64,
}

/// One mounted view.
#[derive(Debug, Serialize, Deserialize)]
pub struct ViewStats {
    /// Mountpoint.
    pub path: String,
    /// Inodes.
    pub names: u64,
    /// Sum of file sizes.
    pub logical_bytes: u64,
}

/// Blobs on this disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct Blobs {
    /// How many.
    pub count: u64,
    /// Sum of their sizes.
    pub local_bytes: u64,
}

/// What is in the quarantine.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct QuarantineStats {
    /// How many files.
    pub files: u64,
    /// What they take on the disk.
    pub bytes: u64,
}

/// The daemon's process.
#[derive(Debug, Serialize, Deserialize)]
pub struct DaemonStats {
    /// Process id.
    pub pid: u32,
    /// Resident memory.
    pub rss_bytes: u64,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Process that starts the next daemon when this one dies; `null` when there is none.
    pub keeper_pid: Option<u32>,
    /// Daemons that died under this keeper.
    pub restarts: u32,
}

/// Collects the numbers; of all views, or of the one mounted at `view`.
pub fn collect(daemon: &Daemon, view: Option<&Path>) -> Result<String> {
    // Numbers asked for after a build include all of it.
    daemon.service.drain();
    let counters = daemon.storage.index.counters();
    let number = |counter| counters.numbers.get(&counter).copied().unwrap_or(0);
    let views: Vec<ViewStats> = daemon
        .mounts
        .all()
        .into_iter()
        .filter(|(path, _)| view.is_none_or(|wanted| wanted == path))
        .map(|(path, view)| {
            let (names, logical_bytes) = view.usage();
            ViewStats {
                path: path.to_string_lossy().into_owned(),
                names,
                logical_bytes,
            }
        })
        .collect();
    if let Some(wanted) = view
        && views.is_empty()
    {
        bail!("{} is not mounted", wanted.display());
    }
    let (count, local_bytes) = daemon.storage.cas.usage()?;
    let Contents { files, bytes } = Quarantine::new(&daemon.storage.dir).contents()?;
    let stats = Stats {
        schema: SCHEMA,
        actions: Actions {
            hits: number(Counter::Hits),
            misses: number(Counter::Misses),
            uncacheable: counters.uncacheable.values().sum(),
            failed: number(Counter::Failed),
            uncacheable_reasons: counters.uncacheable.clone(),
            saved_ms: number(Counter::SavedMs),
            recomputed: number(Counter::Recomputed),
            pending: daemon.service.pending(),
        },
        scripts: Scripts {
            hits: number(Counter::ScriptHits),
            misses: number(Counter::ScriptMisses),
        },
        cc: CcCompiles {
            hits: number(Counter::CcHits),
            misses: number(Counter::CcMisses),
        },
        bytes: Bytes {
            referenced: number(Counter::BytesReferenced),
            stored: number(Counter::BytesStored),
            ingested: number(Counter::BytesIngested),
        },
        views,
        blobs: Blobs { count, local_bytes },
        quarantine: QuarantineStats { files, bytes },
        hit_cost_us: daemon.service.hit_cost().into(),
        remote: remote(daemon, &number)?,
        daemon: DaemonStats {
            pid: std::process::id(),
            rss_bytes: resident_bytes().context("cannot read /proc/self/statm")?,
            uptime_s: daemon.started.elapsed().as_secs(),
            keeper_pid: daemon.keeper.pid(),
            restarts: daemon.keeper.restarts,
        },
    };
    Ok(serde_json::to_string_pretty(&stats)?)
}

fn remote(daemon: &Daemon, number: &dyn Fn(Counter) -> u64) -> Result<Option<RemoteStats>> {
    let Some(connection) = daemon.storage.lazy.connection() else {
        return Ok(None);
    };
    Ok(Some(RemoteStats {
        url: connection.place(),
        answers: !connection.is_left_alone(),
        faults: number(Counter::Faults),
        bytes_faulted: number(Counter::BytesFaulted),
        prefetched: number(Counter::Prefetched),
        bytes_prefetched: number(Counter::BytesPrefetched),
        prefetched_read: number(Counter::PrefetchedRead),
        bytes_prefetched_read: number(Counter::BytesPrefetchedRead),
        results_uploaded: number(Counter::ResultsUploaded),
        results_held_back: number(Counter::ResultsHeldBack),
        results_waiting: daemon.storage.index.upload_count()?,
        traffic: connection.traffic(),
    }))
}

/// Resident set size (proc(5), "statm": second field, in pages).
fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text
        .split_whitespace()
        .nth(1)
        .context("short statm")?
        .parse()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.context("no page size")?;
    Ok(pages * u64::try_from(page)?)
}
