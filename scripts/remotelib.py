"""What `scripts/bench-remote` measures with: an S3 server, a proxy that counts, and machines.

A *machine* is a home, a cargo home, a temporary directory, a store and a checkout below one directory.
Only one is there at a time: the next one has the same paths, and nothing of what was in them.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import select
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib import (
    BUILD_LIMIT,
    MARK,
    STEP_LIMIT,
    BenchError,
    Env,
    Project,
    attempt,
    end_marked,
    exit_of,
    lib,
    output,
    progress,
    run,
    user_cargo_home,
)

BUCKET = "cache"
# SeaweedFS: its parts have neighbouring ports, and each another one for gRPC, so far above.
PARTS = ("master", "volume", "filer", "s3")
GRPC = 10_000
LONGEST_LIFE = 4 * 3600  # seconds; a server whose bench was killed ends by itself
START_LIMIT = 60.0


# ------------------------------------------------------------------ server and proxy


def stop_process(process: subprocess.Popen[Any], limit: float) -> None:
    """Asks a process to end, then makes it; must not fail."""
    process.terminate()
    if not exit_of(process, limit):
        process.kill()
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        progress(f"process {process.pid} cannot be killed")


def free_ports() -> int:
    """The first of four neighbours on which nobody listens, nor on those for gRPC.

    Below the ports that the kernel gives out by itself.
    """

    def is_free(port: int) -> bool:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True

    for _ in range(100):
        base = random.randrange(10_000, 19_000)
        ports = [base + part + above for part in range(len(PARTS)) for above in (0, GRPC)]
        if all(map(is_free, ports)):
            return base
    raise BenchError("no four free ports")


class Seaweed:
    """An S3 server on loopback, with its data below one directory; lets everybody in."""

    def __init__(self, root: Path) -> None:
        program = lib("install_seaweedfs")
        self.base = free_ports()
        self.endpoint = f"http://127.0.0.1:{self.base + 3}"
        root.mkdir()
        command = ["setpriv", "--pdeathsig", "TERM", "timeout", "-k", "5", str(LONGEST_LIFE)]
        command += [program, "-logtostderr=true", "server"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={root}"]
        command += ["-master.telemetry=false", "-volume.max=5", "-filer", "-s3"]
        command += [f"-{part}.port={self.base + i}" for i, part in enumerate(PARTS)]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        log = root / "log"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                env={"PATH": os.environ["PATH"], "HOME": str(root), "TMPDIR": str(root)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the bench, which still needs the server to clean up.
                start_new_session=True,
            )
        try:
            self.make_bucket()
        except BaseException as error:
            self.stop()
            if isinstance(error, BenchError):
                raise BenchError(f"{error}\n{log.read_text()[-2000:]}") from error
            raise

    def make_bucket(self) -> None:
        """Makes the bucket, which works once all parts are there."""
        deadline = time.monotonic() + START_LIMIT
        while True:
            request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
            try:
                urllib.request.urlopen(request, timeout=10).close()
                return
            except (urllib.error.URLError, OSError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"SeaweedFS does not start: {error}") from error
            time.sleep(0.2)

    def put(self, name: str, file: Path) -> None:
        """Stores a file as an object that everybody can get."""
        address = f"{self.endpoint}/{BUCKET}/{name}"
        run(["curl", "-sSf", "-T", file, address], limit=STEP_LIMIT, env=dict(os.environ))

    def stop(self) -> None:
        """Ends it, and removes the sockets that it leaves in /tmp whatever it is told."""
        stop_process(self.process, 15)
        for i, part in enumerate(PARTS):
            for name in (f"{part}-{self.base + i}", f"{part}-grpc-{self.base + i + GRPC}"):
                Path(f"/tmp/seaweedfs-{name}.sock").unlink(missing_ok=True)


@dataclass(frozen=True)
class Counts:
    """What went through a proxy: requests, and bytes of bodies as clients see them."""

    requests: int
    received: int
    sent: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.requests - other.requests,
            self.received - other.received,
            self.sent - other.sent,
        )


class Proxy:
    """A proxy in front of a server that adds a delay to each request, and counts."""

    def __init__(self, program: Path, server: str, delay_ms: int) -> None:
        self.process = subprocess.Popen(
            [str(program), server, str(delay_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.endpoint = self.line()

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 10)[0]:
            raise BenchError("the proxy says nothing")
        return self.process.stdout.readline().strip()

    def counts(self) -> Counts:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        counts = json.loads(self.line())
        return Counts(counts["requests"], counts["bytes_sent"], counts["bytes_received"])

    def stop(self) -> None:
        stop_process(self.process, 5)


@contextmanager
def proxy(program: Path, server: str, delay_ms: int = 0) -> Iterator[Proxy]:
    """A proxy that ends with the block."""
    started = Proxy(program, server, delay_ms)
    try:
        yield started
    finally:
        started.stop()


# ------------------------------------------------------------------ machines


class Machine:
    """A machine without any cache: places and an environment. Subclasses say what they do with it."""

    label = "plain"

    def __init__(self, root: Path, tools: Path) -> None:
        self.root = root
        self.tools = tools
        self.home = root / "home"
        self.cargo_home = root / "cargo"
        self.temporary = root / "tmp"
        self.store = root / "store"
        self.checkout = root / "project"
        self.target = self.checkout / "target"
        self.mark = secrets.token_hex(8)
        self.env = self.environment()

    def environment(self) -> Env:
        """Little of the caller's: what is in it can end up in what a compiler makes."""
        env = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "CARGO_HOME": str(self.cargo_home),
            "CARGO_NET_OFFLINE": "true",
            "RUSTUP_HOME": os.environ.get("RUSTUP_HOME", str(Path.home() / ".rustup")),
            MARK: self.mark,
        }
        if "RUSTUP_TOOLCHAIN" in os.environ:
            env["RUSTUP_TOOLCHAIN"] = os.environ["RUSTUP_TOOLCHAIN"]
        return env | self.settings()

    def settings(self) -> Env:
        """Environment that activates a cache."""
        return {}

    def prepare(self, project: Project | None = None) -> None:
        """Makes the machine, with a checkout."""
        registry = self.cargo_home / "registry"
        for directory in (self.home, registry, self.temporary, self.store):
            directory.mkdir(parents=True)
        # What is downloaded is shared. What cargo unpacks from it is not: its times would be older.
        for name in ("cache", "index"):
            (registry / name).symlink_to(user_cargo_home() / "registry" / name)
        if project is not None:
            lib("fetch_crate", project.name, project.version, self.checkout)

    def cargo(self, *words: str) -> float:
        """Runs cargo in the checkout; returns its seconds."""
        command = ["cargo", *words, "--locked", "--quiet"]
        return run(command, limit=BUILD_LIMIT, env=self.env, cwd=self.checkout)

    def run(self, *words: str | Path) -> float:
        """Runs a short command as this machine."""
        cwd = self.checkout if self.checkout.exists() else self.temporary
        return run(words, limit=STEP_LIMIT, env=self.env, cwd=cwd)

    def connect(self, endpoint: str, prefix: str, *, reads_only: bool) -> None:
        """Says where the remote is."""

    def start(self) -> float:
        """Gets ready for the first build; returns the seconds that took."""
        return 0.0

    def upload(self) -> None:
        """Waits until everything is in the remote."""

    def counters(self) -> dict[str, int]:
        """What it counts itself, until now."""
        return {}

    def stop(self) -> None:
        """Stops daemons and mounts; must not fail."""

    def close(self) -> None:
        """Leaves nothing behind; must not fail."""
        self.stop()
        end_marked(self.mark)
        try:
            lib("drop_mounts", self.root)
            if lib("kachefs_mounts", self.root):
                progress(f"  left behind, still mounted: {self.root}")
                return
        except BenchError as error:
            progress(f"  while cleaning up: {error}")
            return
        shutil.rmtree(self.root, ignore_errors=True)


