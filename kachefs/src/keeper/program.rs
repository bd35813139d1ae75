//! The program file that keeper and daemon run: always the one the keeper was started from, and
//! never one that lies on a mount of ours.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};

/// This program, whatever has become of its name since it was started.
const OWN: &str = "/proc/self/exe";

/// A command that runs this very program: after an upgrade too, when the file of that name is
/// another one.
pub fn command() -> Command {
    let named = std::env::current_exe().ok().filter(|path| {
        let same = |one: io::Result<std::fs::Metadata>, other: io::Result<std::fs::Metadata>| {
            use std::os::unix::fs::MetadataExt;
            matches!((one, other), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()))
        };
        same(path.metadata(), std::fs::metadata(OWN))
    });
    let mut command = Command::new(named.unwrap_or_else(|| OWN.into()));
    command.arg0("kachefs");
    command
}

/// Goes on from memory when the program file lies on a FUSE file system: a page of it that is not
/// there could be one that only the daemon, yet to be started, can read.
pub fn leave_mounts() -> Result<()> {
    let mut program = File::open(OWN).context("cannot open the kachefs program")?;
    if fstatfs(&program)?.filesystem_type() != FUSE_SUPER_MAGIC {
        return Ok(());
    }
    let copy = memfd_create(c"kachefs", MFdFlags::MFD_CLOEXEC)?;
    io::copy(&mut program, &mut File::from(copy.try_clone()?))?;
    drop(program);
    let arguments: Vec<CString> = std::env::args_os()
        .map(|argument| CString::new(argument.into_vec()))
        .collect::<Result<_, _>>()?;
    let path = CString::new(format!("/proc/self/fd/{}", copy.as_raw_fd()))?;
    match nix::unistd::execv(&path, &arguments) {
        Ok(never) => match never {},
        Err(error) => Err(error).context("cannot run kachefs from memory"),
    }
}

/// Shows as `kachefs` to `ps`, also when started through a name of another kind.
pub fn name_process() {
    // For people only.
    let _ = std::fs::write("/proc/self/comm", "kachefs");
}
