//! `kachefs push`: what was made here goes to the remote now.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use store::StoreDir;
use wrapper::protocol::{Answer, Control};

use crate::daemon::client;
use crate::lazy::Pushed;
use crate::remote_config::{self, RemoteConfig};

/// Between two looks how far it is.
const GLANCE: Duration = Duration::from_millis(100);

/// Rounds that have to end before everything noted until now was tried: one may be under way.
const ROUNDS: u64 = 2;

/// How many times as long as anything waits for the remote may go by with nothing uploaded.
const PATIENCE: u32 = 3;

/// Upload what was made here.
///
/// That happens by itself, in the background. With `--wait` the command ends when nothing is left, for
/// machines that go away after a build; it fails when the remote does not take it.
#[derive(Debug, Args)]
pub struct Push {
    /// Wait until everything is uploaded
    #[arg(long)]
    wait: bool,
    /// Print JSON for scripts
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    schema: u32,
    /// Results that are still to be uploaded.
    left: u64,
    /// Why, if that is known.
    failure: Option<String>,
}

impl Push {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        let first = ask(dir)?;
        let pushed = if self.wait { wait(dir, &first)? } else { first };
        let done = pushed.left == 0 && pushed.failure.is_none();
        if self.json {
            let report = Report {
                schema: 1,
                left: pushed.left,
                failure: pushed.failure.clone(),
            };
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else if done {
            println!("everything is uploaded");
        } else if !self.wait {
            println!("{} results are being uploaded", pushed.left);
        }
        if self.wait && !done {
            let why = pushed.failure.unwrap_or_else(|| "more is made".to_owned());
            bail!("{} results are not uploaded: {why}", pushed.left);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn wait(dir: &StoreDir, first: &Pushed) -> Result<Pushed> {
    let mut error = std::io::stderr();
    let shows = error.is_terminal();
    let wait = RemoteConfig::load(dir)?.map_or(remote_config::WAIT, |config| config.wait);
    let patience = PATIENCE * wait;
    let mut moved = Instant::now();
    let mut pushed = first.clone();
    loop {
        let tried = pushed.rounds >= first.rounds + ROUNDS;
        let gives_up = !pushed.is_passing || moved.elapsed() > patience;
        if tried
            && (pushed.failure.is_none() && pushed.left == 0
                || pushed.failure.is_some() && gives_up)
        {
            break;
        }
        if shows {
            // Who cannot be shown how far it is waits all the same.
            let _ = write!(error, "\r{} results left ", pushed.left);
        }
        thread::sleep(GLANCE);
        let now = ask(dir)?;
        if now.left != pushed.left {
            moved = Instant::now();
        }
        pushed = now;
    }
    if shows {
        let _ = write!(error, "\r\x1b[K");
    }
    Ok(pushed)
}

fn ask(dir: &StoreDir) -> Result<Pushed> {
    match client::ask(dir, Control::Push)? {
        Some(Answer::Report(json)) => {
            serde_json::from_str(&json).context("the daemon's answer does not parse")
        }
        Some(Answer::Failed(why)) => bail!(why),
        None => bail!("no daemon is running for this store; `kachefs mount` starts one"),
        other => bail!("unexpected answer from the daemon: {other:?}"),
    }
}
