//! What each watched call does with which path (syscalls(2)).

use libc::c_long;

use super::Unseen;

/// Calls that are always handed over.
pub(super) const WATCHED: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_open_by_handle_at,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_truncate,
    libc::SYS_fchmodat,
    FCHMODAT2,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_io_uring_setup,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_utime,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_utimes,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_futimesat,
];

/// Those of them that the shim makes itself.
pub(super) const AT_GATE: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Calls about a path or an open file, and which argument says which.
pub(super) const STATUS: &[(c_long, u32)] = &[(libc::SYS_statx, 2), (libc::SYS_newfstatat, 3)];

/// Sends to whom the socket is connected with, or to an address if there is one: which argument says.
pub(super) const SEND: (c_long, u32) = (libc::SYS_sendto, 4);

/// Since Linux 6.6; the same number everywhere.
const FCHMODAT2: c_long = 452;

/// What a call does with a path, if it does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Does {
    /// Opens it for reading, or runs it.
    Open,
    /// Asks what it is, following links.
    Status,
    /// The same, not following a last link.
    Link,
    /// Makes it, which fails where something is.
    Make,
    /// Makes it, or changes or replaces what is there.
    Put,
    /// Changes what is there.
    Change,
    /// Takes it away.
    Remove,
}

impl Does {
    /// Whether it leaves things as they are.
    pub(super) fn reads(self) -> bool {
        matches!(self, Self::Open | Self::Status | Self::Link)
    }
}

/// Where a call finds a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// What is done with it.
    pub(super) does: Does,
    /// The directory a relative one starts at.
    pub(super) directory: Directory,
    /// Where the text is in the caller's memory.
    pub(super) address: u64,
}

/// Where a relative path starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Directory {
    /// The working directory.
    Working,
    /// An open one.
    Open(i32),
}

/// What a call means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// It is about these paths.
    Paths(Named, Option<Named>),
    /// It opens a path as a `struct open_how` at the address says.
    OpenHow(Directory, u64, u64),
    /// It talks to, or listens at, an address of this length.
    Socket {
        listens: bool,
        address: u64,
        length: u64,
    },
    /// It sends what a `struct msghdr` at this address says.
    Message(u64),
    /// It changes where its caller works, to what is open already.
    Moves,
    /// It cannot be followed.
    Unseen(Unseen),
}

