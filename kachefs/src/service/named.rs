//! Files and directories that flags name: native libraries, profiles, what linker arguments hold.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use store::{Digest, Hasher, Kind};
use wrapper::args::{self, SearchKind};

use super::Service;
use super::prepare::{Place, Prepared, Refusal};
use crate::fs::{Body, Errno, Node, View};

/// Whether an argument selects a linker script by name, searched for who knows where.
pub(super) fn chooses_linker_script(link_args: &[String]) -> bool {
    link_args.iter().flat_map(|arg| arg.split(',')).any(|part| {
        part.starts_with("-T") || part.starts_with("--script") || part.starts_with("-script")
    })
}

/// Files and directories named by flags.
pub(super) fn named_digests(
    service: &Service,
    prepared: &Prepared,
) -> Result<Vec<(Vec<u8>, Digest)>, Refusal> {
    let invocation = &prepared.invocation;
    let mut named = Vec::new();
    let mut add = |path: &Path, required: bool| {
        let template = prepared.roots.template(path.as_os_str().as_bytes());
        match content_at(service, &prepared.locate(service, path)) {
            Ok(Some(digest)) => named.push((template, digest)),
            Ok(None) if !required => named.push((template, Digest::of(b"absent"))),
            _ => return Err(Refusal::Named("named-input-unreadable")),
        }
        Ok(())
    };
    for search in &invocation.searches {
        if search.kind != SearchKind::Dependency {
            add(&search.path, false)?;
        }
    }
    for path in &invocation.input_files {
        add(path, true)?;
    }
    for path in args::link_arg_paths(&invocation.link_args, &prepared.cwd) {
        refuse_linker_script(&path)?;
        add(&path, false)?;
    }
    Ok(named)
}

/// A linker script can name further files (ld(1), "INCLUDE", "INPUT", "GROUP") that nobody would
/// look at.
fn refuse_linker_script(path: &Path) -> Result<(), Refusal> {
    use std::io::Read;
    const LONGEST: u64 = 1 << 20;
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut text));
    let binary = text.starts_with(b"\x7fELF") || text.starts_with(b"!<arch>");
    let names_files = |word: &str| text.windows(word.len()).any(|part| part == word.as_bytes());
    if read.is_ok() && !binary && ["INCLUDE", "INPUT", "GROUP"].into_iter().any(names_files) {
        return Err(Refusal::Named("linker-script"));
    }
    Ok(())
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
