//! Finding a result without running the compiler, and binding it.

use std::path::{Path, PathBuf};

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use store::{
    ActionEntry, ActionKey, ActionResult, Counter, Digest, InputRecord, InvocationDigest,
    Observation, OutputContent, RootSet,
};
use wrapper::environment;
use wrapper::key::{self, Sources};
use wrapper::roots::Roots;

use super::Service;
use super::observed::Site;
use super::prepare::{Place, Prepared};
use super::share::Source;
use crate::fs::outputs::Bound;
use crate::fs::{Body, Errno, FsResult};

/// A result that serves this checkout.
pub struct Found {
    /// The key it is stored under.
    pub key: ActionKey,
    /// The result.
    pub result: ActionResult,
    /// How it was found.
    pub(super) source: Source,
}

/// What processes about to compile the same agree on: everything but the sources, and the crate
/// root of those. `None` when the crate root cannot be read.
pub fn flight_key(service: &Service, prepared: &Prepared) -> Option<ActionKey> {
    let source = &prepared.invocation.source;
    let digest = source_digest(service, prepared, source)?;
    let template = prepared.roots.template_place(source.as_os_str().as_bytes());
    let sources = Sources {
        files: vec![(template, digest)],
        environment: Vec::new(),
        observed: None,
        package: None,
    };
    Some(key::action_key(
        &prepared.digest,
        &prepared.dependencies,
        &sources,
    ))
}

/// What earlier runs of an invocation read.
pub fn records(service: &Service, invocation: &InvocationDigest) -> Vec<InputRecord> {
    let records = service.storage.index.records(invocation);
    records.unwrap_or_else(|error| {
        tracing::warn!(%error, "input records");
        Vec::new()
    })
}

/// What is stored under a key for these roots, and the key it is really stored under.
pub fn entry_here(
    service: &Service,
    key: &ActionKey,
    roots: &Roots,
) -> Option<(ActionKey, ActionEntry)> {
    // Texts made elsewhere would need other escapes here: such roots have entries of their own.
    let entry = if roots.is_plain() {
        service.entry(key)?
    } else {
        ActionEntry::PathBound(RootSet::all())
    };
    match entry {
        ActionEntry::PathBound(set) => {
            let key = key::bound_key(key, set, roots);
            Some((key, service.entry(&key)?))
        }
        entry => Some((*key, entry)),
    }
}

/// The first result whose recorded inputs are what they were, and whose blobs can be had.
pub fn find(service: &Service, prepared: &Prepared) -> Option<Found> {
    find_where(service, prepared, |found| is_whole(service, &found.result))
}

/// The first result whose recorded inputs are what they were, and of which more is true.
pub(super) fn find_where(
    service: &Service,
    prepared: &Prepared,
    wanted: impl Fn(&Found) -> bool,
) -> Option<Found> {
    records(service, &prepared.digest)
        .into_iter()
        .find_map(|record| {
            let sources = current_sources(service, prepared, &record)?;
            let key = key::action_key(&prepared.digest, &prepared.dependencies, &sources);
            let source = Source { record, key };
            let (key, entry) = entry_here(service, &key, &prepared.roots)?;
            let ActionEntry::Result(result) = entry else {
                return None;
            };
            let found = Found {
                key,
                result,
                source,
            };
            wanted(&found).then_some(found)
        })
}

/// What the files and variables of a record are now; `None` when a file is gone.
pub fn current_sources(
    service: &Service,
    prepared: &Prepared,
    record: &InputRecord,
) -> Option<Sources> {
    let mut files = Vec::with_capacity(record.sources.len());
    for template in &record.sources {
        if !prepared.roots.knows(template) {
            return None;
        }
        let path = prepared.roots.render(template);
        let path = Path::new(OsStr::from_bytes(&path));
        let digest = source_digest(service, prepared, path)?;
        files.push((template.clone(), digest));
        // rustc refuses a module with two files (E0761), so the other one is an input as well.
        if let Some(twin) = module_twin(path)
            && exists(service, prepared, &twin)
        {
            let template = prepared.roots.template_place(twin.as_os_str().as_bytes());
            files.push((template, Digest::of(b"kachefs other file of a module")));
        }
    }
    let environment = record
        .env
        .iter()
        .map(|name| {
            let value = environment::value(&prepared.environment, name.as_bytes());
            (
                name.clone(),
                value.map(|value| prepared.roots.template(value)),
            )
        })
        .collect();
    let observed = match &record.observed {
        Some(observed) => Some(look_again(prepared.site(service), observed)?),
        None => None,
    };
    let package = match &observed {
        Some(_) => None,
        None => prepared.package(service).ok()?.0,
    };
    Some(Sources {
        files,
        environment,
        observed,
        package,
    })
}

