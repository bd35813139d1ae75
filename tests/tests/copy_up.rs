//! Whatever is done to a file that a hit brought, the blob behind it stays as it is, and so do the
//! other views that show it. Disks that can share bytes between files share them.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use harness::disk::Disk;
use harness::{Must, Project, Sandbox, Tree, samples, tree};
use nix::fcntl::{AT_FDCWD, FallocateFlags};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

/// A project, built, its view emptied and built again: every output is a blob.
fn built(sandbox: &Sandbox) -> Project {
    let project = samples::plain(sandbox.path("project"));
    sandbox.mount(project.target());
    let _ = sandbox.cargo(&project, "build").ok();
    sandbox.counters();
    bring(sandbox, &project);
    project
}

/// Has hits bring everything anew.
fn bring(sandbox: &Sandbox, project: &Project) {
    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(project, "build").ok());
    seen.assert_all_hit(3);
}

/// The store's blobs: names, bytes, modes, times. The names are the digests of the bytes, so one
/// equal picture also says that none was torn.
fn blobs(sandbox: &Sandbox) -> Tree {
    Tree::of(&sandbox.store().join("blobs"))
}

/// The blob that holds the bytes of a file.
fn blob_of(sandbox: &Sandbox, path: &Path) -> PathBuf {
    let bytes = fs::read(path).must(path.display());
    let blobs = tree::files(&sandbox.store().join("blobs"));
    let same = |blob: &PathBuf| {
        blob.metadata()
            .is_ok_and(|meta| meta.len() == bytes.len() as u64)
            && fs::read(blob).is_ok_and(|blob| blob == bytes)
    };
    blobs.into_iter().find(same).must("a blob with these bytes")
}

fn writable(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .open(path)
        .must(path.display())
}

fn map_and_write(path: &Path, at: usize, byte: u8) {
    let file = writable(path);
    let length = usize::try_from(file.metadata().must("fstat").len()).must("small");
    let size = NonZeroUsize::new(length).must("not empty");
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping where the kernel puts it, of a file nobody shortens meanwhile.
    let map = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0) }.must("mmap");
    assert!(at < length);
    // SAFETY: `at` lies within the mapping, which is live and writable.
    unsafe { map.cast::<u8>().add(at).write_volatile(byte) };
    // SAFETY: the mapping made above; nothing refers to it any more.
    unsafe { munmap(map, length) }.must("munmap");
}

/// Something a program may do to a file, and its name.
type Change = (&'static str, fn(&Path));

const CHANGES: [Change; 12] = [
    ("write", |path| {
        writable(path).write_all_at(b"changed", 100).must("pwrite");
    }),
    ("append", |path| {
        let file = OpenOptions::new().append(true).open(path);
        file.must("open").write_all(b"appended").must("append");
    }),
    ("truncate down", |path| {
        writable(path).set_len(1000).must("set_len");
    }),
    ("truncate up", |path| {
        let file = writable(path);
        let length = file.metadata().must("fstat").len();
        file.set_len(length + 5000).must("set_len");
    }),
    ("truncate to nothing", |path| {
        writable(path).set_len(0).must("set_len");
    }),
    ("open to truncate", |path| {
        fs::write(path, "new").must("write");
    }),
    ("map and write", |path| map_and_write(path, 5000, 0xa5)),
    ("preallocate", |path| {
        let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(writable(path), mode, 0, 1 << 20).must("fallocate");
    }),
    ("punch", |path| {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(writable(path), mode, 4096, 8192).must("punch");
    }),
    ("copy into", |path| {
        let (mut from, mut to) = (100_000, 9000);
        let file = writable(path);
        nix::fcntl::copy_file_range(&file, Some(&mut from), &file, Some(&mut to), 9000)
            .must("copy_file_range");
    }),
    ("chmod", |path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).must("chmod");
    }),
    ("set times", |path| {
        let time = TimeSpec::new(1_000_000_000, 1);
        let flags = UtimensatFlags::FollowSymlink;
        utimensat(AT_FDCWD, path, &time, &time, flags).must("utimensat");
    }),
];

#[test]
fn no_change_reaches_the_blob_or_another_view() {
    let sandbox = Sandbox::new();
    let first = built(&sandbox);
    let second = first.checkout(sandbox.path("elsewhere"));
    sandbox.mount(second.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&second, "build").ok());
    seen.assert_all_hit(3);
    let before = (blobs(&sandbox), Tree::of(&second.target()));
    for (what, change) in CHANGES {
        let program = first.program("app");
        let old = (
            fs::read(&program).must("read"),
            program.metadata().must("stat"),
        );
        change(&program);
        let new = (
            fs::read(&program).must("read"),
            program.metadata().must("stat"),
        );
        let shown = |meta: &fs::Metadata| (meta.mode(), meta.mtime(), meta.mtime_nsec());
        let changed = old.0 != new.0 || shown(&old.1) != shown(&new.1);
        assert!(changed || what == "preallocate", "{what} does something");
        assert_eq!(old.1.ino(), new.1.ino(), "{what}: still the same file");
        before
            .0
            .assert_same(&blobs(&sandbox), &format!("{what}: the blobs"));
        before.1.assert_same(
            &Tree::of(&second.target()),
            &format!("{what}: the other view"),
        );
        // The result is still what it was.
        bring(&sandbox, &first);
        assert_eq!(
            fs::read(&program).must("read"),
            old.0,
            "{what}: after a hit"
        );
    }
    assert_eq!(
        sandbox.output_of(second.program("app")),
        samples::PLAIN_OUTPUT
    );
}

