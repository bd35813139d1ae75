//! Which compilers may write aside, by how they are called.

use std::ffi::OsStr;
use std::path::Path;

use nix::unistd::geteuid;
use wrapper::args::{Invocation, SplitDebuginfo};
use wrapper::aside;

use crate::service::prepare::Prepared;

/// Whether one may write to a directory in `place`.
pub(super) fn may_write_aside(place: &Path, prepared: &Prepared) -> bool {
    let invocation = &prepared.invocation;
    // What another user makes is not ours to link.
    let is_ours = prepared.caller.uid == geteuid().as_raw();
    let named = [Some(&invocation.out_dir), invocation.incremental.as_ref()];
    let mut named = named.into_iter().flatten();
    let are_plain = aside::is_plain(place) && named.all(|path| aside::is_plain(path));
    let remaps = prepared.remaps();
    let users = invocation.user_remaps.iter();
    let users = users.filter_map(|remap| Some(remap.rsplit_once('=')?.0));
    let mut remapped = remaps.iter().map(|(from, _)| *from).chain(users);
    let place = place.to_string_lossy();
    !prepared.runs_unknown
        && !must_write_there(invocation)
        && is_ours
        && are_plain
        && !remapped.any(|from| place.starts_with(from))
}

/// Whether what a compiler makes may not be told where it is made, or may not be taken over from there.
fn must_write_there(invocation: &Invocation) -> bool {
    !is_usual_linker(invocation)
        || invocation.split_debuginfo != SplitDebuginfo::Off
        || invocation
            .target
            .as_deref()
            .is_some_and(|target| !is_linux(target))
}

/// Whether no program links that might make more of where it writes than compilers' drivers and well-known linkers
/// do.
fn is_usual_linker(invocation: &Invocation) -> bool {
    const DRIVERS: [&str; 3] = ["cc", "gcc", "clang"];
    const LINKERS: [&str; 6] = ["ld", "bfd", "gold", "lld", "mold", "wild"];
    if !invocation.runs_linker() {
        return true;
    }
    let is_driver = invocation.linker.as_ref().is_none_or(|linker| {
        let name = linker.file_name().and_then(OsStr::to_str);
        // `clang-19`, `aarch64-linux-gnu-gcc`.
        let is_version = |c: char| c.is_ascii_digit() || c == '-' || c == '.';
        let name = name.map(|name| name.trim_end_matches(is_version));
        let own = name.and_then(|name| name.rsplit('-').next());
        own.is_some_and(|own| DRIVERS.contains(&own))
    });
    let is_linker = invocation.fuse_ld().is_none_or(|ld| LINKERS.contains(&ld));
    let mut arguments = invocation.link_args.iter();
    is_driver && is_linker && !arguments.any(|argument| is_detour(argument))
}

/// Whether an argument of a compiler's driver has it run other programs than its own.
fn is_detour(argument: &str) -> bool {
    let has = |option: &&str| argument.starts_with(option);
    ["-B", "-wrapper", "-specs", "--specs", "-fplugin"]
        .iter()
        .any(has)
        || argument.contains("--ld-path")
}

/// Whether debug information for a target is DWARF by all that is known of it: other kinds (`CodeView`) may name the
/// object that it was in, and with it the directory. A specification of one's own may say anything.
fn is_linux(target: &str) -> bool {
    let is_own = Path::new(target).extension().is_some() || target.contains('/');
    !is_own && target.split('-').any(|part| part == "linux")
}

#[cfg(test)]
mod tests {
    use super::*;
    use wrapper::args;

    #[test]
    fn who_may_name_the_directory_writes_where_it_is_told() {
        let must_write_there = |more: &str| {
            let argv = format!(
                "rustc --crate-name x --crate-type lib --emit=dep-info,metadata,link --out-dir /t/deps \
                 -Cmetadata=1 -Cextra-filename=-1 --error-format=json --json=artifacts x.rs {more}"
            );
            let argv: Vec<_> = argv.split_whitespace().map(str::to_owned).collect();
            let parsed = args::parse(&argv[1..], Path::new("/ws"));
            must_write_there(&parsed.expect("parses"))
        };
        for more in [
            "",
            "-Cdebuginfo=2 -Copt-level=3",
            "--target aarch64-unknown-linux-musl",
            "-Cincremental=/t/incremental",
            "--crate-type bin",
            "--crate-type proc-macro",
            "--crate-type cdylib",
            "--crate-type staticlib",
            "--test",
            "--test -Clinker=clang-19 -Clink-arg=-fuse-ld=mold",
            "--crate-type bin -Clinker=/opt/bin/aarch64-linux-gnu-gcc",
            "-Clinker=flip-link",
            "--crate-type bin -Clink-arg=-Wl,-O1 -Clink-arg=-fuse-ld=lld",
        ] {
            assert!(!must_write_there(more), "{more}");
        }
        for more in [
            "--crate-type bin -Clinker=flip-link",
            "--test -Clinker=/ws/link.sh",
            "--test -Clink-arg=-fuse-ld=/ws/link.sh",
            "--test -Clink-arg=--ld-path=/ws/link.sh",
            "--test -Clink-args=-B/ws",
            "--test -Clink-arg=-specs=/ws/specs",
            "-Csplit-debuginfo=packed",
            "--target x86_64-pc-windows-gnu",
            "--target x86_64-unknown-uefi",
            "--target wasm32-unknown-unknown",
            "--target targets/x86_64-unknown-linux-gnu.json",
        ] {
            assert!(must_write_there(more), "{more}");
        }
    }
}
