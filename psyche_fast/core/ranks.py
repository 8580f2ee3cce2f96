"""The other ranks of a run as rank 0 starts them, listens for them and hears of their end."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from psyche_fast.config import ARCHITECTURES, RunConfig
from psyche_fast.core.plan import Plan
from psyche_fast.distro.replicas import ReplicasDiffer
from psyche_fast.errors import SidecarFailed, explain
from psyche_fast.metrics import Console
from psyche_fast.rank.elastic import most_replicas
from psyche_fast.start import tls
from psyche_fast.start.cluster import Launched, announce
from psyche_fast.start.door import Door
from psyche_fast.start.early import Early
from psyche_fast.start.elastic import ReplicaSidecars
from psyche_fast.start.knock import read_secret
from psyche_fast.start.network import listen, tcp_url, use_interface
from psyche_fast.start.parent import TIMEOUT
from psyche_fast.start.signals import StopRequest, stop_on_signal
from psyche_fast.start.spawn import Sidecars
from psyche_fast.start.store import host_store

_DEATH_SECONDS = 2.5
"""How long a failing core looks for the sidecar whose death is the cause."""
_EXIT_SECONDS = 30.0


@dataclass(frozen=True)
class Ranks:
    """What rank 0 has of the others.

    Attributes:
        store: where they hear of the run.
        sidecars: those that were started on this machine.
        stop: whether the user wants the run to end.
    """

    store: dist.TCPStore
    sidecars: Sidecars
    stop: StopRequest


@contextmanager
def started(
    plan: Plan,
    output: Path,
    launch: Launched | None,
    console: Console,
    early: Early | None = None,
) -> Iterator[Ranks]:
    """Starts the ranks of this machine; when the block ends, so have they.

    Args:
        plan: the run.
        output: the run directory.
        launch: where the other ranks were started with this one (torchrun, Slurm).
        console: for what the user has to do.
        early: sidecars that have been started already, as far as they are needed.

    Raises:
        SidecarFailed: a sidecar ended before the block did; the message names it.
    """
    config, devices = plan.resolved, plan.devices
    world_size = config.parallelism.world_size
    machines = config.machines
    sock = listen(machines.host, machines.port)
    host, port = sock.getsockname()[:2]
    use_interface(host)
    os.environ.update(tls.variables(machines.tls_key, machines.tls_cert, machines.tls_ca))
    secret = None if machines.secret_file is None else read_secret(machines.secret_file)
    # The door takes the address that is named; the store, and the ranks here, need none.
    inner = sock if secret is None else listen("127.0.0.1", 0)
    environment = {TIMEOUT: str(machines.timeout), ARCHITECTURES: config.model.python_arch}
    if machines.threads:
        environment["OMP_NUM_THREADS"] = str(machines.threads)
    address = tcp_url(*inner.getsockname()[:2])
    with (
        closing(sock),
        closing(inner),  # until the store takes it over
        _sidecars(config, devices.backend, address, environment, console) as sidecars,
        stop_on_signal(console.message, sidecars.kill) as stop,
    ):
        sidecars.early = early
        for rank in range(1, config.ranks_here):
            log_file = output / "logs" / f"rank-{rank}.log"
            sidecars.spawn(rank, devices.devices[rank].index, log_file)
        sidecars.watch(grace=_DEATH_SECONDS + 1)
        missing = world_size - config.ranks_here
        if launch is not None:
            announce(launch, host, port)
        elif missing:
            console.message(
                f"waiting for {missing} ranks from other machines: psyche-fast sidecar "
                f"{'--elastic ' if config.parallelism.elastic else ''}"
                f"--main-host {_reachable(host)} --port {port} "
                f"--world-size {sidecars.world_size} "
                f"--start-rank {config.ranks_here} --num-local-ranks {missing} "
                f"--backend {devices.backend}"
                + ("" if secret is None else f" --secret-file {machines.secret_file}")
                + (
                    ""
                    if machines.tls_key is None
                    else " and its own --tls-key, --tls-cert, --tls-ca"
                )
            )
        inside = inner.getsockname()[1]
        store = host_store(inner, world_size, timedelta(seconds=machines.timeout))
        door = None
        if secret is not None:
            door = Door(sock, inside, secret, str(output.resolve()), machines.timeout)
        try:
            yield Ranks(store, sidecars, stop)
            sidecars.join(_EXIT_SECONDS)
        except (SidecarFailed, ReplicasDiffer):
            raise
        except Exception as error:
            message = sidecars.failure(_DEATH_SECONDS if _lost_a_rank(error) else 0.2)
            if message is None:
                if isinstance(error, ValueError | OSError):
                    raise
                message = explain(error)
            raise SidecarFailed(message) from error
        finally:
            if door is not None:
                door.close()
                if door.refused:
                    console.message(
                        f"the door has refused {door.refused} knocks, most from "
                        f"{door.busiest()}; logs/rank-0.log"
                    )


def _sidecars(
    config: RunConfig, backend: str, address: str, environment: dict[str, str], console: Console
) -> Sidecars:
    options = config.parallelism
    if not options.elastic:
        return Sidecars(backend, address, options.world_size, environment)
    size = options.ranks_per_replica
    world = most_replicas(options) * size
    return ReplicaSidecars(backend, address, world, environment, size=size, tell=console.message)


def _reachable(host: str) -> str:
    """What other machines call this one."""
    return platform.node() if host in ("0.0.0.0", "::") else host


def _lost_a_rank(error: Exception) -> bool:
    return isinstance(error, dist.DistError | RuntimeError) and not isinstance(error, ValueError)
