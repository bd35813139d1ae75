//! The name of this boot of the machine: what the page cache held in another one is gone.

use std::fs;

/// Instead of the kernel's name: for tests, which cannot reboot.
const TEST_BOOT: &str = "KACHEFS_TEST_BOOT_ID";

/// How the kernel names this boot (random(4)); `None` where it does not say.
pub fn this_boot() -> Option<String> {
    if let Some(boot) = std::env::var_os(TEST_BOOT) {
        return boot.into_string().ok();
    }
    let read = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let boot = read.trim();
    (!boot.is_empty()).then(|| boot.to_owned())
}
