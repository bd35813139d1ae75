//! How the shim gets into programs: at their start, and into what they start.
//!
//! The variable that asks the dynamic linker for it is taken out of the environment before `main`, so that
//! no program sees another environment than it would have without. What such a program starts gets it
//! again, if it is one of those that make many calls or start many programs: it is not forced on
//! programs it might disturb (one made with a sanitizer wants its own library to come first).

use core::ffi::{CStr, c_char, c_int, c_void};
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use crate::ask;
use crate::loads::{self, Place};
use crate::pages;
use crate::ring;
use crate::search::{self, Lists};
use crate::system::{self, AT_FDCWD};
use crate::words::{ALLOCATOR, ALLOCATOR_IS_TOLD, ATTACH};

/// A list of texts that ends in none.
pub type List = *const *const c_char;

/// The variable, with its `=`.
const VARIABLE: &[u8] = b"LD_PRELOAD=";

/// More variables than this, and the shim is not passed on: they take memory of stacks that may be small.
const MOST_VARIABLES: usize = 256;

/// Programs the shim is passed on to: the last parts of their names, but for numbers, as in
/// `x86_64-linux-gnu-gcc-12`.
const PASSED_ON_TO: [&[u8]; 35] = [
    b"sh",
    b"bash",
    b"dash",
    b"env",
    b"make",
    b"gmake",
    b"ninja",
    b"cmake",
    b"perl",
    b"python",
    b"cc",
    b"c++",
    b"gcc",
    b"g++",
    b"cpp",
    b"cc1plus",
    b"clang",
    b"clang++",
    b"as",
    b"ld",
    b"ld.bfd",
    b"ld.gold",
    b"ld.lld",
    b"lld",
    b"collect",
    b"lto",
    b"ar",
    b"ranlib",
    b"nm",
    b"strip",
    b"objcopy",
    b"rustc",
    b"rustdoc",
    b"cargo",
    b"kachefs-cc",
];

/// The variable as we found it.
static mut ENTRY: [u8; 64] = [0; 64];
/// Whether we did.
static HAS_ENTRY: AtomicBool = AtomicBool::new(false);

/// A function of the C library that one of ours stands before.
struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

static SPAWN: Next = Next::called(c"posix_spawn");
static SPAWN_BY_NAME: Next = Next::called(c"posix_spawnp");
static RUN_BY_NAME: Next = Next::called(c"execvpe");

impl Next {
    const fn called(name: &'static CStr) -> Self {
        let found = AtomicPtr::new(ptr::null_mut());
        Self { name, found }
    }

