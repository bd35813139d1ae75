//! `kachefs doctor`: checks what kachefs needs and says what to do about what is missing.

use std::env;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use store::{Quarantine, StoreDir};
use wrapper::protocol::Control;

use super::init::{self, Configured};
use super::{dead_mounts, stats};
use crate::daemon::client;

/// Check that everything kachefs needs is there.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
    /// Remove mounts whose daemon is gone
    #[arg(long)]
    fix: bool,
}

/// One check.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    detail: String,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    ok: bool,
    version: &'static str,
    checks: Vec<Check>,
}

impl Doctor {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let checks = vec![
            fuse(),
            permissions(),
            store(dir),
            quarantine(dir),
            wrapper(),
            watching(),
            cargo(),
            rustc(),
            daemon(dir),
            check("mounts", dead_mounts::check(self.fix)),
        ];
        let ok = checks.iter().all(|check| check.ok);
        if self.json {
            let version = env!("CARGO_PKG_VERSION");
            println!(
                "{}",
                serde_json::to_string_pretty(&Report {
                    schema: 1,
                    ok,
                    version,
                    checks
                })?
            );
        } else {
            println!("kachefs {}", env!("CARGO_PKG_VERSION"));
            for check in &checks {
                let mark = if check.ok { "ok     " } else { "PROBLEM" };
                println!("{mark} {:<12} {}", check.name, check.detail);
            }
        }
        Ok(if ok {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn check(name: &'static str, result: Result<String, String>) -> Check {
    let ok = result.is_ok();
    Check {
        name,
        ok,
        detail: result.unwrap_or_else(|problem| problem),
    }
}

fn fuse() -> Check {
    let kernel = nix::sys::utsname::uname()
        .map(|uname| uname.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    check(
        "fuse",
        match fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
        {
            Ok(_) => Ok(format!("/dev/fuse opens, Linux {kernel}")),
            Err(error) => Err(format!(
                "/dev/fuse: {error}; load the fuse module, or in a container pass the device in"
            )),
        },
    )
}

fn permissions() -> Check {
    let result = if nix::unistd::geteuid().is_root() {
        Ok("root: mounts directly".to_owned())
    } else {
        match Command::new("fusermount3").arg("--version").output() {
            Ok(output) => Ok(format!(
                "ordinary user: mounts through {}",
                String::from_utf8_lossy(&output.stdout).trim()
            )),
            Err(error) => Err(format!("fusermount3: {error}; install the fuse3 package")),
        }
    };
    check("permissions", result)
}

fn store(dir: &StoreDir) -> Check {
    let root = dir.root();
    let write = || -> Result<String> {
        dir.create()?;
        let probe = dir.run().join(format!("doctor-{}", std::process::id()));
        let written = fs::File::create(&probe).and_then(|mut file| file.write_all(b"ok"));
        let _ = fs::remove_file(&probe);
        written?;
        let disk = nix::sys::statvfs::statvfs(root)?;
        let free = disk.blocks_available() * disk.fragment_size() / (1 << 20);
        Ok(format!("{} is writable, {free} MiB free", root.display()))
    };
    check(
        "store",
        write().map_err(|error| format!("{}: {error:#}", root.display())),
    )
}

/// Something in it is no problem any more: what was damaged has been dealt with.
fn quarantine(dir: &StoreDir) -> Check {
    let result = match Quarantine::new(dir).contents() {
        Ok(found) if found.files == 0 => Ok("empty".to_owned()),
        Ok(found) => Ok(format!(
            "{} files, {}, were damaged: {} may be deleted, daemon.log names them",
            found.files,
            stats::bytes(found.bytes),
            dir.quarantine().display()
        )),
        Err(error) => Err(format!("{}: {error}", dir.quarantine().display())),
    };
    check("quarantine", result)
}

fn wrapper() -> Check {
    let from_environment = env::var("RUSTC_WRAPPER").ok();
    let result = match (from_environment, init::current()) {
        (Some(wrapper), _) if Path::new(&wrapper).ends_with(init::WRAPPER) => {
            Ok(format!("RUSTC_WRAPPER={wrapper}"))
        }
        (Some(other), _) => Err(format!("RUSTC_WRAPPER={other} stands in the way")),
        (None, Ok(Configured::Kachefs)) => init::wrapper_path()
            .map(|path| format!("configured; {path}"))
            .map_err(|error| format!("{error:#}")),
        (None, Ok(Configured::Nothing)) => Err(
            "not configured; `kachefs mount` sets it, or set RUSTC_WRAPPER=kachefs-rustc".into(),
        ),
        (None, Ok(Configured::Other(other))) => Err(format!(
            "cargo is configured to use {other}; builds are not cached"
        )),
        (None, Err(error)) => Err(format!("{error:#}")),
    };
    check("wrapper", result)
}

/// Doing without is no problem, only slower: see `docs/cache-key.md`.
fn watching() -> Check {
    let without = |why: String| {
        format!(
            "impossible here ({why}): build scripts run each time, and a crate with proc macros \
             counts its whole package"
        )
    };
    let detail = match wrapper::trace::is_possible() {
        Ok(()) => "compilers and build scripts are watched".to_owned(),
        Err(error) => without(error.to_string()),
    };
    check("watching", Ok(detail))
}

fn version_of(program: &str) -> Result<String, String> {
    match Command::new(program).arg("--version").output() {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        Ok(output) => Err(format!("{program} --version: {}", output.status)),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

fn cargo() -> Check {
    check("cargo", version_of("cargo"))
}

fn rustc() -> Check {
    check("rustc", version_of("rustc"))
}

/// Not running is fine: a mount starts it.
fn daemon(dir: &StoreDir) -> Check {
    let result = match client::ask(dir, Control::Ping) {
        Ok(None) => Ok("not running; `kachefs mount` starts it".to_owned()),
        Ok(answer) => super::done(answer).map(|pid| format!("running, pid {pid}")),
        Err(error) => Err(error),
    };
    check("daemon", result.map_err(|error| format!("{error:#}")))
}
