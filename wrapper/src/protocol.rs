//! What clients and the daemon say to each other over the store's Unix socket.
//!
//! A frame is a length (`u32`, little-endian), a protocol version byte, and a postcard message.
//! One connection carries one conversation: a run (request, any number of `Wait`, decision, and after
//! a miss what becomes of it, which is decided on as well) or one control command and its answer. Clients
//! and daemons of different versions refuse each other with a clear error, and a compile then runs
//! plainly.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use store::Look;

use crate::trace::{Observed, Scope};

/// Version of every message below.
pub const VERSION: u8 = 12;

/// Longest frame either side accepts: the output of a compiler that prints a great deal.
const MAX_FRAME: u32 = 256 << 20;

/// Name that answers `readlink` in every directory of a view although no listing shows it. Its
/// target is a [`Token`].
pub const TOKEN_NAME: &str = ".kachefs";

/// First message of a conversation.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// A compiler run.
    Compile(CompileRequest),
    /// A run of a build script.
    Script(ScriptRequest),
    /// A question to a compiler.
    Probe(ProbeRequest),
    /// A run of a C compiler.
    Cc(CcRequest),
    /// A command of the `kachefs` binary.
    Control(Control),
}

/// A compiler run as the wrapper sees it.
#[derive(Debug, Serialize, Deserialize)]
pub struct CompileRequest {
    /// The out-dir's view and inode.
    pub token: (u32, u64),
    /// The compiler and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// File mode creation mask.
    pub umask: u32,
    /// The process that started this one: cargo, whose questions are one build.
    pub parent: u32,
}

/// A question to a compiler, such as for its version.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProbeRequest {
    /// The compiler and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub cwd: Vec<u8>,
}

/// A build script about to run, as its launcher sees it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ScriptRequest {
    /// View and inode of the directory the script lies in.
    pub token: (u32, u64),
    /// The path of that directory, as cargo spells it.
    pub directory: Vec<u8>,
    /// The script's name in it.
    pub script: Vec<u8>,
    /// Its arguments.
    pub arguments: Vec<Vec<u8>>,
    /// The whole environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// File mode creation mask.
    pub umask: u32,
    /// The process that started this one: cargo, whose questions are one build.
    pub parent: u32,
}

/// A run of a C compiler as `kachefs-cc` sees it.
#[derive(Debug, Serialize, Deserialize)]
pub struct CcRequest {
    /// View and inode of the directory the object goes to, or of `OUT_DIR` where that is in no view.
    pub token: (u32, u64),
    /// The path of that directory, absolute.
    pub directory: Vec<u8>,
    /// The compiler and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// File mode creation mask.
    pub umask: u32,
    /// Whether a build script's watch sees all that this process does.
    pub watched: bool,
}

/// What the daemon decides about a run.
#[derive(Debug, Serialize, Deserialize)]
pub enum Decision {
    /// It takes a while, perhaps because another process runs the same; the decision is yet to come.
    Wait,
    /// Not cached: run the program as it was called.
    Plain,
    /// The outputs are in place: replay this and succeed.
    Hit {
        /// Standard output.
        stdout: Vec<u8>,
        /// Standard error.
        stderr: Vec<u8>,
    },
    /// The outputs are in place: do before the watch what the program would have been seen to do,
    /// then replay this and succeed.
    WatchedHit {
        /// Where it looked.
        looked: Vec<(Look, Vec<u8>)>,
        /// What it wrote.
        wrote: Vec<Vec<u8>>,
        /// Standard output.
        stdout: Vec<u8>,
        /// Standard error.
        stderr: Vec<u8>,
    },
    /// Run the program, then send an [`Outcome`]; of a compile, [`Report`]s.
    Run(Run),
    /// Answers [`Report::Made`]: whether the file has its name in the view.
    Placed(bool),
    /// The last word on a run that has ended.
    Over(Verdict),
}

