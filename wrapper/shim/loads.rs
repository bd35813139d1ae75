//! Finding a program to see by what it is loaded.

use core::ffi::c_char;

use crate::loader;
use crate::system::{self, AT_FDCWD};

/// The longest path that is looked at.
const MOST_PATH: usize = 1024;

/// Where a program lies.
pub struct Place<'a> {
    directory: &'a [u8],
    name: &'a [u8],
}

/// Where the program lies that is named as for `execvp(3)`.
pub fn find(program: &[u8]) -> Option<Place<'_>> {
    if let Some(at) = program.iter().rposition(|byte| *byte == b'/') {
        let (directory, name) = (&program[..at], &program[at + 1..]);
        return Some(Place { directory, name });
    }
    // SAFETY: as the C library does when it looks the program up.
    let list = unsafe { system::variable(b"PATH=") }?;
    let mut directories = list.split(|byte| *byte == b':');
    let directory =
        directories.find(|directory| !directory.is_empty() && is_there(directory, program))?;
    let name = program;
    Some(Place { directory, name })
}

impl Place<'_> {
    /// Whether the program is loaded by the system's own dynamic linker.
    pub fn is_of_here(&self) -> bool {
        is_native(self.directory, self.name)
    }

    /// Whether it is where the system's programs are: those find their libraries without anybody's help.
    pub fn is_systems(&self) -> bool {
        const SYSTEMS: [&[u8]; 5] = [b"/usr/bin", b"/usr/lib", b"/usr/libexec", b"/bin", b"/lib"];
        let is_within = |place: &&[u8]| {
            let rest = self.directory.strip_prefix(*place);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        SYSTEMS.iter().any(is_within)
    }
}

/// The path of a name in a directory, ending in a NUL.
pub fn join<const ROOM: usize>(directory: &[u8], name: &[u8]) -> Option<[u8; ROOM]> {
    let mut path = [0; ROOM];
    let length = directory.len();
    if length + 1 + name.len() >= path.len() {
        return None;
    }
    path[..length].copy_from_slice(directory);
    path[length] = b'/';
    path[length + 1..length + 1 + name.len()].copy_from_slice(name);
    Some(path)
}

fn is_there(directory: &[u8], name: &[u8]) -> bool {
    const RUNNABLE: usize = 1;
    join::<MOST_PATH>(directory, name).is_some_and(|path| {
        let path = path.as_ptr().cast::<c_char>() as usize;
        system::pass(system::ACCESS, [path, RUNNABLE, 0, 0, 0]) == 0
    })
}

// What is looked at here, the kernel looks at when it runs the program, and that is handed over.
fn is_native(directory: &[u8], name: &[u8]) -> bool {
    const CLOSE_ON_EXEC: usize = 0o2_000_000;
    // What is called like a program may be a pipe that nobody writes to.
    const NON_BLOCKING: usize = 0o4_000;
    let Some(path) = join::<MOST_PATH>(directory, name) else {
        return false;
    };
    let arguments = [
        AT_FDCWD as usize,
        path.as_ptr() as usize,
        CLOSE_ON_EXEC | NON_BLOCKING,
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
