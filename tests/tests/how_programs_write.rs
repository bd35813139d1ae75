//! The way editors, git, databases, tar and whoever writes together write files: appending, locking,
//! creating exclusively, replacing by rename.
//!
//! Each script runs in a view and on the disk and must see the same. The programs themselves are run
//! in `programs.rs`.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use harness::Must;
use harness::files::{Map, read_write};
use harness::side_by_side::{Log, same};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::mman::MapFlags;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

#[test]
fn appends_of_many_writers_do_not_overlap() {
    same(|dir, log| {
        let path = dir.join("log");
        std::thread::scope(|scope| {
            for writer in 0..4_u8 {
                let path = &path;
                scope.spawn(move || {
                    let mut options = OpenOptions::new();
                    let mut file = options.create(true).append(true).open(path).must("open");
                    for _ in 0..500 {
                        file.write_all(&[b'a' + writer; 37]).must("append");
                    }
                });
            }
        });
        let bytes = fs::read(&path).must("read");
        let whole = |record: &[u8]| record.len() == 37 && record.iter().all(|b| *b == record[0]);
        log.note("length", bytes.len());
        log.note(
            "whole records",
            bytes.chunks(37).filter(|record| whole(record)).count(),
        );
        fs::remove_file(&path).must("remove");
    });
}

#[test]
fn exclusive_creation_has_one_winner() {
    same(|dir, log| {
        for round in 0..50 {
            let path = dir.join(format!("lock{round}"));
            let winners = std::sync::atomic::AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        if File::create_new(&path).is_ok() {
                            winners.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                    });
                }
            });
            log.note("winners", winners);
        }
    });
}

fn lock(file: &File, kind: i32, from: i64, length: i64) -> nix::Result<i32> {
    let region = libc::flock {
        l_type: i16::try_from(kind).must("a lock type"),
        l_whence: i16::try_from(libc::SEEK_SET).must("a whence"),
        l_start: from,
        l_len: length,
        l_pid: 0,
    };
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&region))
}

#[test]
fn record_locks_exclude_by_range() {
    same(|dir, log| {
        let path = dir.join("database");
        let [one, two] = [read_write(&path), read_write(&path)];
        let (read, write, free) = (libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK);
        log.errno("first half", &lock(&one, write, 0, 100));
        log.errno("the same", &lock(&two, write, 50, 100));
        log.errno("the other half", &lock(&two, write, 100, 100));
        log.errno("to read", &lock(&two, read, 0, 10));
        log.errno("free", &lock(&one, free, 0, 100));
        log.errno("to read now", &lock(&two, read, 0, 10));
        log.errno("both read", &lock(&one, read, 0, 10));
    });
}

#[test]
fn editors_and_git_replace_files_by_rename() {
    same(|dir, log| {
        let [config, lock] = ["config", "config.lock"].map(|name| dir.join(name));
        fs::write(&config, "old").must("write");
        let reader = File::open(&config).must("open");
        for round in 0..20 {
            let mut options = OpenOptions::new();
            let mut new = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&lock)
                .must("lock");
            write!(new, "new {round}").must("write");
            new.sync_all().must("fsync");
            drop(new);
            fs::rename(&lock, &config).must("rename");
            log.note("read", fs::read_to_string(&config).ok());
        }
        let mut old = [0; 3];
        reader.read_exact_at(&mut old, 0).must("read");
        log.note("the first one is still open", old);
        // vim with backupcopy=auto: the old one aside, a new one written, then the old removed.
        fs::rename(&config, dir.join("config~")).must("rename");
        fs::write(&config, "third").must("write");
        fs::remove_file(dir.join("config~")).must("remove");
        // Emacs exchanges with the lock.
        fs::write(&lock, "fourth").must("write");
        let exchange = RenameFlags::RENAME_EXCHANGE;
        log.errno(
            "exchange",
            &renameat2(AT_FDCWD, &lock, AT_FDCWD, &config, exchange),
        );
        log.all(dir);
    });
}

/// Runs a shell script in the directory and notes what it says.
fn shell(dir: &Path, log: &mut Log, script: &str) {
    let output = Command::new("sh")
        .arg("-euc")
        .arg(script)
        .current_dir(dir)
        .output();
    let output = output.must("sh");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    log.note(
        script,
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        ),
    );
}

