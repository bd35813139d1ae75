//! Which remote a store has, and who is believed: `[remote]` in the store's `kachefs.toml`.
//!
//! ```toml
//! [remote]
//! url = "s3://bucket/prefix"          # or an absolute path
//! endpoint = "http://127.0.0.1:8333"  # where it is not AWS
//! region = "eu-central-1"
//! profile = "ci"
//! anonymous = true                    # ask without credentials
//! read-only = true                    # upload nothing
//! trust = ["<public key>", ...]       # use only what one of these has signed
//! wait = 10                           # how many seconds anything waits for an answer
//! upload-limit = "5 MiB"              # bytes per second, on average
//! prefetch = "all"                    # `off`, `trace` or `all`
//! prefetch-budget = "1 GiB"           # bytes of blobs fetched early for one build
//! grace = "3days"                     # how long what nothing names is left alone by `remote gc`
//! ```
//!
//! What is not understood is an error, not a default: somebody meant something, and who is believed
//! hangs on it. Credentials are never written here; they come from where AWS has them.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use remote::signed::{PublicKey, SecretKey, Trust};
use remote::{Location, S3Location};
use store::StoreDir;
use toml_edit::{Array, DocumentMut, Item, Table, TableLike, Value, value};

use crate::config_file;

/// The name of the table.
const TABLE: &str = "remote";

/// Which remote a store has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// Where it is.
    pub location: Location,
    /// Whether nothing is to be uploaded.
    pub read_only: bool,
    /// Whose facts are used.
    pub trust: Trust,
    /// How long a call may take: a second more for each [`remote::Limits::SLOWEST`] that it moves.
    pub wait: Duration,
    /// How many bytes are sent per second, on average; `None` where there is no limit.
    pub upload_limit: Option<u64>,
    /// What is fetched before a build asks for it.
    pub prefetch: Prefetch,
    /// How many bytes of blobs are, for one build.
    pub prefetch_budget: u64,
    /// How long an object that nothing names is left alone. The same on all machines: who uploads counts
    /// on what they saw being written less than a third of it ago.
    pub grace: Duration,
}

/// What is fetched before a build asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Prefetch {
    /// Nothing
    Off,
    /// What builds like it have read, once it has to compile something itself
    #[default]
    Trace,
    /// Everything it shows
    All,
}

/// How much is fetched early for one build where nothing else is configured.
pub const PREFETCH_BUDGET: u64 = 256 << 20;

/// The grace where nothing else is configured.
pub const GRACE: Duration = Duration::from_hours(72);

/// The shortest grace: the times of objects are in seconds.
const SHORTEST_GRACE: Duration = Duration::from_secs(3);

/// The longest: others keep to the longest they see, and nothing may be in their way for ever.
pub const LONGEST_GRACE: Duration = Duration::from_hours(365 * 24);

/// The least that may be sent per second.
const LEAST_LIMIT: u64 = 16 << 10;

/// How long a call may take where nothing else is configured.
pub const WAIT: Duration = Duration::from_secs(10);

/// What can be configured, in seconds.
const WAITS: std::ops::RangeInclusive<i64> = 1..=600;

impl RemoteConfig {
    /// What is configured; `None` where there is no remote.
    pub fn load(store: &StoreDir) -> Result<Option<Self>> {
        let path = store.configuration();
        let document = config_file::parse(&path)?;
        let Some(item) = document.get(TABLE) else {
            return Ok(None);
        };
        let table = item.as_table_like().context("`remote` is no table");
        let config = table.and_then(Self::from_table);
        config.map(Some).with_context(|| path.display().to_string())
    }

    /// Writes it, leaving the rest of the file as it is.
    pub fn save(&self, store: &StoreDir) -> Result<()> {
        change(store, |document| {
            document.insert(TABLE, Item::Table(self.to_table()));
        })
    }

    /// Forgets the remote; whether there was one.
    pub fn remove(store: &StoreDir) -> Result<bool> {
        let mut existed = false;
        change(store, |document| {
            existed = document.remove(TABLE).is_some();
        })?;
        Ok(existed)
    }

