//! What a compiler run means to kachefs.
//!
//! The rustc argument model, dep-info, root paths, keys and input records, the protocol between
//! the thin client and the daemon, and the client itself. This crate never opens a source file
//! or a database: it turns arguments, environments and digests into keys. The daemon brings the
//! bytes.

pub mod args;
pub mod artifacts;
pub mod aside;
pub mod cc;
pub mod client;
mod compile;
pub mod depinfo;
pub mod drivers;
pub mod environment;
pub mod key;
pub mod launcher;
pub mod lease;
mod managed;
pub mod mode;
mod probe;
pub mod protocol;
pub mod roots;
mod run;
pub mod trace;
pub mod verdict;