#[test]
fn readers_keep_what_was_replaced() {
    let sandbox = Sandbox::new();
    let project = built(&sandbox);
    let program = project.program("app");
    let old = fs::read(&program).must("read");
    let open = File::open(&program).must("open");
    let all = || {
        let mut bytes = vec![0; old.len()];
        open.read_exact_at(&mut bytes, 0).must("pread");
        bytes
    };
    fs::write(project.path("target/new"), "another").must("write");
    fs::rename(project.path("target/new"), &program).must("rename");
    assert!(all() == old, "after a rename over it");
    // Cargo links the program again, over a name that readers have open.
    bring(&sandbox, &project);
    assert!(all() == old, "after a hit in its place");
    writable(&program)
        .write_all_at(b"changed", 0)
        .must("pwrite");
    assert!(all() == old, "after a write to what has the name now");
}

#[test]
fn readers_see_old_or_new_bytes_while_a_file_is_copied_up() {
    let sandbox = Sandbox::new();
    let project = built(&sandbox);
    let program = project.program("app");
    for round in 0..5_u64 {
        let old = fs::read(&program).must("read");
        let place = 4096 * (round + 1);
        let at = usize::try_from(place).must("small");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let bytes = fs::read(&program).must("read");
                        assert_eq!(bytes.len(), old.len());
                        assert!(bytes[..at] == old[..at] && bytes[at + 4..] == old[at + 4..]);
                        let between = &bytes[at..at + 4];
                        assert!(between == &old[at..at + 4] || between == b"new!");
                    }
                });
            }
            writable(&program)
                .write_all_at(b"new!", place)
                .must("pwrite");
            std::thread::sleep(Duration::from_millis(50));
            stop.store(true, Ordering::Relaxed);
        });
        bring(&sandbox, &project);
        assert!(fs::read(&program).must("read") == old, "the blob");
    }
}

/// How many extents of a file it shares with another file (`FIEMAP_EXTENT_SHARED`).
fn shared_extents(path: &Path) -> usize {
    let output = Command::new("filefrag")
        .arg("-v")
        .arg(path)
        .output()
        .must("filefrag");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && said.contains("physical_offset"),
        "{output:?}"
    );
    said.lines().filter(|line| line.contains("shared")).count()
}

/// Copies a large file up by one changed byte; says how many extents the blob shares then, and how
/// much room that took, as a part of the file's size in percent.
fn copy_up_on(kind: &str) -> Option<(usize, u64)> {
    let sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox, kind)?;
    let project = built(&sandbox);
    let program = project.program("app");
    let size = program.metadata().must("stat").len();
    let blob = blob_of(&sandbox, &program);
    let before = blobs(&sandbox);
    disk.sync();
    let (free, shared) = (disk.free(), shared_extents(&blob));
    assert_eq!(shared, 0, "{kind}: nothing is shared before");
    writable(&program).write_all_at(b"!", 77).must("pwrite");
    disk.sync();
    let took = free.saturating_sub(disk.free()) * 100 / size;
    before.assert_same(&blobs(&sandbox), &format!("{kind}: the blobs"));
    let (old, new) = (
        fs::read(&blob).must("read"),
        fs::read(&program).must("read"),
    );
    assert!(
        new[77] == b'!' && new[..77] == old[..77] && new[78..] == old[78..],
        "{kind}"
    );
    println!("{kind}: {size} bytes, {took} % of it taken");
    Some((shared_extents(&blob), took))
}

#[test]
fn btrfs_shares_the_bytes_of_a_copied_file() {
    if let Some((shared, took)) = copy_up_on("btrfs") {
        assert!(shared > 0, "the blob shares its extents");
        assert!(took < 50, "{took} % of the file were written");
    }
}

#[test]
fn xfs_shares_the_bytes_of_a_copied_file() {
    if let Some((shared, took)) = copy_up_on("xfs") {
        assert!(shared > 0, "the blob shares its extents");
        assert!(took < 50, "{took} % of the file were written");
    }
}

#[test]
fn ext4_copies_the_bytes_of_a_copied_file() {
    if let Some((shared, took)) = copy_up_on("ext4") {
        assert_eq!(shared, 0, "ext4 shares nothing");
        assert!(took >= 90, "only {took} % of the file were written");
    }
}
