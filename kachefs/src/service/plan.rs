//! How compiles that hit can be made again: for `kachefs verify`, and where what they made is lost.
//!
//! Only a compile that would get the very same result now can be compared with it: each request is
//! prepared and looked up anew, nothing is bound.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use store::builds::KeptRequest;
use store::{ActionResult, OutputContent};
use wrapper::drivers;
use wrapper::protocol::{CompileRequest, PlannedCompile, PlannedFile, PlannedUnit, Skipped};

use super::compile::run_of;
use super::lookup::Found;
use super::prepare::{Prepared, prepare};
use super::{Service, lookup};
use crate::fs::Caller;

impl Service {
    /// What to run, and what to compare it with; or why not.
    pub fn plan(&self, kept: &KeptRequest, caller: Caller) -> Result<PlannedCompile, Skipped> {
        let whole = |found: &Found| lookup::is_whole(self, &found.result);
        self.plan_where(kept, caller, whole)
            .map(|(_, compile)| compile)
    }

    /// The same where the result is not whole any more; with what it needs.
    pub(super) fn plan_lost(
        &self,
        kept: &KeptRequest,
        caller: Caller,
    ) -> Result<(Prepared, PlannedCompile), Skipped> {
        self.plan_where(kept, caller, |found| found.key == kept.key)
    }

    fn plan_where(
        &self,
        kept: &KeptRequest,
        caller: Caller,
        wanted: impl Fn(&Found) -> bool,
    ) -> Result<(Prepared, PlannedCompile), Skipped> {
        let skip = |why: &str| Skipped {
            unit: unit_of(kept),
            why: why.to_owned(),
        };
        let request = CompileRequest {
            token: kept.out_dir,
            argv: kept.argv.clone(),
            environment: kept.environment.clone(),
            cwd: kept.cwd.clone(),
            umask: kept.umask,
            parent: 0,
        };
        let prepared = prepare(self, &request, caller)
            .map_err(|_| skip("its inputs are not there any more"))?;
        match lookup::find_where(self, &prepared, wanted) {
            Some(found) if found.key == kept.key => {
                let compile = planned(kept, &prepared, &found.result);
                Ok((prepared, compile))
            }
            _ => Err(skip("its inputs changed since the build")),
        }
    }
}

fn planned(kept: &KeptRequest, prepared: &Prepared, result: &ActionResult) -> PlannedCompile {
    let file = |output: &store::Output| match &output.content {
        OutputContent::Blob { digest, size } => Some(PlannedFile {
            name: output.name.clone(),
            digest: *digest,
            size: *size,
        }),
        // Dep-info names the directory it was written for.
        OutputContent::Template(_) => None,
    };
    let (programs, arguments) = kept.argv.split_at(drivers::programs(&words(&kept.argv)));
    PlannedCompile {
        unit: unit_of(kept),
        program: programs[0].clone(),
        arguments: [&programs[1..], &run_of(prepared).arguments, arguments].concat(),
        environment: prepared.environment.clone(),
        cwd: kept.cwd.clone(),
        files: result.outputs.iter().filter_map(file).collect(),
    }
}

fn words(argv: &[Vec<u8>]) -> Vec<&OsStr> {
    argv.iter().map(|word| OsStr::from_bytes(word)).collect()
}

fn unit_of(kept: &KeptRequest) -> PlannedUnit {
    PlannedUnit {
        package: kept.unit.package.clone(),
        version: kept.version.clone(),
        crate_name: kept.unit.crate_name.clone(),
        kind: kept.unit.kind.clone(),
    }
}
