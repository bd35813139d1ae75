//! Programs that cargo puts before rustc: `clippy-driver rustc --crate-name …`.
//!
//! `cargo clippy` names its driver as the workspace's wrapper, and cargo calls it with rustc as the
//! first argument, through `RUSTC_WRAPPER` like rustc itself. Says how many words of a command line
//! are programs; the thin client and the daemon must agree on it.

use std::ffi::OsStr;
use std::path::Path;

/// The driver of clippy.
const CLIPPY: &str = "clippy-driver";

/// How many of the first words are programs: two where a driver is given the compiler it stands for.
pub fn programs<S: AsRef<OsStr>>(argv: &[S]) -> usize {
    let stands_for = argv
        .get(1)
        .map(|word| Path::new(word.as_ref()))
        .is_some_and(|word| word.file_name().is_some_and(|name| name == "rustc"));
    if stands_for { 2 } else { 1 }
}

/// Whether a program is clippy's driver.
pub fn is_clippy(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name == CLIPPY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_and_what_it_stands_for() {
        assert_eq!(
            programs(&["/b/clippy-driver", "/b/rustc", "--crate-name"]),
            2
        );
        assert_eq!(programs(&["/b/rustc", "--crate-name", "rustc"]), 1);
        assert_eq!(programs(&["/b/rustc"]), 1);
        assert!(is_clippy(Path::new("/b/clippy-driver")));
        assert!(!is_clippy(Path::new("/b/rustc")));
    }
}