    fn from_table(table: &dyn TableLike) -> Result<Self> {
        let known = |name: &str| NAMES.contains(&name);
        if let Some((name, _)) = table.iter().find(|(name, _)| !known(name)) {
            bail!("`remote.{name}` means nothing");
        }
        let url = text(table, "url")?.context("`remote.url` is missing")?;
        let endpoint = text(table, "endpoint")?;
        let region = text(table, "region")?;
        let profile = text(table, "profile")?;
        let anonymous = flag(table, "anonymous")?;
        let location = S3Options {
            endpoint,
            region,
            profile,
            anonymous,
        }
        .place(&url)?;
        Ok(Self {
            location,
            read_only: flag(table, "read-only")?,
            trust: trust(table)?,
            wait: wait(table)?,
            upload_limit: upload_limit(table)?,
            prefetch: prefetch(table)?,
            prefetch_budget: prefetch_budget(table)?,
            grace: grace(table)?,
        })
    }

    fn to_table(&self) -> Table {
        let mut table = Table::new();
        match &self.location {
            Location::Directory(path) => {
                table.insert("url", value(path.display().to_string()));
            }
            Location::S3(location) => {
                table.insert("url", value(location.url()));
                let options = [
                    ("endpoint", &location.endpoint),
                    ("region", &location.region),
                    ("profile", &location.profile),
                ];
                for (name, option) in options {
                    if let Some(text) = option {
                        table.insert(name, value(text));
                    }
                }
                if location.anonymous {
                    table.insert("anonymous", value(true));
                }
            }
        }
        if self.read_only {
            table.insert("read-only", value(true));
        }
        if self.wait != WAIT
            && let Ok(seconds) = i64::try_from(self.wait.as_secs())
        {
            table.insert("wait", value(seconds));
        }
        if let Some(limit) = self.upload_limit {
            table.insert("upload-limit", value(bytes_text(limit)));
        }
        if self.prefetch != Prefetch::default()
            && let Some(name) = self.prefetch.to_possible_value()
        {
            table.insert("prefetch", value(name.get_name()));
        }
        if self.prefetch_budget != PREFETCH_BUDGET {
            let text = bytes_text(self.prefetch_budget);
            table.insert("prefetch-budget", value(text));
        }
        if self.grace != GRACE {
            let text = humantime::format_duration(self.grace).to_string();
            table.insert("grace", value(text));
        }
        if let Trust::Only(keys) = &self.trust {
            let keys = keys.iter().map(|key| Value::from(key.to_string()));
            table.insert("trust", value(keys.collect::<Array>()));
        }
        table
    }
}

const NAMES: [&str; 12] = [
    "url",
    "endpoint",
    "region",
    "profile",
    "anonymous",
    "read-only",
    "trust",
    "wait",
    "upload-limit",
    "prefetch",
    "prefetch-budget",
    "grace",
];

/// How to get to a bucket, beside its name.
#[derive(Clone, Debug, Default)]
pub struct S3Options {
    /// The service, where it is not AWS.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// The profile.
    pub profile: Option<String>,
    /// Whether to ask without credentials.
    pub anonymous: bool,
}

impl S3Options {
    /// The place these options and a URL mean; an error where they do not go together.
    pub fn place(self, url: &str) -> Result<Location> {
        let location: Location = url.parse()?;
        match location {
            Location::S3(location) => Ok(Location::S3(S3Location {
                endpoint: self
                    .endpoint
                    .map(|endpoint| S3Location::endpoint(&endpoint))
                    .transpose()?,
                region: self.region,
                profile: self.profile,
                anonymous: self.anonymous,
                ..location
            })),
            Location::Directory(path) => self.directory(path),
        }
    }

    fn directory(self, path: PathBuf) -> Result<Location> {
        let names = [
            ("endpoint", self.endpoint.is_some()),
            ("region", self.region.is_some()),
            ("profile", self.profile.is_some()),
            ("anonymous", self.anonymous),
        ];
        if let Some((name, _)) = names.iter().find(|(_, is_set)| *is_set) {
            bail!("{} is a directory, which has no {name}", path.display());
        }
        if path.to_str().is_none() {
            bail!("{} is not UTF-8", path.display());
        }
        Ok(Location::Directory(path))
    }
}

