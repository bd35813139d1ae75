//! Files and directories that flags name: native libraries, profiles, what linker arguments hold.

use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use store::{Digest, Hasher, Kind};
use wrapper::args::{self, SearchKind};

use super::Service;
use super::clippy;
use super::files::is_system;
use super::prepare::{Place, Prepared, Refusal};
use crate::fs::{Body, Errno, Node, View};

/// How much of a file is looked at for the words of a linker script.
const LONGEST_SCRIPT: u64 = 1 << 20;
/// The same, for a file in a view.
const LONGEST_SCRIPT_IN_VIEW: usize = 64 << 10;

/// As many bytes tell a library from a script.
const MAGIC: usize = 8;

/// Whether an argument makes the linker's driver search below a directory, or by rules of its own
/// (gcc(1), "-B", "--sysroot", "-specs"; clang's `--gcc-toolchain`).
pub(super) fn searches_elsewhere(link_args: &[String]) -> bool {
    const DRIVER: &[&str] = &["-B", "--prefix", "-specs", "--specs", "-isysroot"];
    const ANY: &[&str] = &[
        "--sysroot",
        "-sysroot",
        "--gcc-toolchain",
        "--gcc-install-dir",
    ];
    let is_any = |part: &str, names: &[&str]| names.iter().any(|name| part.starts_with(name));
    link_args.iter().any(|arg| {
        // What goes on to ld has another meaning: `-Bstatic`.
        let for_driver = !arg.starts_with("-Wl,") && !arg.starts_with("-Bstatic");
        let for_driver = for_driver && !arg.starts_with("-Bdynamic");
        (for_driver && is_any(arg, DRIVER)) || arg.split(',').any(|part| is_any(part, ANY))
    })
}

/// Whether an argument selects a linker script by name, searched for who knows where.
pub(super) fn chooses_linker_script(link_args: &[String]) -> bool {
    link_args.iter().flat_map(|arg| arg.split(',')).any(|part| {
        part.starts_with("-T") || part.starts_with("--script") || part.starts_with("-script")
    })
}

/// What flags name, as templates of paths with what is there.
#[derive(Default)]
pub(super) struct Named {
    /// Files, and the directories a linker searches or of which nobody notes what is read there.
    pub read: Digests,
    /// Directories that only rustc searches.
    pub searched: Digests,
}

type Digests = Vec<(Vec<u8>, Digest)>;

/// Files and directories named by flags.
pub(super) fn named_digests(service: &Service, prepared: &Prepared) -> Result<Named, Refusal> {
    let invocation = &prepared.invocation;
    let mut named = Named::default();
    let add = |to: &mut Digests, path: &Path, required: bool| {
        let template = prepared.roots.template(path.as_os_str().as_bytes());
        match content_at(service, &prepared.locate(service, path)) {
            Ok(Some(digest)) => to.push((template, digest)),
            Ok(None) if !required => to.push((template, Digest::of(b"absent"))),
            _ => return Err(Refusal::Named("named-input-unreadable")),
        }
        Ok(())
    };
    for search in &invocation.searches {
        if search.kind != SearchKind::Dependency {
            let path = search.path.as_os_str().as_bytes();
            // Of what is read among the outputs, or where nothing ever changes, nobody takes notes.
            let is_watched = !prepared.scope.knows(path) && !prepared.scope.owns(path);
            let to = if invocation.runs_linker() || !is_watched {
                &mut named.read
            } else {
                &mut named.searched
            };
            add(to, &search.path, false)?;
            // rustc itself reads archives, to put their members into an rlib.
            refuse_library_scripts(&prepared.locate(service, &search.path), &[])?;
        }
    }
    for path in &invocation.input_files {
        add(&mut named.read, path, true)?;
    }
    for path in args::link_arg_paths(&invocation.link_args, &prepared.cwd) {
        let place = prepared.locate(service, &path);
        refuse_linker_script(&place)?;
        refuse_library_scripts(&place, &[])?;
        add(&mut named.read, &path, false)?;
    }
    if prepared.is_clippy {
        let (environment, cwd, roots) = (&prepared.environment, &prepared.cwd, &prepared.roots);
        let found = clippy::configuration(&service.files, environment, cwd, roots)
            .map_err(|_| Refusal::Named("named-input-unreadable"))?;
        named.read.push((b"clippy.toml".to_vec(), found.digest));
    }
    Ok(named)
}

/// A linker script can name further files (ld(1), "INCLUDE", "INPUT", "GROUP") that nobody would
/// look at.
fn refuse_linker_script(place: &Place) -> Result<(), Refusal> {
    let text = match place {
        Place::Disk(path) => start_of_file(path).unwrap_or_default(),
        // Never by way of the mount, which this process serves.
        Place::View(view, path) => match view.resolve(path) {
            Ok(node) if node.kind == Kind::File => start_of_node(view, &node)?,
            _ => Vec::new(),
        },
    };
    if names_files(&text) {
        return Err(Refusal::Named("linker-script"));
    }
    Ok(())
}

/// What a file begins with, as far as it may be a script: of a library no more than shows it is one.
fn start_of_file(path: &Path) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt;
    // A FIFO, say, must not be waited for.
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)?;
    let mut text = Vec::new();
    if file.metadata()?.is_file() {
        (&mut file).take(MAGIC as u64).read_to_end(&mut text)?;
        if !is_binary(&text) {
            file.take(LONGEST_SCRIPT).read_to_end(&mut text)?;
        }
    }
    Ok(text)
}

