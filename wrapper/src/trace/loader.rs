//! By what a program is loaded. Part of the watcher and of the shim (`shim/lib.rs`).
//!
//! The shim is made for one machine and one C library. A program that brings its own (a toolchain for
//! other machines, say) could not start with it, or would complain; a static one would not load it, and
//! leave its variable in the environment.

/// The dynamic linker of programs that are made for this system (System V ABI, AMD64).
const LOADER: &[u8] = b"/lib64/ld-linux-x86-64.so.2\0";

/// As much of a program as is to be looked at: its headers are at its beginning as a rule.
pub(super) const HEAD: usize = 1024;

/// Whether a file that begins so is a program of this machine that asks for the loader (elf(5)).
pub(super) fn is_native(head: &[u8]) -> bool {
    asks_for_loader(head).unwrap_or(false)
}

fn asks_for_loader(head: &[u8]) -> Option<bool> {
    /// 64 bits, little-endian.
    const MAGIC: &[u8] = b"\x7fELF\x02\x01";
    const INTERPRETER: usize = 3;
    let number = |at: usize, size: usize| {
        let bytes = head.get(at..at.checked_add(size)?)?;
        let digits = bytes.iter().rev();
        Some(digits.fold(0_usize, |number, byte| (number << 8) | usize::from(*byte)))
    };
    if !head.starts_with(MAGIC) {
        return Some(false);
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for entry in 0..count {
        let at = table.checked_add(entry * size)?;
        if number(at, 4)? == INTERPRETER {
            let place = number(at.checked_add(8)?, 8)?;
            let name = head.get(place..place.checked_add(LOADER.len())?)?;
            return Some(name == LOADER);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    #[test]
    #[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
    fn programs_of_this_system_are_told_from_others() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("made.c"), "int main(void) { return 0; }\n").expect("writes");
        let made = |flags: &[&str]| {
            let mut gcc = Command::new("gcc");
            gcc.args(["made.c", "-o", "made"]).args(flags);
            assert!(
                gcc.current_dir(dir.path())
                    .status()
                    .expect("gcc runs")
                    .success()
            );
            fs::read(dir.path().join("made")).expect("reads")
        };
        let head = |program: &[u8]| program[..HEAD.min(program.len())].to_vec();
        assert!(is_native(&head(&made(&[]))));
        assert!(is_native(&head(&made(&["-no-pie"]))));
        assert!(!is_native(&head(&made(&["-static"]))));
        assert!(!is_native(&head(&made(&["-static-pie"]))));
        let other = made(&["-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"]);
        assert!(!is_native(&head(&other)));
        let cut = head(&made(&[]));
        for length in 0..cut.len() {
            // Whatever is cut off, nothing is read that is not there.
            let _ = is_native(&cut[..length]);
        }
        assert!(!is_native(b"#!/bin/sh\n"));
    }
}
