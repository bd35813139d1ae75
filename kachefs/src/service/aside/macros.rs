//! Whether proc macros can tell how the compiler that runs them was called.
//!
//! One that looks for `--out-dir` among the arguments would find a directory that cargo has not named. The
//! standard library is part of each proc macro, and of it what that uses: so the names in its symbol table
//! say whether it asks for arguments. It may also ask the C library, or be given them at its start, which
//! what it imports and how many such functions it has say. Who reads `/proc/pid/cmdline` is seen
//! (`wrapper::trace::Unseen::Arguments`). What cannot be told is taken for one that asks.

use std::num::NonZeroUsize;

use lru::LruCache;
use memchr::memmem;
use object::elf::{DT_INIT, DT_NEEDED};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol};
use parking_lot::Mutex;
use store::Digest;

use crate::service::Service;
use crate::service::externs::{self, Library};
use crate::service::prepare::Prepared;
use crate::service::record::read_whole;

/// Answers remembered, one for each proc macro.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Larger ones are not looked at.
const LARGEST: u64 = 256 << 20;

/// The standard library's own keeper of arguments, which is part of all that it is part of (`std::sys::args`).
/// Where its name is not found, nothing can be told by names.
const KEEPER: &str = "ARGV_INIT_ARRAY";

/// Parts of that keeper which come with it, used or not.
const KEPT: [&str; 3] = [KEEPER, "4ARGC", "4ARGV"];

/// How names begin, and end, of what gives a program its arguments: in `std::env` and below, in both manglings.
const ASKS: [&str; 7] = [
    "4args",
    "7args_os",
    "4Args",
    "6ArgsOs",
    "env..args",
    "env..Args",
    "args..Args",
];

/// What is named like that, and has to do with the arguments of others.
const OTHERS: &str = "7Command4args";

/// What the C library has to say of arguments, and what leads to anything that is not seen here.
const ASKED: [&str; 12] = [
    "__libc_argv",
    "_dl_argv",
    "__progname",
    "__progname_full",
    "program_invocation_name",
    "program_invocation_short_name",
    "getauxval",
    "__getauxval",
    "dlopen",
    "dlmopen",
    "dlsym",
    "dlvsym",
];

/// Libraries of the system that proc macros are linked with, up to the first dot.
const SYSTEM: [&str; 7] = [
    "libc",
    "libgcc_s",
    "libm",
    "libpthread",
    "libdl",
    "librt",
    "ld-linux-x86-64",
];

/// Functions that are called at the start of all that GCC and the standard library are part of, in bytes: one
/// address each.
const AT_START: u64 = 2 * 8;

/// What is known of proc macros, by their content.
pub(super) struct Macros(Mutex<LruCache<Digest, bool>>);

impl Default for Macros {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REMEMBERED)))
    }
}

impl Macros {
    /// Whether no proc macro that a compiler may load can tell how that was called.
    pub fn are_blind(&self, service: &Service, prepared: &Prepared) -> bool {
        let libraries = externs::libraries(service, prepared);
        libraries.is_some_and(|libraries| libraries.iter().all(|library| self.is_blind(library)))
    }

    /// Takes the proc macros behind a compile for such as can tell: one of them may have.
    pub fn suspect(&self, service: &Service, prepared: &Prepared) {
        let libraries = externs::libraries(service, prepared);
        for Library { view, node } in libraries.into_iter().flatten() {
            if let Ok(digest) = view.content_digest(&node) {
                self.0.lock().put(digest, false);
            }
        }
    }

    fn is_blind(&self, Library { view, node }: &Library) -> bool {
        let Ok(digest) = view.content_digest(node) else {
            return false;
        };
        if let Some(known) = self.0.lock().get(&digest) {
            return *known;
        }
        let is_small = view
            .getattr(node.ino)
            .is_ok_and(|meta| meta.size <= LARGEST);
        // One that cannot be read now may be later.
        let Some(Ok(bytes)) = is_small.then(|| read_whole(view, node)) else {
            return false;
        };
        if Digest::of(&bytes) != digest {
            return false;
        }
        let is_blind = has_no_way(&bytes).unwrap_or(false);
        self.0.lock().put(digest, is_blind);
        is_blind
    }
}

/// Whether a library has no way to its program's arguments; `None` where that cannot be told.
fn has_no_way(bytes: &[u8]) -> Option<bool> {
    // Who reads the kernel's file has its name, as a rule.
    if memmem::find(bytes, b"cmdline").is_some() {
        return Some(false);
    }
    let elf: ElfFile64<'_> = ElfFile64::parse(bytes).ok()?;
    let names = elf.symbols().chain(elf.dynamic_symbols());
    let mut has_keeper = false;
    for symbol in names {
        let name = symbol.name().ok()?;
        has_keeper |= name.contains(KEEPER);
        if asks(name) {
            return Some(false);
        }
    }
    let starts = elf.section_by_name(".init_array")?;
    let usual = elf
        .section_by_name(".init")
        .map(|section| section.address());
    let dynamic = elf.elf_dynamic_table().ok()?;
    let mut needed = dynamic.iter().filter(|entry| entry.tag == DT_NEEDED);
    let needs_system_alone = needed.all(|entry| dynamic.string(entry).is_ok_and(is_systems));
    let mut initial = dynamic.iter().filter(|entry| entry.tag == DT_INIT);
    let starts_as_usual =
        starts.size() <= AT_START && initial.all(|entry| usual == Some(entry.val));
    Some(has_keeper && starts_as_usual && needs_system_alone)
}

