"""Processes that tests start: ranks of a gloo group, runs of the command line.

They are forked from a server that has imported what they need, which takes milliseconds instead of
the seconds of an import; otherwise they are processes like any other, with real groups between
them. Whoever tests how processes come to be and end starts them as a user does: tests/processes.py.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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
    "matplotlib.figure", "pytest", "hypothesis", "psyche_fast.cli", "psyche_fast.core.run",
    "psyche_fast.core.plan", "psyche_fast.sidecar", "psyche_fast.rank.serve",
]  # fmt: skip
"""What the server imports; what cannot be imported is left out."""
TIMEOUT = 220.0
"""Seconds that processes may take."""
allowed = True
"""Whether the test that runs is marked `processes`; conftest.py sets it."""


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, check_collectives: bool = False
) -> list[Any]:
    """Runs `function(rank, *args)` in each of `world` processes that form a gloo group.

    Args:
        function: of a module, so that a process can import it.
        world: how many.
        *args: its further arguments.
        check_collectives: whether ranks that call different collectives, or the same one with
            other shapes, are told so at once (`TORCH_DISTRIBUTED_DEBUG=DETAIL`). It wraps every
            collective, so that what is tested is not what users run: for a few tests alone.

    Returns:
        What they returned, in the order of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        group = store, world, check_collectives
        return _values([(_in_group, rank, group, function, args) for rank in range(world)])


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Runs `function(*args)` in a process of its own, which has no group yet."""
    return _values([(function, *args)])[0]


@dataclass(frozen=True)
class Finished:
    """How a command ended, as `subprocess.run` says it."""

    returncode: int
    stdout: str
    stderr: str


def run_command(
    *arguments: str, ranks: int = 1, environment: Mapping[str, str] | None = None
) -> list[Finished]:
    """Runs `psyche-fast` with arguments, in as many processes as a launcher would start.

    Args:
        *arguments: after the program's name; of `train` for several ranks.
        ranks: all ranks of the run. More than one are started as Slurm starts them, so that none
            has to start another and import everything once more.
        environment: variables beside this process's own.

    Returns:
        How each rank ended, in the order of ranks.
    """
    if ranks > 1:
        arguments = (*arguments, "--port", str(free_port()))
    with tempfile.TemporaryDirectory() as folder:
        processes, outputs = [], []
        for rank in range(ranks):
            slurm = {
                "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": str(ranks),
                "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            }  # fmt: skip
            variables = {**(slurm if ranks > 1 else {}), **(environment or {})}
            outputs.append([os.path.join(folder, f"{rank}.{name}") for name in ("out", "err")])
            processes.append(_start(_command, arguments, variables, *outputs[-1]))
        deadline = time.monotonic() + TIMEOUT
        try:
            for process in processes:
                process.join(max(deadline - time.monotonic(), 0))
        finally:
            codes = [process.exitcode for process in processes]
            _end(processes)
        said = [[Path(name).read_text() for name in names] for names in outputs]
    assert None not in codes, f"not done after {TIMEOUT:g} s: {said}"
    return [Finished(*fields) for fields in zip(codes, *zip(*said, strict=True), strict=True)]


@contextmanager
def running(function: Callable[..., None], *args: Any) -> Iterator[Any]:
    """Runs `function(*args)` in a `multiprocessing.Process` that ends with the block."""
    process = _start(function, *args)
    try:
        yield process
    finally:
        _end([process])


def _start(function: Callable[..., None], *args: Any) -> Any:
    assert allowed, "a test that starts processes is to be marked: @pytest.mark.processes"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=args)
    process.start()
    return process


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _values(calls: list[tuple[Any, ...]]) -> list[Any]:
    """The values of functions with arguments, each in a process of its own; all end with one."""
    processes, waiting = [], {}
    for number, call in enumerate(calls):
        reader, writer = multiprocessing.Pipe(duplex=False)
        processes.append(_start(_send_value, writer, *call))
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
    sys.stdout.flush()
    sys.stderr.flush()
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
    arguments: tuple[str, ...], variables: Mapping[str, str], output: str, errors: str
) -> None:
    """One process of a command; its output goes to files, what C++ says too."""
    from psyche_fast.cli import main

    for descriptor, name in ((1, output), (2, errors)):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    os.environ.update(variables)
    status: Any = 0
    try:
        main(list(arguments))
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    _leave(int(status or 0))
