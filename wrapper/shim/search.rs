//! Sparing programs of the system the search for their libraries where none of them is.
//!
//! The dynamic linker looks in all directories of `LD_LIBRARY_PATH` first (ld.so(8)), and each look is
//! handed over. Cargo names four there to build scripts, of which C compilers need none. A program that is
//! passed the shim is started without those of them that hold nothing for it, as the watcher found, and
//! with the whole list under another name. The shim in it puts the list back before `main`, looks itself
//! for what the program was loaded with, and so says what the linker would have said. Should anything have
//! come there meanwhile, the program is run again as it was called.

use core::ffi::{CStr, c_char, c_int, c_void};

use crate::ask;
use crate::start::List;
use crate::system;
use crate::words::{FOR_PROCESSORS, SEARCH};

/// The variable, with its `=`.
pub const VARIABLE: &[u8] = b"LD_LIBRARY_PATH=";

/// What the whole list is called meanwhile: this before its own name.
const HIDDEN: &[u8] = b"KACHEFS_";

/// A longer variable, with its name, is left as it is: both take memory of stacks that may be small.
const LONGEST: usize = 1000;

/// Programs that are spared, where they are the system's own: parts of a C compiler.
const SPARED: [&[u8]; 19] = [
    b"cc", b"c++", b"gcc", b"g++", b"cpp", b"cc1plus", b"clang", b"clang++", b"as", b"ld",
    b"ld.bfd", b"ld.gold", b"collect", b"lto", b"ar", b"ranlib", b"nm", b"strip", b"objcopy",
];

/// Whether a program of this name, without its numbers, is spared.
pub fn is_spared(name: &[u8]) -> bool {
    SPARED.contains(&name)
}

/// Both lists of a program about to be started.
pub struct Lists([u8; HIDDEN.len() + 2 * (LONGEST + 1)]);

impl Lists {
    pub const fn new() -> Self {
        Self([0; HIDDEN.len() + 2 * (LONGEST + 1)])
    }

    /// The whole list under its other name, and what remains of it, if anything. `None` where all of it is
    /// to be searched.
    pub fn of(&mut self, whole: &[u8]) -> Option<(*const c_char, Option<*const c_char>)> {
        let list = whole.strip_prefix(VARIABLE)?;
        // An empty one is the working directory, unless nothing else is left.
        if whole.len() > LONGEST
            || list.iter().any(|byte| b"$;".contains(byte))
            || directories(list).any(<[u8]>::is_empty)
        {
            return None;
        }
        let vain = vain()?;
        let is_vain = |directory: &[u8]| directories(vain).any(|known| known == directory);
        if !directories(list).any(is_vain) {
            return None;
        }
        let Self(text) = self;
        let mut at = 0;
        let mut put = |part: &[u8]| {
            text[at..at + part.len()].copy_from_slice(part);
            at += part.len();
            at
        };
        for part in [HIDDEN, whole] {
            put(part);
        }
        let rest = put(b"\0");
        put(VARIABLE);
        let mut remains = false;
        for directory in directories(list).filter(|directory| !is_vain(directory)) {
            if remains {
                put(b":");
            }
            put(directory);
            remains = true;
        }
        put(b"\0");
        let rest = remains.then(|| text[rest..].as_ptr().cast());
        Some((text.as_ptr().cast(), rest))
    }
}

/// Directories that hold nothing for programs of the system. Asked of the watcher once.
fn vain<'a>() -> Option<&'a [u8]> {
    let ring = ask::ring_if_ready()?;
    ring.vain().or_else(|| {
        system::call(system::ACCESS, [SEARCH.as_ptr() as usize, 0, 0, 0, 0]);
        ring.vain()
    })
}

fn directories(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|byte| *byte == b':')
}

/// What a program was spared: the whole list, and what its loader was given of it.
pub struct Spared {
    whole: &'static [u8],
    searched: Option<*mut c_char>,
}

/// Puts the whole list back where this program was spared any of it.
///
/// # Safety
///
/// Nobody else uses the environment, which is a list of texts in memory of this program's own.
pub unsafe fn put_back() -> Option<Spared> {
    // SAFETY: the caller's.
    unsafe {
        let is_hidden = |text: &[u8]| {
            let name = text.strip_prefix(HIDDEN);
            name.is_some_and(|name| name.starts_with(VARIABLE))
        };
        system::entry(is_hidden)?;
        let searched = system::take(|text| text.starts_with(VARIABLE));
        let place = system::entry(is_hidden)?;
        // `/proc/self/environ` shows a gap.
        (*place).write_bytes(0, HIDDEN.len());
        *place = (*place).add(HIDDEN.len());
        let whole = system::text(*place)?.strip_prefix(VARIABLE)?;
        Some(Spared { whole, searched })
    }
}

