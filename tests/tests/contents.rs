//! Bytes, attributes and locks of files in a view are what they are on the disk.
//!
//! Each test runs one script twice, through a mount and in a plain directory, and compares what it
//! saw: results, error numbers, attributes, bytes. Names are the subject of `namespace.rs`.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use harness::side_by_side::same;
use harness::{Must, Sandbox, processes, tree};
use nix::fcntl::AT_FDCWD;
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

#[test]
fn create_append_and_read() {
    same(|dir, log| {
        let path = dir.join("file");
        log.result("open a missing file", &File::open(&path));
        fs::write(&path, "one").must("write");
        log.result("create_new over it", &File::create_new(&path));
        let mut file = OpenOptions::new().append(true).open(&path).must("open");
        file.write_all(b" two").must("append");
        fs::write(dir.join("other"), "").must("write");
        file.write_all(b" three").must("append");
        log.file(&path);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .must("open");
        file.write_all_at(b"ONE", 0).must("pwrite");
        let mut text = String::new();
        file.read_to_string(&mut text).must("read");
        log.note("written and read", text);
        log.result(
            "open a directory for writing",
            &OpenOptions::new().write(true).open(dir),
        );
        log.result("a file as a directory", &fs::read(path.join("below")));
        fs::write(&path, "shorter").must("truncating write");
        log.all(dir);
    });
}

#[test]
fn large_files_at_any_offset() {
    same(|dir, log| {
        let path = dir.join("large");
        let pattern: Vec<u8> = (0..3_000_017_u32).map(|byte| (byte % 253) as u8).collect();
        fs::write(&path, &pattern).must("write");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .must("open");
        for offset in [0, 1, 4095, 4096, 131_071, 1_048_575, 2_999_000] {
            let mut buffer = vec![0; 5000];
            let count = file.read_at(&mut buffer, offset).must("pread");
            log.note(
                "read",
                (offset, count, tree::contains(&pattern, &buffer[..count])),
            );
            file.write_all_at(b"\xffchanged\xff", offset + 7)
                .must("pwrite");
        }
        let bytes = fs::read(&path).must("read");
        let changed = bytes.split(|byte| *byte == 0xff).count();
        log.note("changed", (bytes.len(), changed));
        log.note("copied", fs::copy(&path, dir.join("copy")).ok());
        log.note("equal", fs::read(dir.join("copy")).must("read") == bytes);
    });
}

#[test]
fn truncate_down_and_up() {
    same(|dir, log| {
        for size in [10_u64, 5000, 200_000] {
            let path = dir.join(format!("file{size}"));
            fs::write(&path, vec![b'x'; usize::try_from(size).must("small")]).must("write");
            let file = OpenOptions::new().write(true).open(&path).must("open");
            file.set_len(size / 2).must("down");
            log.file(&path);
            file.set_len(size * 2).must("up");
            let bytes = fs::read(&path).must("read");
            let zeros = bytes.rsplit(|byte| *byte != 0).next().map(<[u8]>::len);
            log.note("length and zeros", (bytes.len(), zeros));
            file.set_len(0).must("to nothing");
            log.file(&path);
        }
    });
}

#[test]
fn sparse_files() {
    same(|dir, log| {
        let path = dir.join("sparse");
        let mut file = File::create(&path).must("create");
        file.seek(SeekFrom::Start(1 << 30)).must("seek");
        file.write_all(b"end").must("write");
        drop(file);
        let meta = path.metadata().must("stat");
        log.note("size", meta.len());
        log.note("takes less than 4 MiB", meta.blocks() * 512 < 4 << 20);
        let file = File::open(&path).must("open");
        let mut hole = [1; 64];
        file.read_exact_at(&mut hole, 123_456_789).must("read");
        log.note("hole", &hole[..]);
        let mut end = [0; 3];
        file.read_exact_at(&mut end, 1 << 30).must("read");
        log.note("end", end);
        drop(file);
        // The comparison after this script reads every byte: keep it small.
        OpenOptions::new()
            .write(true)
            .open(&path)
            .must("open")
            .set_len(10)
            .must("truncate");
    });
}