fn start_of_node(view: &View, node: &Node) -> Result<Vec<u8>, Refusal> {
    let start = |length| {
        let mut text = vec![0; length];
        let read = view.read(node.ino, 0, &mut text);
        text.truncate(read.map_err(|_| Refusal::Named("named-input-unreadable"))?);
        Ok(text)
    };
    let magic = start(MAGIC)?;
    if is_binary(&magic) {
        return Ok(magic);
    }
    start(LONGEST_SCRIPT_IN_VIEW)
}

/// The same for the libraries in a directory the linker searches, but for those of `known` names. The
/// system's own are known: what `libc.so` names there is part of the linker.
pub(super) fn refuse_library_scripts(place: &Place, known: &[&str]) -> Result<(), Refusal> {
    let may_be_one =
        |name: &[u8]| is_library(name) && !known.iter().any(|known| known.as_bytes() == name);
    match place {
        Place::Disk(path) => {
            let Ok(path) = std::fs::canonicalize(path) else {
                return Ok(());
            };
            if is_system(&path) {
                return Ok(());
            }
            let Ok(entries) = std::fs::read_dir(&path) else {
                return Ok(());
            };
            for entry in entries.flatten() {
                if may_be_one(entry.file_name().as_bytes()) && entry.path().is_file() {
                    refuse_linker_script(&Place::Disk(entry.path()))?;
                }
            }
        }
        Place::View(view, path) => {
            let unreadable = |_: Errno| Refusal::Named("named-input-unreadable");
            let Ok(directory) = view.resolve(path) else {
                return Ok(());
            };
            if directory.kind != Kind::Dir {
                return Ok(());
            }
            let rows = view
                .list(directory.ino, 0, usize::MAX)
                .map_err(unreadable)?;
            for row in rows.iter().filter(|row| may_be_one(&row.name)) {
                let node = view.node(row.ino).map_err(unreadable)?;
                if node.kind == Kind::File && names_files(&start_of_node(view, &node)?) {
                    return Err(Refusal::Named("linker-script"));
                }
            }
        }
    }
    Ok(())
}

/// Whether the linker may take a file of this name for a library, asked for by it or in full
/// (`verbatim`); then a script may have an ending of its own.
fn is_library(name: &[u8]) -> bool {
    let endings: [&[u8]; 5] = [b".a", b".ld", b".lds", b".ldscript", b".x"];
    endings.iter().any(|ending| name.ends_with(ending))
        || name.windows(3).any(|part| part == b".so")
}

/// Whether a file is a library or an object.
fn is_binary(start: &[u8]) -> bool {
    start.starts_with(b"\x7fELF") || start.starts_with(b"!<arch>")
}

/// Whether a file is a linker script that names others, or an archive without its members.
fn names_files(text: &[u8]) -> bool {
    if is_binary(text) {
        return false;
    }
    let says = |word: &&str| text.windows(word.len()).any(|part| part == word.as_bytes());
    text.starts_with(b"!<thin>")
        || ["INCLUDE", "INPUT", "GROUP", "STARTUP", "SEARCH_DIR"]
            .iter()
            .any(says)
}

/// Content of a file, or of the files in a directory; `None` when nothing is there.
fn content_at(service: &Service, place: &Place) -> Result<Option<Digest>, Refusal> {
    let unreadable = |_: io::Error| Refusal::Named("named-input-unreadable");
    match place {
        Place::Disk(path) => match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => service
                .files
                .search_directory(path)
                .map(Some)
                .map_err(unreadable),
            Ok(meta) if meta.is_file() => service
                .files
                .known_file(path, &meta)
                .map(Some)
                .map_err(unreadable),
            Ok(_) => Ok(None),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.kind() == io::ErrorKind::NotADirectory =>
            {
                Ok(None)
            }
            Err(error) => Err(unreadable(error)),
        },
        Place::View(view, path) => {
            let unreadable = |_: Errno| Refusal::Named("named-input-unreadable");
            match view.resolve(path) {
                Ok(node) if node.kind == Kind::Dir => {
                    view_directory(view, &node).map(Some).map_err(unreadable)
                }
                Ok(node) if node.kind == Kind::File => {
                    view.content_digest(&node).map(Some).map_err(unreadable)
                }
                Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
                Err(error) => Err(unreadable(error)),
            }
        }
    }
}

/// Names and contents of the files in a directory of a view.
fn view_directory(view: &View, directory: &Node) -> Result<Digest, Errno> {
    let mut rows = view.list(directory.ino, 0, usize::MAX)?;
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hasher = Hasher::new("kachefs search directory");
    for row in rows {
        let node = view.node(row.ino)?;
        if node.kind == Kind::File {
            hasher.field(&row.name).digest(&view.content_digest(&node)?);
        } else if let Body::Link(target) = &node.state.lock().body {
            hasher.field(&row.name).field(target);
        }
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_fifo() {
        let dir = tempfile::tempdir().expect("tempdir");
        let fifo = dir.path().join("pipe");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
        assert_eq!(start_of_file(&fifo).expect("looks"), b"");
    }

    #[test]
    fn a_library_is_not_read_to_its_end() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("lib.a");
        std::fs::write(&file, b"!<arch>\nand members with GROUP").expect("writes");
        assert_eq!(start_of_file(&file).expect("reads"), b"!<arch>\n");
        std::fs::write(&file, b"  GROUP ( other.a )").expect("writes");
        assert!(names_files(&start_of_file(&file).expect("reads")));
    }
}