/// How to run a program whose results are recorded.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    /// Arguments to put before the others.
    pub arguments: Vec<Vec<u8>>,
    /// Variables to take out of the environment.
    pub remove_environment: Vec<Vec<u8>>,
    /// `(real, remapped)` path prefixes: diagnostics show the real ones again.
    pub remaps: Vec<(String, String)>,
    /// What needs no watching.
    pub scope: Scope,
    /// Where a compiler is to be told to write, if not where cargo said ([`crate::aside`]).
    pub aside: Option<Aside>,
    /// The libraries the program is loaded with, if they are known ([`crate::trace::Program`]).
    pub libraries: Vec<Vec<u8>>,
    /// What the program's allocator is told, if anything ([`crate::trace::Program`]).
    pub allocator: Vec<u8>,
}

impl Run {
    /// As it was called, watched but for what `scope` knows.
    pub fn as_called(scope: Scope) -> Self {
        Self {
            arguments: Vec::new(),
            remove_environment: Vec::new(),
            remaps: Vec::new(),
            scope,
            aside: None,
            libraries: Vec::new(),
            allocator: Vec::new(),
        }
    }
}

/// A directory for a compiler to write to, and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aside {
    /// The directory. Incremental state goes into one within it ([`crate::aside::INCREMENTAL`]).
    pub path: Vec<u8>,
    /// The one cargo named for outputs.
    pub out_dir: Vec<u8>,
    /// The one cargo named for incremental state.
    pub incremental: Option<Vec<u8>>,
}

/// What becomes of a compile. Lent by who sends it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report<N = String, O = Outcome> {
    /// The compiler has made a file of this name in [`Run::aside`], and says so. Whoever hears that is to
    /// find it where cargo named it: the answer is [`Decision::Placed`].
    Made(N),
    /// It has ended. The answer is [`Decision::Over`].
    Ended {
        /// How.
        outcome: O,
        /// Whether it wrote to [`Run::aside`].
        aside: bool,
        /// Whether a proc macro may have asked how it was called, where it was not as cargo said. Nothing of it
        /// stands then.
        asked: bool,
    },
}

/// How a run ended.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether it exited with status 0.
    pub success: bool,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error, with real paths.
    pub stderr: Vec<u8>,
    /// An output that some process still has open for writing, although the program is gone. Of what was
    /// written aside, the daemon sees that itself.
    pub unsettled: Option<String>,
    /// What it was seen to do; `None` where it could not be watched.
    pub observed: Option<Observed>,
}

/// The daemon's last word on a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The outcome stands.
    Stands,
    /// It does not: the compiler looked for a variable that had been taken away from it, or what it made
    /// could not be put where it belongs. Run it again, as it was called unless somebody has read its metadata.
    Redo,
}

/// A command.
#[derive(Debug, Serialize, Deserialize)]
pub enum Control {
    /// Is anybody there?
    Ping,
    /// Mount a view at an absolute path.
    Mount {
        /// The mountpoint, canonical.
        path: Vec<u8>,
        /// The environment of whoever asks: most likely it is what will be built in.
        environment: Vec<(Vec<u8>, Vec<u8>)>,
        /// Their working directory.
        cwd: Vec<u8>,
    },
    /// Mount a managed target again; nothing if it is not managed any more.
    Remount {
        /// The mountpoint, canonical.
        path: Vec<u8>,
    },
    /// Unmount the view at an absolute path, or all views. They do not come back by themselves.
    Unmount {
        /// The mountpoint; `None` for all.
        path: Option<Vec<u8>>,
        /// Detach it although it is in use.
        lazy: bool,
    },
    /// Numbers.
    Stats {
        /// Only the view mounted at this path.
        view: Option<Vec<u8>>,
    },
    /// Why the last build missed; of the first of these targets that has one, as in the next two.
    Explain {
        /// Mountpoints, canonical.
        targets: Vec<Vec<u8>>,
    },
    /// Numbers of the last build.
    LastBuild {
        /// Mountpoints, canonical.
        targets: Vec<Vec<u8>>,
    },
    /// How compiles of the last build that hit can be made again.
    PlanVerify {
        /// Mountpoints, canonical.
        targets: Vec<Vec<u8>>,
        /// How many, chosen at random; `None` for all.
        sample: Option<u64>,
    },
    /// Upload what was made here; say how far that is.
    Push,
    /// Publish a view.
    Publish {
        /// The mountpoint, canonical.
        path: Vec<u8>,
        /// The name it gets.
        name: String,
    },
    /// The published trees.
    Trees,
    /// Take a published tree back.
    Unpublish {
        /// Its name.
        name: String,
    },
    /// Mount a published tree.
    MountTree {
        /// The mountpoint, canonical.
        path: Vec<u8>,
        /// The tree's name.
        name: String,
        /// Whether nothing may be written to it.
        read_only: bool,
    },
    /// Unmount everything and exit; the next daemon mounts it again.
    Stop,
}