#[test]
fn times_are_kept_to_the_nanosecond() {
    same(|dir, log| {
        let path = dir.join("file");
        fs::write(&path, "x").must("write");
        fs::create_dir(dir.join("dir")).must("mkdir");
        symlink("file", dir.join("link")).must("symlink");
        for name in ["file", "dir", "link"] {
            let atime = TimeSpec::new(1_234_567_890, 1);
            let mtime = TimeSpec::new(1_000_000_000, 999_999_999);
            let flags = UtimensatFlags::NoFollowSymlink;
            utimensat(AT_FDCWD, &dir.join(name), &atime, &mtime, flags).must("utimensat");
            let meta = fs::symlink_metadata(dir.join(name)).must("stat");
            log.note(name, (meta.mtime(), meta.mtime_nsec()));
        }
        let meta = path.metadata().must("stat");
        log.note("atime", (meta.atime(), meta.atime_nsec()));
        let file = OpenOptions::new().append(true).open(&path).must("open");
        file.set_modified(std::time::UNIX_EPOCH + Duration::new(77, 5))
            .must("futimens");
        let meta = path.metadata().must("stat");
        log.note(
            "mtime through a descriptor",
            (meta.mtime(), meta.mtime_nsec()),
        );
        log.note("atime is untouched", (meta.atime(), meta.atime_nsec()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).must("chmod");
        log.note("chmod leaves mtime", path.metadata().must("stat").mtime());
        fs::rename(&path, dir.join("renamed")).must("rename");
        log.note(
            "rename leaves mtime",
            dir.join("renamed").metadata().must("stat").mtime(),
        );
        (&file).write_all(b"more").must("write");
        drop(file);
        let moved = dir.join("renamed").metadata().must("stat").mtime() > 77;
        log.note("writing moves mtime", moved);
    });
}

#[test]
fn changes_move_the_times_cargo_compares() {
    same(|dir, log| {
        let [sub, path] = ["sub", "sub/file"].map(|name| dir.join(name));
        fs::create_dir(&sub).must("mkdir");
        fs::write(&path, "x").must("write");
        let age = |path: &Path| {
            let time = TimeSpec::new(1_000_000_000, 0);
            utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::FollowSymlink).must("age");
        };
        let moved = |path: &Path| path.metadata().must("stat").mtime() > 1_000_000_000;
        age(&path);
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .must("open");
        log.note("truncating an open file", moved(&path));
        age(&path);
        OpenOptions::new()
            .write(true)
            .open(&path)
            .must("open")
            .set_len(9)
            .must("truncate");
        log.note("set_len", moved(&path));
        age(&sub);
        fs::write(sub.join("new"), "").must("write");
        log.note("a new name moves its directory", moved(&sub));
        age(&sub);
        fs::remove_file(sub.join("new")).must("remove");
        log.note("a removed name moves its directory", moved(&sub));
        age(&sub);
        fs::write(&path, "written").must("write");
        log.note("writing a file moves its directory", moved(&sub));
    });
}

#[test]
fn one_clock_stamps_view_and_disk() {
    let sandbox = Sandbox::new();
    let view = sandbox.make_dir("project").join("target");
    sandbox.mount(&view);
    // The kernel stamps in ticks, so two clocks that are one may differ by a tick.
    let tick = Duration::from_millis(10);
    let stamp = |path: &Path| {
        fs::write(path, "x").must("write");
        path.metadata().must("stat").modified().must("mtime")
    };
    for index in 0..50 {
        let name = format!("file{index}");
        let before = stamp(&sandbox.path(&name));
        let inside = stamp(&view.join(&name));
        let after = stamp(&sandbox.path(&format!("{name} after")));
        assert!(
            before <= inside + tick,
            "the view is behind the disk: {before:?} {inside:?}"
        );
        assert!(
            inside <= after + tick,
            "the view is ahead of the disk: {inside:?} {after:?}"
        );
    }
}

#[test]
fn permissions() {
    same(|dir, log| {
        let path = dir.join("file");
        fs::write(&path, "x").must("write");
        for mode in [0o755, 0o644, 0o600, 0o444, 0o000, 0o4755, 0o777] {
            log.result(
                "chmod",
                &fs::set_permissions(&path, fs::Permissions::from_mode(mode)),
            );
            log.note("mode", format!("{:o}", path.metadata().must("stat").mode()));
        }
        fs::create_dir(dir.join("dir")).must("mkdir");
        fs::set_permissions(dir.join("dir"), fs::Permissions::from_mode(0o1770)).must("chmod");
        log.all(dir);
    });
}

#[test]
fn shared_mappings_reach_the_file() {
    same(|dir, log| {
        for size in [4096_usize, 1_000_000] {
            let path = dir.join(format!("mapped{size}"));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path);
            let file = file.must("create");
            file.set_len(size as u64).must("set_len");
            let length = NonZeroUsize::new(size).must("not empty");
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping of a file no one else changes; it lies where the kernel puts it
            // and is used only below, within its length, before it is unmapped.
            let map = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) };
            let map = map.must("mmap");
            // SAFETY: `map` is a live, writable mapping of `size` bytes, aligned for bytes, and
            // nothing else refers to it while the slice lives.
            let bytes = unsafe { std::slice::from_raw_parts_mut(map.as_ptr().cast::<u8>(), size) };
            bytes[0] = b'<';
            bytes[size / 2] = b'|';
            bytes[size - 1] = b'>';
            // SAFETY: `map` and `size` are those of the mapping above.
            unsafe { msync(map, size, MsFlags::MS_SYNC) }.must("msync");
            let read = fs::read(&path).must("read");
            log.note(
                "seen by read",
                (read.len(), read[0], read[size / 2], read[size - 1]),
            );
            file.write_all_at(b"w", 1).must("pwrite");
            log.note("seen by the mapping", bytes[1]);
            // SAFETY: the slice is not used after this.
            unsafe { munmap(map, size) }.must("munmap");
            drop(file);
            log.file(&path);
        }
    });
}

