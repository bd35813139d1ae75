//! The mounts below a directory, read from /proc, and how to be rid of them in any state.
//!
//! Never touches a path inside a mount: a dead or stuck file system would take the test with it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, umount2};

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// The file system type, such as `fuse` or `fuse.kachefs`.
    pub kind: String,
    /// The minor device number: the name of its FUSE connection.
    pub minor: u32,
}

impl Mount {
    /// Whether a daemon answers for it.
    pub fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }
}

/// The mounts at or below `root`, innermost last.
pub fn below(root: &Path) -> Vec<Mount> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(parse)
        .filter(|mount| mount.point.starts_with(root))
        .collect()
}

/// The mount exactly at `point`, if there is one.
pub fn at(point: &Path) -> Option<Mount> {
    below(point).into_iter().find(|mount| mount.point == point)
}

/// Aborts every FUSE connection at or below `root` and detaches its mounts, so that whoever waits
/// for an answer gets an error instead. Other mounts below it are detached too.
pub fn cut_below(root: &Path) {
    for mount in below(root).into_iter().rev() {
        // Each of these fails where it is not allowed or not needed; what is left is seen by the
        // caller, who looks at the mount table again.
        let _ = fs::write(
            format!("/sys/fs/fuse/connections/{}/abort", mount.minor),
            "1",
        );
        if umount2(&mount.point, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).is_err() {
            let _ = Command::new("fusermount3")
                .args(["-u", "-z", "--"])
                .arg(&mount.point)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let fields: Vec<_> = before.split(' ').collect();
    let minor = fields.get(2)?.split_once(':')?.1.parse().ok()?;
    let point = unescape(fields.get(4)?);
    let kind = after.split(' ').next()?.to_owned();
    Some(Mount { point, kind, minor })
}

/// Undoes the octal escapes of mountinfo: `\040` is a space.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| first == b'\\');
        let code = code.and_then(|code| u8::from_str_radix(str::from_utf8(code).ok()?, 8).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_mountinfo_line() {
        let line = r"91 27 0:52 / /tmp/a\040b/target rw,nosuid - fuse.kachefs kachefs rw,user_id=0";
        let expected = Mount {
            point: PathBuf::from("/tmp/a b/target"),
            kind: "fuse.kachefs".to_owned(),
            minor: 52,
        };
        assert_eq!(parse(line), Some(expected));
    }

    #[test]
    fn reads_a_line_with_optional_fields() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw";
        let mount = parse(line).expect("a mount");
        assert_eq!((mount.kind.as_str(), mount.minor), ("ext3", 0));
    }
}
