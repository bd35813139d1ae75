//! Managed targets: which mounts come back by themselves, and the mount that steps aside for
//! `cargo clean`.
//!
//! Cargo empties a target and then removes the directory itself. The kernel refuses that for a
//! mountpoint without asking us, so the daemon detaches the mount when cargo has removed the last
//! name, before it answers: the `rmdir` that follows meets the plain empty directory.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use parking_lot::Mutex;
use store::{ManagedTarget, ViewId};

use super::mounts::{MountOutcome, Mounted, Mounts, Shown};
use crate::fs::View;
use crate::mount;

/// Options of `cargo` itself that take the next word as their value.
const GLOBAL_VALUES: &[&[u8]] = &[b"--color", b"--config", b"--explain", b"-C", b"-Z"];

/// Options of `cargo clean` that leave a part of the target alone.
const PARTIAL: &[&str] = &[
    "--package",
    "--profile",
    "--release",
    "--doc",
    "--workspace",
    "--dry-run",
];

impl Mounts {
    /// Makes a target managed. That it will not come back by itself is no reason not to mount it.
    pub fn manage(&self, path: &Path) {
        if let Err(error) = self.storage.dir.managed().add(path) {
            tracing::warn!(path = %path.display(), %error, "it will not come back by itself");
        }
    }

    /// Mounts the managed targets that are where they were, when the daemon starts. Not those it has
    /// taken over: one that is gone since was cleaned, and cargo is about to remove its directory.
    pub fn remount_all(&self, taken: &[PathBuf]) {
        let (targets, damaged) = match self.storage.dir.managed().all() {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "cannot list managed targets");
                return;
            }
        };
        for error in damaged {
            tracing::error!(%error, "a managed target is forgotten");
        }
        let managed = targets.iter().map(ManagedTarget::path);
        for path in managed.filter(|path| !taken.contains(path)) {
            let _changing = self.changing.lock();
            // Not one that was removed: it comes back when the next build asks for it.
            if is_removed(&path) {
                continue;
            }
            match self.remount_locked(&path) {
                Ok(Some(MountOutcome::Mounted(_))) => {
                    tracing::info!(path = %path.display(), "mounted again");
                }
                // Not ours any more, or taken over.
                Ok(None | Some(MountOutcome::Already)) => {}
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(path = %path.display(), error, "not mounted again");
                }
            }
        }
    }

    /// Mounts a managed target again; `None` when it is not managed, or when another directory
    /// has taken the place of the one it was in.
    pub fn remount(&self, path: &Path) -> Result<Option<MountOutcome>> {
        let _changing = self.changing.lock();
        self.remount_locked(path)
    }

    fn remount_locked(&self, path: &Path) -> Result<Option<MountOutcome>> {
        let known = self.storage.dir.managed().find(path)?;
        if !known.is_some_and(|target| target.is_in_place()) {
            return Ok(None);
        }
        // Somebody removed the directory while no view was mounted there, as `cargo clean` does
        // after a reboot: what it held must not come back.
        let shown = if is_removed(path) {
            Shown::Empty
        } else {
            Shown::AsItWas
        };
        self.attach(path, shown).map(Some)
    }
}

