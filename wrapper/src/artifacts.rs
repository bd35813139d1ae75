//! The outputs a compiler announced, and whether they are finished.

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::lease;

/// How long to wait for somebody who still writes when the compiler is gone: linkers that leave a
/// child behind to tidy up.
pub const PATIENCE: Duration = Duration::from_millis(200);

/// rustc's artifact notification (`--json=artifacts`; rustc book, "JSON Output").
#[derive(Debug, Deserialize)]
pub struct Artifact<'a> {
    /// The file, as a path.
    #[serde(borrow)]
    pub artifact: Cow<'a, str>,
    /// What it is: `link`, `metadata`, `dep-info`...
    #[serde(borrow)]
    pub emit: Cow<'a, str>,
}

/// How a notification begins.
const BEGINNING: &[u8] = b"{\"$message_type\":\"artifact\"";
/// And before Rust 1.76.
const OLD_BEGINNING: &[u8] = b"{\"artifact\":";

/// The notifications in what a compiler wrote to standard error.
pub fn announced(stderr: &[u8]) -> impl Iterator<Item = Artifact<'_>> {
    stderr
        .split(|byte| *byte == b'\n')
        .filter(|line| line.starts_with(BEGINNING) || line.starts_with(OLD_BEGINNING))
        .filter_map(|line| serde_json::from_slice(line).ok())
}

/// Whether a compiler announces in a way that was given up before any that is tested here.
pub fn is_of_old(stderr: &[u8]) -> bool {
    let mut lines = stderr.split(|byte| *byte == b'\n');
    lines.any(|line| line.starts_with(OLD_BEGINNING))
}

/// The first announced output that some process has open for writing, or mapped for it. A file
/// that cannot be asked counts as finished.
///
/// The daemon cannot tell: the kernel does not report to it who opens a file, and it must not
/// touch its own mount to ask.
pub fn unsettled(stderr: &[u8]) -> Option<String> {
    let deadline = Instant::now() + PATIENCE;
    let _unharmed = lease::Unharmed::start();
    announced(stderr)
        .find(|output| {
            File::open(Path::new(output.artifact.as_ref()))
                .is_ok_and(|file| !lease::wait_unwritten(&file, deadline))
        })
        .map(|output| output.artifact.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(path: &Path) -> Vec<u8> {
        format!(
            "{{\"$message_type\":\"artifact\",\"artifact\":\"{}\",\"emit\":\"link\"}}\n",
            path.display()
        )
        .into_bytes()
    }

    #[test]
    fn reads_announcements() {
        let stderr = b"warning: x\n{\"$message_type\":\"artifact\",\"artifact\":\"/t/a.d\",\"emit\":\"dep-info\"}\nnoise";
        let found: Vec<_> = announced(stderr).collect();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (&*found[0].artifact, &*found[0].emit),
            ("/t/a.d", "dep-info")
        );
        let of_before = br#"{"artifact":"/t/liba.rmeta","emit":"metadata"}"#;
        assert_eq!(announced(of_before).count(), 1);
        assert!(is_of_old(of_before) && !is_of_old(stderr));
    }

    #[test]
    fn a_file_being_written_is_not_settled() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("out");
        let writer = File::create(&path).expect("creates");
        assert_eq!(
            unsettled(&note(&path)).as_deref(),
            path.to_str(),
            "somebody has it open for writing"
        );
        drop(writer);
        assert_eq!(unsettled(&note(&path)), None);
        assert_eq!(unsettled(&note(&dir.path().join("absent"))), None);
    }
}
