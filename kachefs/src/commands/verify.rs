//! `kachefs verify`: makes compiles of the last build again that hit, and compares byte for byte.
//!
//! The compiler runs without kachefs, in a scratch directory, with the arguments and the environment
//! the hit was asked for with. Where the bytes differ it runs once more: a compiler that does not agree
//! with itself says nothing about the cache. Of an rlib the names are left out that rustc makes up anew
//! each time.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use store::{Cas, Digest, StoreDir};
use tempfile::TempDir;
use wrapper::protocol::{Answer, Control, Plan, PlannedCompile, PlannedFile, PlannedUnit};

use super::explain::name;
use super::last_build::targets;
use crate::archive;
use crate::compile_again;
use crate::daemon::client;
use crate::explain::report::UnitName;

/// Version of the JSON form.
const SCHEMA: u32 = 1;

/// How many hits are looked at unless told otherwise.
const SAMPLE: usize = 10;

/// Compile some of the last build's hits again, and compare them byte for byte with what was served.
///
/// Fails when any differs. A crate whose compile differs from one time to the other, without kachefs,
/// is told apart and no failure; one whose sources changed since the build is skipped. Build scripts
/// are not run again.
#[derive(Debug, Args)]
pub struct Verify {
    /// How many hits to compile again, chosen at random
    #[arg(long, value_name = "N", default_value_t = SAMPLE, conflicts_with = "all")]
    sample: usize,
    /// Compile every hit again
    #[arg(long)]
    all: bool,
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
    /// The target directory [default: `target` here or above]
    #[arg(long, value_name = "TARGET")]
    view: Option<PathBuf>,
}

/// Everything `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    view: String,
    build: u64,
    /// Compiles that hit.
    hits: usize,
    /// Those made again.
    checked: usize,
    same: usize,
    different: Vec<Finding>,
    not_reproducible: Vec<Finding>,
    not_compiled: Vec<Note>,
    skipped: Vec<Note>,
}

#[derive(Debug, Serialize)]
struct Finding {
    #[serde(flatten)]
    unit: UnitName,
    files: Vec<Differing>,
}

