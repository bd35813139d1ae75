//! Running and finding programs: what a compiler or linker is asked about itself.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use wrapper::environment::{self, Environment};

/// How long a program may take to answer a question about itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first line a program prints; `None` for an empty one.
pub fn first_line(command: Command, environment: &Environment) -> io::Result<Option<OsString>> {
    let said = said(command, environment)?;
    let line = said.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok((!line.is_empty()).then(|| OsString::from_vec(line.to_vec())))
}

/// What a program prints. One that does not finish saying it in time is ended, and half an answer
/// is none.
pub fn said(mut command: Command, environment: &Environment) -> io::Result<Vec<u8>> {
    let mut child = command
        .env_clear()
        .envs(
            environment
                .iter()
                .map(|(n, v)| (OsStr::from_bytes(n), OsStr::from_bytes(v))),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let text = child
        .stdout
        .take()
        .map_or(Ok(Vec::new()), |stdout| read_in_time(stdout, PATIENCE));
    if text.is_err() {
        // Already ended is what we want.
        let _ = child.kill();
    }
    let status = child.wait()?;
    let text = text?;
    if !status.success() {
        return Err(io::Error::other(format!(
            "{status} when asked about itself"
        )));
    }
    Ok(text)
}

fn read_in_time(mut from: ChildStdout, patience: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + patience;
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).map_err(io::Error::other)?;
        let mut waiting = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match from.read(&mut buffer)? {
            0 => return Ok(text),
            n => text.extend_from_slice(&buffer[..n]),
        }
    }
}

/// Whether a file is a program the kernel runs itself, no script.
pub fn is_elf(path: &Path) -> io::Result<bool> {
    let mut magic = [0; 4];
    match fs::File::open(path)?.read_exact(&mut magic) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| magic == *b"\x7fELF"),
    }
}

/// The file a program name means in a request's environment: an absolute path.
pub fn find_program(program: &Path, environment: &Environment, cwd: &Path) -> io::Result<PathBuf> {
    if program.as_os_str().as_bytes().contains(&b'/') {
        return Ok(cwd.join(program));
    }
    let search = environment::value(environment, b"PATH").unwrap_or_default();
    search
        .split(|byte| *byte == b':')
        .map(|directory| cwd.join(OsStr::from_bytes(directory)).join(program))
        .find(|path| is_executable(path))
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn is_executable(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
        && fs::metadata(path).is_ok_and(|meta| meta.is_file())
}

/// The libraries the loader finds for a program in a request's environment (ld.so(8),
/// `LD_TRACE_LOADED_OBJECTS`). Empty where the loader does not say: a static program, or musl's.
pub fn loaded_libraries(program: &Path, environment: &Environment) -> io::Result<Vec<PathBuf>> {
    let mut command = Command::new(program);
    // Should it be run after all, it does nothing more.
    command.arg("--version");
    let mut traced = environment.to_vec();
    traced.push((b"LD_TRACE_LOADED_OBJECTS".to_vec(), b"1".to_vec()));
    Ok(traced_libraries(&said(command, &traced)?))
}

/// Lines are `name => path (address)` or `path (address)`; a name without a path (the kernel's
/// vDSO, a library not found) has no file.
fn traced_libraries(trace: &[u8]) -> Vec<PathBuf> {
    trace
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let line = line.trim_ascii();
            let end = line.windows(2).rposition(|part| part == b" (")?;
            let line = &line[..end];
            let arrow = line.windows(4).position(|part| part == b" => ");
            let path = &line[arrow.map_or(0, |at| at + 4)..];
            path.starts_with(b"/")
                .then(|| PathBuf::from(OsStr::from_bytes(path)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_names_the_files_that_are_there() {
        let trace = b"\tlinux-vdso.so.1 (0x00007ffe1)\n\
            \tlibrustc_driver-61.so => /opt/my rust/lib/librustc_driver-61.so (0x00007f1)\n\
            \tlibgone.so => not found\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        assert_eq!(
            traced_libraries(trace),
            [
                Path::new("/opt/my rust/lib/librustc_driver-61.so"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert!(traced_libraries(b"rustc 1.95.0 (59807616e 2026-04-14)\n").is_empty());
    }

    #[test]
    fn the_loader_tells_what_a_program_loads() {
        let own = std::env::current_exe().expect("a path");
        let libraries = loaded_libraries(&own, &[]).expect("traced");
        assert!(libraries.iter().all(|path| path.is_file()), "{libraries:?}");
        assert!(!libraries.is_empty());
    }
}
