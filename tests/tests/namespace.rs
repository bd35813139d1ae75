//! File operations in a view do what they do on the disk.
//!
//! Each test runs one script twice, through a mount and in a plain directory, and compares what it
//! saw: results, error numbers, attributes, bytes.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use harness::side_by_side::same;
use harness::{Must, Sandbox, processes, tree};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
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
fn rename_files() {
    same(|dir, log| {
        let [a, b, missing] = ["a", "b", "missing"].map(|name| dir.join(name));
        fs::write(&a, "a").must("write");
        fs::write(&b, "b").must("write");
        let mut open = File::open(&b).must("open");
        log.result("over a file", &fs::rename(&a, &b));
        log.all(dir);
        let mut text = String::new();
        open.read_to_string(&mut text).must("read");
        log.note("what was replaced is still open", text);
        log.result("from nothing", &fs::rename(&missing, &a));
        log.result("onto itself", &fs::rename(&b, &b));
        fs::hard_link(&b, &a).must("link");
        log.result("onto another name of the same file", &fs::rename(&a, &b));
        log.all(dir);
        fs::create_dir(dir.join("dir")).must("mkdir");
        log.result("over a directory", &fs::rename(&b, dir.join("dir")));
        log.result("into a directory", &fs::rename(&b, dir.join("dir/moved")));
        log.all(dir);
    });
}

#[test]
fn rename_with_flags() {
    same(|dir, log| {
        let [a, b] = ["a", "b"].map(|name| dir.join(name));
        fs::write(&a, "a").must("write");
        fs::write(&b, "bb").must("write");
        let rename = |flags| renameat2(AT_FDCWD, &a, AT_FDCWD, &b, flags);
        log.errno("no replace", &rename(RenameFlags::RENAME_NOREPLACE));
        log.errno("exchange", &rename(RenameFlags::RENAME_EXCHANGE));
        log.all(dir);
        fs::remove_file(&b).must("remove");
        log.errno(
            "exchange with nothing",
            &rename(RenameFlags::RENAME_EXCHANGE),
        );
        log.errno(
            "no replace of nothing",
            &rename(RenameFlags::RENAME_NOREPLACE),
        );
        log.all(dir);
    });
}

#[test]
fn rename_directories() {
    same(|dir, log| {
        fs::create_dir_all(dir.join("one/inner")).must("mkdir");
        fs::write(dir.join("one/inner/file"), "x").must("write");
        fs::create_dir(dir.join("empty")).must("mkdir");
        fs::create_dir(dir.join("full")).must("mkdir");
        fs::write(dir.join("full/file"), "y").must("write");
        log.result(
            "into itself",
            &fs::rename(dir.join("one"), dir.join("one/inner/one")),
        );
        log.result(
            "over a full one",
            &fs::rename(dir.join("one"), dir.join("full")),
        );
        log.result(
            "over an empty one",
            &fs::rename(dir.join("one"), dir.join("empty")),
        );
        log.result(
            "over a file",
            &fs::rename(dir.join("empty"), dir.join("full/file")),
        );
        log.all(dir);
        log.result(
            "below another",
            &fs::rename(dir.join("empty"), dir.join("full/moved")),
        );
        log.result("the old path", &fs::read(dir.join("empty/inner/file")));
        log.result("the new path", &fs::read(dir.join("full/moved/inner/file")));
        log.all(dir);
    });
}

#[test]
fn make_and_remove_directories() {
    same(|dir, log| {
        log.result("make", &fs::create_dir(dir.join("dir")));
        log.result("make again", &fs::create_dir(dir.join("dir")));
        log.result("make below nothing", &fs::create_dir(dir.join("no/dir")));
        fs::write(dir.join("dir/file"), "").must("write");
        log.result("remove a full one", &fs::remove_dir(dir.join("dir")));
        log.result(
            "remove a file as one",
            &fs::remove_dir(dir.join("dir/file")),
        );
        log.result("unlink one", &fs::remove_file(dir.join("dir")));
        log.result("remove a file", &fs::remove_file(dir.join("dir/file")));
        log.result("remove an empty one", &fs::remove_dir(dir.join("dir")));
        log.result("remove nothing", &fs::remove_dir(dir.join("dir")));
        log.result("make it anew", &fs::create_dir(dir.join("dir")));
        log.all(dir);
    });
}

#[test]
fn hard_links_share_the_inode() {
    same(|dir, log| {
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.join(name));
        fs::write(&a, vec![b'x'; 50_000]).must("write");
        fs::hard_link(&a, &b).must("link");
        fs::hard_link(&b, &c).must("link");
        let inodes = || {
            let of = |path: &Path| path.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
            (of(&a) == of(&b), of(&b) == of(&c))
        };
        log.note("one inode", inodes());
        fs::set_permissions(&b, fs::Permissions::from_mode(0o640)).must("chmod");
        let mut file = OpenOptions::new().append(true).open(&c).must("open");
        file.write_all(b"appended").must("append");
        log.note(
            "lengths",
            [&a, &b, &c].map(|path| path.metadata().must("stat").len()),
        );
        log.note(
            "modes",
            [&a, &b, &c].map(|path| path.metadata().must("stat").mode()),
        );
        fs::remove_file(&a).must("remove");
        log.note("links", b.metadata().must("stat").nlink());
        log.result("over a name", &fs::hard_link(&c, &b));
        log.result("of a directory", &fs::hard_link(dir, dir.join("no")));
        log.result("of nothing", &fs::hard_link(&a, dir.join("no")));
        log.note("one inode still", inodes());
        fs::remove_file(&b).must("remove");
        log.note("links", c.metadata().must("stat").nlink());
    });
}

