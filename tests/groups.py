"""Processes that tests start: ranks of a gloo group, runs of the command line.

They are forked from a server that has imported what they need, which takes milliseconds instead of
the seven seconds of an import; otherwise they are processes like any other, with real groups
between them, and a run's sidecars are children of its core. `test_any_python_model` starts a run as
users do.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import logging
import multiprocessing
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import free_port

PRELOADED = [
    "torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
    "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.mixtral.modeling_mixtral",
    "torch.distributed.run", "matplotlib.figure", "pytest", "hypothesis", "psyche_fast.cli",
    "psyche_fast.core.run",
    "psyche_fast.core.plan", "psyche_fast.sidecar", "psyche_fast.rank.serve",
    "psyche_fast.psyche.serving",
]  # fmt: skip
"""What the server imports; what cannot be imported is left out."""
_TRAIN = "psyche_fast.cli:main"
RANKS = {"psyche_fast": _TRAIN, "psyche_fast.sidecar": "psyche_fast.sidecar:main"}
TIMEOUT = 220.0
"""Seconds that processes may take."""
INTERPRETER = "TRITON_INTERPRET"
"""The environment variable that has kernels interpreted."""
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000
allowed = True
"""Whether the test that runs is marked `processes`; conftest.py sets it."""


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    check_collectives: bool = False,
    interpreted: Collection[int] = (),
) -> list[Any]:
    """Runs `function(rank, *args)` in each of `world` processes that form a gloo group.

    Args:
        function: of a module, so that a process can import it.
        world: how many.
        *args: its further arguments.
        check_collectives: whether ranks that call different collectives, or the same one with
            other shapes, are told so at once (`TORCH_DISTRIBUTED_DEBUG=DETAIL`). It wraps every
            collective, so that what is tested is not what users run: for a few tests alone.
        interpreted: ranks that have Triton's interpreter, also where there is a GPU.

    Returns:
        What they returned, in the order of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        group = store, world, check_collectives
        calls = [(_in_group, rank, group, function, args) for rank in range(world)]
        return _values(calls, interpreted)


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Runs `function(*args)` in a process of its own, which has no group yet."""
    return _values([(function, *args)])[0]


@dataclass(frozen=True)
class Finished:
    """How a command ended, as `subprocess.run` says it."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A `psyche-fast` that runs; what tests want of `subprocess.Popen`.

    Args:
        *arguments: after the program's name.
        program: another one's `main`, as `module:function`.
        environment: variables beside this process's own.
        folder: its working directory; None for this process's.
        host: the network namespace that it runs in; None for this one.
        terminal: the name of a terminal that it runs in, as a session of its own.
    """

    def __init__(
        self,
        *arguments: str,
        program: str = _TRAIN,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        host: str | None = None,
        terminal: str | None = None,
    ) -> None:
        self._said = Path(tempfile.mkdtemp())
        streams = [self._said / "out", self._said / "err"]
        for stream in streams:
            stream.touch()
        self._process = _start(
            _command, program, arguments, dict(environment or {}), folder, host, terminal,
            *([terminal] * 2 if terminal else map(str, streams)),
        )  # fmt: skip
        self.pid = self._process.pid
        _commands.append(self)

    def poll(self) -> int | None:
        """Its status, or None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """As of `poll`."""
        return self.poll()

    def send_signal(self, number: signal.Signals) -> None:
        """To this process alone."""
        os.kill(self.pid, number)

    def stderr(self) -> str:
        """What it has said."""
        return (self._said / "err").read_text()

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """What it said on its two streams (not on a terminal) until it ended.

        Raises:
            AssertionError: that was not within `timeout` seconds.
        """
        self._process.join(timeout)
        said = (self._said / "out").read_text(), self.stderr()
        assert self.poll() is not None, f"not done after {timeout:g} s: {said}"
        return said

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Its status, once it has ended within `timeout` seconds."""
        self.communicate(timeout)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Ends it where it still runs."""
        _end([self._process])

    def close(self) -> None:
        """Ends it and forgets what it said."""
        self.kill()
        shutil.rmtree(self._said)


_commands: list[Command] = []


def end_all() -> None:
    """Ends the commands that a test has started; conftest.py calls it after each."""
    while _commands:
        _commands.pop().close()