    /// Finds it, if it is to be found: at the start as a rule, for in a process made by vfork(2) little may
    /// be done.
    fn find(&self) -> *mut c_void {
        let mut found = self.found.load(Ordering::Relaxed);
        if found.is_null() {
            found = system::next(self.name);
            self.found.store(found, Ordering::Relaxed);
        }
        found
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn(c_int, List) = {
    extern "C" fn start(_count: c_int, arguments: List) {
        // SAFETY: at a program's start nobody else uses its environment, which is a list of texts that
        // the kernel has put into memory of this program's own, as it has the arguments.
        let (spared, kept) = unsafe {
            pages::start(*arguments);
            hide_allocator();
            (search::put_back(), hide())
        };
        for function in [&SPAWN, &SPAWN_BY_NAME, &RUN_BY_NAME] {
            function.find();
        }
        if kept.is_some() {
            HAS_ENTRY.store(true, Ordering::Release);
            // Without, every call is handed over.
            let _ = attach();
        }
        let is_as_searched = spared.is_none_or(search::Spared::was_vain)
            && (kept != Some(Kept::WithOthers) || search::was_given_the_same());
        if !is_as_searched {
            // SAFETY: the C library calls this with what the program was called with (glibc).
            unsafe { search::run_again(arguments) }
        }
    }
    start
};

/// How this program got the shim.
#[derive(PartialEq)]
enum Kept {
    /// By itself.
    Alone,
    /// With the libraries that the program is loaded with.
    WithOthers,
}

/// Keeps the variable, as it is to be passed on, and takes it out of the environment.
///
/// # Safety
///
/// As [`system::take`].
unsafe fn hide() -> Option<Kept> {
    // SAFETY: the caller's.
    let kept = unsafe {
        let text = system::text(*system::entry(|text| text.starts_with(VARIABLE))?)?;
        // The shim comes first, and where it is there is nothing of others.
        let own = text.split(|byte| *byte == b':').next()?;
        let entry = &raw mut ENTRY;
        // With its NUL, which is there already.
        if own.len() >= (*entry).len() {
            return None;
        }
        ptr::copy_nonoverlapping(own.as_ptr(), entry.cast(), own.len());
        if own.len() < text.len() {
            Kept::WithOthers
        } else {
            Kept::Alone
        }
    };
    // SAFETY: the caller's. What was in it is kept.
    unsafe { system::wipe(system::take(|text| text.starts_with(VARIABLE))?) };
    Some(kept)
}

/// Takes what the allocator was told out of the environment: it has read it, for libraries that allocate are
/// initialised before this one.
///
/// # Safety
///
/// As [`system::take`].
unsafe fn hide_allocator() {
    let is_told = |text: &[u8]| {
        let value = text.strip_prefix(ALLOCATOR.as_bytes());
        let value = value.and_then(|value| value.strip_prefix(b"="));
        value.is_some_and(|value| value.starts_with(ALLOCATOR_IS_TOLD.as_bytes()))
    };
    // SAFETY: the caller's. It has no other user any more.
    unsafe {
        if let Some(told) = system::take(is_told) {
            system::wipe(told);
        }
    }
}

/// Makes the gate and gets the memory to write to.
fn attach() -> Option<()> {
    let process = u32::try_from(system::call(system::GETPID, [0; 5])).ok()?;
    let path = path(process);
    let arguments = [AT_FDCWD as usize, path.as_ptr() as usize, 0, 0, 0];
    let fd = system::call(system::OPENAT, arguments);
    let number = usize::try_from(fd).ok()?;
    let memory = system::make_gate().and_then(|()| system::share(ring::LENGTH, fd));
    system::call(system::CLOSE, [number, 0, 0, 0, 0]);
    ask::attach(memory?, process);
    system::make_ready()
}

/// What a process asks for to get the memory, ending in a NUL.
fn path(process: u32) -> [u8; ATTACH.len() + 9] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut path = [0; ATTACH.len() + 9];
    path[..ATTACH.len()].copy_from_slice(ATTACH);
    let length = (32 - process.leading_zeros()).div_ceil(4).max(1);
    for at in 0..length {
        let digit = (process >> (4 * (length - 1 - at))) & 0xf;
        path[ATTACH.len() + at as usize] = DIGITS[digit as usize];
    }
    path
}

/// An environment with the variable, if a program is to get it and there is room.
struct Environment {
    variables: [*const c_char; MOST_VARIABLES],
    lists: Lists,
}

impl Environment {
    const fn new() -> Self {
        Self {
            variables: [ptr::null(); MOST_VARIABLES],
            lists: Lists::new(),
        }
    }

    /// The environment for a program that is to be started with this one.
    ///
    /// # Safety
    ///
    /// The name is none or a text, and the environment none or a list of texts that ends in none.
    unsafe fn of(&mut self, program: *const c_char, given: List) -> List {
        // SAFETY: the caller's.
        unsafe { self.try_of(program, given) }.unwrap_or(given)
    }

    unsafe fn try_of(&mut self, program: *const c_char, given: List) -> Option<List> {
        if !HAS_ENTRY.load(Ordering::Acquire) || given.is_null() {
            return None;
        }
        // SAFETY: the caller's.
        let program = unsafe { system::text(program) }?;
        let place = place_if_passed_on_to(program)?;
        let mut count = 1;
        let mut list = None;
        let mut lists = 0;
        for at in 0.. {
            // SAFETY: the list is not over.
            let entry = unsafe { *given.add(at) };
            // SAFETY: the caller's.
            let Some(text) = (unsafe { system::text(entry) }) else {
                break;
            };
            // A program that is to load others does without ours. And there is to be room for the end,
            // which is none already, and for one more.
            if text.starts_with(VARIABLE) || count + 2 >= MOST_VARIABLES {
                return None;
            }
            if text.starts_with(search::VARIABLE) {
                list = Some((count, text));
                lists += 1;
            }
            self.variables[count] = entry;
            count += 1;
        }
        self.variables[0] = (&raw const ENTRY).cast();
        if let Some((at, whole)) = list
            && lists == 1
            && names(program).into_iter().any(search::is_spared)
            && place.is_systems()
            && let Some((hidden, rest)) = self.lists.of(whole)
        {
            self.variables[at] = hidden;
            self.variables[count] = rest.unwrap_or(ptr::null());
        }
        Some(self.variables.as_ptr())
    }
}

/// Where a program is, if it is to have the shim and can load it.
fn place_if_passed_on_to(program: &[u8]) -> Option<Place<'_>> {
    let mut names = names(program).into_iter();
    let is_called_so = names.any(|name| PASSED_ON_TO.contains(&name)) && is_at_hand();
    let place = is_called_so.then(|| loads::find(program))?;
    place.filter(Place::is_of_here)
}

