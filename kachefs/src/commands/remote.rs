//! `kachefs remote`: which remote a store has, and whether it works.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use remote::signed::{PublicKey, Trust};
use remote::{Checked, DirectoryRemote, Limits, Location};
use serde::Serialize;
use store::StoreDir;

use super::remote_gc::RemoteGc;
use crate::remote_config::{self, Prefetch, RemoteConfig, S3Options};

/// Share what is compiled here by way of a bucket or a directory.
#[derive(Debug, Args)]
pub struct Remote {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Use a bucket or a directory
    Set(Set),
    /// Use none any more
    Unset,
    /// Show which remote is used
    Status {
        /// Print JSON for scripts
        #[arg(long)]
        json: bool,
    },
    /// Write, read and remove an object, and say what does not work
    Check {
        /// Print JSON for scripts
        #[arg(long)]
        json: bool,
    },
    /// Remove what nothing names
    Gc(RemoteGc),
}

/// Use a bucket or a directory.
///
/// Keys that are trusted stay so; `remote unset` forgets them. Credentials are not given here: they come
/// from the environment, the profile, the container or the instance, as for every program that uses AWS.
#[derive(Debug, Args)]
struct Set {
    /// `s3://BUCKET/PREFIX`, or the absolute path of a directory that others see as well
    url: String,
    /// The service, where it is not AWS: `http://127.0.0.1:8333`
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The region of the bucket
    #[arg(long)]
    region: Option<String>,
    /// The profile in the configuration of AWS
    #[arg(long)]
    profile: Option<String>,
    /// Ask without credentials
    #[arg(long)]
    anonymous: bool,
    /// Upload nothing
    #[arg(long)]
    read_only: bool,
    /// Use only what this key has signed; can be given several times [default: as before]
    #[arg(long, value_name = "KEY")]
    trust: Vec<PublicKey>,
    /// How long a build waits for an answer before it goes on without [default: 10, or as before]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    wait: Option<u64>,
    /// How many bytes to send per second, on average: `5MiB` [default: no limit, or as before]
    #[arg(long, value_name = "BYTES", value_parser = remote_config::parse_limit)]
    upload_limit: Option<u64>,
    /// What to fetch before a build asks for it [default: trace, or as before]
    #[arg(long, value_name = "MODE")]
    prefetch: Option<Prefetch>,
    /// How many bytes of blobs to fetch early for one build: `1GiB` [default: 256 MiB, or as before]
    #[arg(long, value_name = "BYTES", value_parser = remote_config::parse_bytes)]
    prefetch_budget: Option<u64>,
    /// How long `remote gc` leaves alone what nothing names: `12h`. The same on all machines [default:
    /// 3days, or as before]
    #[arg(long, value_name = "TIME", value_parser = remote_config::parse_grace)]
    grace: Option<Duration>,
}

#[derive(Serialize)]
struct Status {
    schema: u32,
    remote: Option<String>,
    read_only: bool,
    trusted: Vec<String>,
    own_key: Option<String>,
}

#[derive(Serialize)]
struct Verdict {
    schema: u32,
    ok: bool,
    remote: String,
    read_ms: f64,
    write_ms: Option<f64>,
    findings: Vec<String>,
}

