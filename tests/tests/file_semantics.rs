//! What programs other than cargo rely on in a directory: holes, ranges, mappings, owners, times,
//! limits.
//!
//! Each script runs in a view and on the disk and must see the same; what a view does differently
//! is in `exceptions.rs`.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use harness::Must;
use harness::files::{Map, read_write};
use harness::side_by_side::same;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag};
use nix::sys::mman::MapFlags;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, lseek};

/// All data of a file as `SEEK_DATA` and `SEEK_HOLE` show it, in whole blocks.
fn extents(file: &File) -> Vec<(i64, i64)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(data) = lseek(file, at, Whence::SeekData) {
        at = lseek(file, data, Whence::SeekHole).must("the end of the data");
        found.push((data / 4096, (at + 4095) / 4096));
    }
    found
}

#[test]
fn data_and_holes() {
    same(|dir, log| {
        let path = dir.join("file");
        let file = read_write(&path);
        file.set_len(1 << 20).must("set_len");
        log.note("nothing but a hole", extents(&file));
        file.write_all_at(&[1; 5000], 65_536).must("pwrite");
        file.write_all_at(&[2; 4096], 524_288).must("pwrite");
        log.note("two pieces", extents(&file));
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&file, punch, 65_536, 4096).must("punch");
        log.note("a hole in one", extents(&file));
        let beyond = lseek(&file, 1 << 20, Whence::SeekData);
        log.errno("data behind the end", &beyond);
        log.errno(
            "a hole behind the end",
            &lseek(&file, 1 << 20, Whence::SeekHole),
        );
        log.errno(
            "data in the last hole",
            &lseek(&file, 600_000, Whence::SeekData),
        );
        let blocks = file.metadata().must("fstat").blocks();
        log.note("takes less than 64 KiB", blocks * 512 < 65_536);
        drop(file);
        log.all(dir);
        fs::remove_file(&path).must("remove");
    });
}

#[test]
fn what_is_mapped_and_not_yet_written_back_is_data() {
    same(|dir, log| {
        let path = dir.join("file");
        let file = read_write(&path);
        file.set_len(1 << 20).must("set_len");
        let map = Map::new(&file, MapFlags::MAP_SHARED);
        map.set(300_000, 7);
        log.note(
            "through another descriptor",
            extents(&File::open(&path).must("open")),
        );
        map.set(700_000, 8);
        log.note("and again", extents(&File::open(&path).must("open")));
        log.note("still mapped", (map.get(300_000), map.get(700_000)));
        // cp looks for holes, then copies what is between them.
        let copied = Command::new("cp").arg(&path).arg(dir.join("copy")).status();
        log.note("cp", copied.must("cp").success());
        drop(map);
        drop(file);
        let bytes = fs::read(dir.join("copy")).must("read");
        log.note("copied", (bytes.len(), bytes[300_000], bytes[700_000]));
        fs::remove_file(&path).must("remove");
        fs::remove_file(dir.join("copy")).must("remove");
    });
}

#[test]
fn preallocate_and_punch() {
    same(|dir, log| {
        let path = dir.join("file");
        let file = read_write(&path);
        let (keep, punch, zero) = (
            FallocateFlags::FALLOC_FL_KEEP_SIZE,
            FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            FallocateFlags::FALLOC_FL_ZERO_RANGE,
        );
        let call = |flags, from, length| nix::fcntl::fallocate(&file, flags, from, length);
        for (what, flags) in [
            ("extend", FallocateFlags::empty()),
            ("keep", keep),
            ("punch", punch | keep),
            ("punch without keep", punch),
            ("zero", zero),
            ("zero and keep", zero | keep),
        ] {
            file.set_len(0).must("empty");
            file.write_all_at(&[b'x'; 9000], 0).must("pwrite");
            log.errno(what, &call(flags, 4000, 10_000));
            log.file(&path);
            let bytes = fs::read(&path).must("read");
            log.note(
                "bytes",
                bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>(),
            );
        }
        log.errno("nothing", &call(keep, 0, 0));
        log.errno("below zero", &call(keep, -1, 10));
        log.errno("too far", &call(FallocateFlags::empty(), i64::MAX - 5, 5));
        let read_only = File::open(&path).must("open");
        let refused = nix::fcntl::fallocate(&read_only, keep, 0, 10);
        log.errno("not opened for writing", &refused);
    });
}

