//! What the daemon says of the last build of a view: to `kachefs explain`, `stats --last-build` and
//! `verify`.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use store::Digest;
use store::builds::{LoggedAction, LoggedEnd};
use wrapper::protocol::Plan;

use super::Daemon;
use super::stats::HitCostStats;
use crate::clock;
use crate::explain::report::{Build, UnitName};
use crate::explain::{self, Logged};
use crate::fs::Caller;
use crate::service::builds::SCRIPT_RUN;
use crate::service::hit_cost::percentiles_of;

/// Version of the JSON form of [`LastBuild`].
const SCHEMA: u32 = 1;

/// The slowest compiles that are named.
const SLOWEST: usize = 10;

/// Everything `kachefs stats --last-build --json` prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct LastBuild {
    /// Version of this form.
    pub schema: u32,
    /// Where the view is mounted.
    pub view: String,
    /// Which build it is.
    pub build: Build,
    /// Compiler runs.
    pub actions: Ends,
    /// Runs of build scripts.
    pub scripts: Ends,
    /// Milliseconds that hits spared.
    pub saved_ms: u64,
    /// What ran longest.
    pub slowest: Vec<Slow>,
    /// Microseconds from a request that hit to its answer.
    pub hit_cost_us: HitCostStats,
}

/// How many ended how.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ends {
    /// Served.
    pub hits: u64,
    /// Ran, and succeeded.
    pub misses: u64,
    /// Ran, and failed.
    pub failed: u64,
    /// Not cached.
    pub uncacheable: u64,
    /// The last by reason.
    pub uncacheable_reasons: BTreeMap<String, u64>,
}

/// Something that ran.
#[derive(Debug, Serialize, Deserialize)]
pub struct Slow {
    /// What it makes.
    #[serde(flatten)]
    pub unit: UnitName,
    /// Milliseconds it took.
    pub ran_ms: u64,
}

/// The last build of the first of these targets that has one.
pub fn logged(daemon: &Daemon, targets: &[PathBuf]) -> Result<Logged> {
    daemon.service.drain();
    daemon.service.builds.write();
    let index = &daemon.storage.index;
    let views = index.views()?;
    let mut known = None;
    for target in targets {
        let bytes = target.as_os_str().as_bytes();
        let views = views.iter().filter(|(_, record)| record.path == bytes);
        for (view, _) in views {
            known.get_or_insert(target);
            if let Some((build, record)) = index.builds(*view)?.pop() {
                let actions = index.build_actions(*view, build)?;
                return Ok(Logged {
                    id: *view,
                    view: target.to_string_lossy().into_owned(),
                    build,
                    record,
                    actions,
                });
            }
        }
    }
    if let Some(target) = known {
        bail!("nothing was built in {} yet", target.display());
    }
    let target = targets.first().context("no target")?;
    bail!("{} was never mounted", target.display())
}

/// `kachefs explain --json`.
pub fn explain(daemon: &Daemon, targets: &[PathBuf]) -> Result<String> {
    let logged = logged(daemon, targets)?;
    let report = explain::explain(&logged, |unit| daemon.storage.index.parts(unit))?;
    Ok(serde_json::to_string_pretty(&report)?)
}

/// `kachefs stats --last-build --json`.
pub fn last_build(daemon: &Daemon, targets: &[PathBuf]) -> Result<String> {
    let logged = logged(daemon, targets)?;
    Ok(serde_json::to_string_pretty(&summary(&logged))?)
}

/// How the compiles of the last build that hit can be made again: all, or as many of them by chance.
pub fn plan(
    daemon: &Daemon,
    targets: &[PathBuf],
    sample: Option<u64>,
    caller: Caller,
) -> Result<Plan> {
    let logged = logged(daemon, targets)?;
    let index = &daemon.storage.index;
    let mut requests = index.build_requests(logged.id, logged.build)?;
    if requests.is_empty() {
        bail!("nothing hit in the last build of {}", logged.view);
    }
    let mut plan = Plan {
        view: logged.view,
        build: logged.build.0,
        hits: requests.len() as u64,
        compiles: Vec::new(),
        skipped: Vec::new(),
    };
    if let Some(sample) = sample {
        let chance = clock::now_ms().to_le_bytes();
        requests.sort_by_cached_key(|kept| {
            let key = kept.key.0;
            Digest::of(&[key.as_bytes().as_slice(), &chance].concat())
        });
        requests.truncate(usize::try_from(sample)?);
    }
    for kept in &requests {
        match daemon.service.plan(kept, caller) {
            Ok(compile) => plan.compiles.push(compile),
            Err(skipped) => plan.skipped.push(skipped),
        }
    }
    Ok(plan)
}

fn summary(logged: &Logged) -> LastBuild {
    let mut build = LastBuild {
        schema: SCHEMA,
        view: logged.view.clone(),
        build: logged.build(),
        actions: Ends::default(),
        scripts: Ends::default(),
        saved_ms: 0,
        slowest: Vec::new(),
        hit_cost_us: HitCostStats::default(),
    };
    let mut costs = Vec::new();
    for action in &logged.actions {
        build.add(action, &mut costs);
    }
    build
        .slowest
        .sort_by_key(|slow| std::cmp::Reverse(slow.ran_ms));
    build.slowest.truncate(SLOWEST);
    build.hit_cost_us = percentiles_of(costs).into();
    build
}

impl LastBuild {
    fn add(&mut self, action: &LoggedAction, costs: &mut Vec<u64>) {
        let ends = if action.unit.kind == SCRIPT_RUN {
            &mut self.scripts
        } else {
            &mut self.actions
        };
        match &action.end {
            LoggedEnd::Hit { spared_ms, .. } => {
                ends.hits += 1;
                self.saved_ms += spared_ms;
                costs.push(action.answer_us);
            }
            LoggedEnd::Miss { ran_ms, .. } | LoggedEnd::Failed { ran_ms } => {
                if matches!(action.end, LoggedEnd::Miss { .. }) {
                    ends.misses += 1;
                } else {
                    ends.failed += 1;
                }
                self.slowest.push(Slow {
                    unit: UnitName::of(action),
                    ran_ms: *ran_ms,
                });
            }
            LoggedEnd::Uncacheable { reason, .. } => {
                ends.uncacheable += 1;
                *ends.uncacheable_reasons.entry(reason.clone()).or_default() += 1;
            }
        }
    }
}
