//! Finding a program to see by what it is loaded.

use core::ffi::c_char;

use crate::loader;
use crate::system::{self, AT_FDCWD};

/// The longest path that is looked at.
const MOST_PATH: usize = 1024;

/// Whether the program, named as for `execvp(3)`, is loaded by the system's own dynamic linker.
pub fn is_of_here(program: &[u8]) -> bool {
    if program.contains(&b'/') {
        return is_native(program, b"");
    }
    directory_of(program).is_some_and(|directory| is_native(directory, program))
}

/// Whether the program, named so, lies where the system's programs do: those find their libraries without
/// anybody's help.
pub fn is_systems(program: &[u8]) -> bool {
    const PLACES: [&[u8]; 5] = [
        b"/usr/bin/",
        b"/usr/lib/",
        b"/usr/libexec/",
        b"/bin/",
        b"/lib/",
    ];
    let is_in = |path: &[u8], place: &[u8]| {
        path.starts_with(place) || place.strip_suffix(b"/") == Some(path)
    };
    let path = if program.contains(&b'/') {
        Some(program)
    } else {
        directory_of(program)
    };
    path.is_some_and(|path| PLACES.iter().any(|place| is_in(path, place)))
}

/// The directory of `PATH` that has a program.
fn directory_of(program: &[u8]) -> Option<&'static [u8]> {
    // SAFETY: as the C library does when it looks the program up.
    let list = unsafe { system::variable(b"PATH=") }?;
    let mut directories = list.split(|byte| *byte == b':');
    directories.find(|directory| !directory.is_empty() && is_there(directory, program))
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
    let mut head = [0; loader::HEAD];
    let read = system::call(
        system::PREAD,
        [fd, head.as_mut_ptr() as usize, loader::HEAD, 0, 0],
    );
    system::call(system::CLOSE, [fd, 0, 0, 0, 0]);
    let head = &head[..usize::try_from(read).unwrap_or(0)];
    loader::is_native(head)
}
