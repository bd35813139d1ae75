//! Where clippy finds its configuration.
//!
//! It looks for a file in the package's directory and in every one above, up to the first that has
//! one. What it finds is keyed here, so that those looks bind no result to where the checkout lies.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use store::{Digest, Hasher};
use wrapper::environment::{self, Environment};
use wrapper::roots::Roots;

use super::files::FileDigests;

/// The names of its configuration (the clippy book, "Configuration").
const NAMES: [&str; 2] = [".clippy.toml", "clippy.toml"];

/// Variables that say where it begins to look, first to last.
const FROM: [&[u8]; 2] = [b"CLIPPY_CONF_DIR", b"CARGO_MANIFEST_DIR"];

/// The configuration of one run.
pub(super) struct Configuration {
    /// Every place it may lie at, up to the first directory that has one.
    pub(super) places: Vec<PathBuf>,
    /// What is there.
    pub(super) digest: Digest,
}

/// Looks where clippy does.
pub(super) fn configuration(
    files: &FileDigests,
    environment: &Environment,
    cwd: &Path,
    roots: &Roots,
) -> io::Result<Configuration> {
    let named = FROM
        .iter()
        .find_map(|name| environment::value(environment, name));
    let start = cwd.join(OsStr::from_bytes(named.unwrap_or_default()));
    let start = fs::canonicalize(start)?;
    let mut places = Vec::new();
    let mut hasher = Hasher::new("kachefs clippy configuration");
    for directory in start.ancestors() {
        let mut found = false;
        for name in NAMES {
            let path = directory.join(name);
            // A directory of that name is none, and a link that leads nowhere is as nothing.
            if fs::metadata(&path).is_ok_and(|meta| !meta.is_dir()) {
                found = true;
                let place = roots.template(path.as_os_str().as_bytes());
                hasher.field(&place).digest(&files.file(&path)?);
            }
            places.push(path);
        }
        if found {
            break;
        }
    }
    Ok(Configuration {
        places,
        digest: hasher.finish(),
    })
}