#[test]
fn copy_file_range_and_sendfile() {
    same(|dir, log| {
        let [from, to] = ["from", "to"].map(|name| read_write(&dir.join(name)));
        let pattern: Vec<u8> = (0..100_000_u32).map(|byte| (byte % 251) as u8).collect();
        from.write_all_at(&pattern, 0).must("pwrite");
        let copy = |from: &File, mut at, to: &File, mut into, length| {
            nix::fcntl::copy_file_range(from, Some(&mut at), to, Some(&mut into), length)
        };
        log.note("all", copy(&from, 0, &to, 0, 200_000));
        log.note("a piece further", copy(&from, 17, &to, 150_000, 5000));
        log.note("from behind the end", copy(&from, 100_000, &to, 0, 10));
        log.note("into itself", copy(&to, 0, &to, 200_000, 1000));
        log.note("onto itself", copy(&to, 0, &to, 500, 1000));
        let append = OpenOptions::new()
            .append(true)
            .open(dir.join("to"))
            .must("open");
        log.note("appending", copy(&from, 0, &append, 0, 10));
        let mut at = 99_990;
        let sent = nix::sys::sendfile::sendfile(&to, &from, Some(&mut at), 100);
        log.note("sendfile", sent);
        drop((from, to, append));
        log.all(dir);
        log.note(
            "bytes",
            fs::read(dir.join("to"))
                .must("read")
                .iter()
                .map(|b| u64::from(*b))
                .sum::<u64>(),
        );
    });
}

#[test]
fn private_mappings_stay_private() {
    same(|dir, log| {
        let path = dir.join("file");
        fs::write(&path, vec![b'a'; 20_000]).must("write");
        let file = read_write(&path);
        let [shared, private] =
            [MapFlags::MAP_SHARED, MapFlags::MAP_PRIVATE].map(|flags| Map::new(&file, flags));
        private.set(10, b'p');
        shared.set(11, b's');
        log.note("private", (private.get(10), shared.get(10)));
        let mut byte = [0; 2];
        file.read_exact_at(&mut byte, 10).must("pread");
        log.note("the file", byte);
        fs::remove_file(&path).must("remove");
        shared.set(19_999, b'e');
        file.read_exact_at(&mut byte, 19_998).must("pread");
        log.note("unlinked while mapped", byte);
    });
}

#[test]
fn special_files_of_every_kind() {
    same(|dir, log| {
        for (name, kind, device) in [
            ("fifo", SFlag::S_IFIFO, 0),
            ("socket", SFlag::S_IFSOCK, 0),
            ("null", SFlag::S_IFCHR, makedev(1, 3)),
            ("block", SFlag::S_IFBLK, makedev(240, 300)),
            ("file", SFlag::S_IFREG, 0),
        ] {
            let path = dir.join(name);
            log.errno(
                name,
                &mknod(&path, kind, Mode::from_bits_truncate(0o640), device),
            );
            let meta = fs::symlink_metadata(&path).ok();
            log.note(
                "kind and device",
                meta.map(|meta| (meta.mode(), meta.rdev(), meta.len())),
            );
            log.result("rename", &fs::rename(&path, dir.join("moved")));
            log.result("link", &fs::hard_link(dir.join("moved"), &path));
            for path in [&path, &dir.join("moved")] {
                log.result("remove", &fs::remove_file(path));
            }
        }
        // A pipe by name carries bytes between processes.
        let fifo = dir.join("pipe");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).must("mkfifo");
        let mut writer = Command::new("sh");
        let writer = writer
            .args(["-c", "echo through > \"$1\"", "sh"])
            .arg(&fifo)
            .spawn();
        log.note("read", fs::read_to_string(&fifo).ok());
        writer.must("sh").wait().must("wait");
        fs::remove_file(&fifo).must("remove");
        let socket = dir.join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket);
        log.result("bind", &listener);
        log.result("connect", &std::os::unix::net::UnixStream::connect(&socket));
        fs::remove_file(&socket).must("remove");
        log.all(dir);
    });
}

