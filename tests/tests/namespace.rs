//! Changes of names in a view do what they do on the disk.
//!
//! Each test runs one script twice, through a mount and in a plain directory, and compares what it
//! saw: results, error numbers, attributes, bytes. What names lead to is in `contents.rs`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use harness::side_by_side::same;
use harness::{Must, tree};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

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
