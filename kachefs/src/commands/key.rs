//! `kachefs key`: what this store signs with, and whose signatures it believes.

use std::io::ErrorKind;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use remote::signed::{PublicKey, SecretKey, Trust};
use serde::Serialize;
use store::StoreDir;

use crate::remote_config::{RemoteConfig, signing_key};

/// Say who may be believed.
///
/// A remote is believed nothing about bytes, which are held against their digests. That these bytes are
/// what a compiler made of those sources nobody can check, only promise: whoever uploads signs it with
/// the key of their store, and whoever downloads lists the keys they trust. Who lists none believes
/// everybody who can write to the remote.
#[derive(Debug, Args)]
pub struct Key {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the key this store signs with, and print its public half
    Generate,
    /// Show the key of this store, and those it trusts
    List {
        /// Print JSON for scripts
        #[arg(long)]
        json: bool,
    },
    /// Believe what these keys have signed, and nothing else
    Trust {
        /// Public keys, as `key list` shows them
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<PublicKey>,
        /// Trust them no more
        #[arg(long)]
        remove: bool,
    },
}

#[derive(Serialize)]
struct List {
    schema: u32,
    own: Option<String>,
    trusted: Vec<String>,
}

impl Key {
    pub(super) fn run(self, dir: &StoreDir) -> Result<ExitCode> {
        match self.action {
            Action::Generate => generate(dir)?,
            Action::List { json } => list(dir, json)?,
            Action::Trust { keys, remove } => trust(dir, &keys, remove)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn generate(dir: &StoreDir) -> Result<()> {
    dir.create()?;
    let path = dir.signing_key();
    let key = SecretKey::generate().context("no random numbers")?;
    match key.save(&path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!(
                "{} exists; others may trust it, so it is left",
                path.display()
            )
        }
        saved => saved.with_context(|| format!("cannot write {}", path.display()))?,
    }
    println!("{}", key.public());
    Ok(())
}

fn list(dir: &StoreDir, json: bool) -> Result<()> {
    let own = signing_key(dir)?.map(|key| key.public().to_string());
    let config = RemoteConfig::load(dir)?;
    let trusted = config.iter().flat_map(|config| config.trust.keys());
    let trusted: Vec<String> = trusted.map(ToString::to_string).collect();
    if json {
        let list = List {
            schema: 1,
            own,
            trusted,
        };
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    match own {
        Some(key) => println!("own      {key}"),
        None => println!("own      none (kachefs key generate)"),
    }
    for key in &trusted {
        println!("trusted  {key}");
    }
    if trusted.is_empty() {
        println!("trusted  everybody who can write to the remote");
    }
    Ok(())
}

fn trust(dir: &StoreDir, keys: &[PublicKey], remove: bool) -> Result<()> {
    let no_remote = "this store has no remote; see kachefs remote set";
    let mut config = RemoteConfig::load(dir)?.context(no_remote)?;
    let mut trusted = config.trust.keys().to_vec();
    if remove {
        if let Some(key) = keys.iter().find(|key| !trusted.contains(key)) {
            bail!("{key} is not trusted");
        }
        trusted.retain(|key| !keys.contains(key));
        if trusted.is_empty() {
            bail!(
                "then everybody who can write to the remote would be believed; to have that, unset \
                 the remote and set it without --trust"
            );
        }
    } else {
        let is_new = |key: &&PublicKey| !config.trust.keys().contains(key);
        trusted.extend(keys.iter().filter(is_new));
    }
    config.trust = Trust::Only(trusted);
    config.save(dir)
}
