//! Large directories, and listing them while they change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use harness::side_by_side::same;
use harness::{Must, Sandbox};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

const MANY: usize = 100_000;

fn name(index: usize) -> String {
    format!("entry-{index:06}")
}

/// An open directory, read by getdents64(2) a few names at a time.
struct Listing {
    dir: File,
    ended: bool,
}

impl Listing {
    fn of(path: &Path) -> Self {
        let dir = File::open(path).must(path.display());
        Self { dir, ended: false }
    }

    /// Some more names, as many as fit into `buffer` bytes, with the position after each.
    fn some(&mut self, buffer: usize) -> Vec<(String, i64)> {
        let mut bytes = vec![0_u8; buffer];
        // SAFETY: the buffer is as long as the call is told, and lives through it.
        let read = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                self.dir.as_raw_fd(),
                bytes.as_mut_ptr(),
                buffer,
            )
        };
        let read = usize::try_from(read).must("getdents64");
        self.ended = read == 0;
        let mut names = Vec::new();
        let mut rest = &bytes[..read];
        // struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name, NUL.
        while rest.len() > 19 {
            let off = i64::from_ne_bytes(rest[8..16].try_into().must("8 bytes"));
            let length = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
            let name = rest[19..length]
                .split(|byte| *byte == 0)
                .next()
                .must("a name");
            let name = String::from_utf8_lossy(name).into_owned();
            if name != "." && name != ".." {
                names.push((name, off));
            }
            rest = &rest[length..];
        }
        names
    }

    fn all(&mut self, buffer: usize) -> Vec<String> {
        let mut names = Vec::new();
        while !self.ended {
            names.extend(self.some(buffer).into_iter().map(|(name, _)| name));
        }
        names
    }
}

fn mounted() -> (Sandbox, PathBuf) {
    let sandbox = Sandbox::new();
    let view = sandbox.make_dir("project").join("target");
    sandbox.mount(&view);
    (sandbox, view)
}

/// A directory with so many empty files, made in no order; links, which are the cheapest names.
fn fill(dir: &Path, count: usize) {
    fs::create_dir(dir).must("mkdir");
    let first = dir.join(name(0));
    fs::write(&first, "").must("write");
    for index in 1..count {
        // 7919 is a prime: every name comes once.
        fs::hard_link(&first, dir.join(name(index * 7919 % count))).must("link");
    }
}

/// Every name of `stayed` was seen exactly once, and nothing twice that was not made anew.
#[track_caller]
fn assert_once(
    seen: &[String],
    stayed: impl IntoIterator<Item = String>,
    remade: &BTreeSet<String>,
) {
    let mut times: BTreeMap<&String, u32> = BTreeMap::new();
    for name in seen {
        *times.entry(name).or_default() += 1;
    }
    let wrong: Vec<_> = stayed
        .into_iter()
        .filter(|name| times.get(name) != Some(&1))
        .map(|name| (times.get(&name).copied(), name))
        .collect();
    assert!(
        wrong.is_empty(),
        "{} not seen once: {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(9)]
    );
    let twice: Vec<_> = times
        .iter()
        .filter(|(name, count)| **count > 1 && !remade.contains(**name))
        .collect();
    assert!(twice.is_empty(), "seen more than once: {twice:?}");
}

#[test]
fn a_hundred_thousand_names() {
    let (sandbox, view) = mounted();
    let dir = view.join("many");
    fill(&dir, MANY);
    let expected: BTreeSet<String> = (0..MANY).map(name).collect();
    let listed = Listing::of(&dir).all(32_768);
    assert_eq!(listed.len(), MANY);
    assert_eq!(listed.into_iter().collect::<BTreeSet<_>>(), expected);
    assert_eq!(fs::metadata(dir.join(name(0))).must("stat").len(), 0);

    // While somebody reads it, a third goes, a third is new, and some go and come again.
    let mut listing = Listing::of(&dir);
    let mut seen = Vec::new();
    let mut remade = BTreeSet::new();
    let mut step = 0;
    while !listing.ended {
        seen.extend(listing.some(16_384).into_iter().map(|(name, _)| name));
        for _ in 0..150 {
            let at = step * 3 % MANY;
            let gone = dir.join(name(at));
            if step < MANY / 3 - 1 && gone.exists() && at != 0 {
                fs::remove_file(&gone).must("remove");
                if step % 50 == 0 {
                    fs::hard_link(dir.join(name(1)), &gone).must("link");
                    remade.insert(name(at));
                }
            }
            fs::hard_link(dir.join(name(1)), dir.join(format!("new-{step}"))).must("link");
            step += 1;
        }
    }
    assert!(step > 10_000, "it changed while it was read");
    assert_once(&seen, (0..MANY).filter(|at| at % 3 != 0).map(name), &remade);

    drop(listing);
    // What is left can be removed while it is listed.
    let mut listing = Listing::of(&dir);
    while !listing.ended {
        for (name, _) in listing.some(32_768) {
            fs::remove_file(dir.join(&name)).must(name);
        }
    }
    drop(listing);
    assert_eq!(fs::read_dir(&dir).must("readdir").count(), 0);
    fs::remove_dir(&dir).must("rmdir");
    sandbox.unmount(&view);
}