def run_command(
    *arguments: str, ranks: int = 1, environment: Mapping[str, str] | None = None
) -> list[Finished]:
    """Runs `psyche-fast` with arguments, in as many processes as a launcher would start.

    Args:
        *arguments: after the program's name; of `train` for several ranks.
        ranks: all ranks of the run. More than one are started as Slurm starts them.
        environment: variables beside this process's own.

    Returns:
        How each rank ended, in the order of ranks.
    """
    if ranks > 1:
        arguments = (*arguments, "--port", str(free_port()))
    commands = []
    for rank in range(ranks):
        slurm = {
            "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": str(ranks),
            "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }  # fmt: skip
        variables = {**(slurm if ranks > 1 else {}), **(environment or {})}
        commands.append(Command(*arguments, environment=variables))
    try:
        found = []
        for command in commands:
            said = command.communicate()
            assert command.returncode is not None
            found.append(Finished(command.returncode, *said))
        return found
    finally:
        for command in commands:
            _commands.remove(command)
            command.close()


def run_processes(function: Callable[..., Any], args: tuple[Any, ...], nprocs: int) -> list[Any]:
    """What `function(number, *args)` returns in each of `nprocs` processes, without a group."""
    return _values([(function, number, *args) for number in range(nprocs)])


@contextmanager
def running(function: Callable[..., None], *args: Any) -> Iterator[Any]:
    """Runs `function(*args)` in a `multiprocessing.Process` that ends with the block."""
    process = _start(function, *args)
    try:
        yield process
    finally:
        _end([process])


def context() -> Any:
    """`multiprocessing` with the server that has imported what it needs."""
    assert allowed, "a test that starts processes is to be marked: @pytest.mark.processes"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def _start(function: Callable[..., None], *args: Any, interpreted: bool = False) -> Any:
    server = context()
    if not interpreted or INTERPRETER in os.environ:
        process = server.Process(target=function, args=args)
        process.start()
        return process
    # The server has imported triton, which cannot be told any more.
    os.environ[INTERPRETER] = "1"
    try:
        process = multiprocessing.get_context("spawn").Process(target=function, args=args)
        process.start()
    finally:
        del os.environ[INTERPRETER]
    return process


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _values(calls: list[tuple[Any, ...]], interpreted: Collection[int] = ()) -> list[Any]:
    """The values of functions with arguments, each in a process of its own; all end with one."""
    processes, waiting = [], {}
    for number, call in enumerate(calls):
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = _start(_send_value, writer, *call, interpreted=number in interpreted)
        processes.append(process)
        writer.close()
        waiting[reader] = number
    values: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    try:
        while waiting:
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            missing = sorted(waiting.values())
            assert ready, f"processes {missing} of {len(calls)} are not done after {TIMEOUT:g} s"
            for reader in ready:
                assert isinstance(reader, Connection)
                number = waiting.pop(reader)
                try:
                    error, value = reader.recv()
                except EOFError:
                    processes[number].join()
                    error = f"ended without a word: exit code {processes[number].exitcode}"
                assert error is None, f"process {number} of {len(calls)}: {error}"
                values[number] = torch.load(io.BytesIO(value), weights_only=False)
        for process in processes:
            process.join(30)
    finally:
        _end(processes)
    return [values[number] for number in range(len(calls))]


def _send_value(writer: Connection, function: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    try:
        # bytes, not shared memory: the process is gone before the tensors are looked at
        value = io.BytesIO()
        torch.save(function(*args), value)
        writer.send((None, value.getvalue()))
        status = 0
    except BaseException:
        writer.send((traceback.format_exc(), None))
        status = 1
    _leave(status)


def _leave(status: int) -> None:
    """Not by Python's own end: a thread of gloo's may let go of a tensor meanwhile, and abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a terminal that has been closed
            stream.flush()
    os._exit(status)


def _in_group(
    rank: int,
    group: tuple[str, int, bool],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    store, world, check_collectives = group
    if check_collectives:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    value = function(rank, *args)
    dist.destroy_process_group()
    return value


def _command(
    program: str,
    arguments: tuple[str, ...],
    variables: Mapping[str, str],
    folder: Path | None,
    host: str | None,
    terminal: str | None,
    *streams: str,
) -> None:
    """One process of a command; its output goes to files, what C++ says too."""
    if sys.platform == "linux":  # a run without an end outlives no test that is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job ignores
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which what nohup starts ignores
    if host is not None:
        with open(f"/run/netns/{host}") as space:
            assert ctypes.CDLL(None).setns(space.fileno(), _CLONE_NEWNET) == 0
    if terminal is not None:
        os.setsid()  # whose terminal is the first that it opens to read and write
    for descriptor, name in zip((1, 2), streams, strict=True):
        opened = os.open(name, os.O_RDWR)
        os.dup2(opened, descriptor)
        os.close(opened)
    if folder is not None:
        os.chdir(folder)
    os.environ.update(variables)
    fork_ranks()
    _run(program, list(arguments))


def _run(program: str, arguments: list[str]) -> None:
    """A program, in a process that is forked for it and ends with it."""
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    status: Any = 0
    try:
        pkgutil.resolve_name(program)(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    _leave(int(status or 0))


def fork_ranks(programs: Mapping[str, str] = RANKS) -> None:
    """Has this process fork what it starts of itself, instead of Pythons that import all anew.

    Args:
        programs: `module:function` by a module or script.
    """
    plain = subprocess.Popen.__init__

    def start(self: Any, args: Sequence[str], *more: Any, **options: Any) -> None:
        for at, word in enumerate(args[1:4], start=1):
            if args[0] == sys.executable and word in programs:
                arguments = list(args[at + 1 :])
                options["preexec_fn"] = partial(_rank, programs[word], arguments, dict(options))
        plain(self, args, *more, **options)

    subprocess.Popen.__init__ = start  # type: ignore[assignment]


def _rank(program: str, arguments: list[str], options: Mapping[str, Any]) -> None:
    """What an exec does to a process, then the rank; the streams are its own already."""
    if dist.is_initialized():
        return  # started again by a core that trains: by the exec, as users' are
    if (before := options.get("preexec_fn")) is not None:
        before()
    if (environment := options.get("env")) is not None:
        os.environ.clear()
        os.environ.update(environment)
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as every Python begins; Popen restores it
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in options.get("pass_fds", ()):
            with suppress(OSError):  # the listing's own
                os.close(int(name))
    vars(resource_tracker._resource_tracker).update(_fd=None, _pid=None)
    logging.getLogger("psyche_fast").handlers.clear()
    _run(program, arguments)
