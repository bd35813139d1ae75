//! The socket: accepts conversations, one thread each, and carries out commands.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use wrapper::protocol::{self, Answer, Control, ProtocolError, Request};

use super::Daemon;
use super::builds;
use super::mounts::{Management, MountOutcome};
use super::{stats, trees};
use crate::fs::Caller;
use crate::mount::Access;
use crate::service::builds::Asked;

/// A client that sends nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(30);

/// Serves connections until [`Control::Stop`] or until `ended` says so.
pub fn serve(daemon: &Arc<Daemon>, listener: &UnixListener, ended: &Arc<AtomicBool>) {
    for stream in listener.incoming() {
        if ended.load(Ordering::Relaxed) {
            break;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept");
                // Out of descriptors, most likely: backings can be opened again, and some
                // conversations end.
                daemon.storage.close_idle();
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let (daemon, ended) = (Arc::clone(daemon), Arc::clone(ended));
        let spawned = std::thread::Builder::new()
            .name("conversation".into())
            .spawn(move || {
                if let Err(error) = converse(&daemon, &stream, &ended) {
                    tracing::debug!(%error, "conversation");
                }
            });
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot start a thread");
        }
    }
}

fn converse(
    daemon: &Arc<Daemon>,
    stream: &UnixStream,
    ended: &AtomicBool,
) -> Result<(), ProtocolError> {
    let peer = getsockopt(stream, PeerCredentials).map_err(std::io::Error::from)?;
    let owner = nix::unistd::geteuid();
    // The directory's mode keeps others out already; root may always ask, as on any disk.
    if peer.uid() != owner.as_raw() && peer.uid() != 0 {
        tracing::warn!(uid = peer.uid(), "refused a stranger");
        return Ok(());
    }
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let caller = Caller {
        uid: peer.uid(),
        gid: peer.gid(),
    };
    match protocol::receive(stream)? {
        Request::Compile(request) if !sees_our_files(peer.pid()) => {
            let asked = Asked::compile(&request);
            daemon
                .service
                .refuse(stream, Some(&asked), "other-namespace")
        }
        Request::Script(request) if !sees_our_files(peer.pid()) => {
            let asked = Asked::script(&request);
            daemon
                .service
                .refuse(stream, Some(&asked), "other-namespace")
        }
        Request::Cc(_) if !sees_our_files(peer.pid()) => {
            daemon.service.refuse(stream, None, "other-namespace")
        }
        Request::Probe(_) if !sees_our_files(peer.pid()) => {
            protocol::send(stream, &protocol::Decision::Plain)
        }
        // What is there would be taken over, and be seen by nobody who asked.
        Request::Control(
            Control::Mount { .. } | Control::Remount { .. } | Control::MountTree { .. },
        ) if !sees_our_files(peer.pid()) => {
            let why = "the daemon of this store runs in another mount namespace";
            protocol::send(stream, &Answer::Failed(why.to_owned()))
        }
        Request::Compile(request) => daemon.service.compile(stream, request, caller),
        Request::Script(request) => daemon.service.script(stream, &request, caller),
        Request::Probe(request) => daemon.service.probe(stream, &request),
        Request::Cc(request) => daemon.service.cc(stream, &request, caller),
        Request::Control(control) => control_answer(daemon, stream, control, caller, ended),
    }
}

/// Whether a path means to a process what it means to us: a container, or a program in a mount
/// namespace of its own, may have other files there (`mount_namespaces(7)`).
fn sees_our_files(pid: i32) -> bool {
    ["ns/mnt", "root"].iter().all(|part| {
        let identity = |whose: &str| {
            let meta = fs::metadata(format!("/proc/{whose}/{part}")).ok()?;
            Some((meta.dev(), meta.ino()))
        };
        identity("self").is_some_and(|ours| identity(&pid.to_string()) == Some(ours))
    })
}

