"""What the benches share: projects and peers, processes and their limits, a calm machine, and where
numbers come from.

Imported by `scripts/bench` (builds), `scripts/bench-fs` (the file system) and `scripts/bench-remote`
(a remote); runs nothing itself.
"""

from __future__ import annotations

import datetime
import itertools
import mmap
import os
import platform
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LIB = REPO / "scripts" / "lib.sh"

STEP_LIMIT = 120.0  # seconds; mounting, emptying, stopping a daemon
INSTALL_LIMIT = 3600.0
BUILD_LIMIT = 1800.0  # a build that takes longer has failed
CALM_LIMIT = 5.0
TOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE

# Processes that a bench leaves running are found by this variable.
MARK = "KACHEFS_BENCH_RUN"

Env = dict[str, str]


class BenchError(Exception):
    """Something did not work; the message says what, and on what."""


@dataclass(frozen=True)
class Project:
    """A published crate that is built."""

    name: str
    version: str
    program: str
    edited: str  # a source file of the root package

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Peer:
    """A published tool that kachefs is compared with."""

    crate: str
    version: str
    install_options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.crate} {self.version}"


PROJECTS = {
    project.name: project
    for project in (
        Project("ripgrep", "15.2.0", "rg", "crates/core/main.rs"),
        Project("eza", "0.23.5", "eza", "src/main.rs"),
    )
}

PEERS = {
    # Its lock names versions that are no longer to be had.
    "kache": Peer("kache", "2.0.0"),
    "mbx": Peer("mbx", "1.29.1", ("--locked",)),
    # The default features are remote storages; the local disk needs none.
    "sccache": Peer("sccache", "0.19.0", ("--locked", "--no-default-features")),
}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], *, limit: float, env: Env, cwd: Path | None = None) -> float:
    """Runs a command to its end and returns its seconds.

    Its output goes to a file, not a pipe: a daemon it starts may keep the
    descriptor open, and nobody must wait for that.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BenchError(f"cannot run {words[0]}: {error}") from error
        try:
            # Not process.wait(limit): with a limit Python asks again and again, up to 50 ms
            # late, which is as long as a build with nothing to do takes.
            ended = exit_of(process, limit)
            seconds = time.monotonic() - began
            if not ended:
                raise BenchError(f"no end after {limit:.0f} s: {' '.join(words)}")
        finally:
            if process.poll() is None:
                end_group(process)
        status = process.wait()
        if status != 0:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-4000:]
            raise BenchError(f"exit status {status}: {' '.join(words)}\n{tail}")
    return seconds


def exit_of(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Waits for a process, without delay when it ends; False when it has not after `limit`."""
    descriptor = os.pidfd_open(process.pid)
    try:
        return bool(select.select([descriptor], [], [], limit)[0])
    finally:
        os.close(descriptor)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its group; does not wait for one stuck in the kernel."""
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        progress(f"process {process.pid} cannot be killed")


def attempt(command: Sequence[str | Path], *, env: Env, cwd: Path | None = None) -> None:
    """Runs a command for cleaning up: failure is shown, and stops nothing."""
    try:
        run(command, limit=STEP_LIMIT, env=env, cwd=cwd)
    except BenchError as error:
        progress(f"  while cleaning up: {error}")


def output(
    command: Sequence[str | Path], *, env: Env | None = None, limit: float = STEP_LIMIT
) -> str:
    """What a short command prints on stdout."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{error}\n{error.stderr}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(str(error)) from error
    return done.stdout.strip()


def lib(function: str, *arguments: str | Path) -> str:
    """Runs one function of scripts/lib.sh."""
    return output(["bash", LIB, function, *arguments], limit=600)


def marked_processes(mark: str) -> list[int]:
    """The processes that were started, however indirectly, with this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile, or is someone else's
    return found


def end_marked(mark: str) -> None:
    """Ends what a contender left running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked_processes(mark):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        deadline = time.monotonic() + 5
        while marked_processes(mark):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return