impl Remote {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        match self.action {
            Action::Set(set) => set.run(dir)?,
            Action::Unset => {
                let existed = RemoteConfig::remove(dir)?;
                println!(
                    "{}",
                    if existed {
                        "the store has no remote any more"
                    } else {
                        NONE
                    }
                );
            }
            Action::Status { json } => status(dir, json)?,
            Action::Check { json } => return check(dir, json),
            Action::Gc(gc) => return gc.run(dir),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What is said to those who have none.
pub(super) const NONE: &str = "the store has no remote (kachefs remote set)";

impl Set {
    fn run(self, dir: &StoreDir) -> Result<()> {
        let options = S3Options {
            endpoint: self.endpoint,
            region: self.region,
            profile: self.profile,
            anonymous: self.anonymous,
        };
        let location = options.place(&self.url)?;
        // Who stops believing everybody does so until they say otherwise.
        let before = RemoteConfig::load(dir)?;
        let trust = match (self.trust, &before) {
            (keys, _) if !keys.is_empty() => Trust::Only(keys),
            (_, Some(before)) => before.trust.clone(),
            _ => Trust::Everybody,
        };
        let wait = before.as_ref().map(|before| before.wait);
        let wait = wait.unwrap_or(remote_config::WAIT);
        let upload_limit = before.as_ref().and_then(|before| before.upload_limit);
        let prefetch = before.as_ref().map(|before| before.prefetch);
        let budget = before.as_ref().map(|before| before.prefetch_budget);
        let grace = before.map_or(remote_config::GRACE, |before| before.grace);
        let wait = self.wait.map_or(wait, Duration::from_secs);
        let config = RemoteConfig {
            location,
            read_only: self.read_only,
            trust,
            wait,
            upload_limit: self.upload_limit.or(upload_limit),
            prefetch: self.prefetch.or(prefetch).unwrap_or_default(),
            prefetch_budget: self
                .prefetch_budget
                .or(budget)
                .unwrap_or(remote_config::PREFETCH_BUDGET),
            grace: self.grace.unwrap_or(grace),
        };
        let is_new = match &config.location {
            Location::Directory(path) => find_or_make(path, config.read_only)?,
            Location::S3(_) => false,
        };
        config.save(dir)?;
        status(dir, false)?;
        if is_new {
            println!("new      yes: if others use it already, it is not mounted here");
        }
        Ok(())
    }
}

/// Makes sure that there is a remote in a directory, if only an empty one. Whether there was none: nobody can
/// tell a new one from a mount point where nothing is mounted but who sets it.
fn find_or_make(path: &Path, read_only: bool) -> Result<bool> {
    if !path.is_dir() {
        bail!("{} is no directory; make it first", path.display());
    }
    let failed = |error| anyhow!("{} cannot be used: {error}", path.display());
    if DirectoryRemote::is_one(path).map_err(failed)? {
        return Ok(false);
    }
    if read_only {
        bail!(
            "{} is no remote: it is not mounted, or new, and has to be set without --read-only first",
            path.display()
        );
    }
    DirectoryRemote::make(path).map_err(failed)?;
    Ok(true)
}

fn status(dir: &StoreDir, json: bool) -> Result<()> {
    let config = RemoteConfig::load(dir)?;
    let own = remote_config::signing_key(dir)?.map(|key| key.public().to_string());
    let trust = config.iter().flat_map(|config| config.trust.keys());
    let status = Status {
        schema: 1,
        remote: config.as_ref().map(|config| config.location.to_string()),
        read_only: config.as_ref().is_some_and(|config| config.read_only),
        trusted: trust.map(ToString::to_string).collect(),
        own_key: own,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(());
    }
    let Some(remote) = status.remote else {
        println!("{NONE}");
        return Ok(());
    };
    println!("remote   {remote}");
    println!("uploads  {}", if status.read_only { "no" } else { "yes" });
    println!(
        "signs    {}",
        status
            .own_key
            .as_deref()
            .unwrap_or("nothing (kachefs key generate)")
    );
    let trusted = status.trusted.join(", ");
    let everybody = "everybody who can write to it";
    println!(
        "trusts   {}",
        if trusted.is_empty() {
            everybody
        } else {
            &trusted
        }
    );
    Ok(())
}

fn check(dir: &StoreDir, json: bool) -> Result<ExitCode> {
    let config = RemoteConfig::load(dir)?.context(NONE)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let checked = runtime.block_on(async {
        let remote = remote::open(&config.location, Limits::default()).await?;
        remote::check(&*remote, config.read_only).await
    });
    // A directory that hangs holds a thread.
    runtime.shutdown_background();
    let Checked {
        read,
        write,
        findings,
    } = checked?;
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
    let verdict = Verdict {
        schema: 1,
        ok: findings.is_empty(),
        remote: config.location.to_string(),
        read_ms: milliseconds(read),
        write_ms: write.map(milliseconds),
        findings,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        for finding in &verdict.findings {
            println!("PROBLEM {finding}");
        }
        if verdict.ok {
            let write = verdict
                .write_ms
                .map(|ms| format!(", written in {ms:.1} ms"));
            let write = write.unwrap_or_else(|| ", not written".to_owned());
            println!(
                "ok      {}: read in {:.1} ms{write}",
                verdict.remote, verdict.read_ms
            );
        }
    }
    Ok(if verdict.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