#[test]
fn copies_and_archives_keep_everything() {
    same(|dir, log| {
        let from = dir.join("from");
        fs::create_dir_all(from.join("sub/empty")).must("mkdir");
        fs::write(from.join("small"), "small").must("write");
        fs::write(from.join("sub/large"), vec![b'L'; 300_000]).must("write");
        fs::hard_link(from.join("small"), from.join("sub/same")).must("link");
        symlink("../small", from.join("sub/link")).must("symlink");
        let sparse = File::create(from.join("sparse")).must("create");
        sparse.set_len(10 << 20).must("set_len");
        sparse.write_all_at(b"middle", 5 << 20).must("pwrite");
        drop(sparse);
        fs::set_permissions(from.join("small"), fs::Permissions::from_mode(0o640)).must("chmod");
        let old = TimeSpec::new(1_000_000_000, 987_654_321);
        for name in ["small", "sub/large", "sub/empty", "sub", "sparse"] {
            let flags = UtimensatFlags::FollowSymlink;
            utimensat(AT_FDCWD, &from.join(name), &old, &old, flags).must("utimensat");
        }
        let (link, flags) = (from.join("sub/link"), UtimensatFlags::NoFollowSymlink);
        utimensat(AT_FDCWD, &link, &old, &old, flags).must("utimensat");
        shell(dir, log, "cp -a from cp");
        shell(
            dir,
            log,
            "tar -cSf all.tar from && mkdir tar && tar -xSf all.tar -C tar",
        );
        shell(
            dir,
            log,
            "diff -r from cp && diff -r from tar/from && rm all.tar",
        );
        let shown = "find cp tar/from -printf '%P %m %n %s %Ts %l\\n' | grep -v ' d ' | sort";
        shell(
            dir,
            log,
            &format!("{shown} | grep -v -e '^sub ' -e '^ ' -e '^sub/empty '"),
        );
        shell(
            dir,
            log,
            "test $(du -k cp/sparse | cut -f1) -lt 200 && echo sparse still",
        );
        fs::remove_dir_all(dir.join("from")).must("remove");
        shell(dir, log, "rm -r cp/sparse tar/from/sparse");
    });
}

#[test]
fn a_database_writes_its_pages_its_journal_and_its_shared_memory() {
    // The calls of sqlite3 in its two modes, as strace shows them.
    same(|dir, log| {
        let [db, journal, wal, shm] =
            ["db", "db-journal", "db-wal", "db-shm"].map(|name| dir.join(name));
        let file = read_write(&db);
        log.errno(
            "shared lock",
            &lock(&file, libc::F_RDLCK, 1_073_741_826, 510),
        );
        log.errno(
            "reserved lock",
            &lock(&file, libc::F_WRLCK, 1_073_741_825, 1),
        );
        let page = |number: u8| vec![number; 4096];
        for number in 0..10_u8 {
            file.write_all_at(&page(number), u64::from(number) * 4096)
                .must("page");
        }
        file.sync_data().must("fdatasync");
        let log_file = read_write(&journal);
        log_file.write_all_at(&page(3), 512).must("journal");
        log_file.sync_data().must("fdatasync");
        File::open(dir)
            .must("open")
            .sync_all()
            .must("fsync of the directory");
        file.write_all_at(&page(33), 3 * 4096).must("page");
        file.sync_data().must("fdatasync");
        log_file.set_len(0).must("truncate the journal");
        fs::remove_file(&journal).must("commit");
        log.note(
            "journal while open",
            log_file.metadata().must("fstat").nlink(),
        );
        let (frames, memory) = (read_write(&wal), read_write(&shm));
        memory
            .write_all_at(&[0], 32_767)
            .must("grow the shared memory");
        let [one, two] = [&memory, &memory].map(|file| Map::new(file, MapFlags::MAP_SHARED));
        one.set(100, 42);
        log.note("seen by the other", two.get(100));
        for frame in 0..20 {
            frames
                .write_all_at(&page(frame), 32 + u64::from(frame) * 4120)
                .must("frame");
            one.set(usize::from(frame) * 4, frame);
        }
        frames.sync_data().must("fdatasync");
        log.errno("locks of the index", &lock(&memory, libc::F_WRLCK, 120, 1));
        drop((one, two));
        frames.set_len(0).must("reset");
        drop((frames, memory, file, log_file));
        log.all(dir);
    });
}
