"""Ranks that were started by somebody else: torchrun, or Slurm's srun.

Every process runs the same command. The one with rank 0 is the core, the others are its sidecars.
Only `announce` and `meet` import torch.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """This process among those that were started together.

    Attributes:
        rank: its rank.
        world_size: all ranks.
        local_rank: its number on this machine.
        local_world_size: ranks on this machine.
        host: rank 0's machine; None where all ranks are on one.
        port: where the core's store is to listen; None where `meeting` says it.
        meeting: host and port of torchrun's own store, which is up already, and the prefix of our
            keys in it; None under Slurm.
        has_own_gpus: whether a rank that sees fewer GPUs than its machine has ranks sees those
            that are its alone.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str | None
    port: int | None
    meeting: tuple[str, int, str] | None = None
    has_own_gpus: bool = False


def launched(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """Reads torchrun's variables, or else srun's; None where neither started this process.

    Raises:
        ValueError: a variable is missing or no number.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _torchrun(environ)
    # srun's own: a batch script has SLURM_PROCID and SLURM_NTASKS too, but is alone.
    if "SLURM_STEP_NUM_TASKS" in environ and _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        return _slurm(environ)
    return None


def _torchrun(environ: Mapping[str, str]) -> Launched:
    world, local = _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_WORLD_SIZE")
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    port = _number(environ, "MASTER_PORT")
    prefix = f"psyche_fast/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    # Otherwise the port is kept free for rank 0's (TORCH_DISABLE_SHARE_RDZV_TCP_STORE).
    has_store = environ.get("TORCHELASTIC_USE_AGENT_STORE", "True") == "True"
    return Launched(
        rank=_number(environ, "RANK"),
        world_size=world,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=local,
        host=address if world > local else None,
        port=None if has_store else port,
        meeting=(address, port, prefix) if has_store else None,
    )


def _slurm(environ: Mapping[str, str]) -> Launched:
    world, nodes = _number(environ, "SLURM_STEP_NUM_TASKS"), environ.get("SLURM_STEP_NODELIST", "")
    several = _number(environ, "SLURM_STEP_NUM_NODES") > 1
    # Free on most machines, and the same on all ranks of one step only.
    step = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    tasks = _local_tasks(environ, world)
    return Launched(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks,
        host=first_host(nodes) if several else None,
        port=20_000 + zlib.crc32(step.encode()) % 10_000,
        has_own_gpus=_has_own_gpus(environ, tasks),
    )


def _local_tasks(environ: Mapping[str, str], world: int) -> int:
    """This machine's part of `SLURM_STEP_TASKS_PER_NODE`, such as `4(x2),3`."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = environ.get(name, str(world))
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{name}: wanted numbers such as 4(x2),3, got {text!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    if sum(tasks) != world:
        raise ValueError(f"{name}: {text} are {sum(tasks)} tasks, but the step has {world}")
    if len(set(tasks)) == 1:
        return tasks[0]
    machine = _number(environ, "SLURM_NODEID")
    if machine >= len(tasks):
        raise ValueError(f"SLURM_NODEID: {machine}, but {name} {text} names {len(tasks)} machines")
    return tasks[machine]


def _has_own_gpus(environ: Mapping[str, str], tasks: int) -> bool:
    """Whether Slurm gave each task GPUs of its own, or there are enough for that."""
    if environ.get("SLURM_GPUS_PER_TASK") or "gpu" in environ.get("SLURM_TRES_PER_TASK", ""):
        return True
    count = environ.get("SLURM_GPUS_ON_NODE", "")
    named = environ.get("SLURM_STEP_GPUS", "")
    gpus = int(count) if count.isdecimal() else len(named.split(",")) if named else 0
    return gpus >= tasks


def first_host(nodes: str) -> str:
    """The first name of Slurm's list, such as `node[003-004,007],gpu1`.

    Raises:
        ValueError: no list.
    """
    match = re.match(r"([^,\[\]]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST: wanted names of machines, got {nodes!r}")
    return match[1] + (match[2] or "")


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name}: wanted a number in the environment, got {text!r}")
    return int(text)


def announce(launch: Launched, host: str, port: int) -> None:
    """Tells the other ranks where the core's store listens; by rank 0."""
    if launch.meeting is not None:
        if host in ("0.0.0.0", "::"):  # where it listens, and no address to be called by
            host = launch.host or "127.0.0.1"
        _store(launch.meeting, 60).set("address", f"{host} {port}")


def meet(launch: Launched, timeout: float) -> tuple[str, int]:
    """Where the core's store listens; by every rank but 0.

    Raises:
        ValueError: rank 0 has not said so in time.
    """
    if launch.meeting is None:
        assert launch.port is not None
        return launch.host or "127.0.0.1", launch.port
    import torch.distributed as dist

    try:
        text = _store(launch.meeting, timeout).get("address").decode()
    except dist.DistError as error:
        raise ValueError(
            f"rank 0 has not said within {timeout:g} s where it listens (--timeout)"
        ) from error
    host, port = text.split()
    return host, int(port)


def _store(meeting: tuple[str, int, str], timeout: float):  # type: ignore[no-untyped-def]
    from datetime import timedelta

    import torch.distributed as dist

    host, port, prefix = meeting
    limit = timedelta(seconds=timeout)
    return dist.PrefixStore(prefix, dist.TCPStore(host, port, is_master=False, timeout=limit))
