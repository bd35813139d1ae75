//! Which directories of `LD_LIBRARY_PATH` hold nothing that programs of the system are loaded with.
//!
//! Cargo names four of its own to build scripts. The dynamic linker of each program they start then looks
//! for each library in each of them, and in each for a dozen directories besides (ld.so(8)): most of the
//! calls of a C compiler that are handed over. Such programs are started without them, where that
//! makes no difference, and say themselves what they would have looked for (`shim/search.rs`).

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::words::FOR_PROCESSORS;

/// The variable the dynamic linker knows them from.
pub(super) const VARIABLE: &str = "LD_LIBRARY_PATH";

/// Those of a list's directories, with `:` between.
pub(super) fn vain(list: &[u8]) -> Vec<u8> {
    // What stands for another path, or separates otherwise, is left alone (ld.so(8)).
    if list.iter().any(|byte| b"$;".contains(byte)) {
        return Vec::new();
    }
    let directories = list.split(|byte| *byte == b':');
    let vain: Vec<&[u8]> = directories.filter(|directory| is_vain(directory)).collect();
    vain.join(&b':')
}

fn is_vain(directory: &[u8]) -> bool {
    let path = Path::new(OsStr::from_bytes(directory));
    if !path.is_absolute() {
        return false;
    }
    match fs::read_dir(path) {
        Ok(mut entries) => entries
            .all(|entry| entry.is_ok_and(|entry| !may_be_loaded(entry.file_name().as_bytes()))),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Whether a program that is none of Rust's may be loaded with what has this name.
fn may_be_loaded(name: &[u8]) -> bool {
    let has = |part: &[u8]| name.windows(part.len()).any(|window| window == part);
    FOR_PROCESSORS.contains(&name) || (has(b".so") && !has(b"-rust-") && !is_hashed(name))
}

/// Whether it is called as cargo and rustc call libraries: `libserde_derive-0123456789abcdef.so`.
fn is_hashed(name: &[u8]) -> bool {
    const DIGITS: usize = 16;
    let Some(stem) = name.strip_suffix(b".so") else {
        return false;
    };
    let Some((rest, digits)) = stem.split_last_chunk::<DIGITS>() else {
        return false;
    };
    rest.ends_with(b"-") && digits.iter().all(u8::is_ascii_hexdigit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_holds_nothing_is_searched_in_vain() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name).into_os_string().into_encoded_bytes();
        for file in [
            "deps/libserde_derive-0123456789abcdef.so",
            "deps/libserde-0123456789abcdef.rlib",
            "deps/main.d",
            "lib/libLLVM.so.22.1-rust-1.95.0-stable",
            "lib/librustc_driver-6108105cd7e8391a.so",
            "other/libz.so.1",
            "plain/libbfd-2.40-system.so",
            "hashless/libderive-0123456789abcde.so",
            "processors/haswell/x",
        ] {
            let file = dir.path().join(file);
            fs::create_dir_all(file.parent().expect("has one")).expect("mkdir");
            fs::write(file, "").expect("writes");
        }
        let names = [
            "deps",
            "other",
            "lib",
            "plain",
            "missing",
            "hashless",
            "processors",
        ];
        let list = names.map(at).join(&b':');
        assert_eq!(vain(&list), ["deps", "lib", "missing"].map(at).join(&b':'));
        assert_eq!(vain(&[list, b"$ORIGIN/lib".to_vec()].join(&b':')), b"");
        assert_eq!(vain(b""), b"");
        assert_eq!(vain(b"relative:."), b"");
    }
}
