//! Misses that only follow from other misses of the same build: the first ones are named, once.

use std::collections::{BTreeMap, BTreeSet};

use super::changes::{Difference, maker};
use super::report::{Cause, CauseKind, Miss};
use crate::service::builds::{SCRIPT, SCRIPT_RUN};

/// Puts differences into the misses they belong to, folding what follows from others.
pub fn fold(misses: &mut [Miss], differences: Vec<Difference>) {
    let behind: Vec<BTreeSet<usize>> = differences
        .iter()
        .enumerate()
        .map(|(at, difference)| behind(misses, at, difference))
        .collect();
    for (at, mut difference) in differences.into_iter().enumerate() {
        let explained = &behind[at];
        if !explained.is_empty() {
            // The script and what it makes are other ones because those misses made them.
            difference.causes.retain(|cause| {
                let own = &misses[at].unit.package;
                let followed = match cause.kind {
                    CauseKind::BuildScript => is_behind(misses, explained, SCRIPT, own),
                    CauseKind::GeneratedSource | CauseKind::NamedInput | CauseKind::LookedAt => {
                        maker(&cause.name)
                            .is_some_and(|maker| is_behind(misses, explained, SCRIPT_RUN, maker))
                    }
                    _ => false,
                };
                !followed
            });
        }
        if !explained.iter().any(|at| is_crate(&misses[*at])) {
            difference
                .causes
                .extend(dependency_causes(&difference.dependencies));
        }
        misses[at].causes = difference.causes;
    }
    for at in 0..misses.len() {
        let roots = roots_of(misses, &behind, at, &mut BTreeSet::from([at]));
        for root in roots {
            let (unit, root_unit) = (misses[at].unit.clone(), misses[root].unit.clone());
            misses[at].follows.push(root_unit);
            misses[root].followers.push(unit);
        }
    }
}

/// The misses whose outputs are another miss's changed inputs.
fn behind(misses: &[Miss], at: usize, difference: &Difference) -> BTreeSet<usize> {
    let own = &misses[at].unit;
    let is_behind = |(other, miss): &(usize, &Miss)| {
        let unit = &miss.unit;
        let same_package = unit.package == own.package;
        *other != at
            && match unit.kind.as_str() {
                SCRIPT => difference.script && same_package,
                SCRIPT_RUN => difference.makers.contains(&unit.package),
                _ => is_crate(miss) && difference.dependencies.contains_key(&unit.crate_name),
            }
    };
    let found = misses.iter().enumerate().filter(is_behind);
    found.map(|(other, _)| other).collect()
}

fn is_behind(misses: &[Miss], behind: &BTreeSet<usize>, kind: &str, package: &str) -> bool {
    let is_it = |at: &usize| {
        let unit = &misses[*at].unit;
        unit.kind == kind && unit.package == package
    };
    behind.iter().any(is_it)
}

/// Whether others can depend on it.
fn is_crate(miss: &Miss) -> bool {
    !matches!(
        miss.unit.kind.as_str(),
        "test" | "bin" | SCRIPT | SCRIPT_RUN
    )
}

/// The misses with causes of their own that a miss follows from.
fn roots_of(
    misses: &[Miss],
    behind: &[BTreeSet<usize>],
    at: usize,
    seen: &mut BTreeSet<usize>,
) -> BTreeSet<usize> {
    let mut roots = BTreeSet::new();
    for other in &behind[at] {
        if !seen.insert(*other) {
            continue;
        }
        if misses[*other].causes.is_empty() {
            roots.extend(roots_of(misses, behind, *other, seen));
        } else {
            roots.insert(*other);
        }
    }
    roots
}

fn dependency_causes(dependencies: &BTreeMap<String, &'static str>) -> Vec<Cause> {
    let cause = |(name, became): (&String, &&'static str)| Cause {
        kind: CauseKind::Dependency,
        name: name.clone(),
        before: None,
        after: None,
        text: format!("dependency {name} {became}"),
    };
    dependencies.iter().map(cause).collect()
}