/// The key this store signs with; `None` where there is none.
pub fn signing_key(dir: &StoreDir) -> Result<Option<SecretKey>> {
    let path = dir.signing_key();
    match SecretKey::load(&path) {
        Ok(key) => Ok(Some(key)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn change(store: &StoreDir, edit: impl FnOnce(&mut DocumentMut)) -> Result<()> {
    store.create()?;
    let path = store.configuration();
    let mut document = config_file::parse(&path)?;
    let before = document.to_string();
    edit(&mut document);
    let after = document.to_string();
    if before == after {
        Ok(())
    } else {
        config_file::write(&path, &after)
    }
}

fn text(table: &dyn TableLike, name: &str) -> Result<Option<String>> {
    let found = table.get(name).map(|item| {
        let text = item.as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .with_context(|| format!("`remote.{name}` is no text"))
    });
    found.transpose()
}

fn flag(table: &dyn TableLike, name: &str) -> Result<bool> {
    let item = table.get(name);
    item.map_or(Ok(false), |item| {
        item.as_bool()
            .with_context(|| format!("`remote.{name}` is neither true nor false"))
    })
}

fn wait(table: &dyn TableLike) -> Result<Duration> {
    let Some(item) = table.get("wait") else {
        return Ok(WAIT);
    };
    let seconds = item.as_integer().filter(|seconds| WAITS.contains(seconds));
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok());
    seconds
        .map(Duration::from_secs)
        .with_context(|| format!("`remote.wait` is no number of seconds in {WAITS:?}"))
}

fn upload_limit(table: &dyn TableLike) -> Result<Option<u64>> {
    let text = text(table, "upload-limit")?;
    let limit = text.map(|text| parse_limit(&text).context("`remote.upload-limit`"));
    limit.transpose()
}

/// Bytes per second as people write them: `5MiB`, `500kB`.
pub fn parse_limit(text: &str) -> Result<u64> {
    let limit = parse_bytes(text)?;
    if limit < LEAST_LIMIT {
        bail!("{text:?} is too little: 16 KiB at least");
    }
    Ok(limit)
}

/// A number of bytes as people write them: `1GiB`.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let parsed = text.parse::<bytesize::ByteSize>();
    let bytes = parsed.map_err(|error| anyhow!("{text:?} is no number of bytes: {error}"))?;
    Ok(bytes.as_u64())
}

fn prefetch(table: &dyn TableLike) -> Result<Prefetch> {
    let Some(text) = text(table, "prefetch")? else {
        return Ok(Prefetch::default());
    };
    Prefetch::from_str(&text, false)
        .map_err(|_| anyhow!("`remote.prefetch` is none of `off`, `trace` and `all`"))
}

fn prefetch_budget(table: &dyn TableLike) -> Result<u64> {
    let text = text(table, "prefetch-budget")?;
    text.map_or(Ok(PREFETCH_BUDGET), |text| {
        parse_bytes(&text).context("`remote.prefetch-budget`")
    })
}

fn bytes_text(limit: u64) -> String {
    let shown = bytesize::ByteSize(limit).to_string();
    match shown.parse() {
        Ok(bytesize::ByteSize(parsed)) if parsed == limit => shown,
        _ => format!("{limit} B"),
    }
}

fn grace(table: &dyn TableLike) -> Result<Duration> {
    let text = text(table, "grace")?;
    text.map_or(Ok(GRACE), |text| {
        parse_grace(&text).context("`remote.grace`")
    })
}

/// A grace as people write it: `3days`, `12h`.
pub fn parse_grace(text: &str) -> Result<Duration> {
    let grace = humantime::parse_duration(text).with_context(|| format!("{text:?} is no time"))?;
    if grace < SHORTEST_GRACE {
        let shortest = humantime::format_duration(SHORTEST_GRACE);
        bail!("{text:?} is too short: {shortest} at least");
    }
    if grace > LONGEST_GRACE {
        bail!("{text:?} is too long: a year at most");
    }
    Ok(grace)
}

fn trust(table: &dyn TableLike) -> Result<Trust> {
    let Some(item) = table.get("trust") else {
        return Ok(Trust::Everybody);
    };
    let array = item.as_array().context("`remote.trust` is no list")?;
    let key = |value: &Value| {
        let text = value
            .as_str()
            .context("`remote.trust` holds what is no text")?;
        Ok(text.parse()?)
    };
    let keys: Vec<PublicKey> = array.iter().map(key).collect::<Result<_>>()?;
    if keys.is_empty() {
        // Who empties the list may mean nobody, or everybody.
        bail!("`remote.trust` is empty: remove it to believe whatever the remote holds");
    }
    Ok(Trust::Only(keys))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const KEY: &str = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

    fn store() -> (tempfile::TempDir, StoreDir) {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = StoreDir::new(dir.path().join("store"));
        store.create().expect("creates");
        (dir, store)
    }

    fn loaded(text: &str) -> Result<Option<RemoteConfig>> {
        let (_dir, store) = store();
        fs::write(store.configuration(), text).expect("writes");
        RemoteConfig::load(&store)
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let (_dir, store) = store();
        assert_eq!(RemoteConfig::load(&store).expect("loads"), None);
        fs::write(store.configuration(), "# mine\nmode = \"exact\"\n").expect("writes");
        let options = S3Options {
            endpoint: Some("http://127.0.0.1:8333".into()),
            region: Some("eu-central-1".into()),
            profile: Some("ci".into()),
            anonymous: true,
        };
        let bucket = options.place("s3://bucket/a/b").expect("a place");
        let directory = S3Options::default().place("/mnt/cache").expect("a place");
        for (location, trust) in [
            (bucket, Trust::Only(vec![KEY.parse().expect("a key")])),
            (directory, Trust::Everybody),
        ] {
            let config = RemoteConfig {
                location,
                read_only: trust != Trust::Everybody,
                wait: if trust == Trust::Everybody {
                    WAIT
                } else {
                    Duration::from_secs(2)
                },
                upload_limit: (trust == Trust::Everybody).then_some((5 << 20) + 1),
                prefetch: if trust == Trust::Everybody {
                    Prefetch::Trace
                } else {
                    Prefetch::All
                },
                prefetch_budget: if trust == Trust::Everybody {
                    PREFETCH_BUDGET
                } else {
                    12345
                },
                grace: if trust == Trust::Everybody {
                    GRACE
                } else {
                    Duration::from_mins(90)
                },
                trust,
            };
            config.save(&store).expect("saves");
            assert_eq!(RemoteConfig::load(&store).expect("loads"), Some(config));
            let text = fs::read_to_string(store.configuration()).expect("reads");
            assert!(text.starts_with("# mine\nmode = \"exact\"\n"), "{text}");
        }
        assert!(RemoteConfig::remove(&store).expect("removes"));
        assert!(!RemoteConfig::remove(&store).expect("removes"));
        let text = fs::read_to_string(store.configuration()).expect("reads");
        assert_eq!(text, "# mine\nmode = \"exact\"\n");
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for (text, word) in [
            ("remote = 1", "no table"),
            ("[remote]", "url"),
            ("[remote]\nurl = 1", "no text"),
            ("[remote]\nurl = \"ftp://x\"", "ftp://x"),
            ("[remote]\nurl = \"/x\"\nread_only = true", "read_only"),
            ("[remote]\nurl = \"/x\"\nread-only = 1", "neither"),
            ("[remote]\nurl = \"/x\"\nregion = \"r\"", "region"),
            ("[remote]\nurl = \"/x\"\ntrust = []", "empty"),
            ("[remote]\nurl = \"/x\"\ntrust = [\"abc\"]", "abc"),
            ("[remote]\nurl = \"s3://abc\"\nendpoint = \"x\"", "endpoint"),
            ("[remote]\nurl = \"/x\"\nwait = 0", "wait"),
            ("[remote]\nurl = \"/x\"\nwait = \"5\"", "wait"),
            ("[remote]\nurl = \"/x\"\ngrace = 5", "no text"),
            ("[remote]\nurl = \"/x\"\nupload-limit = \"x\"", "no number"),
            (
                "[remote]\nurl = \"/x\"\nupload-limit = \"1 KiB\"",
                "too little",
            ),
            ("[remote]\nurl = \"/x\"\ngrace = \"soon\"", "no time"),
            ("[remote]\nurl = \"/x\"\ngrace = \"1s\"", "too short"),
            ("[remote", "does not parse"),
        ] {
            let error = loaded(text).expect_err(text);
            let shown = format!("{error:#}");
            assert!(
                shown.contains(word) && !shown.contains('\n'),
                "{text}: {shown}"
            );
            assert!(shown.contains("kachefs.toml"), "{shown}");
        }
    }
}