/// A file that is not what was served.
#[derive(Debug, Serialize)]
struct Differing {
    name: String,
    /// `null` when it is not in the store any more.
    served: Option<String>,
    /// `null` when it was not made at all.
    made: Option<String>,
    /// The first byte that differs, where both can be read.
    first_difference: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Note {
    #[serde(flatten)]
    unit: UnitName,
    text: String,
}

/// What came of one compile made again.
enum Verdict {
    Same,
    Different(Vec<Differing>),
    NotReproducible(Vec<Differing>),
    NotCompiled(String),
}

impl Verify {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        if !self.all && self.sample == 0 {
            bail!("--sample 0 looks at nothing");
        }
        refuse_strangers(dir)?;
        let sample = (!self.all).then_some(self.sample as u64);
        let targets = targets(self.view.as_deref())?;
        let plan = match client::ask(dir, Control::PlanVerify { targets, sample })? {
            Some(Answer::Plan(plan)) => plan,
            Some(Answer::Failed(why)) => bail!(why),
            None => bail!("no daemon is running for this store; `kachefs mount` starts one"),
            other => bail!("unexpected answer from the daemon: {other:?}"),
        };
        let report = verify(&Cas::new(dir), plan)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", text(&report));
        }
        let failures = report.different.len() + report.not_compiled.len();
        Ok(if failures == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// What is run comes out of the store: with another user's, that user would choose what we run.
fn refuse_strangers(dir: &StoreDir) -> Result<()> {
    match fs::metadata(dir.root()) {
        Ok(meta) if meta.uid() != nix::unistd::geteuid().as_raw() => {
            bail!("{} belongs to another user", dir.root().display())
        }
        Ok(_) => Ok(()),
        // Then there is no daemon either.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => {
            Err(error).with_context(|| format!("cannot look at {}", dir.root().display()))
        }
    }
}

fn verify(cas: &Cas, plan: Plan) -> Result<Report> {
    let note = |unit: PlannedUnit, text| Note {
        unit: unit_name(unit),
        text,
    };
    let skipped = plan.skipped.into_iter();
    let mut report = Report {
        schema: SCHEMA,
        view: plan.view,
        build: plan.build,
        hits: usize::try_from(plan.hits)?,
        checked: plan.compiles.len(),
        same: 0,
        different: Vec::new(),
        not_reproducible: Vec::new(),
        not_compiled: Vec::new(),
        skipped: skipped.map(|one| note(one.unit, one.why)).collect(),
    };
    for compile in plan.compiles {
        let verdict = check(cas, &compile)?;
        let finding = |files| Finding {
            unit: unit_name(compile.unit.clone()),
            files,
        };
        match verdict {
            Verdict::Same => report.same += 1,
            Verdict::Different(files) => report.different.push(finding(files)),
            Verdict::NotReproducible(files) => report.not_reproducible.push(finding(files)),
            Verdict::NotCompiled(why) => report.not_compiled.push(note(compile.unit.clone(), why)),
        }
    }
    Ok(report)
}

/// Makes one compile again, and once more if that is not what was served.
fn check(cas: &Cas, compile: &PlannedCompile) -> Result<Verdict> {
    let once = match compile_again(compile)? {
        Ok(made) => made,
        Err(why) => return Ok(Verdict::NotCompiled(why)),
    };
    let (differing, damaged) = differences(cas, compile, once.path())?;
    if differing.is_empty() {
        return Ok(Verdict::Same);
    }
    if damaged {
        return Ok(Verdict::Different(differing));
    }
    let twice = match compile_again(compile)? {
        Ok(made) => made,
        Err(why) => return Ok(Verdict::NotCompiled(why)),
    };
    for file in &differing {
        let of = |made: &TempDir| Made::at(&made.path().join(&file.name));
        if !of(&once)?.is_as(&of(&twice)?) {
            return Ok(Verdict::NotReproducible(differing));
        }
    }
    Ok(Verdict::Different(differing))
}

/// What is in a file.
struct Made {
    /// `None` when there is no file.
    digest: Option<Digest>,
    /// Of what an archive holds.
    members: Option<Digest>,
}

impl Made {
    fn at(path: &Path) -> Result<Self> {
        match fs::read(path) {
            Ok(bytes) => Ok(Self {
                digest: Some(Digest::of(&bytes)),
                members: archive::digest(&bytes),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self {
                digest: None,
                members: None,
            }),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn is_as(&self, other: &Self) -> bool {
        self.digest == other.digest || (self.members.is_some() && self.members == other.members)
    }
}

/// Compiles into a scratch directory; an inner error is why the compiler failed.
fn compile_again(compile: &PlannedCompile) -> Result<Result<TempDir, String>> {
    let scratch = tempfile::Builder::new()
        .prefix("kachefs-verify-")
        .tempdir()
        .context("no scratch directory")?;
    let output = compile_again::command(compile, scratch.path()).output();
    Ok(match output {
        Ok(output) if output.status.success() => Ok(scratch),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().next().unwrap_or_default();
            Err(format!("{}: {said}", output.status))
        }
        Err(error) => Err(format!("cannot run the compiler: {error}")),
    })
}

/// The served files that are not what was made now, and whether one of them is not what it was when
/// it was stored.
fn differences(cas: &Cas, compile: &PlannedCompile, made: &Path) -> Result<(Vec<Differing>, bool)> {
    let (mut differing, mut damaged) = (Vec::new(), false);
    for file in &compile.files {
        let path = made.join(&file.name);
        let (served, now) = (Made::at(&cas.path(&file.digest))?, Made::at(&path)?);
        let is_whole = served.digest == Some(file.digest);
        damaged |= !is_whole;
        if is_whole && now.is_as(&served) {
            continue;
        }
        let shown = |digest: Digest| digest.to_string();
        differing.push(Differing {
            name: file.name.clone(),
            first_difference: first_difference(cas, file, &path)?,
            served: served.digest.map(shown),
            made: now.digest.map(shown),
        });
    }
    Ok((differing, damaged))
}

fn first_difference(cas: &Cas, file: &PlannedFile, made: &Path) -> Result<Option<u64>> {
    let (Ok(served), Ok(made)) = (cas.open(&file.digest), File::open(made)) else {
        return Ok(None);
    };
    let (served, made) = (BufReader::new(served).bytes(), BufReader::new(made).bytes());
    let mut at = 0;
    let (mut served, mut made) = (served, made);
    loop {
        match (served.next().transpose()?, made.next().transpose()?) {
            (None, None) => return Ok(None),
            (one, other) if one != other => return Ok(Some(at)),
            _ => at += 1,
        }
    }
}

fn unit_name(unit: PlannedUnit) -> UnitName {
    UnitName {
        package: unit.package,
        version: unit.version,
        crate_name: unit.crate_name,
        kind: unit.kind,
    }
}

fn text(report: &Report) -> String {
    use std::fmt::Write;
    let mut text = format!(
        "last build of {}: {} of {} compiles that hit made again, {} the same\n",
        report.view, report.checked, report.hits, report.same
    );
    let mut add = |title: &str, findings: &[Finding]| {
        for finding in findings {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}: {title}", name(&finding.unit));
            for file in &finding.files {
                let at = match (file.first_difference, &file.made) {
                    (_, None) => "was not made".to_owned(),
                    (Some(at), _) => format!("differs from byte {at} on"),
                    (None, _) => "differs".to_owned(),
                };
                let _ = writeln!(text, "    {} {at}", file.name);
            }
        }
    };
    add("DIFFERENT from what was served", &report.different);
    let title = "not reproducible: two compiles without kachefs differ as well";
    add(title, &report.not_reproducible);
    for note in &report.not_compiled {
        let _ = writeln!(
            text,
            "{}: does not compile: {}",
            name(&note.unit),
            note.text
        );
    }
    for note in &report.skipped {
        let _ = writeln!(text, "{}: skipped: {}", name(&note.unit), note.text);
    }
    text
}
