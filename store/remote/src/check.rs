//! A round trip: whether a remote can be read and written, and does what is relied on.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use store::Digest;

use crate::error::RemoteError;
use crate::name::{Kind, ObjectName};
use crate::{Body, Object, Put, Remote, Written};

/// How much is written and read.
const SIZE: u8 = 64;

/// Longest time by which the clocks may differ without anybody being told.
const SKEW: Duration = Duration::from_mins(1);

/// What a round trip showed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// How long reading a small object takes.
    pub read: Duration,
    /// How long writing one takes; `None` for a remote that is only read.
    pub write: Option<Duration>,
    /// What does not work as it should, in words.
    pub findings: Vec<String>,
}

/// Reads, and unless `read_only` also writes, compares, lists and removes an object of its own.
pub async fn check(remote: &dyn Remote, read_only: bool) -> Result<Checked, RemoteError> {
    let id = Digest::of(format!("{:?} {}", SystemTime::now(), std::process::id()).as_bytes());
    let name = ObjectName::check(&id);
    let began = Instant::now();
    let nothing = remote.get(&name, None, SIZE.into()).await?;
    let mut checked = Checked {
        read: began.elapsed(),
        write: None,
        findings: Vec::new(),
    };
    if nothing.is_some() {
        checked
            .findings
            .push("it has objects that nobody wrote".to_owned());
    }
    if read_only {
        // Anything may answer that it has no such object; a listing is something.
        remote.list(Kind::Trees, None).await?;
    } else {
        let written = write(remote, &name, &mut checked).await;
        let removed = remote.delete(&name).await;
        written?;
        removed?;
    }
    Ok(checked)
}

async fn write(
    remote: &dyn Remote,
    name: &ObjectName,
    checked: &mut Checked,
) -> Result<(), RemoteError> {
    let mut find = |is_right: bool, text: &str| {
        if !is_right {
            checked.findings.push(text.to_owned());
        }
    };
    let content: Bytes = (0..SIZE).collect();
    let began = Instant::now();
    let first = remote
        .put(name, Body::Bytes(content.clone()), Put::IfAbsent)
        .await?;
    let (now, took) = (SystemTime::now(), began.elapsed());
    checked.write = Some(took);
    find(
        first == Written::New,
        "it says that an object exists which does not",
    );
    let again = remote
        .put(name, Body::Bytes(Bytes::new()), Put::IfAbsent)
        .await?;
    find(
        again == Written::Existed,
        "it replaces an object that is to be left (If-None-Match)",
    );
    let whole = remote.get(name, None, SIZE.into()).await?;
    find(
        whole.as_ref() == Some(&content),
        "what is written does not come back",
    );
    let part = remote.get(name, Some(8..16), 8).await?;
    find(
        part == Some(content.slice(8..16)),
        "a range does not come back (Range)",
    );
    let listed = find_listed(remote, name).await?;
    find(listed.is_some(), "what is written is not listed");
    let modified = listed.map_or(now, |object| object.modified);
    let ahead = modified.duration_since(now).unwrap_or_default();
    let behind = now.duration_since(modified).unwrap_or_default();
    find(
        ahead.max(behind) < SKEW + took,
        "its clock and that of this machine differ by more than a minute",
    );
    Ok(())
}

/// Finds an object among all that are listed: others may have left some.
async fn find_listed(
    remote: &dyn Remote,
    name: &ObjectName,
) -> Result<Option<Object>, RemoteError> {
    let mut after = None;
    loop {
        let page = remote.list(Kind::Check, after.as_ref()).await?;
        if let Some(found) = page.iter().find(|object| object.name == *name) {
            return Ok(Some(found.clone()));
        }
        match page.last() {
            Some(last) => after = Some(last.name.clone()),
            None => return Ok(None),
        }
    }
}
