"""Runs that others start: torchrun and Slurm, or a parent that starts them again when they fail."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

from psyche_fast.config import ARCHITECTURES, RunConfig
from psyche_fast.ranks import Machines
from psyche_fast.start import knock, signals, tls
from psyche_fast.start.cluster import Launched, meet
from psyche_fast.start.logs import quiet_terminal
from psyche_fast.start.network import tcp_url
from psyche_fast.start.parent import TIMEOUT

OURSELVES = [sys.executable, "-m", "psyche_fast"]


def supervised(config: RunConfig, restarts: int) -> int:
    """Runs it, and again where it fails.

    Args:
        config: the run.
        restarts: how often.

    Returns:
        The exit status.
    """
    from psyche_fast.metrics.writer import read_metrics
    from psyche_fast.start.supervise import arguments_of, supervise

    output = config.run.output or datetime.now().strftime("runs/%Y%m%d-%H%M%S")
    config = config.replace(output=output)
    again = config.replace(resume="auto", fork=None, start_step=1)
    metrics = Path(output, "metrics.jsonl")

    began, limit = time.monotonic(), config.run.max_time

    def command(life: int) -> list[str]:
        chosen = again if life else config
        others = config.run.resume or config.run.fork
        if life and others and not any(Path(output).glob("checkpoints/*/state")):
            # It has nothing of its own to go on from: it begins again where it began.
            metrics.unlink(missing_ok=True)
            chosen = config
        if limit is not None:  # of all lives together
            chosen = chosen.replace(max_time=max(0.0, began + limit - time.monotonic()))
        return [*OURSELVES, "train", *arguments_of(chosen)]

    def last_step() -> int:
        try:
            lines = read_metrics(metrics)
        except (OSError, ValueError):  # none yet
            return 0
        return int(lines[-1]["step"]) if lines else 0

    return supervise(command, restarts, last_step)


def as_launched(config: RunConfig, launch: Launched) -> RunConfig:
    """The run where each rank was started by torchrun or Slurm: the core starts none.

    Raises:
        ValueError: the run takes another number of ranks, or is elastic.
    """
    parallelism, machines = config.parallelism, config.machines
    if launch.world_size != parallelism.world_size:
        raise ValueError(
            f"{launch.world_size} ranks were started, but --replicas {parallelism.replicas} x "
            f"--data-parallelism {parallelism.data_parallelism} x --tensor-parallelism "
            f"{parallelism.tensor_parallelism} are {parallelism.world_size}"
        )
    if parallelism.elastic:
        raise ValueError(
            "--elastic under torchrun or Slurm: they end all ranks with the first; start the core, "
            "and `psyche-fast sidecar --elastic` for each further replica"
        )
    changes: dict[str, Any] = {"local_ranks": 1}
    if launch.host is not None and machines.host == Machines().host:
        changes["host"] = launch.host
    if launch.port is not None and machines.port == 0:
        changes["port"] = launch.port
    config = config.replace(**changes)
    # On every rank, so that none waits for a core that has refused it.
    knock.check(config.machines.host, config.machines.secret_file)
    return config


def serve(config: RunConfig, launch: Launched) -> None:
    """A rank after the first: a sidecar that the core need not spawn."""
    quiet_terminal()
    signals.leave_to_core()
    from psyche_fast import sidecar
    from psyche_fast.start.devices import device_of_launched

    machines = config.machines
    device, backend = device_of_launched(machines.device, launch)
    host, port = meet(dataclasses.replace(launch, port=machines.port or None), machines.timeout)
    os.environ.setdefault(TIMEOUT, str(machines.timeout))
    os.environ[ARCHITECTURES] = config.model.python_arch
    files = machines.tls_key, machines.tls_cert, machines.tls_ca
    tls.check(*files)
    os.environ.update(tls.variables(*files))
    sidecar.run(
        Namespace(
            parent_pid=None, backend=backend, init_method=tcp_url(host, port),
            world_size=launch.world_size, rank=launch.rank, device=device.index,
            secret_file=machines.secret_file,
        )
    )  # fmt: skip