impl Spared {
    /// Whether the loader would have found nothing in the directories it was spared. Says what it would have
    /// looked for, and forgets what it was given.
    pub fn was_vain(self) -> bool {
        // SAFETY: a text of this program's own, which has no other user any more.
        let searched = self.searched.and_then(|text| unsafe { system::text(text) });
        let searched = searched.and_then(|text| text.strip_prefix(VARIABLE));
        let mut searched = directories(searched.unwrap_or_default()).peekable();
        let mut spared = directories(self.whole)
            .filter(|directory| searched.next_if(|next| next == directory).is_none());
        let was_vain =
            spared.all(|directory| !is_for_processors(directory) && !holds_loaded(directory));
        if let Some(text) = self.searched {
            // SAFETY: as above.
            unsafe { system::wipe(text) };
        }
        was_vain
    }
}

/// Whether a directory has any part for some processors.
fn is_for_processors(directory: &[u8]) -> bool {
    let mut names = FOR_PROCESSORS.iter();
    names.any(|name| ask::is_there(directory, name))
}

/// Whether the loader would have found the libraries that this program was given by their paths, had it
/// looked for them. Says what it would have looked for.
pub fn was_given_the_same() -> bool {
    // SAFETY: at the program's start nobody changes its environment.
    let mut list = unsafe { system::variable(VARIABLE) }.unwrap_or_default();
    if list.is_empty() {
        return true;
    }
    if directories(list).any(is_for_processors) {
        return false;
    }
    let data = (&raw mut list).cast();
    // SAFETY: the function is called with what is given here, and with what the C library says.
    unsafe { dl_iterate_phdr(is_elsewhere, data) == 0 }
}

/// Whether any library this program was loaded with is in a directory, too.
fn holds_loaded(directory: &[u8]) -> bool {
    let mut directory = directory;
    let data = (&raw mut directory).cast();
    // SAFETY: the function is called with what is given here, and with what the C library says.
    unsafe { dl_iterate_phdr(is_in, data) != 0 }
}

unsafe extern "C" {
    /// As `dl_iterate_phdr(3)`.
    fn dl_iterate_phdr(
        look: unsafe extern "C" fn(*const Object, usize, *mut c_void) -> c_int,
        data: *mut c_void,
    ) -> c_int;
}

/// The beginning of `struct dl_phdr_info` (link.h).
#[repr(C)]
struct Object {
    address: usize,
    name: *const c_char,
}

/// Whether a directory holds what is called as this object; for `dl_iterate_phdr`.
unsafe extern "C" fn is_in(object: *const Object, _size: usize, directory: *mut c_void) -> c_int {
    // SAFETY: what the caller says, and a directory's path.
    let (object, directory) = unsafe { (searched_for(object), *directory.cast::<&[u8]>()) };
    object
        .is_some_and(|(_, name)| ask::is_there(directory, name))
        .into()
}

/// Whether a list of directories holds what is called as this object before the one it lies in; for
/// `dl_iterate_phdr`.
unsafe extern "C" fn is_elsewhere(object: *const Object, _size: usize, list: *mut c_void) -> c_int {
    // SAFETY: what the caller says, and a list of paths.
    let (object, list) = unsafe { (searched_for(object), *list.cast::<&[u8]>()) };
    let Some((beside, name)) = object else {
        return 0;
    };
    let is_beside = |directory: &&[u8]| without_end(beside) == without_end(directory);
    let mut before = directories(list).take_while(|directory| !is_beside(directory));
    before
        .any(|directory| ask::is_there(directory, name))
        .into()
}

/// Where an object lies, and its name, if the loader searches for it.
///
/// # Safety
///
/// It is one the C library tells of.
unsafe fn searched_for<'a>(object: *const Object) -> Option<(&'a [u8], &'a [u8])> {
    // SAFETY: the caller's. The program has no name, nor has what the kernel puts into it.
    let (beside, name) = unsafe { system::text((*object).name) }.and_then(split)?;
    // The shim, and the loader, whose path is the program's.
    let is_searched = !beside.starts_with(b"/proc/") && !name.starts_with(b"ld-linux");
    is_searched.then_some((beside, name))
}

/// A directory's path without what the loader takes from its end.
fn without_end(directory: &[u8]) -> &[u8] {
    let end = directory.iter().rposition(|byte| *byte != b'/');
    &directory[..end.map_or(0, |end| end + 1)]
}

/// What comes before the last `/`, and behind it.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = path.iter().rposition(|byte| *byte == b'/')?;
    Some((&path[..at + 1], &path[at + 1..]))
}

/// Runs this program again, as it was called.
///
/// # Safety
///
/// The arguments are the program's own.
pub unsafe fn run_again(arguments: List) -> ! {
    const PROGRAM: &CStr = c"/proc/self/exe";
    let (program, arguments) = (PROGRAM.as_ptr() as usize, arguments as usize);
    // SAFETY: at the program's start nobody changes its environment.
    let environment = unsafe { system::environ } as usize;
    system::call(system::EXECVE, [program, arguments, environment, 0, 0]);
    // It must not go on with another library than its own.
    system::abort()
}
