//! Two machines that share a directory: one has built something, the other has not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::{Must, Project, Sandbox, tree};

/// Two machines: each a sandbox of its own, with a directory that both see.
pub struct Machines {
    /// The directory.
    pub shared: TempDir,
    /// Who builds first.
    pub warm: Sandbox,
    /// Who has built nothing.
    pub cold: Sandbox,
}

impl Default for Machines {
    fn default() -> Self {
        Self::new()
    }
}

impl Machines {
    /// Both use the directory as their remote.
    pub fn new() -> Self {
        let shared = tempfile::tempdir().must("a directory");
        let machines = Self {
            shared,
            warm: Sandbox::new(),
            cold: Sandbox::new(),
        };
        for machine in [&machines.warm, &machines.cold] {
            machines.set(machine, "");
        }
        machines
    }

    /// Sets the remote of a machine with more options.
    pub fn set(&self, machine: &Sandbox, options: &str) {
        let shared = self.shared.path().display();
        machine
            .kachefs(&format!("remote set {shared} --wait 2 {options}"))
            .ok();
    }

    /// Builds on the warm machine, and uploads.
    pub fn build(&self, project: &Project, words: &str) {
        self.warm.mount(project.target());
        self.warm.cargo(project, words).ok();
        self.warm.kachefs("push --wait").ok();
    }

    /// The same for a project that a sample makes; then a checkout of it on the cold machine, mounted.
    pub fn built(sample: impl FnOnce(PathBuf) -> Project) -> (Self, Project) {
        let machines = Self::new();
        let project = sample(machines.warm.path("project"));
        machines.build(&project, "build");
        let checkout = machines.checkout(&project);
        (machines, checkout)
    }

    /// A checkout of the same project on the cold machine, mounted.
    pub fn checkout(&self, project: &Project) -> Project {
        let checkout = project.checkout(self.cold.path("somewhere/else"));
        self.cold.mount(checkout.target());
        checkout
    }

    /// The objects of a kind.
    pub fn objects(&self, kind: &str) -> Vec<PathBuf> {
        let directory = self.shared.path().join("v1").join(kind);
        if directory.exists() {
            tree::files(&directory)
        } else {
            Vec::new()
        }
    }
}

/// What a machine's statistics say of its remote.
pub fn remote(machine: &Sandbox) -> Value {
    machine.stats()["remote"].clone()
}

/// A number of those.
pub fn number(machine: &Sandbox, name: &str) -> u64 {
    remote(machine)[name].as_u64().must(name)
}

/// The libraries below a directory of a mount that somebody had to wait for when they were read. The daemon must have
/// been started with [`DEBUG_LOG`].
pub fn read_late(machine: &Sandbox, target: &Path) -> Vec<PathBuf> {
    let log = fs::read_to_string(machine.store().join("daemon.log")).must("a log");
    let waits: Vec<_> = log
        .lines()
        .filter(|line| line.contains("a read waits"))
        .collect();
    let is_library = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| ["rlib", "rmeta", "so", "a"].contains(&extension))
    };
    let is_late = |path: &PathBuf| {
        let ino = format!("ino=#{} ", fs::metadata(path).must("is there").ino());
        waits.iter().any(|line| line.contains(&ino))
    };
    let libraries = tree::files(target).into_iter().filter(is_library);
    libraries.filter(is_late).collect()
}

/// Has a daemon tell who waits for what (`KACHEFS_LOG`).
pub const DEBUG_LOG: &str = "info,kachefs=debug";
