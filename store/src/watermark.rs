//! How far the index has come, remembered outside of the store.
//!
//! A damaged log ends early, and nothing in the index tells that there was more. Under a mount that
//! outlives its daemon the kernel would then know names and numbers the index has forgotten. So the
//! keeper holds a small file in memory, and each commit leaves its sequence number there before it is
//! acknowledged. Called by the index; never read from a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use parking_lot::Mutex;

/// The number of the last commit.
#[derive(Debug)]
pub struct Watermark {
    file: File,
    highest: Mutex<u64>,
}

impl Watermark {
    /// What an earlier process has left in `file`; 0 where there was none.
    pub fn new(file: File) -> io::Result<Self> {
        let mut bytes = [0; 8];
        let length = file.read_at(&mut bytes, 0)?;
        let highest = if length == bytes.len() {
            u64::from_ne_bytes(bytes)
        } else {
            0
        };
        Ok(Self {
            file,
            highest: Mutex::new(highest),
        })
    }

    /// The highest number so far.
    pub fn highest(&self) -> u64 {
        *self.highest.lock()
    }

    /// Notes a commit.
    pub fn raise(&self, number: u64) {
        let mut highest = self.highest.lock();
        if number > *highest {
            *highest = number;
            self.write(number);
        }
    }

    /// Starts anew from here: what was acknowledged before is lost, and known to be.
    pub fn restart(&self, number: u64) {
        let mut highest = self.highest.lock();
        *highest = number;
        self.write(number);
    }

    fn write(&self, number: u64) {
        // The file has its page and lies in memory; if it failed all the same, a loss might go
        // unnoticed, and nothing else.
        let _ = self.file.write_all_at(&number.to_ne_bytes(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_process_knows() {
        let file = tempfile::tempfile().expect("tempfile");
        let next = || Watermark::new(file.try_clone().expect("dup")).expect("reads");
        let first = next();
        assert_eq!(first.highest(), 0);
        first.raise(7);
        first.raise(5);
        assert_eq!(next().highest(), 7);
        first.restart(3);
        assert_eq!(next().highest(), 3);
    }
}
