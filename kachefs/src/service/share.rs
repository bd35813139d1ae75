//! What other machines are told, and what they are asked: results by way of the store's remote.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use store::{
    ActionEntry, ActionKey, Batch, Digest, Hasher, IndexError, InputRecord, InvocationDigest, Root,
    Upload,
};
use wrapper::mode::Mode;
use wrapper::protocol::ProtocolError;

use super::builds::started;
use super::prepare::Prepared;
use super::pulse::Pulse;
use super::{Action, Service};
use crate::fs::View;
use crate::lazy::manifests::{Part, Process};
use crate::lazy::secrets::Secrets;

/// Which results belong together: changes when they do not any more.
const FINGERPRINT: u64 = 1;

/// Directories of a layout that lie in the profile's.
const OF_LAYOUT: [&[u8]; 3] = [b"deps", b"build", b"examples"];

/// Where a result came from, as others find it.
#[derive(Clone)]
pub(super) struct Source {
    /// The input record that led to it.
    pub(super) record: InputRecord,
    /// The key, before it was bound to paths.
    pub(super) key: ActionKey,
}

/// The build an action belongs to.
#[derive(Clone, Copy)]
pub(super) struct Build {
    process: Process,
    fingerprint: Digest,
}

/// The process that asks, with when it started.
pub(super) fn process(parent: u32) -> Process {
    (parent, started(parent))
}

impl Service {
    /// Asks the remote, where the store has one, for what nobody has made here. Whether there is a
    /// result now.
    pub(super) fn learn(
        &self,
        stream: &UnixStream,
        action: &impl Action,
    ) -> Result<bool, ProtocolError> {
        if self.storage.lazy.connection().is_none() {
            return Ok(false);
        }
        let learned = Pulse::during(stream, || {
            if let Some(build) = action.build() {
                self.storage.learn_build(&build.fingerprint);
                if action.find().is_some() {
                    return true;
                }
            }
            self.storage.learn(&action.invocation()) && action.find().is_some()
        })?;
        Ok(learned)
    }

    /// The build a compile belongs to; `None` where nobody could have the same one, or would be told.
    pub(super) fn build_of(&self, prepared: &Prepared) -> Option<Build> {
        self.storage.lazy.connection()?;
        let process = process(prepared.parent);
        let target = Path::new(prepared.roots.path(Root::View));
        let beside_target = target.parent().and_then(lockfile_above);
        let lockfile = beside_target.or_else(|| {
            let cwd = std::fs::read_link(format!("/proc/{}/cwd", prepared.parent)).ok()?;
            lockfile_above(&cwd)
        })?;
        let out_dir = prepared.view.path_of(prepared.out_dir).ok()?;
        let mut hasher = Hasher::new("kachefs build");
        hasher
            .number(FINGERPRINT)
            .digest(&self.files.file(&lockfile).ok()?)
            .digest(&prepared.facts.compiler)
            .field(profile_of(&out_dir))
            .number(u64::from(prepared.mode == Mode::Exact));
        Some(Build {
            process,
            fingerprint: hasher.finish(),
        })
    }

    /// The build a run of a script belongs to: that of what its process asked for before.
    pub(super) fn build_of_process(&self, parent: u32) -> Option<Build> {
        self.storage.lazy.connection()?;
        let process = process(parent);
        let fingerprint = self.storage.lazy.builds.fingerprint(process)?;
        Some(Build {
            process,
            fingerprint,
        })
    }

    /// Notes that a build has used or made a result.
    pub(super) fn note_part(
        &self,
        build: Option<Build>,
        invocation: InvocationDigest,
        source: &Source,
        stored_under: ActionKey,
    ) {
        let Some(build) = build.filter(|_| self.storage.lazy.writable().is_some()) else {
            return;
        };
        match store::record_digest(&invocation, &source.record) {
            Ok(record) => {
                let keys = keys(source.key, stored_under);
                let part = Part {
                    invocation,
                    record,
                    keys,
                };
                let builds = &self.storage.lazy.builds;
                builds.note(build.process, build.fingerprint, part);
            }
            Err(error) => tracing::warn!(%error, "part of a build"),
        }
    }