class Kachefs(Machine):
    """A machine with kachefs: its target is a view, its store has a remote."""

    label = "kachefs"

    def settings(self) -> Env:
        return {
            "KACHEFS_STORE": str(self.store),
            "RUSTC_WRAPPER": str(self.tools / "kachefs-rustc"),
        }

    def kachefs(self, *words: str | Path) -> float:
        return self.run(self.tools / "kachefs", *words)

    def connect(self, endpoint: str, prefix: str, *, reads_only: bool) -> None:
        place = [f"s3://{BUCKET}/{prefix}", "--endpoint", endpoint, "--anonymous"]
        self.place = [*place, *(["--read-only"] if reads_only else [])]
        self.kachefs("remote", "set", *self.place)

    def fetches_early(self, mode: str) -> None:
        """What is fetched before it is wanted; after `connect`."""
        self.kachefs("remote", "set", *self.place, "--prefetch", mode)

    def start(self) -> float:
        return self.kachefs("mount", self.target, "--no-init")

    def upload(self) -> None:
        run(
            [self.tools / "kachefs", "push", "--wait"],
            limit=BUILD_LIMIT,
            env=self.env,
            cwd=self.checkout,
        )

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(
            output([self.tools / "kachefs", "stats", "--json"], env=self.env)
        )
        return stats

    def counters(self) -> dict[str, int]:
        stats = self.stats()
        counters = {k: stats["actions"][k] for k in ("hits", "misses", "uncacheable", "failed")}
        counters |= {f"script_{k}": stats["scripts"][k] for k in ("hits", "misses")}
        counters["referenced"] = stats["bytes"]["referenced"]
        counters["own_requests"] = stats["remote"]["requests"]
        remote = (
            "faults",
            "bytes_faulted",
            "bytes_prefetched",
            "bytes_prefetched_read",
            "results_uploaded",
            "results_held_back",
        )
        return counters | {k: stats["remote"][k] for k in remote}

    def stop(self) -> None:
        for words in (["unmount", "--all"], ["daemon", "stop"]):
            attempt([self.tools / "kachefs", *words], env=self.env)