def spread(directory: Path) -> None:
    """Has ext4 keep apart the directories made in one (chattr(1), "T"); others know no such thing.

    Without a journal ext4 walks past every inode that was freed nearby within the last minutes. Behind a
    round that had just been removed, making a file took 160 microseconds instead of 6.
    Where a directory goes depends on its name: names should not come again.
    """
    if chattr := shutil.which("chattr"):
        command = [chattr, "+T", directory]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=STEP_LIMIT)


def user_cargo_home() -> Path:
    return Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo")).resolve()


def install_peer(name: str) -> Path:
    """Installs a peer, once, below the cache directory; returns its bin directory."""
    peer = PEERS[name]
    peers = Path(lib("where_is", "cache")) / "peers"
    root = peers / f"{peer.crate}-{peer.version}"
    if not (root / "bin" / peer.crate).exists():
        progress(f"installing {peer} into {root} (once, takes minutes)")
        build = peers / "build"
        command: list[str | Path] = ["cargo", "install", peer.crate, "--version", peer.version]
        command += ["--root", root, *peer.install_options]
        env = {k: v for k, v in os.environ.items() if k != "RUSTC_WRAPPER"}
        env["CARGO_TARGET_DIR"] = str(build)
        root.mkdir(parents=True, exist_ok=True)
        run(command, limit=INSTALL_LIMIT, env=env, cwd=root)
        shutil.rmtree(build, ignore_errors=True)
    return root / "bin"


def build_kachefs() -> Path:
    """Builds kachefs itself (release); returns the directory of its binaries."""
    progress("building kachefs (release)")
    target = Path(lib("where_is", "build"))
    command: list[str | Path] = ["cargo", "build", "--release", "--locked", "-p", "kachefs"]
    command += ["--target-dir", target]
    run(command, limit=2 * INSTALL_LIMIT, env=dict(os.environ), cwd=REPO)
    return target / "release"


def build_example(name: str) -> Path:
    """Builds a program that only benches run; returns where it is."""
    target = Path(lib("where_is", "build"))
    command = ["cargo", "build", "--release", "--locked", "-p", "kachefs-tests"]
    command += ["--example", name, "--target-dir", str(target)]
    run(command, limit=INSTALL_LIMIT, env=dict(os.environ), cwd=REPO)
    return target / "release" / "examples" / name


EDITS = itertools.count(secrets.randbelow(10**9) * 10**6)


def edit(source: Path) -> None:
    """Appends a function that no other edit has had."""
    number = next(EDITS)
    with source.open("a") as file:
        file.write(f"\n#[allow(dead_code)]\nfn bench_edit_{number}() -> u64 {{\n    {number}\n}}\n")


def busy_fraction(seconds: float) -> float:
    """How much of all processors was in use meanwhile."""

    def read() -> tuple[int, int]:
        times = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(times) - times[3] - times[4], sum(times)

    busy, total = read()
    time.sleep(seconds)
    busy_after, total_after = read()
    return (busy_after - busy) / max(1, total_after - total)


def calm_down(env: Env) -> bool:
    """Waits until what was written is on the disk and the processors rest.

    Gives up after a while, and says so: something else is using the machine.
    """
    run(["sync"], limit=STEP_LIMIT, env=env)
    deadline = time.monotonic() + CALM_LIMIT
    while busy_fraction(0.25) > 0.08:
        if time.monotonic() > deadline:
            return False
    return True


def touch_memory(mebibytes: int) -> None:
    """Makes the kernel have so much free memory at hand.

    The host of a virtual machine takes back what lies free for seconds, and the first use of a page
    then costs microseconds. Without this, whoever is measured first pays for the others.
    """
    memory = mmap.mmap(-1, mebibytes << 20, flags=TOUCHED)
    memory.close()


def machine(scratch: Path) -> dict[str, str]:
    """Where the numbers come from."""

    def field(path: str, name: str) -> str:
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
        return "unknown"

    kib = field("/proc/meminfo", "MemTotal").split()[0]
    return {
        "cpu": field("/proc/cpuinfo", "model name"),
        "cores": str(os.cpu_count()),
        "memory": f"{int(kib) / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "disk": output(["df", "--output=fstype", scratch]).split()[-1],
        "rustc": output(["rustc", "--version"]),
        "cargo": output(["cargo", "--version"]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
