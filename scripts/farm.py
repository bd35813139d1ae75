"""A build farm for `scripts/bench-remote`: one machine builds tests, many run a part of them at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchlib import (
    BUILD_LIMIT,
    PROJECTS,
    BenchError,
    Project,
    calm_down,
    end_marked,
    lib,
    output,
    progress,
    run,
)
from remotelib import BUCKET, Kachefs, Seaweed, open_machine, size

SHARDS = 8
WAYS = {
    "mount": "`kachefs mount --read-only`",
    "archive": "`target.tar.zst`",
    "tests": "`tests.tar.zst`, the test programs and `rg`",
}
# The libraries of ripgrep that are packages of its workspace. They are published one by one, so the
# workspace is put together again.
MEMBERS = {
    "globset": "0.4.19",
    "grep": "0.4.1",
    "grep-cli": "0.1.12",
    "grep-matcher": "0.1.9",
    "grep-printer": "0.3.1",
    "grep-regex": "0.1.14",
    "grep-searcher": "0.1.17",
    "ignore": "0.4.29",
}
PREFIX, NAME = "farm", "tests"
ARCHIVES = {"archive": "archives/target.tar.zst", "tests": "archives/tests.tar.zst"}
ALSO_RUN = "debug/rg"  # by the integration tests
TEST_LIMIT = 300.0


def workspace(root: Path, project: Project) -> None:
    """The project with its libraries beside it, as where it is developed."""
    lib("fetch_crate", project.name, project.version, root)
    for name, version in MEMBERS.items():
        lib("fetch_crate", name, version, root / "crates" / name)
    members = ", ".join(f'"crates/{name}"' for name in MEMBERS)
    lines = ["", "[workspace]", f"members = [{members}]", "", "[patch.crates-io]"]
    lines += [f'{name} = {{ path = "crates/{name}" }}' for name in MEMBERS]
    with (root / "Cargo.toml").open("a") as file:
        file.write("\n".join(lines) + "\n")
    # The libraries' own tests need more than is locked, the same as the members' locks name.
    env = {k: v for k, v in os.environ.items() if k != "RUSTC_WRAPPER"}
    run(["cargo", "fetch", "--quiet"], limit=BUILD_LIMIT, env=env, cwd=root)


class Site:
    """What the shards run, and where they get it."""

    def __init__(self, scratch: Path, tools: Path, server: Seaweed) -> None:
        self.scratch = scratch
        self.tools = tools
        self.server = server
        self.tests: list[str] = []
        self.left_out: list[str] = []

    def build(self) -> dict[str, Any]:
        """Builds the tests, publishes the target, and stores the archive."""
        made = Kachefs(self.scratch / "m", self.tools)
        # As is usual where nobody builds a second time.
        made.env["CARGO_INCREMENTAL"] = "0"
        with open_machine(made):
            made.prepare()
            workspace(made.checkout, PROJECTS["ripgrep"])
            made.connect(self.server.endpoint, PREFIX, reads_only=False)
            made.start()
            seconds = made.cargo("test", "--no-run", "--workspace")
            self.tests = self.that_pass(made)
            publishing = made.kachefs("publish", made.target, "--name", NAME)
            archives = {
                "archive": self.archive(made, "archive", ["."]),
                "tests": self.archive(made, "tests", [*self.tests, ALSO_RUN]),
            }
        progress(
            f"  built in {seconds:.1f} s, {len(self.tests)} test programs, archives of "
            + " and ".join(size(archive["bytes"]) for archive in archives.values())
        )
        return {
            "seconds": seconds,
            "publishing": publishing,
            "archives": archives,
            "tests": self.tests,
            "left_out": self.left_out,
        }

    def archive(self, made: Kachefs, way: str, what: list[str]) -> dict[str, float]:
        """Stores an archive of part of the target in the bucket."""
        file = self.scratch / "archive"
        pack: list[str | Path] = ["tar", "-C", made.target, "-I", "zstd -T0 -3", "-cf", file]
        seconds = run([*pack, *what], limit=BUILD_LIMIT, env=made.env)
        self.server.put(ARCHIVES[way], file)
        packed = {"seconds": seconds, "bytes": file.stat().st_size}
        file.unlink()
        return packed

    def that_pass(self, made: Kachefs) -> list[str]:
        """The test programs, below the target, that pass wherever they are run."""
        words: list[str | Path] = ["cargo", "test", "--no-run", "--workspace", "--locked"]
        words += ["--quiet", "--message-format", "json"]
        words += ["--manifest-path", made.checkout / "Cargo.toml"]
        lines = output(words, env=made.env, limit=BUILD_LIMIT).splitlines()
        messages = [json.loads(line) for line in lines]
        found = [m["executable"] for m in messages if m.get("profile", {}).get("test")]
        passing = []
        for program in filter(None, found):
            try:
                run([program, "--quiet"], limit=TEST_LIMIT, env=made.env, cwd=made.temporary)
            except BenchError as error:
                why = str(error).partition(":")[0]
                progress(f"  left out, does not pass by itself ({why}): {Path(program).name}")
                self.left_out.append(Path(program).name)
                continue
            passing.append(str(Path(program).relative_to(made.target)))
        if len(passing) < SHARDS:
            raise BenchError(f"too few tests pass: {passing}")
        return passing

    def quiet(self) -> bool:
        """Leaves the real machine to calm down; whether it did."""
        return calm_down(dict(os.environ))

    def run(self, way: str, endpoint: str) -> float:
        """All shards at once; the seconds until the last one is through."""
        with self.shards(endpoint) as shards:
            actions = [
                partial(self.work, way, shard, self.tests[number::SHARDS], endpoint)
                for number, shard in enumerate(shards)
            ]
            began = time.monotonic()
            at_once(actions, shards)
            return time.monotonic() - began

    @contextmanager
    def shards(self, endpoint: str) -> Iterator[list[Kachefs]]:
        """Machines that have nothing yet."""
        shards = [Kachefs(self.scratch / f"s{number}", self.tools) for number in range(SHARDS)]
        try:
            for shard in shards:
                shard.prepare()
                shard.connect(endpoint, PREFIX, reads_only=True)
            yield shards
        finally:
            for shard in shards:
                if shard.root.exists():
                    shard.close()

    def work(self, way: str, shard: Kachefs, tests: list[str], endpoint: str) -> None:
        """What one shard does."""
        there = shard.root / "target"
        there.mkdir()
        if way == "mount":
            shard.kachefs("mount", "--read-only", NAME, there)
        else:
            address = f"{endpoint}/{BUCKET}/{ARCHIVES[way]}"
            script = 'set -o pipefail; curl -sSf "$1" | tar -C "$2" -I zstd -xf -'
            command: list[str | Path] = ["bash", "-c", script, "unpack", address, there]
            run(command, limit=BUILD_LIMIT, env=shard.env, cwd=shard.root)
        self.run_tests(shard, there, tests)

    def run_tests(self, shard: Kachefs, there: Path, tests: list[str]) -> None:
        for test in tests:
            run([there / test, "--quiet"], limit=TEST_LIMIT, env=shard.env, cwd=shard.temporary)


def at_once(actions: Sequence[Callable[[], None]], shards: Sequence[Kachefs]) -> None:
    """Runs actions in a thread each; an error or an interruption ends what the others have started."""
    with ThreadPoolExecutor(len(actions)) as pool:
        futures = [pool.submit(action) for action in actions]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for shard in shards:
                end_marked(shard.mark)
            raise
