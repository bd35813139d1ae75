//! `kachefs explain`: why the last build did not hit in everything.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use store::StoreDir;
use wrapper::protocol::Control;

use super::last_build::{report, seconds, targets};
use crate::explain::report::{Miss, Report, UnitName};

/// Show why the last build compiled what it did: what changed since the nearest earlier compile.
///
/// The last build is the last cargo process that compiled anything, or asked for it, in the target
/// directory of where you are. Crates that were only compiled again because of another are named with
/// that one.
#[derive(Debug, Args)]
pub struct Explain {
    /// Explain only this crate or package
    #[arg(value_name = "CRATE")]
    unit: Option<String>,
    /// Explain the last build, as without it
    #[arg(long)]
    last_build: bool,
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
    /// The target directory [default: `target` here or above]
    #[arg(long, value_name = "TARGET")]
    view: Option<PathBuf>,
}

impl Explain {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let targets = targets(self.view.as_deref())?;
        let json = report(dir, Control::Explain { targets })?;
        let mut report: Report = serde_json::from_str(&json)?;
        if let Some(name) = &self.unit {
            keep(&mut report, name)?;
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", text(&report, self.unit.is_some()));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Leaves out what is not of this name.
fn keep(report: &mut Report, name: &str) -> Result<()> {
    let is_it = |unit: &UnitName| unit.is_called(name);
    report.hits.retain(is_it);
    report.misses.retain(|miss| is_it(&miss.unit));
    report.failed.retain(|failed| is_it(&failed.unit));
    report.uncacheable.retain(|one| is_it(&one.unit));
    let left = report.hits.len() + report.misses.len();
    if left + report.failed.len() + report.uncacheable.len() == 0 {
        bail!(
            "the last build of {} asked for no crate {name}",
            report.view
        );
    }
    Ok(())
}

/// The report for people; of everything, or of one crate with all that is about it.
fn text(report: &Report, of_one: bool) -> String {
    let mut text = String::new();
    let actions = &report.actions;
    if !of_one {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "last build of {}: {} hits, {} misses, {} failed, {} not cached",
            report.view, actions.hits, actions.misses, actions.failed, actions.uncacheable
        );
    }
    let is_told = |miss: &&Miss| of_one || miss.follows.is_empty() || !miss.causes.is_empty();
    for miss in report.misses.iter().filter(is_told) {
        let _ = writeln!(text, "\n{}: ran {}", name(&miss.unit), seconds(miss.ran_ms));
        add_miss(&mut text, miss);
    }
    for failed in &report.failed {
        let ran = seconds(failed.ran_ms);
        let _ = writeln!(
            text,
            "\n{}: failed after {ran}, is not stored",
            name(&failed.unit)
        );
    }
    for one in &report.uncacheable {
        let (unit, why, reason) = (name(&one.unit), &one.text, &one.reason);
        let _ = writeln!(text, "\n{unit}: not cached\n    {why} ({reason})");
    }
    if of_one {
        for hit in &report.hits {
            let _ = writeln!(text, "\n{}: hit", name(hit));
        }
    }
    text.trim_start_matches('\n').to_owned()
}

fn add_miss(text: &mut String, miss: &Miss) {
    for cause in &miss.causes {
        let _ = writeln!(text, "    {}", cause.text);
    }
    if !miss.follows.is_empty() {
        let and = if miss.causes.is_empty() {
            "follows"
        } else {
            "follows as well"
        };
        let _ = writeln!(text, "    {and} from {}", names(&miss.follows));
    }
    if let Some(why) = &miss.not_stored {
        let _ = writeln!(text, "    is not stored: {why}");
    }
    if !miss.followers.is_empty() {
        let (count, names) = (miss.followers.len(), names(&miss.followers));
        let _ = writeln!(text, "    {count} more followed: {names}");
    }
}

/// More names than this are counted.
const NAMED: usize = 8;

fn names(units: &[UnitName]) -> String {
    let shown = |unit: &UnitName| match unit.kind.as_str() {
        "build script" | "build script run" | "test" => format!("{} ({})", unit.package, unit.kind),
        _ => unit.crate_name.clone(),
    };
    let named: Vec<_> = units.iter().take(NAMED).map(shown).collect();
    match units.len().checked_sub(NAMED) {
        None | Some(0) => named.join(", "),
        Some(more) => format!("{} and {more} others", named.join(", ")),
    }
}

/// A unit for people.
pub(super) fn name(unit: &UnitName) -> String {
    let package = if unit.package.is_empty() {
        &unit.crate_name
    } else {
        &unit.package
    };
    let mut text = package.clone();
    if !unit.version.is_empty() {
        let _ = write!(text, " {}", unit.version);
    }
    let own = unit.crate_name.replace('_', "-") == package.replace('_', "-");
    if !own && !unit.kind.starts_with("build script") {
        let _ = write!(text, ", {}", unit.crate_name);
    }
    if !unit.kind.is_empty() {
        let _ = write!(text, ", {}", unit.kind);
    }
    text
}