#[test]
fn unlinked_files_live_while_open() {
    same(|dir, log| {
        for size in [3, 300_000] {
            let path = dir.join("file");
            fs::write(&path, vec![b'x'; size]).must("write");
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .must("open");
            fs::remove_file(&path).must("remove");
            log.file(&path);
            log.note("links", file.metadata().must("fstat").nlink());
            file.write_all(b"written after").must("write");
            file.seek(SeekFrom::Start(0)).must("seek");
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).must("read");
            log.note(
                "read",
                (
                    bytes.len(),
                    String::from_utf8_lossy(&bytes[..3]).into_owned(),
                ),
            );
            fs::write(&path, "a new file of that name").must("write");
            log.note("length of the old", file.metadata().must("fstat").len());
            log.all(dir);
        }
    });
}

#[test]
fn symbolic_links() {
    same(|dir, log| {
        fs::write(dir.join("file"), "through").must("write");
        symlink("file", dir.join("link")).must("symlink");
        symlink("nowhere", dir.join("dangling")).must("symlink");
        symlink("loop", dir.join("loop")).must("symlink");
        symlink("../".repeat(500), dir.join("long")).must("symlink");
        log.note("read through", fs::read_to_string(dir.join("link")).ok());
        log.note("target", fs::read_link(dir.join("link")).ok());
        log.note("long target", fs::read_link(dir.join("long")).ok());
        log.result("dangling", &fs::read(dir.join("dangling")));
        log.result("loop", &fs::read(dir.join("loop")));
        log.result("read_link of a file", &fs::read_link(dir.join("file")));
        log.result("over a name", &symlink("x", dir.join("file")));
        fs::write(dir.join("link"), "written through").must("write");
        log.all(dir);
        fs::remove_file(dir.join("link")).must("remove");
        log.all(dir);
    });
}

#[test]
fn a_directory_of_two_thousand_names() {
    same(|dir, log| {
        let many = dir.join("many");
        fs::create_dir(&many).must("mkdir");
        for index in 0..2000 {
            fs::write(many.join(format!("a name of some length {index:04}")), "").must("write");
        }
        let names = || {
            let mut names: Vec<_> = fs::read_dir(&many)
                .must("readdir")
                .map(|e| e.must("entry").file_name())
                .collect();
            names.sort();
            names
        };
        let before = names();
        log.note(
            "names",
            (
                before.len(),
                before.first().cloned(),
                before.last().cloned(),
            ),
        );
        // Removing what was just listed, while listing, must skip nothing.
        for entry in fs::read_dir(&many).must("readdir") {
            fs::remove_file(entry.must("entry").path()).must("remove");
        }
        log.note("left", names());
        log.result("remove the directory", &fs::remove_dir(&many));
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
fn names_have_255_bytes_at_most() {
    same(|dir, log| {
        let [longest, too_long] = [255, 256].map(|length| dir.join("n".repeat(length)));
        log.result("create 255", &fs::write(&longest, "x"));
        log.result("create 256", &fs::write(&too_long, "x"));
        log.result("look up 256", &fs::symlink_metadata(&too_long));
        log.result("mkdir 256", &fs::create_dir(&too_long));
        log.result("symlink 256", &symlink("x", &too_long));
        log.result("link to 256", &fs::hard_link(&longest, &too_long));
        log.result("rename to 256", &fs::rename(&longest, &too_long));
        let deep = (0..40).fold(dir.to_owned(), |path, _| path.join("d".repeat(80)));
        log.result("a path of 3,240 bytes", &fs::create_dir_all(deep));
        log.result(
            "bytes that are no text",
            &fs::write(dir.join(not_text()), "x"),
        );
        log.note("names", fs::read_dir(dir).must("readdir").count());
    });
}

fn not_text() -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(vec![b'a', 0xff, 0xfe, b'z'])
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

#[test]
fn many_threads_at_once() {
    same(|dir, log| {
        std::thread::scope(|scope| {
            for thread in 0..8 {
                scope.spawn(move || {
                    let own = dir.join(format!("thread{thread}"));
                    fs::create_dir(&own).must("mkdir");
                    for index in 0..100 {
                        let path = own.join(format!("file{index}"));
                        let bytes = vec![thread; 1 + index * 100];
                        fs::write(&path, &bytes).must("write");
                        assert_eq!(fs::read(&path).must("read"), bytes);
                        fs::rename(&path, dir.join(format!("{thread}-{index}"))).must("rename");
                        if index % 2 == 0 {
                            fs::remove_file(dir.join(format!("{thread}-{index}"))).must("remove");
                        }
                    }
                });
            }
        });
        log.note("names", tree::walk(dir).len());
        log.all(dir);
    });
}
