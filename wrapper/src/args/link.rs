//! What linker arguments mean to the cache: which files they may name, and which make the linker
//! write files of its own.
//!
//! Linker arguments are an open language, so nothing here decides what a linker does. The names
//! found are more than there are: the caller hashes those that exist. It never touches the disk.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::{Uncacheable, absolute};

/// Prefixes after which a linker argument can go on with a path.
const PATH_PREFIXES: &[&str] = &["-L", "-B", "-T", "-F", "-R", "-I", "-l", "@"];

/// Linker options, without dashes and value, that write a file besides the output (GNU ld, gold,
/// lld, mold, wild, and the compiler drivers). Case matters: `-Map`, but `-m` is an emulation.
const WRITING: &[&str] = &[
    "Map",
    "dependency-file",
    "MF",
    "MD",
    "MMD",
    "out-implib",
    "implib",
    "pdb",
    "output",
    "output-def",
    "reproduce",
    "repro",
    "time-trace",
    "why-extract",
    "why-live",
    "print-archive-stats",
    "print-symbol-order",
    "save-temps",
    "dump-dir",
    "dumpdir",
    "gsplit-dwarf",
    "fsave-optimization-record",
    "foptimization-record-file",
    "opt-remarks-filename",
    "lto-obj-path",
    "lto-emit-asm",
    "lto-emit-llvm",
    "obj-path",
    "emit-asm",
    "emit-llvm",
    "thinlto-index-only",
    "thinlto-emit-imports-files",
    "thinlto-emit-index-files",
    "thinlto-cache-dir",
    "cache-dir",
    "stats-file",
];

/// Every piece of `link_args` that could name a file or a directory, absolute against `cwd`.
///
/// Far more names than files: the caller hashes those that exist. What a named file names in turn
/// (a linker script's `INCLUDE`) is not found here.
pub fn link_arg_paths(link_args: &[String], cwd: &Path) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    let mut paths = Vec::new();
    let mut add = |piece: &str| {
        let prefixes = PATH_PREFIXES
            .iter()
            .filter_map(|prefix| piece.strip_prefix(prefix));
        for name in prefixes.chain([piece]).filter(|name| !name.is_empty()) {
            let path = absolute(cwd, name);
            if seen.insert(path.clone()) {
                paths.push(path);
            }
        }
    };
    for arg in link_args {
        // Names may hold separators, so every level of splitting counts.
        add(arg);
        for separators in [&[','][..], &[',', '='], &[',', '=', ':']] {
            arg.split(separators).for_each(&mut add);
        }
    }
    paths
}

/// Refuses arguments whose effect on a linker the key cannot hold.
pub(super) fn check_link_args(link_args: &[String]) -> Result<(), Uncacheable> {
    for arg in link_args {
        for piece in arg.split(',') {
            // The file would be hashed, but not the files it names.
            if piece.starts_with('@') {
                return Err(Uncacheable::ResponseFile);
            }
            let writes = piece.split('=').any(is_writing_option);
            let names_output = piece.starts_with("-o");
            if writes || names_output {
                return Err(Uncacheable::LinkerOutput(arg.clone()));
            }
        }
    }
    Ok(())
}

fn is_writing_option(piece: &str) -> bool {
    // Options of the LTO plugin follow `-plugin-opt=` without a dash.
    WRITING.contains(&piece.trim_start_matches('-'))
}

/// Whether some linker argument asks for the CPU of this machine (`-march=native`).
pub(super) fn asks_for_native_cpu(link_args: &[String]) -> bool {
    link_args
        .iter()
        .any(|arg| arg.split([',', '=']).any(|piece| piece == "native"))
}

