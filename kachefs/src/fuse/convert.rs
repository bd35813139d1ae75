//! The kernel's words for ours and back: errors, times, kinds, attributes. Pure functions, but for
//! the time "now".

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, Request, TimeOrNow};
use nix::unistd::Whence;
use store::{Ino, Kind, Timestamp};

use crate::clock;
use crate::fs::{Attributes, Caller, Entry};

/// Set in the number of a request that an earlier daemon had (`FUSE_UNIQUE_RESEND`).
const RESENT: u64 = 1 << 63;

/// The number of a request, and whether an earlier daemon had it and may have carried it out.
pub(super) fn number_of(request: &Request) -> (u64, bool) {
    let number = request.unique().0;
    (number & !RESENT, number & RESENT != 0)
}

pub(super) fn errno(error: crate::fs::Errno) -> Errno {
    Errno::from_i32(error as i32)
}

pub(super) fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.secs.unsigned_abs());
    let whole = if time.secs < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(u64::from(time.nanos))))
        .unwrap_or(UNIX_EPOCH)
}

pub(super) fn timestamp(time: TimeOrNow) -> Timestamp {
    let time = match time {
        TimeOrNow::Now => return clock::now(),
        TimeOrNow::SpecificTime(time) => time,
    };
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timestamp {
            secs: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: since.subsec_nanos(),
        },
        // fuser reads seconds before the epoch as if the nanoseconds counted down with them
        // (`system_time_from_time` in its time.rs): -2 s + 0.5 s comes as 2.5 s before. What the
        // kernel sent is the two parts as they are.
        Err(error) => {
            let before = error.duration();
            Timestamp {
                secs: -i64::try_from(before.as_secs()).unwrap_or(i64::MAX),
                nanos: before.subsec_nanos(),
            }
        }
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

pub(super) fn attr(entry: &Entry) -> FileAttr {
    let attributes = &entry.attributes;
    FileAttr {
        ino: INodeNo(entry.ino.0),
        size: entry.size,
        blocks: entry.blocks,
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(entry.kind),
        perm: attributes.perm,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        blksize: 4096,
        flags: 0,
    }
}

pub(super) fn whence_of(whence: i32) -> Option<Whence> {
    match whence {
        libc::SEEK_DATA => Some(Whence::SeekData),
        libc::SEEK_HOLE => Some(Whence::SeekHole),
        _ => None,
    }
}

/// Mode of a regular file, or of what `mknod` was asked for.
pub(super) fn kind_of_mode(mode: u32) -> Option<Kind> {
    match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => Some(Kind::File),
        libc::S_IFIFO => Some(Kind::Fifo),
        libc::S_IFSOCK => Some(Kind::Socket),
        libc::S_IFCHR => Some(Kind::CharDevice),
        libc::S_IFBLK => Some(Kind::BlockDevice),
        _ => None,
    }
}

pub(super) fn absent() -> FileAttr {
    attr(&Entry {
        ino: Ino(0),
        kind: Kind::File,
        attributes: Attributes {
            perm: 0,
            uid: 0,
            gid: 0,
            nlink: 0,
            rdev: 0,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
        },
        size: 0,
        blocks: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_keep_their_nanoseconds() {
        // What fuser makes of -2 s + 0.5 s, and what it has to be given to say so again.
        let read = UNIX_EPOCH - Duration::new(2, 500_000_000);
        let time = timestamp(TimeOrNow::SpecificTime(read));
        assert_eq!((time.secs, time.nanos), (-2, 500_000_000));
        let shown = UNIX_EPOCH - Duration::from_millis(1500);
        assert_eq!(system_time(time), shown);
    }
}
