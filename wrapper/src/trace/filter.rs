//! The seccomp filter: which calls are handed to the listener (seccomp(2)).
//!
//! Calls that take no path, the great majority, pass without leaving the kernel: it knows by heart
//! that the filter lets them.

use std::os::fd::RawFd;

use libc::{c_long, sock_filter};
use nix::errno::Errno;

use super::{calls, words};

/// The architecture whose call numbers these are (linux/audit.h).
#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

/// Calls of the x32 ABI carry this bit (asm/unistd.h).
const X32_BIT: u32 = 0x4000_0000;

const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// Where the parts of `struct seccomp_data` are (linux/seccomp.h).
const NR: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// The lower half of an argument, on the little-endian machines above.
const fn argument(n: u32) -> u32 {
    16 + 8 * n
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_BITS: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;

fn statement(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u32, k: u32, yes: u8, no: u8) -> sock_filter {
    // Every code is below 256.
    #[expect(clippy::cast_possible_truncation)]
    let code = code as u16;
    sock_filter {
        code,
        jt: yes,
        jf: no,
        k,
    }
}

/// Whether a call is one of this architecture's own.
pub(super) fn is_native(arch: u32, number: i32) -> bool {
    arch == ARCH && number.cast_unsigned() & X32_BIT == 0
}

fn number(call: c_long) -> u32 {
    // Call numbers are small.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let number = call as u32;
    number
}

/// Where the caller's next instruction is in `struct seccomp_data`.
const INSTRUCTION: u32 = 8;

/// Whether a call that is watched comes from the shim's gate. Calls that are not are not asked, so that
/// the kernel still knows them by heart.
fn at_gate() -> [sock_filter; 6] {
    // Where `syscall` leads back to.
    let back = words::GATE as u64 + 2;
    // Halves of an address.
    #[expect(clippy::cast_possible_truncation)]
    let (low, high) = (back as u32, (back >> 32) as u32);
    [
        statement(LOAD, INSTRUCTION),
        jump(IF_EQUAL, low, 0, 2),
        statement(LOAD, INSTRUCTION + 4),
        jump(IF_EQUAL, high, 1, 0),
        statement(RETURN, NOTIFY),
        statement(RETURN, ALLOW),
    ]
}

/// The program. Each test that does not fit leads on to the next.
fn program() -> Vec<sock_filter> {
    let mut program = vec![
        statement(LOAD, ARCHITECTURE),
        jump(IF_EQUAL, ARCH, 1, 0),
        statement(RETURN, NOTIFY),
        statement(LOAD, NR),
        jump(IF_BITS, X32_BIT, 0, 1),
        statement(RETURN, NOTIFY),
    ];
    for call in calls::WATCHED {
        if calls::AT_GATE.contains(call) {
            program.push(jump(IF_EQUAL, number(*call), 0, 6));
            program.extend(at_gate());
        } else {
            program.push(jump(IF_EQUAL, number(*call), 0, 1));
            program.push(statement(RETURN, NOTIFY));
        }
    }
    // With this flag programs ask about what they have open already (an empty path). One that gives
    // a path all the same goes unseen.
    let empty_path = libc::AT_EMPTY_PATH.cast_unsigned();
    for (call, flags) in calls::STATUS {
        program.push(jump(IF_EQUAL, number(*call), 0, 9));
        program.push(statement(LOAD, argument(*flags)));
        program.push(jump(IF_BITS, empty_path, 0, 1));
        program.push(statement(RETURN, ALLOW));
        program.extend(at_gate());
    }
    let (send, address) = calls::SEND;
    program.push(jump(IF_EQUAL, number(send), 0, 7));
    for half in [argument(address), argument(address) + 4] {
        program.push(statement(LOAD, half));
        program.push(jump(IF_EQUAL, 0, 1, 0));
        program.push(statement(RETURN, NOTIFY));
    }
    program.push(statement(RETURN, ALLOW));
    // Within a machine, connect(2) tells who is talked to.
    let [local, kernel] = [libc::AF_UNIX, libc::AF_NETLINK].map(i32::cast_unsigned);
    program.push(jump(IF_EQUAL, number(libc::SYS_socket), 0, 4));
    program.push(statement(LOAD, argument(0)));
    program.push(jump(IF_EQUAL, local, 2, 0));
    program.push(jump(IF_EQUAL, kernel, 1, 0));
    program.push(statement(RETURN, NOTIFY));
    program.push(statement(RETURN, ALLOW));
    program
}

/// Installs the filter on this thread and what it starts from now on. Returns the descriptor to
/// listen on, which closes itself on exec.
pub(super) fn install() -> Result<RawFd, Errno> {
    let mut program = program();
    let length = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog {
        len: length,
        filter: program.as_mut_ptr(),
    };
    // Signals must not make a program ask twice; older kernels lack the flag (Linux 5.19).
    let listen = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let best = listen | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    match set(best, &program).or_else(|_| set(listen, &program)) {
        // Without a privilege only a thread that can gain none may be filtered (seccomp(2)).
        Err(Errno::EACCES) => {
            // SAFETY: changes one flag of this thread.
            Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
            set(best, &program).or_else(|_| set(listen, &program))
        }
        result => result,
    }
}

fn set(flags: libc::c_ulong, program: &libc::sock_fprog) -> Result<RawFd, Errno> {
    // SAFETY: the program and what it points to outlive the call, which copies them.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::from_ref(program),
        )
    };
    let fd = Errno::result(fd)?;
    RawFd::try_from(fd).map_err(|_| Errno::EBADF)
}