#[test]
fn listing_goes_on_where_it_stopped() {
    let (_sandbox, view) = mounted();
    let dir = view.join("some");
    fill(&dir, 2000);
    let mut listing = Listing::of(&dir);
    let mut rows = Vec::new();
    while !listing.ended {
        rows.extend(listing.some(1024));
    }
    assert_eq!(rows.len(), 2000);
    // Back to any place: telldir(3) and seekdir(3) are these positions.
    for at in [0, 1, 999, 1500, 1998] {
        let whence = nix::unistd::Whence::SeekSet;
        nix::unistd::lseek(&listing.dir, rows[at].1, whence).must("lseek");
        listing.ended = false;
        let rest: Vec<_> = rows[at + 1..]
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        assert_eq!(listing.all(4096), rest, "from {at}");
    }
}

#[test]
fn positions_mean_the_same_to_the_next_daemon() {
    let (sandbox, view) = mounted();
    let dir = view.join("some");
    fill(&dir, 2000);
    let mut listing = Listing::of(&dir);
    let first: Vec<_> = (0..20).flat_map(|_| listing.some(1024)).collect();
    let stopped = first.last().must("some names").1;
    drop(listing);
    sandbox.unmount(&view);
    sandbox.mount(&view);
    let mut listing = Listing::of(&dir);
    nix::unistd::lseek(&listing.dir, stopped, nix::unistd::Whence::SeekSet).must("lseek");
    let mut seen: Vec<_> = first.into_iter().map(|(name, _)| name).collect();
    seen.extend(listing.all(1024));
    assert_eq!(seen.len(), 2000);
    assert_once(&seen, (0..2000).map(name), &BTreeSet::new());
}

#[test]
fn a_directory_that_changes_under_many_hands() {
    let (_sandbox, view) = mounted();
    let dir = view.join("busy");
    fill(&dir, 500);
    std::thread::scope(|scope| {
        for hand in 0..2 {
            let dir = &dir;
            scope.spawn(move || {
                for index in 0..1500 {
                    let path = dir.join(format!("hand{hand}-{index}"));
                    fs::write(&path, "x").must("write");
                    if index % 3 == 0 {
                        fs::rename(&path, dir.join(format!("moved{hand}-{index}"))).must("rename");
                    } else {
                        fs::remove_file(&path).must("remove");
                    }
                }
            });
        }
        for _ in 0..20 {
            let seen = Listing::of(&dir).all(2048);
            assert_once(&seen, (0..500).map(name), &BTreeSet::new());
        }
    });
    assert_eq!(fs::read_dir(&dir).must("readdir").count(), 1500);
}

#[test]
fn an_open_directory_follows_its_renames() {
    same(|dir, log| {
        let [old, new] = ["old", "new"].map(|name| dir.join(name));
        fs::create_dir(&old).must("mkdir");
        fs::write(old.join("a"), "").must("write");
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let open: OwnedFd = nix::fcntl::open(&old, flags, Mode::empty()).must("open");
        fs::rename(&old, &new).must("rename");
        let made = nix::sys::stat::mkdirat(&open, "b", Mode::S_IRWXU);
        log.errno("mkdir in it", &made);
        let again = File::from(open.try_clone().must("dup"));
        let mut names = Listing {
            dir: again,
            ended: false,
        }
        .all(1024);
        names.sort();
        log.note("names", names);
        log.all(dir);
    });
}
