//! Whether a program is loaded as this one was.
//!
//! The shim is made for one machine and one C library. A program that brings its own (a toolchain for
//! other machines, say) could not start with it, or would complain.

use core::ffi::c_char;

use crate::system::{self, AT_FDCWD};

/// The dynamic linker of programs that are made for this system (System V ABI, AMD64).
const LOADER: &[u8] = b"/lib64/ld-linux-x86-64.so.2\0";

/// Interpreters of scripts that are such programs on every system.
const INTERPRETERS: [&[u8]; 2] = [b"#!/bin/", b"#!/usr/bin/"];

/// As much of a program as is looked at; its headers are at its beginning as a rule.
const HEAD: usize = 1024;

/// Where programs are looked for that are named without a slash, and no other variable says.
const MOST_PATH: usize = 1024;

/// Whether the program, named as for `execvp(3)`, is loaded by the system's own dynamic linker.
pub fn is_of_here(program: &[u8]) -> bool {
    if program.contains(&b'/') {
        return is_native(program, b"");
    }
    // SAFETY: as the C library does when it looks the program up.
    let list = unsafe { system::variable(b"PATH=") };
    let Some(list) = list else {
        return false;
    };
    let mut directories = list.split(|byte| *byte == b':');
    let found = directories.find(|directory| !directory.is_empty() && is_there(directory, program));
    found.is_some_and(|directory| is_native(directory, program))
}

/// A path of two parts, ending in a NUL.
fn join(directory: &[u8], name: &[u8]) -> Option<[u8; MOST_PATH]> {
    let mut path = [0; MOST_PATH];
    let length = directory.len();
    if length + 1 + name.len() >= path.len() {
        return None;
    }
    path[..length].copy_from_slice(directory);
    if !name.is_empty() {
        path[length] = b'/';
        path[length + 1..length + 1 + name.len()].copy_from_slice(name);
    }
    Some(path)
}

fn is_there(directory: &[u8], name: &[u8]) -> bool {
    const RUNNABLE: usize = 1;
    join(directory, name).is_some_and(|path| {
        let path = path.as_ptr().cast::<c_char>() as usize;
        system::pass(system::ACCESS, [path, RUNNABLE, 0, 0, 0]) == 0
    })
}

// What is looked at here, the kernel looks at when it runs the program, and that is handed over.
fn is_native(directory: &[u8], name: &[u8]) -> bool {
    const CLOSE_ON_EXEC: usize = 0o2_000_000;
    let Some(path) = join(directory, name) else {
        return false;
    };
    let arguments = [
        AT_FDCWD as usize,
        path.as_ptr() as usize,
        CLOSE_ON_EXEC,
        0,
        0,
    ];
    let fd = system::pass(system::OPENAT, arguments);
    let Ok(fd) = usize::try_from(fd) else {
        return false;
    };
    let mut head = [0; HEAD];
    let read = system::call(system::PREAD, [fd, head.as_mut_ptr() as usize, HEAD, 0, 0]);
    system::call(system::CLOSE, [fd, 0, 0, 0, 0]);
    let head = &head[..usize::try_from(read).unwrap_or(0)];
    is_native_program(head).unwrap_or(false)
        || INTERPRETERS.iter().any(|start| head.starts_with(start))
}

/// Whether a file that begins so is a program of this machine that asks for the loader (elf(5)).
fn is_native_program(head: &[u8]) -> Option<bool> {
    const MAGIC: &[u8] = b"\x7fELF\x02\x01";
    const INTERPRETER: u64 = 3;
    let number = |at: usize, size: usize| {
        let bytes = head.get(at..at.checked_add(size)?)?;
        let bytes = bytes.iter().rev();
        Some(bytes.fold(0_u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    if !head.starts_with(MAGIC) {
        return Some(false);
    }
    let table = usize::try_from(number(32, 8)?).ok()?;
    let (size, count) = (number(54, 2)? as usize, number(56, 2)? as usize);
    for at in (0..count).map(|entry| table.saturating_add(entry * size)) {
        if number(at, 4)? == INTERPRETER {
            let place = usize::try_from(number(at + 8, 8)?).ok()?;
            let name = head.get(place..place.checked_add(LOADER.len())?)?;
            return Some(name == LOADER);
        }
    }
    Some(false)
}