/// Whether linking for `target` is known to write nothing but the file rustc announces.
///
/// Windows adds `.pdb` files and import libraries, Apple `.dSYM` directories, Emscripten a second
/// module; a custom specification can ask for any of these.
pub(super) fn links_to_one_file(target: &str) -> bool {
    let is_custom = Path::new(target)
        .extension()
        .is_some_and(|extension| extension == "json");
    let wasm = target.starts_with("wasm32-") || target.starts_with("wasm64-");
    let known = target.contains("-linux-")
        || target.contains("-none")
        || (wasm && !target.contains("emscripten"));
    known && !is_custom
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(args: &[&str]) -> Vec<String> {
        args.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn paths_of_link_args() {
        let cases: &[(&str, &[&str])] = &[
            ("/abs/libx.a", &["/abs/libx.a"]),
            ("extra.o", &["/home/ann/ws/extra.o"]),
            ("./a/../extra.o", &["/home/ann/ws/a/../extra.o"]),
            ("-L/lib/dir", &["/lib/dir"]),
            ("-Ldir", &["/home/ann/ws/dir"]),
            ("-B/opt/mold/libexec", &["/opt/mold/libexec"]),
            ("-Tlink.x", &["/home/ann/ws/link.x"]),
            ("-l:libz.a", &["/home/ann/ws/libz.a"]),
            ("-Wl,-T,link.x", &["/home/ann/ws/link.x"]),
            ("-Wl,--version-script=/s/map.txt", &["/s/map.txt"]),
            ("-Wl,--version-script,/s/map.txt", &["/s/map.txt"]),
            ("--ld-path=/usr/bin/mold", &["/usr/bin/mold"]),
            ("-Wl,-rpath,/a:/b", &["/a", "/b", "/a:/b"]),
            ("-Wl,@/tmp/more", &["/tmp/more"]),
            ("/odd,name=1.o", &["/odd,name=1.o"]),
        ];
        for (arg, expected) in cases {
            let paths = link_arg_paths(&owned(&[arg]), Path::new("/home/ann/ws"));
            for path in *expected {
                assert!(
                    paths.contains(&PathBuf::from(path)),
                    "{arg}: {path} not in {paths:?}"
                );
            }
        }
        assert!(link_arg_paths(&owned(&["", ",", "=", "-L"]), Path::new("/")).len() < 6);
    }

    #[test]
    fn ordinary_link_args_pass() {
        let args = owned(&[
            "-Wl,--as-needed",
            "-fuse-ld=mold",
            "-Wl,-O1",
            "-Wl,--build-id=sha1",
            "-Wl,-z,relro,-z,now",
            "-Wl,-rpath,$ORIGIN/../lib",
            "-Wl,-soname,libx.so.1",
            "-Wl,--version-script=map.txt",
            "-Wl,-m,elf_x86_64",
            "-nostartfiles",
            "-no-pie",
            "-Wl,--oformat=binary",
        ]);
        assert_eq!(check_link_args(&args), Ok(()));
        assert!(!asks_for_native_cpu(&args));
    }

    #[test]
    fn link_args_that_write_files() {
        for arg in [
            "-Wl,-Map=out.map",
            "-Wl,-Map,out.map",
            "--Map=out.map",
            "-Map",
            "-Wl,--dependency-file=out.d",
            "-Wl,--out-implib,libx.a",
            "-o",
            "-oother",
            "-Wl,-o,other",
            "--save-temps",
            "-Wl,-plugin-opt=save-temps",
            "-Wl,--plugin-opt=obj-path=x.o",
            "-Wl,--thinlto-cache-dir=/c",
            "-Wl,--reproduce=x.tar",
        ] {
            let refused = Err(Uncacheable::LinkerOutput(arg.to_owned()));
            assert_eq!(check_link_args(&owned(&[arg])), refused, "{arg}");
        }
        for arg in ["@args", "-Wl,@args"] {
            assert_eq!(
                check_link_args(&owned(&[arg])),
                Err(Uncacheable::ResponseFile),
                "{arg}"
            );
        }
    }

    #[test]
    fn native_cpu_in_link_args() {
        for arg in [
            "-march=native",
            "-Wl,-plugin-opt=mcpu=native",
            "-mtune=native",
        ] {
            assert!(asks_for_native_cpu(&owned(&[arg])), "{arg}");
        }
    }

    #[test]
    fn targets_that_link_to_one_file() {
        for target in [
            "x86_64-unknown-linux-gnu",
            "aarch64-unknown-linux-musl",
            "aarch64-linux-android",
            "thumbv7em-none-eabihf",
            "riscv32imac-unknown-none-elf",
            "wasm32-unknown-unknown",
            "wasm32-wasip1",
        ] {
            assert!(links_to_one_file(target), "{target}");
        }
        for target in [
            "x86_64-pc-windows-msvc",
            "x86_64-pc-windows-gnu",
            "aarch64-apple-darwin",
            "aarch64-apple-ios",
            "wasm32-unknown-emscripten",
            "x86_64-unknown-uefi",
            "/specs/x86_64-my-linux-gnu.json",
        ] {
            assert!(!links_to_one_file(target), "{target}");
        }
    }
}
