//! What a proc macro may read of its user's package, none of which rustc reports.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use store::{Digest, Hasher, Kind, Timestamp};
use wrapper::environment;

use super::Service;
use super::files::Limits;
use super::prepare::{Place, Prepared, Refusal, immutable_packages};
use crate::fs::{Errno, Node, View};

/// How much of a package is keyed as a whole; a larger one is refused.
const PACKAGE: Limits = Limits {
    entries: 20_000,
    bytes: 1 << 30,
};

/// What a proc macro may read without anybody reporting it: the package directory, except views,
/// caches and most of version control, and what the package's build script left. Registry and git
/// packages never change under their path (cargo itself relies on it). With the time anything of it
/// changed last.
pub(super) fn package_digest(
    service: &Service,
    prepared: &Prepared,
) -> Result<(Option<Digest>, Timestamp), Refusal> {
    let variable = |name: &[u8]| {
        environment::value(&prepared.environment, name).map(|v| Path::new(OsStr::from_bytes(v)))
    };
    let directory = variable(b"CARGO_MANIFEST_DIR").ok_or(Refusal::Named("no-manifest-dir"))?;
    let immutable = immutable_packages(&prepared.roots)
        .iter()
        .any(|packages| directory.starts_with(packages));
    let package = if immutable {
        None
    } else {
        Some(directory_digest(service, directory)?)
    };
    let generated = match variable(b"OUT_DIR").map(|path| prepared.locate(service, path)) {
        None => None,
        Some(Place::Disk(path)) => Some(directory_digest(service, &path)?),
        Some(Place::View(view, path)) => {
            let mut newest = Timestamp::default();
            let digest = view
                .resolve(&path)
                .and_then(|node| view_tree(&view, &node, &mut newest))
                .map_err(|_| Refusal::Named("out-dir-unreadable"))?;
            Some((digest, newest))
        }
    };
    let mut newest = Timestamp::default();
    if package.is_none() && generated.is_none() {
        return Ok((None, newest));
    }
    let mut hasher = Hasher::new("kachefs package");
    for part in [package, generated] {
        match part {
            Some((digest, changed)) => {
                newest = newest.max(changed);
                hasher.number(1).digest(&digest);
            }
            None => drop(hasher.number(0)),
        }
    }
    Ok((Some(hasher.finish()), newest))
}

fn directory_digest(service: &Service, directory: &Path) -> Result<(Digest, Timestamp), Refusal> {
    let devices = service.mounts.devices();
    let skip = |_: &Path, meta: &Metadata| devices.contains(&meta.dev());
    service
        .files
        .tree(directory, PACKAGE, &skip)
        .map_err(|_| Refusal::Named("package-unreadable"))?
        .ok_or(Refusal::Named("package-too-large"))
}

/// Names and contents of everything below a directory of a view.
fn view_tree(view: &View, directory: &Node, newest: &mut Timestamp) -> Result<Digest, Errno> {
    let mut hasher = Hasher::new("kachefs directory tree");
    let mut rows = view.list(directory.ino, 0, usize::MAX)?;
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    for row in rows {
        let node = view.node(row.ino)?;
        hasher.field(&row.name);
        *newest = (*newest).max(node.state.lock().attributes.ctime);
        match node.kind {
            Kind::Dir => hasher
                .field(b"directory")
                .digest(&view_tree(view, &node, newest)?),
            Kind::File => hasher.field(b"file").digest(&view.content_digest(&node)?),
            Kind::Symlink => hasher.field(b"link").field(&view.readlink(row.ino)?),
            _ => hasher.field(b"special"),
        };
    }
    Ok(hasher.finish())
}
