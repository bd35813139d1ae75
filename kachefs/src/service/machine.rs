//! What a key says of the machine: its processor, which whatever runs may ask what it can do.

use std::io;
use std::sync::OnceLock;

use store::{Digest, Hasher};

use super::prepare::Refusal;

/// This machine's processor, which what runs may ask what it can do.
pub(super) fn processor() -> Result<Digest, Refusal> {
    static PROCESSOR: OnceLock<Option<Digest>> = OnceLock::new();
    PROCESSOR
        .get_or_init(|| cpu().ok())
        .ok_or(Refusal::Named("unknown-processor"))
}

/// What programs may know of this machine's processor.
fn cpu() -> io::Result<Digest> {
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let mut hasher = Hasher::new("kachefs processor");
    for line in info.lines() {
        if ["model name", "flags", "Features", "CPU part"]
            .iter()
            .any(|key| line.starts_with(key))
        {
            hasher.field(line.as_bytes());
        }
        if line.is_empty() {
            break;
        }
    }
    Ok(hasher.finish())
}
