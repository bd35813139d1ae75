//! Running as an ordinary user when the tests themselves run as root.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::{Gid, Uid, chown};

use crate::{Must, mounts};

/// The user a privileged test run becomes: nobody, who owns nothing and is in every `/etc/passwd`.
const NOBODY: u32 = 65_534;

/// Who runs the commands of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
}

impl User {
    /// An ordinary user other than the one running the tests; `None` if that is one already.
    pub fn other() -> Option<Self> {
        Uid::effective().is_root().then_some(Self {
            uid: NOBODY,
            gid: NOBODY,
        })
    }

    /// The words before a command that make it run as this user.
    pub fn prefix(self) -> [String; 5] {
        [
            "setpriv".to_owned(),
            format!("--reuid={}", self.uid),
            format!("--regid={}", self.gid),
            "--clear-groups".to_owned(),
            "--".to_owned(),
        ]
    }

    /// Makes this user the owner of a path.
    #[track_caller]
    pub fn own(self, path: &Path) {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        chown(path, Some(uid), Some(gid)).must(format!("chown {}", path.display()));
    }
}

/// Whether an ordinary user can mount a FUSE file system on this machine: found by having one do
/// it, with fusermount3, and undoing it. The error says why not.
pub fn can_mount_unprivileged() -> Result<(), String> {
    let dir = tempfile::Builder::new().prefix("kachefs-probe-").tempdir();
    let dir = dir.map_err(|error| error.to_string())?;
    let root = dir
        .path()
        .canonicalize()
        .map_err(|error| error.to_string())?;
    let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
    let mut command = match User::other() {
        Some(user) => {
            user.own(&root);
            let [program, args @ ..] = user.prefix();
            let mut command = Command::new(program);
            command.args(args).arg("fusermount3");
            command
        }
        None => Command::new("fusermount3"),
    };
    // fusermount3 sends the descriptor of /dev/fuse over the socket it is told; we never take it,
    // so the connection ends with the socket.
    let output = command
        .arg("--")
        .arg(&root)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .output()
        .map_err(|error| format!("fusermount3: {error}"))?;
    drop(command);
    drop(ours);
    mounts::cut_below(&root);
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "an ordinary user cannot mount FUSE here: {} (wanted: /dev/fuse with mode 666, as on any \
         desktop or Debian, and fusermount3 setuid root)",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}