#[test]
fn programs_run() {
    same(|dir, log| {
        // By another process: a descriptor open for writing that some thread's fork inherits would
        // make the program "busy".
        let copy = |from: &Path, to: &Path| {
            let copied = Command::new("cp").args([from, to]).status().must("cp");
            assert!(copied.success());
        };
        let program = dir.join("true");
        copy(Path::new("/bin/true"), &program);
        log.note(
            "ran",
            Command::new(&program).status().must("exec").success(),
        );
        let [text, script] = ["text", "script"].map(|name| dir.join(name));
        fs::write(&text, "#!/bin/sh\necho ran \"$1\"\n").must("write");
        copy(&text, &script);
        log.result("without the exec bit", &Command::new(&script).status());
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).must("chmod");
        let output = Command::new(&script).arg("well").output().must("exec");
        log.note("said", String::from_utf8_lossy(&output.stdout).into_owned());
        // A running program can be replaced by rename, as cargo and linkers do.
        let sleeper = dir.join("sleep");
        copy(Path::new("/bin/sleep"), &sleeper);
        let mut child = Command::new(&sleeper).arg("60").spawn().must("spawn");
        log.result(
            "write to a running program",
            &OpenOptions::new().write(true).open(&sleeper),
        );
        copy(Path::new("/bin/true"), &dir.join("next"));
        log.result("rename over it", &fs::rename(dir.join("next"), &sleeper));
        log.note(
            "new program",
            Command::new(&sleeper).status().must("exec").success(),
        );
        log.note(
            "old one still runs",
            child.try_wait().must("wait").is_none(),
        );
        child.kill().must("kill");
        child.wait().must("wait");
    });
}

#[test]
fn advisory_locks_exclude() {
    same(|dir, log| {
        let path = dir.join(".cargo-lock");
        let one = File::create(&path).must("create");
        let two = File::open(&path).must("open");
        let state = |result: Result<(), TryLockError>| match result {
            Ok(()) => "locked",
            Err(TryLockError::WouldBlock) => "held by another",
            Err(TryLockError::Error(_)) => "error",
        };
        one.lock().must("lock");
        log.note("exclusive while held", state(two.try_lock()));
        one.unlock().must("unlock");
        log.note("after unlock", state(two.try_lock_shared()));
        log.note("shared with shared", state(one.try_lock_shared()));
        log.note("exclusive with shared", state(one.try_lock()));
        drop(one);
        drop(two);
        // A process another thread is just starting may hold the lock a moment longer.
        let file = File::open(&path).must("open");
        let locked = || file.try_lock().is_ok();
        log.note(
            "after close",
            processes::wait_for(Duration::from_secs(10), locked),
        );
        drop(file);
        // Another process sees the lock as well.
        let held = File::open(&path).must("open");
        held.lock().must("lock");
        let other = Command::new("flock")
            .arg("-n")
            .arg(&path)
            .arg("true")
            .status();
        log.note("another process", other.must("flock").code());
    });
}

#[test]
fn statfs_tells_the_space_of_the_disk() {
    let sandbox = Sandbox::new();
    let view = sandbox.make_dir("project").join("target");
    sandbox.mount(&view);
    let stat = nix::sys::statvfs::statvfs(&view).must("statvfs");
    assert!(stat.blocks() > 0 && stat.blocks_available() > 0, "{stat:?}");
    assert!(
        stat.block_size() > 0 && stat.fragment_size() > 0,
        "{stat:?}"
    );
    assert!(stat.files() > 0, "{stat:?}");
    assert_eq!(stat.name_max(), 255, "{stat:?}");
}

#[test]
fn blocks_are_reported() {
    same(|dir, log| {
        let path = dir.join("file");
        fs::write(&path, vec![1; 1_000_000]).must("write");
        File::open(&path).must("open").sync_all().must("fsync");
        let blocks = path.metadata().must("stat").blocks() * 512;
        log.note(
            "du sees about its size",
            (900_000..=1_200_000).contains(&blocks),
        );
    });
}

#[test]
fn special_files_and_fallocate() {
    same(|dir, log| {
        let fifo = dir.join("fifo");
        log.errno(
            "mkfifo",
            &nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU),
        );
        log.note(
            "kind",
            fs::symlink_metadata(&fifo)
                .map(|meta| meta.mode() & 0o170_000)
                .ok(),
        );
        fs::remove_file(&fifo).must("remove");
        let socket = dir.join("socket");
        log.result("bind", &std::os::unix::net::UnixListener::bind(&socket));
        fs::remove_file(&socket).must("remove");
        let file = File::create(dir.join("file")).must("create");
        let flags = nix::fcntl::FallocateFlags::empty();
        log.errno("fallocate", &nix::fcntl::fallocate(&file, flags, 0, 10_000));
        log.file(&dir.join("file"));
    });
}