/// What is now where an earlier run looked; `None` when that cannot be told.
pub fn look_again(site: Site<'_>, observed: &[Observation]) -> Option<Vec<(Observation, Digest)>> {
    observed
        .iter()
        .map(|observation| {
            let is_somewhere = site.roots.knows(&observation.path);
            is_somewhere.then_some(())?;
            Some((observation.clone(), site.look_again(observation)?))
        })
        .collect()
}

/// The other place of a module's file: `x/mod.rs` for `x.rs`, `x.rs` for `x/mod.rs`.
pub fn module_twin(source: &Path) -> Option<PathBuf> {
    if source.extension() != Some(OsStr::new("rs")) {
        return None;
    }
    if source.file_name() != Some(OsStr::new("mod.rs")) {
        return Some(source.with_extension("").join("mod.rs"));
    }
    let directory = source.parent()?;
    let mut name = directory.file_name()?.to_owned();
    name.push(".rs");
    Some(directory.with_file_name(name))
}

/// Whether this compiler would find something there.
fn exists(service: &Service, prepared: &Prepared, path: &Path) -> bool {
    match prepared.locate(service, path) {
        // What cannot be looked at is no file to the compiler either.
        Place::Disk(path) => path.exists(),
        Place::View(view, path) => view.resolve(&path).is_ok(),
    }
}

/// The digest of one source as this compiler would find it.
pub fn source_digest(service: &Service, prepared: &Prepared, path: &Path) -> Option<Digest> {
    match prepared.locate(service, path) {
        Place::Disk(path) => service.files.file(&path).ok(),
        Place::View(view, path) => {
            let node = view.resolve(&path).ok()?;
            view.content_digest(&node).ok()
        }
    }
}

/// Whether every blob of a result can be had: it is on this disk, or lately was in a remote that answers.
pub(super) fn is_whole(service: &Service, result: &ActionResult) -> bool {
    service.storage.may_be_bound(result.blobs())
}

/// Puts the outputs of a found result into the out-dir, and counts the hit in the same commit.
pub fn bind(service: &Service, prepared: &Prepared, found: &Found) -> FsResult<()> {
    let outputs = found
        .result
        .outputs
        .iter()
        .map(|output| {
            let body = match &output.content {
                OutputContent::Blob { digest, size } => Body::Blob {
                    digest: *digest,
                    size: *size,
                },
                OutputContent::Template(template) => Body::Inline(prepared.roots.render(template)),
            };
            // As the compiler would have made it: everybody may read and, where anybody may,
            // execute; less the caller's umask.
            let mode = if output.mode & 0o111 == 0 {
                0o666
            } else {
                0o777
            } & !prepared.umask;
            let perm = u16::try_from(mode & 0o777).map_err(|_| Errno::EINVAL)?;
            Ok(Bound {
                name: output.name.clone().into_bytes(),
                perm,
                body,
            })
        })
        .collect::<FsResult<Vec<_>>>()?;
    let outputs = service.launchers.beside(prepared, outputs);
    let counted = [
        (Counter::Hits, 1),
        (Counter::BytesReferenced, found.result.referenced_bytes()),
        (Counter::SavedMs, found.result.compile_ms),
    ];
    prepared.view.bind(
        prepared.out_dir,
        outputs,
        Some(found.key),
        prepared.caller,
        |batch| {
            batch.count(&counted, None);
        },
    )
}