/// What a program is called, and what comes last in that, but for numbers: `gcc` of
/// `x86_64-linux-gnu-gcc-12`.
pub fn names(program: &[u8]) -> [&[u8]; 2] {
    let name = program
        .rsplit(|byte| *byte == b'/')
        .next()
        .unwrap_or(program);
    let is_number = |part: &&[u8]| {
        part.iter()
            .all(|byte| byte.is_ascii_digit() || *byte == b'.')
    };
    let mut parts = name.rsplit(|byte| *byte == b'-').skip_while(is_number);
    let last = parts.next().unwrap_or(name);
    let end = last
        .iter()
        .rposition(|byte| !(byte.is_ascii_digit() || *byte == b'.'));
    [name, &last[..end.map_or(0, |end| end + 1)]]
}

/// Whether the shim can be loaded by who we are now, here: another user may not, nor those who see
/// another `/proc`, or none.
fn is_at_hand() -> bool {
    const READABLE: usize = 4;
    let path = (&raw const ENTRY) as usize + VARIABLE.len();
    system::has_gate() && system::pass(system::ACCESS, [path, READABLE, 0, 0, 0]) == 0
}

type Spawn = unsafe extern "C" fn(
    *mut c_int,
    *const c_char,
    *const c_void,
    *const c_void,
    List,
    List,
) -> c_int;
type Run = unsafe extern "C" fn(*const c_char, List, List) -> c_int;

/// The C library's function, as one of this kind.
macro_rules! function {
    ($next:ident as $kind:ty) => {{
        let found = $next.find();
        // SAFETY: what it is called says of what kind it is.
        (!found.is_null()).then(|| unsafe { core::mem::transmute::<*mut c_void, $kind>(found) })
    }};
}

/// As `posix_spawn(3)`.
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawn(
    pid: *mut c_int,
    path: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    arguments: List,
    environment: List,
) -> c_int {
    let Some(spawn) = function!(SPAWN as Spawn) else {
        return system::ENOSYS as c_int;
    };
    let mut with = Environment::new();
    // SAFETY: the caller's.
    unsafe {
        let environment = with.of(path, environment);
        spawn(pid, path, actions, attributes, arguments, environment)
    }
}

/// As `posix_spawnp(3)`.
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawnp(
    pid: *mut c_int,
    file: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    arguments: List,
    environment: List,
) -> c_int {
    let Some(spawn) = function!(SPAWN_BY_NAME as Spawn) else {
        return system::ENOSYS as c_int;
    };
    let mut with = Environment::new();
    // SAFETY: the caller's.
    unsafe {
        let environment = with.of(file, environment);
        spawn(pid, file, actions, attributes, arguments, environment)
    }
}

// Behind their names, of which a program may have others of its own.

unsafe fn run(path: *const c_char, arguments: List, environment: List) -> c_int {
    let mut with = Environment::new();
    // SAFETY: the caller's.
    let environment = unsafe { with.of(path, environment) };
    let arguments = [
        path as usize,
        arguments as usize,
        environment as usize,
        0,
        0,
    ];
    system::returned(system::call(system::EXECVE, arguments)) as c_int
}

unsafe fn run_by_name(file: *const c_char, arguments: List, environment: List) -> c_int {
    let Some(next) = function!(RUN_BY_NAME as Run) else {
        return system::fail(system::ENOSYS) as c_int;
    };
    let mut with = Environment::new();
    // SAFETY: the caller's.
    unsafe {
        let environment = with.of(file, environment);
        next(file, arguments, environment)
    }
}

/// As execve(2).
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execve(path: *const c_char, arguments: List, environment: List) -> c_int {
    // SAFETY: the caller's.
    unsafe { run(path, arguments, environment) }
}

/// As execv(3).
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execv(path: *const c_char, arguments: List) -> c_int {
    // SAFETY: the caller's.
    unsafe { run(path, arguments, own_environment()) }
}

/// As execvpe(3).
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvpe(file: *const c_char, arguments: List, environment: List) -> c_int {
    // SAFETY: the caller's.
    unsafe { run_by_name(file, arguments, environment) }
}

/// As execvp(3).
///
/// # Safety
///
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvp(file: *const c_char, arguments: List) -> c_int {
    // SAFETY: the caller's.
    unsafe { run_by_name(file, arguments, own_environment()) }
}

fn own_environment() -> List {
    // SAFETY: as the C library does: who changes it meanwhile must not.
    unsafe { system::environ }.cast_const().cast()
}
