//! Who holds a mount: the processes that keep it from being unmounted, by device number.
//!
//! Read from `/proc` alone. No path in the mount is resolved and its file system is asked
//! nothing, so this works for a mount that is dead, stuck or detached, and the daemon may ask
//! about its own.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{Pid, getpgid};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

/// Longest command line shown.
const COMMAND_MAX: usize = 60;

/// Most processes named in one line.
const SHOWN: usize = 6;

/// A process that uses something in a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command line, shortened.
    pub command: String,
    /// What it holds.
    pub what: &'static str,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` (pid {}, {})", self.command, self.pid, self.what)
    }
}

/// The processes that hold the mount with this device number, as far as this user may look.
pub fn of(device: u64) -> Vec<Holder> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut holders: Vec<Holder> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| {
            let process = PathBuf::from(format!("/proc/{pid}"));
            Some(Holder {
                pid,
                what: held(&process, device)?,
                command: command(&process),
            })
        })
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

/// Whether somebody holds a mount, and all who do are in one of these process groups.
pub fn are_all_in(groups: &[u32], device: u64) -> bool {
    let is_in_one = |holder: &Holder| {
        let pid = i32::try_from(holder.pid).map(Pid::from_raw).ok();
        let group = pid.and_then(|pid| getpgid(Some(pid)).ok());
        group.is_some_and(|group| groups.contains(&group.as_raw().cast_unsigned()))
    };
    let holders = of(device);
    !holders.is_empty() && holders.iter().all(is_in_one)
}

/// Names holders in one line; `None` if there are none to name.
pub fn describe(holders: &[Holder]) -> Option<String> {
    let names: Vec<String> = holders.iter().take(SHOWN).map(Holder::to_string).collect();
    let more = match holders.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!names.is_empty()).then(|| names.join(", ") + &more)
}

/// What a process holds on a device: the first thing found.
fn held(process: &Path, device: u64) -> Option<&'static str> {
    for (link, what) in [
        ("cwd", "working directory"),
        ("exe", "running program"),
        ("root", "root directory"),
    ] {
        if device_of(&process.join(link)) == Some(device) {
            return Some(what);
        }
    }
    let descriptors = fs::read_dir(process.join("fd")).ok()?;
    if descriptors
        .flatten()
        .any(|descriptor| device_of(&descriptor.path()) == Some(device))
    {
        return Some("open file");
    }
    let maps = fs::read_to_string(process.join("maps")).ok()?;
    maps.lines()
        .any(|line| mapped_device(line) == Some(device))
        .then_some("mapped file")
}

/// The device of what a link in `/proc` leads to. With nothing asked for and no synchronisation,
/// the kernel answers alone (`fuse_getattr`).
fn device_of(link: &Path) -> Option<u64> {
    let stat = statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).ok()?;
    Some(nix::sys::stat::makedev(
        u64::from(stat.stx_dev_major),
        u64::from(stat.stx_dev_minor),
    ))
}

/// The fourth field of a line of `maps` (`proc_pid_maps(5)`): `major:minor`, hexadecimal.
fn mapped_device(line: &str) -> Option<u64> {
    let (major, minor) = line.split_whitespace().nth(3)?.split_once(':')?;
    let number = |hex| u64::from_str_radix(hex, 16).ok();
    Some(nix::sys::stat::makedev(number(major)?, number(minor)?))
}

fn command(process: &Path) -> String {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let mut line = String::from_utf8_lossy(&line)
        .replace('\0', " ")
        .trim()
        .replace(char::is_control, "?");
    if line.is_empty() {
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        name.trim().clone_into(&mut line);
    }
    match line.char_indices().nth(COMMAND_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn this_process_holds_what_it_runs() {
        let exe = std::env::current_exe().expect("exe");
        let device = fs::metadata(exe).expect("stat").dev();
        let own = std::process::id();
        let holders = of(device);
        let found = holders.iter().find(|holder| holder.pid == own);
        let found = found.expect("this process is found");
        assert!(
            describe(std::slice::from_ref(found))
                .is_some_and(|text| text.contains(&own.to_string()))
        );
        assert_eq!(of(nix::sys::stat::makedev(0, 0xf_ffff)), []);
    }

    #[test]
    fn reads_a_line_of_maps() {
        let line = "7f0c-7f0d r--p 00000000 00:2e 12 /ws/target/a b";
        assert_eq!(mapped_device(line), Some(nix::sys::stat::makedev(0, 0x2e)));
        assert_eq!(mapped_device(""), None);
    }

    #[test]
    fn a_long_list_is_cut() {
        let holder = |pid| Holder {
            pid,
            command: "sh".into(),
            what: "open file",
        };
        let many: Vec<_> = (0..10).map(holder).collect();
        assert!(describe(&many).is_some_and(|text| text.ends_with(" and 4 more")));
        assert_eq!(describe(&[]), None);
    }
}