#[test]
fn owners_and_privilege_bits() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: only root gives files away");
        return;
    }
    same(|dir, log| {
        let path = dir.join("file");
        let perm = |path: &Path| path.metadata().must("stat").mode() & 0o7777;
        let set = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).must("chmod");
        let as_nobody = |script: &str| {
            let mut command = Command::new("setpriv");
            command.args([
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "--",
                "sh",
                "-c",
            ]);
            let status = command.arg(script).arg("sh").arg(&path).status();
            status.must("setpriv").success()
        };
        fs::write(&path, "x").must("write");
        for mode in [0o6777, 0o2777, 0o4767] {
            set(mode);
            log.note(
                "written by another",
                (as_nobody("echo y >> \"$1\""), format!("{:o}", perm(&path))),
            );
            set(mode);
            log.note(
                "truncated by another",
                (as_nobody(": > \"$1\""), format!("{:o}", perm(&path))),
            );
            set(mode);
            nix::unistd::chown(&path, Some(Uid::from_raw(1)), Some(Gid::from_raw(2))).must("chown");
            log.note("given away", format!("{:o}", perm(&path)));
            log.file(&path);
        }
        log.note(
            "chmod by another",
            as_nobody("chmod 600 \"$1\" 2>/dev/null"),
        );
        set(0o600);
        log.note("read by another", as_nobody("cat \"$1\" >/dev/null 2>&1"));
        // A set-group-ID directory hands its group on.
        let sub = dir.join("sub");
        fs::create_dir(&sub).must("mkdir");
        nix::unistd::chown(&sub, None, Some(Gid::from_raw(7))).must("chown");
        fs::set_permissions(&sub, fs::Permissions::from_mode(0o2775)).must("chmod");
        fs::write(sub.join("file"), "").must("write");
        fs::create_dir(sub.join("dir")).must("mkdir");
        symlink("x", sub.join("link")).must("symlink");
        nix::unistd::fchownat(
            AT_FDCWD,
            &sub.join("link"),
            Some(Uid::from_raw(3)),
            None,
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .must("lchown");
        log.all(dir);
        // In a sticky directory only the owner removes.
        fs::set_permissions(&sub, fs::Permissions::from_mode(0o1777)).must("chmod");
        let mut remove = Command::new("setpriv");
        remove.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--",
            "rm",
            "-f",
        ]);
        let removed = remove
            .arg(sub.join("file"))
            .stderr(std::process::Stdio::null())
            .status();
        log.note("removed by another", removed.must("rm").success());
    });
}

#[test]
fn times_before_and_far_after_the_epoch() {
    same(|dir, log| {
        let path = dir.join("file");
        fs::write(&path, "x").must("write");
        for (seconds, nanos) in [
            (0, 0),
            (-1, 999_999_999),
            (-2, 500_000_000),
            (-86_400, 0),
            (4_294_967_296, 1),
            (10_000_000_000, 123_456_789),
        ] {
            let time = TimeSpec::new(seconds, nanos);
            utimensat(AT_FDCWD, &path, &time, &time, UtimensatFlags::FollowSymlink).must("set");
            let meta = path.metadata().must("stat");
            log.note("atime", (meta.atime(), meta.atime_nsec()));
            log.note("mtime", (meta.mtime(), meta.mtime_nsec()));
        }
        let (now, omit) = (TimeSpec::UTIME_NOW, TimeSpec::UTIME_OMIT);
        let set = |atime, mtime| {
            let flags = UtimensatFlags::FollowSymlink;
            utimensat(AT_FDCWD, &path, atime, mtime, flags).must("utimensat");
            let meta = path.metadata().must("stat");
            let recent = |seconds| (1_600_000_000..4_000_000_000_i64).contains(&seconds);
            (recent(meta.atime()), recent(meta.mtime()))
        };
        let old = TimeSpec::new(5, 0);
        log.note("both old", set(&old, &old));
        log.note("neither", set(&omit, &omit));
        log.note("atime now", set(&now, &omit));
        log.note("mtime now", set(&old, &now));
    });
}

