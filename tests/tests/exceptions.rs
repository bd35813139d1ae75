//! What a view does not do as a disk does: each exception that `docs/semantics.md` states.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use harness::{Must, Sandbox};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, OFlag, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::Uid;

fn read_write(path: &Path) -> File {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(path).must(path.display())
}

fn mounted() -> (Sandbox, std::path::PathBuf) {
    let sandbox = Sandbox::new();
    let view = sandbox.make_dir("project").join("target");
    sandbox.mount(&view);
    (sandbox, view)
}

#[test]
fn extended_attributes_are_refused() {
    let (_sandbox, view) = mounted();
    let path = view.join("file");
    fs::write(&path, "x").must("write");
    let [path, name] =
        [path.as_os_str().as_bytes(), b"user.test"].map(|b| CString::new(b).must("C"));
    // SAFETY: both strings end with NUL and live through the calls; the value is 1 byte long, and
    // no buffer is offered where the length given is 0.
    let (set, get, list) = unsafe {
        let set = libc::setxattr(path.as_ptr(), name.as_ptr(), [1_u8].as_ptr().cast(), 1, 0);
        let set = (set, Errno::last());
        let get = libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0);
        let get = (get, Errno::last());
        let list = libc::listxattr(path.as_ptr(), std::ptr::null_mut(), 0);
        (set, get, (list, Errno::last()))
    };
    assert_eq!(set, (-1, Errno::EOPNOTSUPP));
    assert_eq!(get, (-1, Errno::EOPNOTSUPP));
    // The kernel lists what it may know itself: nothing.
    assert!(list == (-1, Errno::EOPNOTSUPP) || list.0 == 0, "{list:?}");
}

#[test]
fn nameless_files_are_refused() {
    let (_sandbox, view) = mounted();
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
    let opened = nix::fcntl::open(&view, flags, Mode::S_IRWXU);
    assert_eq!(opened.map(drop), Err(Errno::EOPNOTSUPP));
    // What programs do then.
    let made = tempfile::tempfile_in(&view);
    made.must("a temporary file").write_all(b"x").must("write");
    assert_eq!(fs::read_dir(&view).must("readdir").count(), 0);
}

#[test]
fn birth_times_are_not_told() {
    let (_sandbox, view) = mounted();
    let path = view.join("file");
    fs::write(&path, "x").must("write");
    let birth = path.metadata().must("stat").created();
    assert!(birth.is_err(), "{birth:?}");
}

#[test]
fn collapse_and_insert_are_refused() {
    let (_sandbox, view) = mounted();
    let file = read_write(&view.join("file"));
    file.write_all_at(&[1; 10_000], 0).must("pwrite");
    for flags in [
        FallocateFlags::FALLOC_FL_COLLAPSE_RANGE,
        FallocateFlags::FALLOC_FL_INSERT_RANGE,
    ] {
        let result = nix::fcntl::fallocate(&file, flags, 0, 4096);
        assert_eq!(result, Err(Errno::EOPNOTSUPP), "{flags:?}");
    }
    assert_eq!(fs::read(view.join("file")).must("read"), [1; 10_000]);
}

#[test]
fn a_whiteout_is_refused() {
    let (_sandbox, view) = mounted();
    let [a, b] = ["a", "b"].map(|name| view.join(name));
    fs::write(&a, "a").must("write");
    let whiteout = RenameFlags::from_bits_retain(libc::RENAME_WHITEOUT);
    let result = renameat2(AT_FDCWD, &a, AT_FDCWD, &b, whiteout);
    assert_eq!(result, Err(Errno::EINVAL));
    assert_eq!(fs::read(&a).must("read"), b"a");
}

#[test]
fn reading_leaves_the_access_time() {
    let (_sandbox, view) = mounted();
    let path = view.join("file");
    fs::write(&path, "x").must("write");
    let old = TimeSpec::new(1_000_000_000, 5);
    utimensat(
        AT_FDCWD,
        &path,
        &old,
        &TimeSpec::UTIME_NOW,
        UtimensatFlags::FollowSymlink,
    )
    .must("age");
    assert_eq!(fs::read(&path).must("read"), b"x");
    let meta = path.metadata().must("stat");
    assert_eq!((meta.atime(), meta.atime_nsec()), (1_000_000_000, 5));
}

