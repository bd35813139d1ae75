//! What a keeper and its daemon say to each other, over a Unix socket that keeps messages whole.
//!
//! Both ends are the same program file, so there are no versions. A message may carry a descriptor
//! of `/dev/fuse` (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use store::ViewId;

/// Longer than any message: a path is at most 4096 bytes.
const LONGEST: usize = 8 * 1024;

/// What the kernel and the first daemon of a mount agreed upon; a successor must be told the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Version of the kernel's side of the protocol.
    pub abi: (u32, u32),
    /// What the kernel offers (`FUSE_INIT` flags).
    pub capabilities: u64,
}

/// A mounted view, as far as its descriptor needs explaining.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Which view.
    pub view: ViewId,
    /// Where it is mounted.
    pub path: Vec<u8>,
    /// Minor device number of the mount.
    pub minor: u32,
    /// How its kernel speaks.
    pub connection: Connection,
}

/// What a daemon tells its keeper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// All that an earlier daemon left is served again.
    Ready,
    /// Hold the descriptor that comes with this.
    Hold(Session),
    /// The view is unmounted: close its descriptor.
    Release(ViewId),
}

/// The first thing a keeper tells a daemon, with a file in memory that tells how far the index had come
/// (`store::watermark`); as many sessions follow, each with its descriptor.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// Daemons this keeper had before.
    pub restarts: u32,
    /// How many views the last one left mounted.
    pub sessions: u32,
}

/// The two ends of a new line.
pub fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// Sends one message.
pub fn send(
    line: BorrowedFd<'_>,
    message: &impl Serialize,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = postcard::to_allocvec(message).map_err(io::Error::other)?;
    let descriptor = descriptor.map(|fd| [fd.as_raw_fd()]);
    let rights: Vec<_> = descriptor
        .iter()
        .map(|fds| ControlMessage::ScmRights(fds))
        .collect();
    let parts = [IoSlice::new(&bytes)];
    loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(line.as_raw_fd(), &parts, &rights, flags, None) {
            Err(nix::errno::Errno::EINTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

/// Receives one message; `None` when the other side is gone and all it said is read.
pub fn receive<T: DeserializeOwned>(
    line: BorrowedFd<'_>,
) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut bytes = vec![0; LONGEST];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (length, descriptor) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(line.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            // What a killed process had not read yet is reported so.
            Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
            Ok(message) => {
                let mut descriptor = None;
                for control in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(fds) = control {
                        // SAFETY: the kernel has just installed these descriptors for us, and
                        // nobody else knows their numbers.
                        let mut owned = fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                        descriptor = owned.next();
                    }
                }
                break (message.bytes, descriptor);
            }
        }
    };
    // No message is empty: this is the end.
    if length == 0 {
        return Ok(None);
    }
    let message = postcard::from_bytes(&bytes[..length]).map_err(io::Error::other)?;
    Ok(Some((message, descriptor)))
}

/// A second descriptor of the same connection.
pub fn duplicate(device: impl AsFd) -> io::Result<OwnedFd> {
    device.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    #[test]
    fn messages_carry_descriptors_and_outlive_their_sender() {
        let (ours, theirs) = pair().expect("pair");
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(b"content").expect("writes");
        let session = Session {
            view: ViewId(7),
            path: vec![b'x'; 4096],
            minor: 50,
            connection: Connection {
                abi: (7, 45),
                capabilities: u64::MAX,
            },
        };
        let hold = Report::Hold(session.clone());
        send(theirs.as_fd(), &hold, Some(file.as_fd())).expect("sends");
        send(theirs.as_fd(), &Report::Ready, None).expect("sends");
        drop((theirs, file));

        let (message, descriptor) = receive::<Report>(ours.as_fd())
            .expect("receives")
            .expect("a message");
        assert!(matches!(message, Report::Hold(held) if held == session));
        let mut file = std::fs::File::from(descriptor.expect("a descriptor"));
        let mut text = String::new();
        file.rewind().expect("rewinds");
        file.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "content");
        let ready = receive::<Report>(ours.as_fd()).expect("receives");
        assert!(matches!(ready, Some((Report::Ready, None))));
        assert!(receive::<Report>(ours.as_fd()).expect("ends").is_none());
        assert!(send(ours.as_fd(), &Report::Ready, None).is_err());
    }
}