#[test]
fn an_unlinked_open_file_has_no_way_back() {
    same(|dir, log| {
        let path = dir.join("file");
        let file = read_write(&path);
        (&file).write_all(b"still here").must("write");
        fs::remove_file(&path).must("remove");
        let magic = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let again = |name: &str| {
            let to = dir.join(name);
            let flags = AtFlags::AT_SYMLINK_FOLLOW;
            nix::unistd::linkat(AT_FDCWD, magic.as_str(), AT_FDCWD, &to, flags)
        };
        log.errno("link of an unlinked file", &again("back"));
        log.note("opened through /proc", fs::read_to_string(&magic).ok());
        file.set_len(5).must("truncate");
        file.set_permissions(fs::Permissions::from_mode(0o600))
            .must("chmod");
        log.note("links", file.metadata().must("fstat").nlink());
        // With a name left, the descriptor leads to another.
        let other = dir.join("other");
        let file = read_write(&other);
        let magic = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        let linked =
            nix::unistd::linkat(AT_FDCWD, magic.as_str(), AT_FDCWD, &dir.join("two"), flags);
        log.errno("link of an open file", &linked);
        log.note("links", file.metadata().must("fstat").nlink());
        log.all(dir);
    });
}

#[test]
fn removed_directories_take_nothing_new() {
    same(|dir, log| {
        let sub = dir.join("sub");
        fs::create_dir(&sub).must("mkdir");
        let open = File::open(&sub).must("open");
        fs::remove_dir(&sub).must("rmdir");
        let mode = Mode::from_bits_truncate(0o644);
        let flags = OFlag::O_CREAT | OFlag::O_WRONLY;
        log.errno(
            "create in it",
            &nix::fcntl::openat(&open, "new", flags, mode),
        );
        log.errno("mkdir in it", &nix::sys::stat::mkdirat(&open, "new", mode));
        log.note("links", open.metadata().must("fstat").nlink());
        fs::create_dir(&sub).must("mkdir");
        log.errno(
            "still not in the new one",
            &nix::sys::stat::mkdirat(&open, "new", mode),
        );
        log.all(dir);
    });
}

#[test]
fn flags_and_lengths_at_their_limits() {
    same(|dir, log| {
        let long = "t".repeat(4095);
        log.result("a link to 4,095 bytes", &symlink(&long, dir.join("long")));
        log.note(
            "read",
            fs::read_link(dir.join("long"))
                .ok()
                .map(|t| t.as_os_str().len()),
        );
        log.result(
            "a link to 4,096 bytes",
            &symlink("t".repeat(4096), dir.join("longer")),
        );
        log.result("a link to nothing", &symlink("", dir.join("empty")));
        let file = read_write(&dir.join("file"));
        log.result(
            "write at the largest offset",
            &file.write_at(b"x", i64::MAX as u64 - 1),
        );
        log.result("set_len too large", &file.set_len(i64::MAX as u64));
        log.note("size", file.metadata().must("fstat").len());
        let flags = OFlag::O_WRONLY | OFlag::O_DIRECTORY;
        let opened = nix::fcntl::open(&dir.join("file"), flags, Mode::empty());
        log.errno("a file as a directory", &opened);
        symlink("file", dir.join("link")).must("symlink");
        let opened = nix::fcntl::open(&dir.join("link"), OFlag::O_NOFOLLOW, Mode::empty());
        log.errno("a link, not followed", &opened);
        let opened = nix::fcntl::open(&dir.join("link/"), OFlag::O_RDONLY, Mode::empty());
        log.errno("with a slash at the end", &opened);
    });
}
