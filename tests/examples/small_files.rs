//! A metadata benchmark: many small files are created, written, closed, looked at and removed.
//!
//! `small_files DIR FILES THREADS [BYTES]` prints the seconds it took, first all creations, then all
//! looks, then all removals. Each thread has a directory of its own. Run by `scripts/bench-fs`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

const DEFAULT_BYTES: usize = 2_000;

struct Plan {
    root: PathBuf,
    files: usize,
    threads: usize,
    bytes: usize,
}

impl Plan {
    fn from_arguments() -> Option<Self> {
        let mut words = std::env::args().skip(1);
        let plan = Self {
            root: words.next()?.into(),
            files: words.next()?.parse().ok()?,
            threads: words.next()?.parse().ok()?,
            bytes: words
                .next()
                .map_or(Some(DEFAULT_BYTES), |word| word.parse().ok())?,
        };
        (plan.threads > 0).then_some(plan)
    }

    /// Runs `work` on every file, and returns how long all threads took together.
    fn each(&self, work: impl Fn(&Path) -> io::Result<()> + Sync) -> io::Result<Duration> {
        let start = Barrier::new(self.threads + 1);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|number| {
                    let (start, work) = (&start, &work);
                    scope.spawn(move || {
                        let dir = self.root.join(format!("thread{number}"));
                        start.wait();
                        (0..self.files / self.threads)
                            .try_for_each(|file| work(&dir.join(format!("file{file}"))))
                    })
                })
                .collect();
            start.wait();
            let began = Instant::now();
            for thread in threads {
                thread
                    .join()
                    .map_err(|_| io::Error::other("a thread died"))??;
            }
            Ok(began.elapsed())
        })
    }

    fn run(&self) -> io::Result<[Duration; 3]> {
        for number in 0..self.threads {
            fs::create_dir_all(self.root.join(format!("thread{number}")))?;
        }
        let bytes = vec![b'x'; self.bytes];
        let create = self.each(|file| File::create_new(file)?.write_all(&bytes))?;
        let look = self.each(|file| {
            let length = fs::symlink_metadata(file)?.len();
            if length == self.bytes as u64 {
                Ok(())
            } else {
                Err(io::Error::other(format!(
                    "{} is {length} bytes",
                    file.display()
                )))
            }
        })?;
        let remove = self.each(|file| fs::remove_file(file))?;
        for number in 0..self.threads {
            fs::remove_dir(self.root.join(format!("thread{number}")))?;
        }
        Ok([create, look, remove])
    }
}

fn main() -> ExitCode {
    let Some(plan) = Plan::from_arguments() else {
        eprintln!("usage: small_files DIR FILES THREADS [BYTES]");
        return ExitCode::from(2);
    };
    match plan.run() {
        Ok(times) => {
            let [create, look, remove] = times.map(|time| time.as_secs_f64());
            println!("{create:.6} {look:.6} {remove:.6}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{}: {error}", plan.root.display());
            ExitCode::FAILURE
        }
    }
}
