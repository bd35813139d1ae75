//! Brings the source of a published real project, with everything it depends on.
//!
//! The only place that may need the network, and only the first time: it runs with the user's own
//! environment and cargo home, before the sandbox builds offline.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::{Cmd, toolchain};

const PATIENCE: Duration = Duration::from_mins(15);

/// Puts the source of a crate, with its `Cargo.lock`, at `dest` (new or empty), and what it depends
/// on into the user's cargo registry. Safe to call from several tests at once.
pub fn fetch_crate(name: &str, version: &str, dest: &Path) -> Result<()> {
    let script = toolchain::workspace().join("scripts/lib.sh");
    let fetched = Cmd::new("bash", dest)
        .envs(std::env::vars_os())
        .in_dir(toolchain::workspace())
        .arg(script)
        .args(["fetch_crate", name, version])
        .arg(dest)
        .timeout(PATIENCE)
        .run();
    if !fetched.status.success() {
        bail!("fetching {name} {version}\n{fetched}");
    }
    for file in ["Cargo.toml", "Cargo.lock"] {
        if !dest.join(file).is_file() {
            bail!(
                "fetch_crate {name} {version} left no {file} in {}\n{fetched}",
                dest.display()
            );
        }
    }
    Ok(())
}
