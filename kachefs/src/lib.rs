//! kachefs: the daemon and its commands.
//!
//! `fs` is the file system in plain Rust, `fuse` shows it to the kernel, `mount` attaches it,
//! `holders` says who uses a mount, `flight` lets one do what many want, `service` answers compilers,
//! `explain` says why they ran, `daemon` holds all of it together, `damage` says what was wrong with a
//! store, `archive` what an rlib holds, `compile_again` makes a compile again, `keeper` starts the daemon
//! and keeps its mounts when it dies, `lazy` is what only a remote holds, `remote_config` says which remote
//! a store has, and `commands` is what a person types. The binary in `main.rs` only parses arguments.

mod archive;
pub mod clock;
pub mod commands;
mod compile_again;
pub mod config_file;
pub mod daemon;
pub mod damage;
pub mod epochs;
pub mod explain;
mod flight;
pub mod fs;
pub mod fuse;
pub mod holders;
pub mod keeper;
pub mod lazy;
mod memory;
pub mod mount;
pub mod remote_config;
pub mod service;
pub mod storage;
mod sync_points;
