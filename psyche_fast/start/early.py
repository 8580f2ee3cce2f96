"""Sidecars that import what they need while the core does, before it knows what to tell them.

Imports take seconds, of which a run would wait for the core's and then for its sidecars'. This
module imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from psyche_fast.start.parent import SPAWNED, die_with_parent

FLAG = "--wait-for"
"""The sidecar's, with the core's process id: its arguments come over standard input."""
_THREADS = "OMP_NUM_THREADS"
"""What a core decides for its sidecars of all that is read when torch is imported."""


@dataclass(frozen=True)
class Waiting:
    """A sidecar that imports, or waits.

    Attributes:
        process: it.
        said: what it has written before it began, and not yet to its log.
    """

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def begin(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Has it be a rank, as if it had been started with these.

        Args:
            arguments: of `psyche_fast.sidecar`.
            environment: all variables.
            log: where its output is appended, that of before too.
        """
        order = {
            "arguments": [*arguments],
            "environment": {**environment},
            "log": str(log.absolute()),
        }
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            pipe.write(json.dumps(order).encode() + b"\n")


@dataclass
class Early:
    """Sidecars that have been started early, and not yet been taken."""

    threads: str | None
    _waiting: list[Waiting] = field(default_factory=list)

    def start(self) -> None:
        """Starts one more; from the main thread, as `Sidecars.spawn`."""
        said = tempfile.TemporaryFile()  # noqa: SIM115  # closed when it begins, or below
        process = subprocess.Popen(
            [sys.executable, "-m", "psyche_fast.sidecar", FLAG, str(os.getpid())],
            env=with_threads(os.environ, self.threads) | {SPAWNED: "1"},
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        self._waiting.append(Waiting(process, said))

    def take(self, environment: Mapping[str, str]) -> Waiting | None:
        """One that can be started with these variables and lives; None where there is none."""
        while self._waiting:
            one = self._waiting.pop()
            if environment.get(_THREADS) == self.threads and one.process.poll() is None:
                return one
            _end(one)
        return None

    def end(self) -> None:
        """Ends those that nobody has taken."""
        for one in self._waiting:
            _end(one)
        self._waiting.clear()


def with_threads(environment: Mapping[str, str], threads: str | None) -> dict[str, str]:
    """Variables with so many threads; None for what torch takes without being told."""
    rest = {name: value for name, value in environment.items() if name != _THREADS}
    return rest if threads is None else rest | {_THREADS: threads}


def _end(one: Waiting) -> None:
    one.process.kill()
    one.process.wait()
    assert one.process.stdin is not None
    one.process.stdin.close()
    one.said.close()


@contextmanager
def early(count: int, ranks_here: int, device: str, threads: int) -> Iterator[Early]:
    """Starts sidecars; ends those that have not been taken when the block ends.

    Args:
        count: how many; 0 is no fault.
        ranks_here: ranks on this machine, the core's own included.
        device: `--device`.
        threads: `--threads`.
    """
    on_cpu = device == "cpu" or (device == "auto" and not any(Path("/dev").glob("nvidia[0-9]*")))
    # As the plan decides it; where it decides otherwise they are not taken.
    if not threads and on_cpu:
        threads = max(1, cores() // ranks_here)
    one = Early(str(threads) if threads else os.environ.get(_THREADS))
    try:
        for _ in range(count):
            one.start()
        yield one
    finally:
        one.end()


def wait(parent_pid: int, prepare: Callable[[], object]) -> list[str]:
    """Prepares, and waits for what this sidecar is to do; by it. Ends with its core.

    Args:
        parent_pid: the core's.
        prepare: imports what a rank needs.

    Returns:
        Its arguments.
    """
    die_with_parent(parent_pid)
    prepare()
    with open(0, "rb", closefd=False) as pipe:
        line = pipe.readline()
    if not line:  # the core's plan came to nothing
        os._exit(0)
    order = json.loads(line)
    os.environ.clear()
    os.environ.update(order["environment"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with open(order["log"], "ab", buffering=0) as log:
        log.write(os.pread(1, os.fstat(1).st_size, 0))
        os.ftruncate(1, 0)  # what is left there the core takes for words that are in no log
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    arguments: list[str] = order["arguments"]
    return arguments


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
