//! Files with debugging information that rustc writes beside an output and does not announce
//! (`-C split-debuginfo`, the rustc book): one package for a program, or a file for each object.
//!
//! The binary names those of objects by path, which leads to them only where a debugger started in the
//! workspace finds the target.

use std::path::Path;

use store::{Root, Timestamp};
use wrapper::args::SplitDebuginfo;
use wrapper::mode::Mode;

use super::prepare::Prepared;
use crate::fs::FsResult;

/// What cargo calls a target that lies in its workspace, as remapped paths do.
const TARGET: &str = "target";

/// The names of what the compiler has left beside `linked` since it started.
pub(super) fn sidecars(
    prepared: &Prepared,
    linked: &[String],
    started: Timestamp,
) -> FsResult<Vec<String>> {
    let candidates: Vec<String> = match prepared.invocation.split_debuginfo {
        SplitDebuginfo::Off => return Ok(Vec::new()),
        SplitDebuginfo::Packed => linked.iter().map(|name| format!("{name}.dwp")).collect(),
        SplitDebuginfo::Unpacked => {
            let start = format!("{}.", prepared.invocation.stem());
            let rows = prepared.view.list(prepared.out_dir, 0, usize::MAX)?;
            let names = rows.iter();
            names
                .filter_map(|row| std::str::from_utf8(&row.name).ok())
                .filter(|name| name.starts_with(&start))
                .filter(|name| Path::new(name).extension().is_some_and(|ext| ext == "dwo"))
                .map(str::to_owned)
                .collect()
        }
    };
    let mut found = Vec::new();
    for name in candidates {
        let Ok(node) = prepared.view.child(prepared.out_dir, name.as_bytes()) else {
            continue;
        };
        // What an earlier compile has left is not this one's.
        if prepared.view.getattr(node.ino)?.attributes.ctime >= started {
            found.push(name);
        }
    }
    Ok(found)
}

/// Whether the paths in a binary lead to what lies beside it.
pub(super) fn are_found(prepared: &Prepared) -> bool {
    let view = Path::new(prepared.roots.path(Root::View));
    let in_workspace = view.file_name().is_some_and(|name| name == TARGET)
        && view
            .parent()
            .is_some_and(|parent| parent.join("Cargo.toml").is_file());
    prepared.mode == Mode::Exact
        || prepared.invocation.split_debuginfo != SplitDebuginfo::Unpacked
        || in_workspace
}
