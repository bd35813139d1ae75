//! Mounting and unmounting by our own system calls, and what `/proc/self/mountinfo` says.
//!
//! As root the daemon calls mount(2) itself; as an ordinary user it asks fusermount3(1), which
//! hands back the opened `/dev/fuse` over a socket. fuser's own mount and unmount are not used:
//! its unmount of a busy mount fails where ours says why, and it can hit a foreign mount.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};

/// File system type as `mount` and `df` show it.
pub const FS_TYPE: &str = "fuse.kachefs";
const FUSERMOUNT: &str = "fusermount3";

/// A line of `/proc/self/mountinfo` (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    /// Where it is mounted.
    pub path: PathBuf,
    /// Its file system type.
    pub fs_type: String,
    /// Minor device number: the number of the FUSE connection.
    pub minor: u32,
    /// The user who mounted it; FUSE mounts have one.
    pub owner: Option<u32>,
}

/// Whether a mount may be written to; the kernel sees to it (mount(8), "ro": EROFS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It may.
    ReadWrite,
    /// It may not.
    ReadOnly,
}

/// Mounts and returns the opened FUSE device.
pub fn mount(path: &Path, access: Access) -> Result<OwnedFd> {
    if nix::unistd::geteuid().is_root() {
        mount_as_root(path, access)
    } else {
        mount_as_user(path, access)
    }
}

/// Whether other users may enter a mount made by this process.
pub fn is_shared() -> bool {
    nix::unistd::geteuid().is_root()
}

fn mount_as_root(path: &Path, access: Access) -> Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .context("cannot open /dev/fuse (is the fuse module loaded?)")?;
    let mode = fs::metadata(path)?.mode();
    // Linux: Documentation/filesystems/fuse.rst, "Mount options". Default_permissions makes the
    // kernel check modes as on any disk; allow_other then is no wider than those modes.
    let options = format!(
        "fd={},rootmode={:o},user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd(),
        mode & libc::S_IFMT
    );
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, access == Access::ReadOnly);
    nix::mount::mount(
        Some("kachefs"),
        path,
        Some(FS_TYPE),
        flags,
        Some(options.as_str()),
    )
    .with_context(|| format!("cannot mount {}", path.display()))?;
    Ok(device.into())
}

fn mount_as_user(path: &Path, access: Access) -> Result<OwnedFd> {
    let mut options = "default_permissions,fsname=kachefs,subtype=kachefs".to_owned();
    if access == Access::ReadOnly {
        options.push_str(",ro");
    }
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    // The child needs its end to stay open across exec.
    let inherited = nix::unistd::dup(theirs.as_fd())?;
    let output = Command::new(FUSERMOUNT)
        .args(["-o", &options, "--"])
        .arg(path)
        .env("_FUSE_COMMFD", inherited.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {FUSERMOUNT} (install the fuse3 package)"))?;
    drop((theirs, inherited));
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{FUSERMOUNT}: {}",
            said.trim()
                .lines()
                .last()
                .unwrap_or("failed without a word")
        );
    }
    receive_descriptor(&ours).context("fusermount3 sent no descriptor")
}

fn receive_descriptor(socket: &OwnedFd) -> Result<OwnedFd> {
    let mut byte = [0_u8; 1];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us, and nobody else
            // knows its number.
            return Ok(unsafe { OwnedFd::from_raw_fd(*descriptor) });
        }
    }
    bail!("no descriptor in the message")
}

/// Unmounts. A mount in use is EBUSY, unless `lazy`: then it leaves the tree at once and ends
/// when its last user goes.
pub fn unmount(path: &Path, lazy: bool) -> Result<(), Errno> {
    if nix::unistd::geteuid().is_root() {
        let flags = MntFlags::UMOUNT_NOFOLLOW;
        return umount2(
            path,
            if lazy {
                flags | MntFlags::MNT_DETACH
            } else {
                flags
            },
        );
    }
    let status = Command::new(FUSERMOUNT)
        .args(["-u", "-q"])
        .args(lazy.then_some("-z"))
        .arg("--")
        .arg(path)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        // It says why only in words; busy is what remains after the caller's own checks.
        Ok(_) => Err(Errno::EBUSY),
        Err(_) => Err(Errno::ENOENT),
    }
}

/// All mounts this process sees, in the order they were made.
pub fn mounts() -> io::Result<Vec<MountLine>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect())
}

/// The topmost mount at exactly this path.
pub fn mounted_at(path: &Path) -> io::Result<Option<MountLine>> {
    Ok(mounts()?.into_iter().rev().find(|line| line.path == path))
}

fn parse_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let minor = device.split_once(':')?.1.parse().ok()?;
    let path = unescape(fields.nth(1)?);
    // Optional fields end with a dash; type, source and options follow.
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = rest.next()?;
    let owner = rest.nth(1).and_then(|options| {
        let value = options
            .split(|byte| *byte == b',')
            .find_map(|option| option.strip_prefix(b"user_id="))?;
        std::str::from_utf8(value).ok()?.parse().ok()
    });
    Some(MountLine {
        path,
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        minor,
        owner,
    })
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| std::str::from_utf8(tail.get(..3)?).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = octal {
            path.push(byte);
            rest = &tail[3..];
        } else {
            path.push(byte);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

/// Has the kernel read ahead by whole requests. A FUSE mount starts with the kernel's default
/// (`VM_READAHEAD_PAGES`, 128 KiB), whatever the handshake says, and each request costs a round trip.
/// Only root may say more; others go on with less.
pub fn read_ahead(minor: u32, bytes: u32) {
    let knob = format!("/sys/class/bdi/0:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&knob, (bytes / 1024).to_string()) {
        tracing::debug!(knob, %error, "read-ahead stays as it is");
    }
}

/// Asks the file system at `path` something the kernel cannot answer from memory; ENOTCONN when
/// the process that served it is gone.
pub fn answers(path: &Path) -> Result<(), Errno> {
    nix::sys::statvfs::statvfs(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mountinfo() {
        let line = br"73 29 0:46 / /home/ann/my\040ws/target rw,nosuid shared:9 - fuse.kachefs kachefs rw,user_id=1000,group_id=0";
        assert_eq!(
            parse_line(line),
            Some(MountLine {
                path: "/home/ann/my ws/target".into(),
                fs_type: FS_TYPE.into(),
                minor: 46,
                owner: Some(1000),
            })
        );
        assert_eq!(parse_line(b""), None);
        assert!(mounted_at(Path::new("/")).expect("reads").is_some());
    }
}
