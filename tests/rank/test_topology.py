"""The groups of a run's ranks."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from psyche_fast.compat import set_default_timeout
from psyche_fast.rank.topology import GRACE, Topology, join
from tests.groups import run_processes


def limits(rank: int, folder: Path) -> list[float]:
    """Seconds that collectives of each group may take."""
    device = torch.device("cpu")
    store = dist.FileStore(str(folder / "store"), 4)
    join("gloo", store, 4, rank, device, timedelta(seconds=7))
    found = []
    for seconds in (7, 9):  # a sidecar joins before it hears of the core's --timeout
        if seconds != 7:
            set_default_timeout(timedelta(seconds=seconds) + GRACE)
        topology = Topology.build(2, 1, device, host=True)
        assert topology.shard_mesh is not None
        groups = [topology.peers, topology.copy, topology.host, topology.shard_mesh.get_group()]
        for group in [dist.group.WORLD, *groups]:
            assert isinstance(group, dist.ProcessGroup)
            found.append(group._get_backend(device).options._timeout.total_seconds())
    dist.destroy_process_group()
    return found


@pytest.mark.processes
def test_no_collective_of_any_group_waits_longer_than_the_timeout(tmp_path: Path) -> None:
    """torch's own half an hour would count for those of meshes and of `new_group`."""
    for found in run_processes(limits, (tmp_path,), nprocs=4):
        assert found[:5] == [12.0] * 5
        assert found[6:] == [14.0] * 4
