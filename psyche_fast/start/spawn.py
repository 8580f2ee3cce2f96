"""Spawning and watching sidecars, on the core's machine and on further ones."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from psyche_fast.errors import LOST_ANOTHER_RANK, SidecarFailed, describe_exit
from psyche_fast.start.early import Early
from psyche_fast.start.knock import read_secret
from psyche_fast.start.logs import let_libraries_speak
from psyche_fast.start.network import tcp_url, use_interface
from psyche_fast.start.parent import LIFE, SPAWNED
from psyche_fast.start.signals import exit_now

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 3.0
_LAST_LINES = 8
_LAST_BYTES = 8192


@dataclass
class Child:
    """A sidecar that was spawned."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int  # where this run's words begin in the log
    said: IO[bytes] | None = None  # of one that was started early, before it had a log


@dataclass
class Sidecars:
    """The sidecars that this process spawned.

    Use as a context manager: whatever happens, none outlives it.
    """

    backend: str
    init_method: str
    world_size: int
    environment: dict[str, str] = field(default_factory=dict)
    secret_file: str | None = None
    early: Early | None = None
    _children: list[Child] = field(default_factory=list)
    _closing: threading.Event = field(default_factory=threading.Event)
    _failed: threading.Event = field(default_factory=threading.Event)
    _message: str = ""

    def spawn(self, rank: int, device_index: int | None, log: Path | None) -> None:
        """Starts one sidecar with the arguments that Psyche gives.

        Must be called from the main thread: the child's death signal follows the spawning thread.

        Args:
            rank: its rank.
            device_index: its CUDA index; None on CPU.
            log: where its output is appended; None for this process's own streams.
        """
        assert threading.current_thread() is threading.main_thread()
        arguments = ["--parent-pid", str(os.getpid()), "--backend", self.backend]
        arguments += ["--init-method", self.init_method, "--world-size", str(self.world_size)]
        arguments += ["--rank", str(rank)]
        if device_index is not None:
            arguments += ["--device", str(device_index)]
        if self.secret_file is not None:
            arguments += ["--secret-file", self.secret_file]
        environment = {**os.environ, **self.environment, SPAWNED: "1"}
        if log is not None:
            let_libraries_speak(environment)
        with nullcontext() if log is None else log.open("ab") as output:
            log_start = 0 if output is None else output.tell()
            waiting = None if self.early is None else self.early.take(environment)
            if waiting is not None:
                assert log is not None
                waiting.begin(arguments, environment, log)
                process = waiting.process
            else:
                process = subprocess.Popen(
                    [sys.executable, "-m", "psyche_fast.sidecar", *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    # Ctrl-C in a terminal reaches the core alone, which ends the run in order.
                    start_new_session=True,
                )
        said = None if waiting is None else waiting.said
        self._children.append(Child(rank, process, log, log_start, said))

    def watch(self, grace: float) -> None:
        """Looks at the sidecars from a thread of its own.

        Args:
            grace: seconds that the main thread has to notice a death by itself (gloo does, a
                collective of NCCL would wait); then the thread ends the whole process.
        """
        threading.Thread(target=self._watch, args=(grace,), daemon=True).start()

    def _watch(self, grace: float) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            dead = [c for c in self._children if c.process.poll() is not None]
            if not dead:
                continue
            # A rank that only lost another one is not the one to name.
            time.sleep(_POLL_SECONDS)
            dead = [c for c in self._children if c.process.poll() is not None]
            if not self._are_fatal(dead):
                continue
            dead.sort(key=lambda c: any(LOST_ANOTHER_RANK in line for line in _last_words(c)))
            self._message = obituary(dead[0])
            self._failed.set()
            if not self._closing.wait(grace):
                self.kill()
                exit_now(1, f"error: {self._message}")
            return

    def _are_fatal(self, dead: list[Child]) -> bool:
        return bool(dead)

    def failure(self, wait: float) -> str | None:
        """Says which sidecar failed, waiting up to `wait` seconds for one to be noticed."""
        return self._message if self._failed.wait(wait) else None

    def expect_exit(self) -> None:
        """Stops watching: from now on the sidecars may end."""
        self._closing.set()

    def join(self, timeout: float) -> None:
        """Waits for all to exit by themselves.

        Raises:
            SidecarFailed: one did not, or not with status 0.
        """
        self._closing.set()
        deadline = time.monotonic() + timeout
        for child in self._children:
            try:
                code = child.process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise SidecarFailed(
                    f"rank {child.rank} (pid {child.process.pid}) did not exit within {timeout:g} s"
                ) from None
            if code != 0:
                raise SidecarFailed(obituary(child))

    def wait(self) -> None:
        """Waits until all have exited with status 0, or one has failed.

        Raises:
            SidecarFailed: naming the one that failed.
        """
        while any(c.process.poll() is None for c in self._children):
            failed = [c for c in self._children if c.process.poll() not in (None, 0)]
            if failed:
                raise SidecarFailed(obituary(failed[0]))
            time.sleep(_POLL_SECONDS)
        self.join(0.1)

    def kill(self) -> None:
        """Ends all that still run, at once."""
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGKILL)
        for child in self._children:
            child.process.wait()
            if child.said is not None:
                child.said.close()

    def __enter__(self) -> Sidecars:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends what still runs."""
        self._closing.set()
        self.kill()


def _last_words(child: Child) -> list[str]:
    """The line in which a rank said what ended it, or else the last ones of its log."""
    if child.log is None:
        return []
    if child.said is not None and not child.said.closed:
        with child.said as before, child.log.open("ab") as log:
            before.seek(0)
            log.write(before.read())  # of one that has ended before it wrote to its log
    with child.log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - _LAST_BYTES, child.log_start))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    said = [at for at, line in enumerate(lines) if f" rank {child.rank} ERROR " in line]
    return lines[said[-1] :][:_LAST_LINES] if said else lines[-_LAST_LINES:]


def obituary(child: Child) -> str:
    """How a sidecar ended, and its last words."""
    how = describe_exit(child.process.wait())
    head = f"rank {child.rank} (pid {child.process.pid}) ended: {how}"
    lines = _last_words(child)
    if not lines:
        return head
    return f"{head}; the end of {child.log}:\n  " + "\n  ".join(lines)


def launch_host(
    main_host: str,
    port: int,
    world_size: int,
    start_rank: int,
    start_device: int,
    num_local_ranks: int,
    backend: str,
    elastic: bool = False,
    secret_file: str | None = None,
) -> None:
    """Runs this machine's share of a run whose core is on another machine.

    Args:
        main_host: the core's address.
        port: the core's port.
        world_size: all ranks of the run.
        start_rank: the first rank on this machine.
        start_device: CUDA index of that rank (nccl).
        num_local_ranks: how many ranks run on this machine.
        backend: `nccl` or `gloo`.
        elastic: whether these are replicas of an elastic run.
        secret_file: lets them in where the core has one.

    Raises:
        ValueError: ranks out of range, or no secret in that file.
        SidecarFailed: one of them failed.
    """
    last = start_rank + num_local_ranks - 1
    if num_local_ranks < 1:
        raise ValueError(
            "no CUDA device here for --backend nccl; give --backend gloo, or --num-local-ranks"
        )
    if start_rank < 1 or last >= world_size:
        raise ValueError(
            f"ranks {start_rank} .. {last} do not fit --world-size {world_size}: the core is rank "
            "0, further machines have 1 and up (--start-rank, --num-local-ranks)"
        )
    if secret_file is not None:
        read_secret(secret_file)
    use_interface(main_host)
    url = tcp_url(main_host, port)
    # All ranks here end together: a life that begins with this process.
    environment = {LIFE: os.urandom(8).hex()} if elastic else {}
    with Sidecars(backend, url, world_size, environment, secret_file) as sidecars:
        stop = lambda number, frame: sys.exit(128 + number)  # noqa: E731
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's, which the core acts on
        if secret_file is None:  # otherwise ranks say so, where a look would be a false knock
            say = threading.Thread(target=_say_if_alone, args=(main_host, port), daemon=True)
            say.start()
        for at in range(num_local_ranks):
            sidecars.spawn(
                start_rank + at, start_device + at if backend == "nccl" else None, log=None
            )
        sidecars.wait()


def _say_if_alone(host: str, port: int) -> None:
    """Tells the user what is waited for where no core listens yet."""
    time.sleep(_PATIENCE_SECONDS)
    try:
        socket.create_connection((host, port), _PATIENCE_SECONDS).close()
    except OSError as error:
        sys.stderr.write(
            f"psyche-fast: waiting for the core: nobody listens at {host}:{port} yet "
            f"({error.strerror or error}); is psyche-fast train running there, with that --host "
            "and --port?\n"
        )
        sys.stderr.flush()
