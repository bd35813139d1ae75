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
    let traced = trace(Command::new(program), environment)?;
    Ok(traced
        .into_iter()
        .filter_map(|object| object.path)
        .collect())
}

/// All that the loader finds, in its order, for a program that is started in a directory; `None` where
/// something is not found, or only from there.
pub fn all_loaded(
    program: &Path,
    environment: &Environment,
    cwd: &Path,
) -> io::Result<Option<Vec<PathBuf>>> {
    let mut command = Command::new(program);
    command.current_dir(cwd);
    let traced = trace(command, environment)?;
    // The kernel's own part of the program has no file.
    let traced = traced
        .into_iter()
        .filter(|object| !object.name.starts_with(b"linux-vdso."));
    Ok(traced.map(|object| object.path).collect())
}

fn trace(mut command: Command, environment: &Environment) -> io::Result<Vec<Traced>> {
    // Should it be run after all, it does nothing more.
    command.arg("--version");
    let mut traced = environment.to_vec();
    traced.push((b"LD_TRACE_LOADED_OBJECTS".to_vec(), b"1".to_vec()));
    Ok(objects(&said(command, &traced)?))
}

/// What a program is loaded with.
#[derive(Debug, PartialEq)]
struct Traced {
    /// As it is asked for.
    name: Vec<u8>,
    /// Where it was found, if that is said in full.
    path: Option<PathBuf>,
}

/// Lines are `name => path (address)`, `name => not found` or `path (address)`; the kernel's vDSO has a name
/// there.
fn objects(trace: &[u8]) -> Vec<Traced> {
    const ARROW: &[u8] = b" => ";
    let find = |line: &[u8], part: &[u8]| line.windows(part.len()).position(|found| found == part);
    let of_line = |line: &[u8]| {
        let line = line.trim_ascii();
        let end = line.windows(2).rposition(|part| part == b" (");
        let arrow = find(line, ARROW);
        let name = &line[..arrow.or(end)?];
        let path = end.map(|end| &line[arrow.map_or(0, |at| at + ARROW.len())..end]);
        let path = path.filter(|path| path.starts_with(b"/"));
        Some(Traced {
            name: name.to_vec(),
            path: path.map(|path| PathBuf::from(OsStr::from_bytes(path))),
        })
    };
    trace
        .split(|byte| *byte == b'\n')
        .filter_map(of_line)
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
        let object = |name: &str, path: Option<&str>| Traced {
            name: name.as_bytes().to_vec(),
            path: path.map(PathBuf::from),
        };
        let driver = "/opt/my rust/lib/librustc_driver-61.so";
        let loader = "/lib64/ld-linux-x86-64.so.2";
        assert_eq!(
            objects(trace),
            [
                object("linux-vdso.so.1", None),
                object("librustc_driver-61.so", Some(driver)),
                object("libgone.so", None),
                object(loader, Some(loader)),
            ]
        );
        let version = b"rustc 1.95.0 (59807616e 2026-04-14)\n";
        assert!(objects(version).iter().all(|object| object.path.is_none()));
    }

    #[test]
    fn the_loader_tells_what_a_program_loads() {
        let own = std::env::current_exe().expect("a path");
        let libraries = loaded_libraries(&own, &[]).expect("traced");
        assert!(libraries.iter().all(|path| path.is_file()), "{libraries:?}");
        assert!(!libraries.is_empty());
        let all = all_loaded(&own, &[], Path::new("/")).expect("traced");
        assert_eq!(all, Some(libraries));
    }
}
