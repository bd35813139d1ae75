//! Why the actions of a build missed, for people and scripts.
//!
//! Pure: what is logged of a build and of earlier compiles goes in, a report comes out. A miss is
//! compared with the earlier compile of the same unit that differs in the fewest parts (`changes`),
//! then misses that only follow from others are folded into those (`cascade`). `reasons` has the
//! words for what is not cached, `report` the JSON, which is a contract with scripts.

pub mod cascade;
pub mod changes;
pub mod reasons;
pub mod report;

use store::ViewId;
use store::builds::{BuildId, BuildRecord, LoggedAction, LoggedEnd, Parts, Unit};

use self::changes::Difference;
use self::report::{Actions, Build, Failed, Miss, Report, Uncacheable, UnitName};

/// One build, as it is logged.
pub struct Logged {
    /// Its view.
    pub id: ViewId,
    /// Where its view is mounted.
    pub view: String,
    /// Its number.
    pub build: BuildId,
    /// What is known of its process.
    pub record: BuildRecord,
    /// Its actions, in the order they ended.
    pub actions: Vec<LoggedAction>,
}

impl Logged {
    /// The build, for reports.
    pub fn build(&self) -> Build {
        Build {
            number: self.build.0,
            pid: self.record.pid,
            asked_ms: self.record.asked_ms,
        }
    }
}

/// Explains every action of a build that did not hit. `earlier` has the parts of earlier keys of a unit.
pub fn explain<E>(
    logged: &Logged,
    mut earlier: impl FnMut(&Unit) -> Result<Vec<Parts>, E>,
) -> Result<Report, E> {
    let mut report = Report::new(logged.view.clone(), logged.build());
    let mut differences = Vec::new();
    for action in &logged.actions {
        let unit = UnitName::of(action);
        match &action.end {
            LoggedEnd::Hit { .. } => report.hits.push(unit),
            LoggedEnd::Miss {
                ran_ms,
                parts,
                not_stored,
            } => {
                let mut before = earlier(&action.unit)?;
                before.retain(|known| known.noted_ms < action.asked_ms);
                differences.push(Difference::to_nearest(parts, &before));
                report.misses.push(Miss {
                    unit,
                    ran_ms: *ran_ms,
                    not_stored: not_stored.clone(),
                    causes: Vec::new(),
                    follows: Vec::new(),
                    followers: Vec::new(),
                });
            }
            LoggedEnd::Failed { ran_ms } => report.failed.push(Failed {
                unit,
                ran_ms: *ran_ms,
            }),
            LoggedEnd::Uncacheable { reason, detail } => {
                let text = detail.clone();
                report.uncacheable.push(Uncacheable {
                    unit,
                    text: text.unwrap_or_else(|| reasons::sentence(reason).to_owned()),
                    reason: reason.clone(),
                });
            }
        }
    }
    cascade::fold(&mut report.misses, differences);
    report.actions = Actions {
        hits: report.hits.len(),
        misses: report.misses.len(),
        failed: report.failed.len(),
        uncacheable: report.uncacheable.len(),
    };
    Ok(report)
}