/// Whether a symbol of this name is there for who asks how the program was called.
fn asks(name: &str) -> bool {
    let has = |part: &&str| name.contains(*part);
    let is_standard = name.contains("3std") || name.contains("std..");
    let is_innocent = KEPT.iter().any(has) || name.contains(OTHERS);
    let asks_standard = is_standard && ASKS.iter().any(has) && !is_innocent;
    asks_standard || ASKED.contains(&name)
}

fn is_systems(library: &[u8]) -> bool {
    let stem = library.split(|byte| *byte == b'.').next();
    stem.is_some_and(|stem| SYSTEM.iter().any(|known| known.as_bytes() == stem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    /// What rustc makes of a proc macro.
    fn made(body: &str, flags: &[&str]) -> Vec<u8> {
        let dir = tempfile::tempdir().expect("tempdir");
        let text = format!(
            "extern crate proc_macro;\n#[proc_macro] pub fn m(_: proc_macro::TokenStream) \
             -> proc_macro::TokenStream {{ ({body}).to_string().parse().unwrap() }}\n"
        );
        fs::write(dir.path().join("m.rs"), text).expect("writes");
        let mut rustc = Command::new("rustc");
        rustc.args([
            "--crate-type=proc-macro",
            "-Cprefer-dynamic",
            "-Awarnings",
            "m.rs",
        ]);
        rustc.args(flags).args(["-o", "libm.so"]).current_dir(&dir);
        assert!(rustc.status().expect("runs").success());
        fs::read(dir.path().join("libm.so")).expect("reads")
    }

    #[test]
    fn who_asks_for_arguments_is_told_from_who_does_not() {
        let flags: [&[&str]; 3] = [
            &["-Cdebuginfo=2"],
            &["-Copt-level=3", "-Cstrip=debuginfo"],
            &["-Copt-level=3", "-Cdebuginfo=0", "-Ccodegen-units=1"],
        ];
        let blind = [
            "std::process::Command::new(\"x\").args([\"y\"]).status().is_ok()",
            "std::env::vars().count()",
            "std::fs::read_to_string(\"x\").unwrap_or_default()",
        ];
        let sees = [
            "std::env::args().count()",
            "std::env::args_os().nth(1).is_some()",
            "std::fs::read(\"/proc/self/cmdline\").is_ok()",
            "{ extern \"C\" { static program_invocation_name: *const u8; } \
             unsafe { *program_invocation_name } }",
            "{ extern \"C\" { fn getauxval(of: usize) -> usize; } unsafe { getauxval(31) } }",
            "{ #[used] #[link_section = \".init_array\"] static STARTS: extern \"C\" fn(i32) = \
             { extern \"C\" fn starts(_: i32) {} starts }; 7 }",
        ];
        for flags in flags {
            for body in blind {
                assert_eq!(
                    has_no_way(&made(body, flags)),
                    Some(true),
                    "{body} {flags:?}"
                );
            }
            for body in sees {
                assert_ne!(
                    has_no_way(&made(body, flags)),
                    Some(true),
                    "{body} {flags:?}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_told_may_see_all() {
        let stripped = made("7", &["-Cstrip=symbols"]);
        assert_ne!(has_no_way(&stripped), Some(true));
        for bytes in [&b""[..], b"\x7fELF", &stripped[..stripped.len() / 2]] {
            assert_ne!(has_no_way(bytes), Some(true));
        }
        let with_another_start = made(
            "{ #[unsafe(no_mangle)] extern \"C\" fn starts(_: i32) {} starts as usize }",
            &["-Clink-arg=-Wl,-init=starts"],
        );
        assert_ne!(has_no_way(&with_another_start), Some(true));
        let of_another = made("7", &["-Clink-arg=-Wl,--no-as-needed,-l:libresolv.so.2"]);
        assert_ne!(has_no_way(&of_another), Some(true));
    }

    #[test]
    fn names_in_both_manglings() {
        for name in [
            "_RNvNtCsjrHSEGnQ3l9_3std3env4args",
            "_RNvXsa_NtCsjrHSEGnQ3l9_3std3envNtB5_4ArgsNtNtNtNtCs_4core4iter6traits8iterator8Iterator4next",
            "_ZN3std3env7args_os17h0123456789abcdefE",
            "_ZN4core3ptr35drop_in_place$LT$std..env..Args$GT$17h0123456789abcdefE",
            "__libc_argv",
        ] {
            assert!(asks(name), "{name}");
        }
        for name in [
            "_RNvNtNtNtNtCsjrHSEGnQ3l9_3std3sys4args4unix3imp15ARGV_INIT_ARRAY",
            "_ZN3std3sys4args4unix3imp15ARGV_INIT_ARRAY12init_wrapper17h0123456789abcdefE",
            "_RNvNtNtNtNtCsjrHSEGnQ3l9_3std3sys4args4unix3imp4ARGC.0",
            "_RNvNtCs_3std3env8vars_os",
            "_RNvNtCs_4clap4args",
        ] {
            assert!(!asks(name), "{name}");
        }
    }
}