/// What a call of this number means.
#[expect(clippy::too_many_lines, reason = "a table")]
pub(super) fn meaning(number: c_long, arguments: &[u64; 6]) -> Meaning {
    let [first, second, third, fourth, ..] = *arguments;
    let at = |argument: u64| {
        // Descriptors are the lower half of a register.
        #[expect(clippy::cast_possible_truncation)]
        let fd = (argument as u32).cast_signed();
        if fd == libc::AT_FDCWD {
            Directory::Working
        } else {
            Directory::Open(fd)
        }
    };
    let named = |does, directory, address| Named {
        does,
        directory,
        address,
    };
    let here = |does, address| named(does, Directory::Working, address);
    let one = |named| Meaning::Paths(named, None);
    let two = |first, second| Meaning::Paths(first, Some(second));
    let unless = |flags: u64, flag: i32, does| {
        if flags & u64::from(flag.cast_unsigned()) == 0 {
            does
        } else {
            Does::Link
        }
    };
    match number {
        libc::SYS_openat => one(named(opened(third), at(first), second)),
        libc::SYS_openat2 => Meaning::OpenHow(at(first), second, third),
        libc::SYS_faccessat => one(named(Does::Status, at(first), second)),
        libc::SYS_faccessat2 => {
            let does = unless(fourth, libc::AT_SYMLINK_NOFOLLOW, Does::Status);
            one(named(does, at(first), second))
        }
        libc::SYS_statx => {
            let does = unless(third, libc::AT_SYMLINK_NOFOLLOW, Does::Status);
            one(named(does, at(first), second))
        }
        libc::SYS_newfstatat => {
            let does = unless(fourth, libc::AT_SYMLINK_NOFOLLOW, Does::Status);
            one(named(does, at(first), second))
        }
        libc::SYS_readlinkat => one(named(Does::Link, at(first), second)),
        // Paths that start there are seen with what it leads to.
        libc::SYS_chdir => two(here(Does::Status, first), here(Does::Link, first)),
        libc::SYS_fchdir => Meaning::Moves,
        libc::SYS_execve => one(here(Does::Open, first)),
        libc::SYS_execveat => one(named(Does::Open, at(first), second)),
        libc::SYS_getxattr | libc::SYS_listxattr => one(here(Does::Status, first)),
        libc::SYS_lgetxattr | libc::SYS_llistxattr => one(here(Does::Link, first)),
        libc::SYS_mkdirat | libc::SYS_mknodat => one(named(Does::Make, at(first), second)),
        libc::SYS_symlinkat => one(named(Does::Make, at(second), third)),
        libc::SYS_linkat => two(
            named(Does::Open, at(first), second),
            named(Does::Make, at(third), fourth),
        ),
        libc::SYS_renameat | libc::SYS_renameat2 => two(
            named(Does::Remove, at(first), second),
            named(Does::Put, at(third), fourth),
        ),
        libc::SYS_unlinkat => one(named(Does::Remove, at(first), second)),
        libc::SYS_truncate
        | libc::SYS_setxattr
        | libc::SYS_lsetxattr
        | libc::SYS_removexattr
        | libc::SYS_lremovexattr => one(here(Does::Change, first)),
        libc::SYS_fchmodat | FCHMODAT2 | libc::SYS_fchownat | libc::SYS_utimensat => {
            one(named(Does::Change, at(first), second))
        }
        libc::SYS_connect | libc::SYS_bind => Meaning::Socket {
            listens: number == libc::SYS_bind,
            address: second,
            length: third,
        },
        libc::SYS_sendto => Meaning::Socket {
            listens: false,
            address: arguments[4],
            length: arguments[5],
        },
        // `struct mmsghdr` begins with one; several at once are sent by those who talk to machines.
        libc::SYS_sendmsg | libc::SYS_sendmmsg => Meaning::Message(second),
        libc::SYS_socket => Meaning::Unseen(Unseen::Network),
        libc::SYS_mount
        | libc::SYS_umount2
        | libc::SYS_move_mount
        | libc::SYS_pivot_root
        | libc::SYS_chroot
        | libc::SYS_setns => Meaning::Unseen(Unseen::Mounts),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open => one(here(opened(second), first)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_creat => one(here(Does::Put, first)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mkdir | libc::SYS_mknod => one(here(Does::Make, first)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_stat | libc::SYS_access => one(here(Does::Status, first)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_lstat | libc::SYS_readlink => one(here(Does::Link, first)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_symlink => one(here(Does::Make, second)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_link => two(here(Does::Open, first), here(Does::Make, second)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_rename => two(here(Does::Remove, first), here(Does::Put, second)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_unlink | libc::SYS_rmdir => one(here(Does::Remove, first)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_chmod
        | libc::SYS_chown
        | libc::SYS_lchown
        | libc::SYS_utime
        | libc::SYS_utimes => one(here(Does::Change, first)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_futimesat => one(named(Does::Change, at(first), second)),
        _ => Meaning::Unseen(Unseen::Calls),
    }
}

/// Whether a call of this number changes where its caller works.
pub(super) fn moves(number: c_long) -> bool {
    matches!(number, libc::SYS_chdir | libc::SYS_fchdir)
}

/// What opening with these flags does (open(2)).
pub(super) fn opened(flags: u64) -> Does {
    let has = |flag: i32| flags & u64::from(flag.cast_unsigned()) != 0;
    let nameless = u64::from(libc::O_TMPFILE.cast_unsigned());
    if flags & nameless == nameless {
        // A file without a name in this directory.
        Does::Status
    } else if has(libc::O_PATH) {
        if has(libc::O_NOFOLLOW) {
            Does::Link
        } else {
            Does::Status
        }
    } else if has(libc::O_CREAT) && has(libc::O_EXCL) {
        Does::Make
    } else if has(libc::O_CREAT) {
        Does::Put
    } else if has(libc::O_WRONLY) || has(libc::O_RDWR) || has(libc::O_TRUNC) {
        Does::Change
    } else {
        Does::Open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_watched_call_means_something() {
        for call in WATCHED.iter().chain(STATUS.iter().map(|(call, _)| call)) {
            let meaning = meaning(*call, &[0; 6]);
            let known = [libc::SYS_io_uring_setup, libc::SYS_open_by_handle_at].contains(call);
            assert!(
                known || meaning != Meaning::Unseen(Unseen::Calls),
                "call {call}"
            );
        }
    }

    #[test]
    fn flags_of_open() {
        let flags = |flags: i32| opened(u64::from(flags.cast_unsigned()));
        assert_eq!(flags(libc::O_RDONLY | libc::O_DIRECTORY), Does::Open);
        assert_eq!(flags(libc::O_WRONLY | libc::O_CREAT), Does::Put);
        assert_eq!(flags(libc::O_RDWR), Does::Change);
        assert_eq!(flags(libc::O_RDWR | libc::O_TMPFILE), Does::Status);
        assert_eq!(flags(libc::O_PATH | libc::O_NOFOLLOW), Does::Link);
    }
}
