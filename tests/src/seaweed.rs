//! A real S3 server on loopback: `SeaweedFS`, one process with its data in the sandbox.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Chance, Cmd, Must, Sandbox, processes, toolchain};

/// How long it may take to be there.
const PATIENCE: Duration = Duration::from_mins(1);

/// Seconds after which it ends by itself.
const LONGEST_LIFE: &str = "1200";

/// Its parts, each with a port of its own, the next one behind the last.
const PARTS: [&str; 4] = ["master", "volume", "filer", "s3"];

/// How far above its port each part has another one, for gRPC.
const GRPC: u16 = 10_000;

/// How often another set of ports is tried.
const TRIES: u32 = 5;

/// A running server, stopped when dropped.
#[derive(Debug)]
pub struct Seaweed {
    child: Child,
    base: u16,
    program: PathBuf,
    directory: PathBuf,
    /// Whether everybody may do everything.
    is_open: bool,
}

impl Seaweed {
    /// Starts a server that keeps its data in the sandbox and lets everybody in.
    pub fn start(sandbox: &Sandbox) -> Self {
        Self::start_with(sandbox, &[])
    }

    /// Starts a server with further arguments.
    pub fn start_with(sandbox: &Sandbox, arguments: &[&str]) -> Self {
        let program = program(sandbox.root());
        for _ in 0..TRIES {
            if let Some(server) = Self::try_start(&program, sandbox, arguments) {
                return server;
            }
        }
        panic!("SeaweedFS does not start:\n{}", log(sandbox.root()));
    }

    fn try_start(program: &Path, sandbox: &Sandbox, arguments: &[&str]) -> Option<Self> {
        let base = free_ports();
        let directory = sandbox.root().join("seaweed");
        fs::create_dir_all(&directory).must("make its directory");
        let output = File::create(log_file(sandbox.root())).must("make its log");
        let errors = output.try_clone().must("one log for both");
        let ports = PARTS
            .iter()
            .zip(base..)
            .map(|(part, port)| format!("-{part}.port={port}"));
        // Ends with the test, however that ends (PR_SET_PDEATHSIG, prctl(2)).
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "timeout", "-k", "5", LONGEST_LIFE])
            .arg(program)
            .args([
                "-logtostderr=true",
                "server",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
            ])
            .arg(format!("-dir={}", directory.display()))
            .args(["-master.telemetry=false", "-volume.max=5", "-filer", "-s3"])
            .args(ports)
            .args(["-s3.port.iceberg=0", "-s3.port.lance=0"])
            .args(arguments)
            .current_dir(&directory)
            .env("HOME", &directory)
            .env("TMPDIR", &directory)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .must("start SeaweedFS");
        let mut server = Self {
            child,
            base,
            program: program.to_owned(),
            directory,
            is_open: arguments.is_empty(),
        };
        let mut is_there = || server.has_ended() || server.answers();
        let came = processes::wait_for(PATIENCE, &mut is_there);
        (came && !server.has_ended()).then_some(server)
    }

    /// Where it is: `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port())
    }

    /// That of the last part.
    fn port(&self) -> u16 {
        self.base + 3
    }

    /// Makes a bucket, whoever may do what in it.
    pub fn make_bucket(&self, name: &str) {
        let commands = self.directory.join("commands");
        fs::write(&commands, format!("s3.bucket.create -name {name}\n")).must("write commands");
        let made = Command::new("timeout")
            .arg("60")
            .arg(&self.program)
            .args(["-logtostderr=true", "shell"])
            .arg(format!("-master=127.0.0.1:{}", self.base))
            .env("HOME", &self.directory)
            .env("TMPDIR", &self.directory)
            .stdin(File::open(&commands).must("read commands"))
            .output()
            .must("run the server's shell");
        let said = String::from_utf8_lossy(&made.stdout).into_owned();
        let complained = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "{said}{complained}");
        assert!(said.contains(name), "{said}{complained}");
        // The S3 server hears of it a little later, and denies access until then.
        let object = format!("/{name}/kachefs-is-there");
        let takes = || self.request("PUT", &object).starts_with("HTTP/1.1 200");
        if self.is_open {
            assert!(processes::wait_for(PATIENCE, takes), "{name} is not used");
            self.request("DELETE", &object);
        }
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().must("wait for SeaweedFS").is_some()
    }

    /// Whether it writes, which it can once all its parts are there, or would if it knew us.
    fn answers(&self) -> bool {
        let answer = self.request("PUT", "/kachefs-is-there");
        ["200", "403"]
            .iter()
            .any(|status| answer.starts_with(&format!("HTTP/1.1 {status}")))
    }

    /// Sends a request without a body and returns the answer; empty where there is none.
    fn request(&self, method: &str, path: &str) -> String {
        let mut answer = Vec::new();
        let port = self.port();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n"
        );
        // Where there is no answer yet, there is an error.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(request.as_bytes())?;
            stream.read_to_end(&mut answer)
        });
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Seaweed {
    fn drop(&mut self) {
        // `timeout` passes it on.
        let _ = kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGTERM,
        );
        let ended = processes::wait_for(Duration::from_secs(15), || {
            !matches!(self.child.try_wait(), Ok(None))
        });
        if !ended {
            processes::end(&self.directory);
            let _ = self.child.wait();
        }
        // It leaves its sockets where nobody can tell it not to put them.
        for (part, port) in PARTS.iter().zip(self.base..) {
            for name in [
                format!("{part}-{port}"),
                format!("{part}-grpc-{}", port + GRPC),
            ] {
                let _ = fs::remove_file(format!("/tmp/seaweedfs-{name}.sock"));
            }
        }
    }
}

fn program(root: &Path) -> PathBuf {
    let installed = Cmd::new("bash", root)
        .envs(std::env::vars_os())
        .in_dir(toolchain::workspace())
        .arg(toolchain::workspace().join("scripts/lib.sh"))
        .arg("install_seaweedfs")
        .timeout(Duration::from_mins(5))
        .run();
    assert!(installed.status.success(), "{installed}");
    PathBuf::from(installed.stdout.trim())
}

/// The first of as many neighbours as there are parts, on which nobody listens now, nor on those for
/// gRPC. Below the ports that the kernel gives out by itself (`ip_local_port_range`, ip(7)).
fn free_ports() -> u16 {
    let mut chance = Chance::new();
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let all_free = |base: u16| {
        let mut ports = PARTS.iter().zip(base..).map(|(_, port)| port);
        ports.all(|port| is_free(port) && is_free(port + GRPC))
    };
    (0..100)
        .map(|_| 10_000 + u16::try_from(chance.below(9_000)).must("a port"))
        .find(|base| all_free(*base))
        .must("four free ports")
}

fn log_file(root: &Path) -> PathBuf {
    root.join("seaweed.log")
}

fn log(root: &Path) -> String {
    let text = fs::read_to_string(log_file(root)).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
