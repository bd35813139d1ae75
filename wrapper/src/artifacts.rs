//! The outputs a compiler announced, and whether they are finished.

use std::borrow::Cow;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};
use serde::Deserialize;

/// How long to wait for somebody who still writes when the compiler is gone: linkers that leave a
/// child behind to tidy up.
const PATIENCE: Duration = Duration::from_millis(200);

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

/// The notifications in what a compiler wrote to standard error.
pub fn announced(stderr: &[u8]) -> impl Iterator<Item = Artifact<'_>> {
    stderr
        .split(|byte| *byte == b'\n')
        .filter(|line| line.starts_with(b"{\"$message_type\":\"artifact\""))
        .filter_map(|line| serde_json::from_slice(line).ok())
}

/// The first announced output that some process has open for writing, or mapped for it. A file
/// that cannot be asked counts as finished.
///
/// The daemon cannot tell: the kernel does not report to it who opens a file. Everybody else can,
/// by asking for a read lease, which the kernel refuses while there are writers (fcntl(2),
/// "Leases").
pub fn unsettled(stderr: &[u8]) -> Option<String> {
    let deadline = Instant::now() + PATIENCE;
    // Somebody who opens the file in this moment breaks the lease, and SIGIO says so: it must not
    // end this process.
    // SAFETY: no handler is installed, the signal is ignored.
    let before = unsafe { signal(Signal::SIGIO, SigHandler::SigIgn) };
    let found = announced(stderr)
        .find(|output| !is_settled(Path::new(output.artifact.as_ref()), deadline))
        .map(|output| output.artifact.into_owned());
    if let Ok(before) = before {
        // SAFETY: puts back what was there; this program installs no handlers of its own.
        let _ = unsafe { signal(Signal::SIGIO, before) };
    }
    found
}

fn is_settled(path: &Path, deadline: Instant) -> bool {
    let Ok(file) = File::open(path) else {
        return true;
    };
    while has_writers(&file) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn has_writers(file: &File) -> bool {
    let lease = |kind: libc::c_int| {
        // SAFETY: the descriptor is open for the call; F_SETLEASE takes a number.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
        Errno::result(result)
    };
    match lease(libc::F_RDLCK) {
        Ok(_) => {
            // Closing the file ends it too.
            let _ = lease(libc::F_UNLCK);
            false
        }
        Err(error) => error == Errno::EAGAIN,
    }
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