class Kache(Machine):
    """A machine with kache, configured as its documentation says for such a one."""

    label = "kache"

    def settings(self) -> Env:
        kache = self.tools / "kache"
        return {
            "KACHE_CONFIG": str(self.home / "kache.toml"),
            "KACHE_CACHE_DIR": str(self.store),
            "KACHE_RUNTIME_DIR": str(self.temporary),
            "KACHE_PROFILE": "debug",
            "KACHE_MIN_COMPILE_MS": "0",
            "KACHE_S3_ACCESS_KEY": "anybody",
            "KACHE_S3_SECRET_KEY": "anything",
            "RUSTC_WRAPPER": str(kache),
            # Runs of build scripts stay on the machine that made them; the C they compile does not.
            "HOST_CC": f"{kache} cc",
            "HOST_CXX": f"{kache} c++",
            "CC_KNOWN_WRAPPER_CUSTOM": "kache",
        }

    def connect(self, endpoint: str, prefix: str, *, reads_only: bool) -> None:
        lines = [
            "[cache]",
            f"remote_readonly = {str(reads_only).lower()}",
            "remote_key_listing = true",
            "demand_timeout_secs = 60",
            "[cache.remote]",
            'type = "s3"',
            f'bucket = "{BUCKET}"',
            f'endpoint = "{endpoint}"',
            f'prefix = "{prefix}"',
        ]
        (self.home / "kache.toml").write_text("\n".join(lines) + "\n")

    def start(self) -> float:
        return self.run(self.tools / "kache", "daemon", "start")

    def cargo(self, *words: str) -> float:
        """Through its own command, which prepares new checkouts."""
        command: list[str | Path] = [self.tools / "kache", "cargo", "--", *words]
        command += ["--locked", "--quiet"]
        return run(command, limit=BUILD_LIMIT, env=self.env, cwd=self.checkout)

    def upload(self) -> None:
        self.run(self.tools / "kache", "save-manifest")
        queue = self.store / "upload-queue"
        deadline = time.monotonic() + BUILD_LIMIT
        while queue.is_dir() and any(path.is_file() for path in queue.rglob("*")):
            if time.monotonic() > deadline:
                raise BenchError(f"kache does not upload what is in {queue}")
            time.sleep(0.5)
        self.run(self.tools / "kache", "daemon", "stop")
        # Outside of a package this sends whatever is not there yet.
        push: list[str | Path] = [self.tools / "kache", "sync", "--push"]
        run(push, limit=BUILD_LIMIT, env=self.env, cwd=self.home)

    def stop(self) -> None:
        attempt([self.tools / "kache", "daemon", "stop"], env=self.env)


@contextmanager
def open_machine(machine: Machine) -> Iterator[None]:
    """Leaves nothing of a machine behind the block."""
    try:
        yield
    finally:
        machine.close()


def programs(directory: Path, tools: Path, names: Sequence[str]) -> Path:
    """Copies programs, so that a build that goes on beside cannot replace them."""
    directory.mkdir(exist_ok=True)
    for name in names:
        shutil.copy2(tools / name, directory)
    return directory


def size(number: float) -> str:
    """Bytes in the unit people read."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