#[test]
fn set_group_id_that_means_nothing_stays() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: only root becomes another user");
        return;
    }
    // On a file its group cannot execute the bit once asked for mandatory locks. Disks clear it
    // when somebody outside the group writes; Linux does not ask FUSE file systems to
    // (fuse_setattr).
    let (_sandbox, view) = mounted();
    let path = view.join("file");
    fs::write(&path, "x").must("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2767)).must("chmod");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    let script = "echo y >> \"$1\"";
    let written = command.args(["sh", "-c", script, "sh"]).arg(&path).status();
    assert!(written.must("sh").success());
    assert_eq!(fs::read(&path).must("read"), b"xy\n");
    assert_eq!(path.metadata().must("stat").mode() & 0o7777, 0o2767);
}

#[test]
fn set_user_id_and_devices_have_no_effect() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: only root makes device nodes");
        return;
    }
    let (_sandbox, view) = mounted();
    let null = view.join("null");
    mknod(
        &null,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(1, 3),
    )
    .must("mknod");
    let opened = File::open(&null).map(drop);
    assert_eq!(
        opened.map_err(|e| e.raw_os_error()),
        Err(Some(libc::EACCES))
    );
    let id = view.join("id");
    let copied = Command::new("cp")
        .args(["/usr/bin/id", &id.to_string_lossy()])
        .status();
    assert!(copied.must("cp").success());
    fs::set_permissions(&id, fs::Permissions::from_mode(0o4755)).must("chmod");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    let output = command.arg(&id).arg("-u").output().must("id");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "65534");
}

#[test]
fn the_name_of_the_token_is_taken() {
    let (_sandbox, view) = mounted();
    fs::create_dir(view.join("sub")).must("mkdir");
    for dir in [&view, &view.join("sub")] {
        let token = dir.join(".kachefs");
        let listed: Vec<_> = fs::read_dir(dir).must("readdir").flatten().collect();
        assert!(listed.iter().all(|entry| entry.file_name() != ".kachefs"));
        let target = fs::read_link(&token).must("readlink");
        assert!(!target.as_os_str().is_empty());
        let errno = |result: std::io::Result<()>| result.err().and_then(|e| e.raw_os_error());
        assert_eq!(
            errno(File::create_new(&token).map(drop)),
            Some(libc::EEXIST)
        );
        assert_eq!(errno(fs::create_dir(&token)), Some(libc::EEXIST));
        assert_eq!(errno(symlink("x", &token)), Some(libc::EEXIST));
        fs::write(dir.join("file"), "x").must("write");
        let file = dir.join("file");
        assert_eq!(errno(fs::hard_link(&file, &token)), Some(libc::EEXIST));
        assert_eq!(errno(fs::rename(&file, &token)), Some(libc::EEXIST));
        assert!(fs::remove_file(&token).is_err());
        assert!(fs::rename(&token, dir.join("other")).is_err());
        assert_eq!(fs::read_link(&token).must("readlink"), target);
    }
    // It does not keep a directory from being empty.
    fs::remove_file(view.join("sub/file")).must("remove");
    fs::remove_dir(view.join("sub")).must("rmdir");
}

#[test]
fn clones_are_refused() {
    let (_sandbox, view) = mounted();
    let [from, to] = ["from", "to"].map(|name| read_write(&view.join(name)));
    from.write_all_at(&[1; 10_000], 0).must("pwrite");
    let source = std::os::fd::AsRawFd::as_raw_fd(&from);
    // SAFETY: FICLONE takes a descriptor by value and touches no memory of ours.
    let cloned =
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&to), libc::FICLONE, source) };
    assert_eq!((cloned, Errno::last()), (-1, Errno::EOPNOTSUPP));
    // What cp does then.
    let mut copy = Command::new("cp");
    let copy = copy
        .arg("--reflink=auto")
        .arg(view.join("from"))
        .arg(view.join("to"));
    assert!(copy.status().must("cp").success());
    assert_eq!(fs::read(view.join("to")).must("read"), [1; 10_000]);
}