/// The answer to a [`Control`].
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Done; the text is for people and may be empty.
    Done(String),
    /// The mount was there already.
    AlreadyMounted,
    /// Not done, and why: one line.
    Failed(String),
    /// The statistics, as the JSON text of `kachefs stats --json`.
    Stats(String),
    /// What was asked about the last build, as JSON text.
    Report(String),
    /// What to make again.
    Plan(Plan),
}

/// Compiles to be made again.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Where the view is mounted.
    pub view: String,
    /// Which build it was.
    pub build: u64,
    /// How many compiles hit in it.
    pub hits: u64,
    /// The compiles.
    pub compiles: Vec<PlannedCompile>,
    /// Those that cannot be compared.
    pub skipped: Vec<Skipped>,
}

/// One compile to be made again.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlannedCompile {
    /// What it makes.
    pub unit: PlannedUnit,
    /// The compiler.
    pub program: Vec<u8>,
    /// Its arguments, with the directories cargo chose.
    pub arguments: Vec<Vec<u8>>,
    /// Its environment.
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Its working directory.
    pub cwd: Vec<u8>,
    /// What was served.
    pub files: Vec<PlannedFile>,
}

/// A file that was served.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlannedFile {
    /// Its name in the out-dir.
    pub name: String,
    /// What it holds.
    pub digest: store::Digest,
    /// Its length.
    pub size: u64,
}

/// A compile that hit, but cannot be compared.
#[derive(Debug, Serialize, Deserialize)]
pub struct Skipped {
    /// What it makes.
    pub unit: PlannedUnit,
    /// Why.
    pub why: String,
}

/// What a compile makes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlannedUnit {
    /// The package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// The crate.
    pub crate_name: String,
    /// What is made of it.
    pub kind: String,
}

/// Sent instead of any expected message when the conversation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The connection failed or ended.
    #[error("daemon connection: {0}")]
    Io(#[from] io::Error),
    /// The other side speaks another version.
    #[error(
        "daemon and client differ in protocol version ({found} and {VERSION}); run `kachefs daemon stop`, then mount again"
    )]
    Version {
        /// The version byte received.
        found: u8,
    },
    /// A frame longer than [`MAX_FRAME`], or one that does not decode.
    #[error("daemon connection: malformed message: {0}")]
    Malformed(String),
}

/// Writes one message.
pub fn send(mut stream: impl Write, message: &impl Serialize) -> Result<(), ProtocolError> {
    let mut frame = vec![0, 0, 0, 0, VERSION];
    frame = postcard::to_extend(message, frame)
        .map_err(|error| ProtocolError::Malformed(error.to_string()))?;
    let length = u32::try_from(frame.len() - 4)
        .ok()
        .filter(|length| *length <= MAX_FRAME)
        .ok_or_else(|| ProtocolError::Malformed(format!("{} bytes is too long", frame.len())))?;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&frame)?;
    Ok(())
}

