//! Where a remote is: `s3://bucket/prefix`, or a directory.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Longest and shortest name of a bucket (S3 User Guide, bucket naming rules).
const BUCKET: std::ops::RangeInclusive<usize> = 3..=63;

/// Where a remote is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Location {
    /// A directory: of this machine, of NFS, or of a bucket that is mounted.
    Directory(PathBuf),
    /// A bucket.
    S3(S3Location),
}

/// A bucket, and how to get there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct S3Location {
    /// The name of the bucket.
    pub bucket: String,
    /// What the names of objects start with; empty, or without `/` at either end.
    pub prefix: String,
    /// The service, where it is not AWS: `http://127.0.0.1:8333`.
    pub endpoint: Option<String>,
    /// The region; otherwise that of the environment or profile.
    pub region: Option<String>,
    /// The profile in the configuration of AWS.
    pub profile: Option<String>,
    /// Whether to ask without credentials.
    pub anonymous: bool,
}

/// Not a place for a remote.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text:?} is no place for a remote: {reason}")]
pub struct LocationError {
    text: String,
    reason: &'static str,
}

impl LocationError {
    /// What somebody wrote, without what may be a name and a password.
    fn new(text: &str, reason: &'static str) -> Self {
        let text = match text.rsplit_once('@') {
            Some((_, rest)) => format!("…@{rest}"),
            None => text.to_owned(),
        };
        Self { text, reason }
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        let wrong = |reason| LocationError::new(text, reason);
        if let Some(path) = text.strip_prefix("file://") {
            return directory(path).ok_or_else(|| wrong("file:// wants an absolute path"));
        }
        let Some(rest) = text.strip_prefix("s3://") else {
            let reason = "s3://BUCKET/PREFIX or an absolute path is expected";
            return directory(text).ok_or_else(|| wrong(reason));
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_bucket(bucket) {
            return Err(wrong("not the name of a bucket"));
        }
        let prefix = prefix.trim_matches('/');
        let is_part = |part: &str| !matches!(part, "" | "." | "..");
        let has_parts = prefix.is_empty() || prefix.split('/').all(is_part);
        if !has_parts || !prefix.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(wrong("not a prefix"));
        }
        Ok(Self::S3(S3Location {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint: None,
            region: None,
            profile: None,
            anonymous: false,
        }))
    }
}

fn directory(path: &str) -> Option<Location> {
    path.starts_with('/')
        .then(|| Location::Directory(PathBuf::from(path)))
}

fn is_bucket(name: &str) -> bool {
    let ends = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    let inside =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    BUCKET.contains(&name.len())
        && ends(name.bytes().next())
        && ends(name.bytes().last())
        && name.bytes().all(inside)
        && !name.contains("..")
}

impl S3Location {
    /// The bucket and prefix: `s3://bucket/prefix`.
    pub fn url(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        format!("s3://{}{slash}{}", self.bucket, self.prefix)
    }

    /// The address of a service, as somebody gave it: a scheme, a host, perhaps a port.
    pub fn endpoint(text: &str) -> Result<String, LocationError> {
        let rest = text
            .strip_prefix("http://")
            .or_else(|| text.strip_prefix("https://"));
        let host = rest.map(|rest| rest.trim_end_matches('/'));
        // A name and a password in it would end up in a file and in messages.
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
        match host {
            Some(host) if !host.is_empty() && host.bytes().all(allowed) => {
                Ok(text.trim_end_matches('/').to_owned())
            }
            _ => Err(LocationError::new(
                text,
                "an endpoint is http:// or https:// and a host",
            )),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::S3(location) => write!(f, "{location}"),
        }
    }
}

impl fmt::Display for S3Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url())?;
        match &self.endpoint {
            Some(endpoint) => write!(f, " at {endpoint}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_understood() {
        for (text, shown) in [
            ("s3://bucket", "s3://bucket"),
            ("s3://my.bucket-1/", "s3://my.bucket-1"),
            ("s3://bucket/a/b/", "s3://bucket/a/b"),
            ("/mnt/cache", "/mnt/cache"),
            ("file:///mnt/cache", "/mnt/cache"),
        ] {
            let location: Location = text.parse().expect(text);
            assert_eq!(location.to_string(), shown);
        }
    }

    #[test]
    fn endpoints_are_addresses() {
        for text in [
            "http://127.0.0.1:8333",
            "https://s3.example.com/",
            "http://[::1]:9000",
        ] {
            let endpoint = S3Location::endpoint(text).expect(text);
            assert_eq!(endpoint, text.trim_end_matches('/'));
        }
        for text in [
            "",
            "host",
            "ftp://host",
            "http://",
            "http://a:b@host",
            "https://host/path",
        ] {
            assert!(S3Location::endpoint(text).is_err(), "{text}");
        }
    }

    #[test]
    fn other_texts_are_none() {
        for text in [
            "",
            "bucket",
            "relative/path",
            "file://relative",
            "s3://",
            "s3:///prefix",
            "s3://ab",
            "s3://Bucket",
            "s3://bucket..x",
            "s3://-bucket",
            "s3://bucket/a//b",
            "s3://bucket/../x",
            "s3://bucket/a b",
            "https://bucket.s3.amazonaws.com",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