fn control_answer(
    daemon: &Arc<Daemon>,
    stream: &UnixStream,
    control: Control,
    caller: Caller,
    ended: &AtomicBool,
) -> Result<(), ProtocolError> {
    // Mounting imports, unmounting waits for the last results: both may take their time.
    stream.set_write_timeout(None)?;
    let path = |bytes| PathBuf::from(OsString::from_vec(bytes));
    let answer = match control {
        Control::Ping => Answer::Done(format!("{}, {}", std::process::id(), daemon.keeper)),
        Control::Mount {
            path: bytes,
            environment,
            cwd,
        } => {
            let answer = mount(daemon, &path(bytes));
            if !matches!(answer, Answer::Failed(_)) {
                acquaint(daemon, environment, path(cwd));
            }
            answer
        }
        Control::Remount { path: bytes } => match daemon.mounts.remount(&path(bytes)) {
            Ok(_) => Answer::Done(String::new()),
            Err(error) => Answer::Failed(format!("{error:#}")),
        },
        Control::Unmount { path: bytes, lazy } => {
            unmount(daemon, bytes.map(path), lazy, Management::Ends)
        }
        Control::Stats { view } => match stats::collect(daemon, view.map(path).as_deref()) {
            Ok(json) => Answer::Stats(json),
            Err(error) => Answer::Failed(format!("{error:#}")),
        },
        Control::Explain { targets } => report(builds::explain(daemon, &paths(targets))),
        Control::LastBuild { targets } => report(builds::last_build(daemon, &paths(targets))),
        Control::PlanVerify { targets, sample } => {
            match builds::plan(daemon, &paths(targets), sample, caller) {
                Ok(plan) => Answer::Plan(plan),
                Err(error) => Answer::Failed(format!("{error:#}")),
            }
        }
        Control::Push => push(daemon),
        Control::Publish { path: bytes, name } => said(trees::publish(daemon, &path(bytes), &name)),
        Control::Trees => report(trees::list(daemon)),
        Control::Unpublish { name } => said(trees::unpublish(daemon, &name)),
        Control::MountTree {
            path: bytes,
            name,
            read_only,
        } => {
            let access = if read_only {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            };
            said(trees::mount(daemon, &path(bytes), &name, access))
        }
        Control::Stop => stop(daemon, ended),
    };
    protocol::send(stream, &answer)?;
    if ended.load(Ordering::Relaxed) {
        // Wakes the accept loop, which then sees that it is over.
        let _ = crate::daemon::client::connect(&daemon.storage.dir);
    }
    Ok(())
}

fn paths(paths: Vec<Vec<u8>>) -> Vec<PathBuf> {
    let paths = paths.into_iter();
    paths
        .map(|bytes| PathBuf::from(OsString::from_vec(bytes)))
        .collect()
}

fn said(result: anyhow::Result<String>) -> Answer {
    match result {
        Ok(text) => Answer::Done(text),
        Err(error) => Answer::Failed(format!("{error:#}")),
    }
}

fn report(report: anyhow::Result<String>) -> Answer {
    match report {
        Ok(json) => Answer::Report(json),
        Err(error) => Answer::Failed(format!("{error:#}")),
    }
}

/// Nobody waits for it, and a build that begins meanwhile waits for what is being read only.
fn acquaint(daemon: &Arc<Daemon>, environment: Vec<(Vec<u8>, Vec<u8>)>, cwd: PathBuf) {
    let daemon = Arc::clone(daemon);
    let spawned = std::thread::Builder::new()
        .name("acquaint".into())
        .spawn(move || daemon.service.acquaint(&environment, &cwd));
    if let Err(error) = spawned {
        tracing::error!(%error, "cannot start a thread");
    }
}

fn mount(daemon: &Daemon, path: &Path) -> Answer {
    let outcome = match daemon.mounts.mount(path) {
        Ok(outcome) => outcome,
        Err(error) => return Answer::Failed(format!("{error:#}")),
    };
    daemon.mounts.manage(path);
    match outcome {
        MountOutcome::Already => Answer::AlreadyMounted,
        MountOutcome::Mounted(imported) if imported.files > 0 => Answer::Done(format!(
            "took over {} files, {} bytes",
            imported.files, imported.bytes
        )),
        MountOutcome::Mounted(_) => Answer::Done(String::new()),
    }
}

fn push(daemon: &Daemon) -> Answer {
    match daemon.storage.lazy.connection() {
        None => return Answer::Failed("the store has no remote (kachefs remote set)".to_owned()),
        Some(connection) if connection.config.read_only => {
            let why = format!("{} is only read here", connection.place());
            return Answer::Failed(why);
        }
        Some(_) => {}
    }
    // What was made until now is noted.
    daemon.service.drain();
    let pushed = daemon.storage.push().map_err(anyhow::Error::from);
    report(pushed.and_then(|pushed| Ok(serde_json::to_string(&pushed)?)))
}

fn unmount(daemon: &Daemon, path: Option<PathBuf>, lazy: bool, management: Management) -> Answer {
    daemon.service.drain();
    let Some(path) = path else {
        let failures = daemon.mounts.unmount_all(lazy, management);
        return if failures.is_empty() {
            Answer::Done("unmounted everything".to_owned())
        } else {
            Answer::Failed(failures.join("; "))
        };
    };
    match daemon.mounts.unmount(&path, lazy, management) {
        Ok(said) => Answer::Done(said),
        Err(error) => Answer::Failed(format!("{error:#}")),
    }
}

fn stop(daemon: &Daemon, ended: &AtomicBool) -> Answer {
    let answer = unmount(daemon, None, false, Management::Stays);
    if matches!(answer, Answer::Done(_)) {
        ended.store(true, Ordering::Relaxed);
    }
    answer
}