/// Reads one message.
pub fn receive<T: DeserializeOwned>(mut stream: impl Read) -> Result<T, ProtocolError> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length == 0 || length > MAX_FRAME {
        return Err(ProtocolError::Malformed(format!("frame of {length} bytes")));
    }
    // Grows as bytes arrive: a hostile length alone allocates nothing.
    let mut frame = Vec::new();
    stream.take(u64::from(length)).read_to_end(&mut frame)?;
    if frame.len() != length as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    if frame[0] != VERSION {
        return Err(ProtocolError::Version { found: frame[0] });
    }
    postcard::from_bytes(&frame[1..]).map_err(|error| ProtocolError::Malformed(error.to_string()))
}

/// Reads what the daemon decides, past all signs that it is alive.
pub fn decision(stream: impl Read + Copy) -> Result<Decision, ProtocolError> {
    loop {
        match receive(stream)? {
            Decision::Wait => {}
            decision => return Ok(decision),
        }
    }
}

/// Tells a wrapper which daemon serves a directory, and which directory of which view it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Number of the view.
    pub view: u32,
    /// Inode of the directory.
    pub directory: u64,
    /// The daemon's socket.
    pub socket: Vec<u8>,
}

impl Token {
    /// The text of the token.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = format!("kachefs:1:{}:{}:", self.view, self.directory).into_bytes();
        text.extend_from_slice(&self.socket);
        text
    }

    /// The token a text stands for; `None` for anything else.
    pub fn decode(text: &[u8]) -> Option<Self> {
        let mut parts = text
            .strip_prefix(b"kachefs:1:")?
            .splitn(3, |byte| *byte == b':');
        let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
        let view = u32::try_from(number()?).ok()?;
        let directory = number()?;
        Some(Self {
            view,
            directory,
            socket: parts.next()?.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip() {
        let mut wire = Vec::new();
        send(
            &mut wire,
            &Request::Control(Control::Mount {
                path: b"/t".to_vec(),
                environment: Vec::new(),
                cwd: Vec::new(),
            }),
        )
        .expect("sends");
        let message: Request = receive(&wire[..]).expect("receives");
        assert!(matches!(message, Request::Control(Control::Mount { path, .. }) if path == b"/t"));
    }

    #[test]
    fn what_is_lent_is_received_and_signs_of_life_are_skipped() {
        let outcome = Outcome {
            success: true,
            stdout: b"said".to_vec(),
            stderr: Vec::new(),
            unsettled: None,
            observed: None,
        };
        let (one, other) = std::os::unix::net::UnixStream::pair().expect("connects");
        let report = Report::<&str, _>::Ended {
            outcome: &outcome,
            aside: true,
            asked: false,
        };
        send(&one, &report).expect("sends");
        let received: Report = receive(&other).expect("receives");
        assert!(
            matches!(received, Report::Ended { outcome, aside: true, asked: false } if outcome.stdout == b"said")
        );

        for decision in [
            Decision::Wait,
            Decision::Wait,
            Decision::Over(Verdict::Redo),
        ] {
            send(&other, &decision).expect("sends");
        }
        let decision = decision(&one).expect("receives");
        assert!(matches!(decision, Decision::Over(Verdict::Redo)));
    }

    #[test]
    fn strangers_are_refused() {
        let mut wire = Vec::new();
        send(&mut wire, &Control::Ping).expect("sends");
        wire[4] = 99;
        assert!(matches!(
            receive::<Control>(&wire[..]),
            Err(ProtocolError::Version { found: 99 })
        ));
        assert!(receive::<Control>(&[255, 255, 255, 255, 1][..]).is_err());
        assert!(receive::<Control>(&[9, 0, 0, 0, 1][..]).is_err());
        assert!(receive::<Control>(&[][..]).is_err());
    }

    #[test]
    fn tokens_round_trip() {
        let token = Token {
            view: 3,
            directory: 1 << 40,
            socket: b"/s:1/run/daemon.sock".to_vec(),
        };
        assert_eq!(Token::decode(&token.encode()), Some(token));
        for bad in [
            &b"kachefs:2:1:1:/s"[..],
            b"kachefs:1:x:1:/s",
            b"",
            b"kachefs:1:1",
        ] {
            assert_eq!(Token::decode(bad), None);
        }
    }
}
