//! The shim: what watched programs have in front of the C library.
//!
//! Handing a call over to the watcher costs two changes of process. Most calls only ask what is there,
//! and whoever asks can say so itself: this library, which the dynamic linker loads before all others
//! (ld.so(8), `LD_PRELOAD`), makes those calls from one instruction that the filter lets pass, and then
//! writes into memory it shares with the watcher what was asked and whether it was there. What it does
//! not know, what changes anything, and every call that does not come this way (static programs, calls
//! the C library makes within itself) is handed over as ever: without the shim nothing is missed.
//!
//! It has no standard library and needs nothing of the C library but a few names that every one has. It
//! is part of the wrapper's program, which puts it into memory (`trace::shim`).

#![no_std]
#![allow(missing_docs)]

#[path = "../src/trace/ring.rs"]
#[allow(dead_code)]
mod ring;
#[path = "../src/trace/words.rs"]
mod words;

/// Defines functions of the C library under several names.
macro_rules! functions {
    ($($names:ident),+ = $arguments:tt -> $result:ty $body:block) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $names $arguments -> $result $body
        )+
    };
}

mod ask;
#[path = "../src/trace/loader.rs"]
mod loader;
mod loads;
mod pages;
mod real_path;
mod search;
mod start;
mod system;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    system::abort()
}

// What unwinds through code of the core library, of which nothing does here. Not to be seen by others:
// programs have one of their own.
core::arch::global_asm!(
    ".globl rust_eh_personality",
    ".hidden rust_eh_personality",
    "rust_eh_personality: ud2"
);