/// Whether nothing is at `path`, not even a dead mount.
fn is_removed(path: &Path) -> bool {
    let mounted = mount::mounted_at(path).is_ok_and(|line| line.is_some());
    !mounted
        && fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Detaches the mount of `view`, whose last name the process `pid` has just removed, if that is
/// `cargo clean`; returns whether it did. Called by the worker that has not answered yet: the kernel holds
/// the root directory's lock for that process, so nobody makes a new name in between, and the path is
/// resolved without a request to this mount.
pub(super) fn emptied(mounted: &Mutex<HashMap<ViewId, Mounted>>, view: &View, pid: u32) -> bool {
    if !cleans_everything(pid) {
        return false;
    }
    let found = mounted
        .lock()
        .get(&view.id)
        .filter(|known| std::ptr::eq(&raw const *known.view, view) && !known.leaving)
        .map(|known| (known.path.clone(), known.device));
    let Some((path, device)) = found else {
        return false;
    };
    if let Err(error) = detach(&path, device) {
        tracing::warn!(path = %path.display(), %error, "not detached for cargo clean");
        return false;
    }
    if !view.retire() {
        tracing::error!(path = %path.display(), "detached although it is not empty");
        return false;
    }
    // The session goes on for whoever still uses something unlinked, and ends by itself.
    drop(mounted.lock().remove(&view.id));
    tracing::info!(path = %path.display(), "detached for cargo clean");
    true
}

/// Detaches the mount with this device number, and no other that may be at its path.
fn detach(path: &Path, device: u64) -> Result<()> {
    let ours = mount::mounted_at(path)?
        .is_some_and(|line| nix::sys::stat::makedev(0, u64::from(line.minor)) == device);
    if !ours {
        return Err(anyhow!("it is mounted elsewhere"));
    }
    mount::unmount(path, true).map_err(|error: Errno| error.into())
}

fn cleans_everything(pid: u32) -> bool {
    let read = |file| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = read("cmdline");
    let argv: Vec<&[u8]> = line
        .strip_suffix(b"\0")
        .unwrap_or(&line)
        .split(|byte| *byte == 0)
        .collect();
    let called = Path::new(std::ffi::OsStr::from_bytes(argv[0])).file_name();
    let is_cargo = called.is_some_and(|name| name == "cargo") || read("comm") == b"cargo\n";
    is_cargo && is_whole_clean(&argv[1..])
}

/// Whether these arguments of cargo remove the whole target.
fn is_whole_clean(arguments: &[&[u8]]) -> bool {
    let mut words = arguments.iter();
    let command = loop {
        match words.next() {
            Some(word) if GLOBAL_VALUES.contains(word) => drop(words.next()),
            // A toolchain, where rustup's proxy left it in place.
            Some(word) if word.starts_with(b"-") || word.starts_with(b"+") => {}
            word => break word,
        }
    };
    command == Some(&&b"clean"[..]) && !words.any(|word| is_partial(word))
}

fn is_partial(word: &[u8]) -> bool {
    let name = word.split(|byte| *byte == b'=').next().unwrap_or(word);
    if name.starts_with(b"--") {
        return PARTIAL.iter().any(|option| option.as_bytes() == name);
    }
    // `-p`, `-r` and `-n`, alone or among others (`-qr`), but not in the value of another option.
    word.starts_with(b"-")
        && !word.starts_with(b"-Z")
        && !word.starts_with(b"-C")
        && word.iter().any(|letter| b"prn".contains(letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(line: &str) -> bool {
        let words: Vec<&[u8]> = line.split_whitespace().map(str::as_bytes).collect();
        is_whole_clean(&words)
    }

    #[test]
    fn only_a_whole_clean_counts() {
        for line in [
            "clean",
            "+nightly clean",
            "-q clean",
            "-C clean clean",
            "--color never clean -v",
            "--config build.jobs=2 clean --target-dir other",
            "-Z unstable-options clean -Zprofile-rustflags",
            "clean --manifest-path crates/app/Cargo.toml --offline",
        ] {
            assert!(whole(line), "{line}");
        }
        for line in [
            "",
            "build",
            "-C clean build",
            "run -- clean",
            "clean -p app",
            "clean -papp",
            "clean --package=app",
            "clean --release",
            "clean -qr",
            "clean --profile dev",
            "clean --doc",
            "clean -n",
            "clean --dry-run",
        ] {
            assert!(!whole(line), "{line}");
        }
    }

    #[test]
    fn this_process_is_no_cargo_clean() {
        assert!(!cleans_everything(std::process::id()));
        assert!(!cleans_everything(0));
    }
}
