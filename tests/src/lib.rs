//! The harness of the end-to-end tests: real mounts, real cargo, real rustc, no mocks.
//!
//! A test makes a [`Sandbox`] (a home, a cargo home and a store of its own), writes a [`Project`]
//! into it, runs cargo and kachefs there, and looks at files and counters. Every command runs
//! under a timeout, every sandbox under a watchdog, and dropping a sandbox fails the test if it
//! left a mount or a process behind.
//!
//! The harness never looks inside kachefs: it knows its commands, `stats --json` and the layout of
//! the store directory, as any script of a user may.

mod archive;
pub mod aside;
pub mod chance;
pub mod command;
pub mod counters;
pub mod disk;
pub mod fetch;
pub mod files;
pub mod flip;
mod image;
pub mod killer;
pub mod lossy_disk;
pub mod machines;
pub mod messages;
pub mod mounts;
pub mod processes;
pub mod project;
pub mod proxy;
pub mod samples;
pub mod sandbox;
pub mod seaweed;
pub mod side_by_side;
pub mod toolchain;
pub mod tree;
pub mod unprivileged;

pub use chance::Chance;
pub use command::{Cmd, Outcome, Running};
pub use counters::Counters;
pub use lossy_disk::LossyDisk;
pub use machines::Machines;
pub use project::{Package, Project};
pub use proxy::Proxy;
pub use sandbox::Sandbox;
pub use seaweed::Seaweed;
pub use tree::Tree;

use std::fmt::Display;

/// Turns an error into a failed test that says what was being done.
pub trait Must<T> {
    /// The value, or a panic naming `what` and the error, at the caller's line.
    fn must(self, what: impl Display) -> T;
}

impl<T, E: Display> Must<T> for Result<T, E> {
    #[track_caller]
    fn must(self, what: impl Display) -> T {
        match self {
            Ok(value) => value,
            Err(error) => panic!("{what}: {error:#}"),
        }
    }
}

impl<T> Must<T> for Option<T> {
    #[track_caller]
    fn must(self, what: impl Display) -> T {
        match self {
            Some(value) => value,
            None => panic!("{what}"),
        }
    }
}