    /// A build got a result that others may have made: what it will read of it may be fetched now.
    pub(super) fn foresee(&self, build: Option<Build>, key: &ActionKey) {
        let Some(Build {
            process,
            fingerprint,
        }) = build
        else {
            return;
        };
        let blobs = || match self.storage.index.action(key) {
            Ok(entry) => entry.iter().flat_map(ActionEntry::blobs).collect(),
            Err(error) => {
                tracing::warn!(%error, "result that was bound");
                Vec::new()
            }
        };
        self.storage.foresee(process, fingerprint, blobs);
    }

    /// A build has to make something itself.
    pub(super) fn has_missed(&self, build: Option<Build>, view: &View) {
        if let Some(build) = build {
            let shown = || view.blobs();
            self.storage
                .has_missed(build.process, build.fingerprint, shown);
        }
    }

    /// Notes, with the commit that stores a result, that others are to be told of it.
    pub(super) fn share(
        &self,
        batch: &mut Batch<'_>,
        secrets: Option<&Secrets>,
        invocation: InvocationDigest,
        source: &Source,
        (stored_under, entry): (ActionKey, &ActionEntry),
    ) -> Result<(), IndexError> {
        let Some(connection) = self.storage.lazy.writable() else {
            return Ok(());
        };
        let Some(secrets) = secrets else {
            tracing::info!("not uploaded: nobody knows what must not leave this machine");
            return Ok(());
        };
        let upload = Upload {
            remote: connection.id,
            invocation,
            record: source.record.clone(),
            keys: keys(source.key, stored_under),
            secrets: secrets.to_vec(),
            result: Some(entry.digest()?),
        };
        self.storage.note_upload(batch, &upload)
    }

    /// What must not leave this machine of what a process, or what it runs, makes; `None` where nothing
    /// is sent. Asked while the process is there.
    pub(super) fn secrets_of(&self, parent: u32) -> Option<Secrets> {
        self.storage.lazy.writable()?;
        let (pid, started) = process(parent);
        self.secrets.process(pid, started)
    }
}

fn keys(key: ActionKey, stored_under: ActionKey) -> Vec<ActionKey> {
    let mut keys = vec![key, stored_under];
    keys.dedup();
    keys
}

/// The lockfile of the workspace a directory is in: cargo's search (the cargo book, "Workspaces"), but
/// by the lockfile itself.
fn lockfile_above(directory: &Path) -> Option<PathBuf> {
    let mut candidates = directory.ancestors().map(|above| above.join("Cargo.lock"));
    candidates.find(|path| path.is_file())
}

/// The directory of the profile in an out-dir: `debug` of `debug/deps`, and of
/// `x86_64-unknown-linux-gnu/debug/build/…`.
fn profile_of(out_dir: &[u8]) -> &[u8] {
    let parts: Vec<&[u8]> = out_dir.split(|byte| *byte == b'/').collect();
    let of_layout = parts.iter().position(|part| OF_LAYOUT.contains(part));
    let before = of_layout.unwrap_or(parts.len()).checked_sub(1);
    before
        .and_then(|at| parts.get(at))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_found_in_every_layout() {
        for (out_dir, profile) in [
            ("debug/deps", "debug"),
            ("release/examples", "release"),
            ("x86_64-unknown-linux-musl/release/deps", "release"),
            ("debug/build/serde/0123/out", "debug"),
            ("debug", "debug"),
            ("deps", ""),
        ] {
            assert_eq!(
                profile_of(out_dir.as_bytes()),
                profile.as_bytes(),
                "{out_dir}"
            );
        }
    }

    #[test]
    fn a_lockfile_is_looked_for_upwards() {
        let dir = tempfile::tempdir().expect("tempdir");
        let below = dir.path().join("a/b");
        std::fs::create_dir_all(&below).expect("mkdir");
        let lockfile = dir.path().join("Cargo.lock");
        std::fs::write(&lockfile, b"").expect("writes");
        assert_eq!(lockfile_above(&below), Some(lockfile));
    }
}
