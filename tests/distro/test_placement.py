"""Sharded parameters: the same bits as without sharding, in real processes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from psyche_fast.distro import DeMo, Distro
from tests.distro.support import random_arrays, run_processes, to_parameters

# Even and uneven shards along both dimensions, one rank left with nothing, a replicated one, a
# plain one.
PLACEMENTS = {
    "columns": ((16, 24), Shard(1)),
    "nothing": ((1, 8), Shard(0)),
    "odd_rows": ((15, 8), Shard(0)),
    "plain": ((8, 8), None),
    "replicated": ((24,), Replicate()),
    "rows": ((16, 24), Shard(0)),
}
SHAPES = {name: shape for name, (shape, _) in PLACEMENTS.items()}


def train(parameters, gradients):
    distro = Distro(
        parameters,
        compression_decay=0.9,
        compression_chunk=8,
        compression_topk=3,
        weight_decay=0.1,
    )
    previous, kept = None, []
    for step in range(3):
        distro.error_correction(0.01)
        kept.append({n: full(p) for n, p in parameters.items()})
        for name, p in parameters.items():
            p.grad = gradients(step, name)
        own = distro.generate(previous, 0.01, 0.02)
        if previous:
            distro.apply([previous, own], 0.02)
        kept.append({n: full(p) for n, p in parameters.items()})
        previous = own
    kept.append(distro.state_dict()["delta"])
    kept.append({n: r.sparse_val for n, r in zip(distro.names, own, strict=True)})
    return kept


def full(tensor):
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def _worker(rank, count, dtype):
    mesh = init_device_mesh("cpu", (count,))

    def place(name, tensor):
        placement = PLACEMENTS[name][1]
        return tensor if placement is None else distribute_tensor(tensor, mesh, [placement])

    plain = to_parameters(random_arrays(0, SHAPES), dtype)
    parameters = {n: place(n, p.detach().clone()).requires_grad_() for n, p in plain.items()}

    def gradient(step, name):
        return torch.tensor(random_arrays(50 + step, SHAPES)[name]).to(dtype)

    sharded = train(parameters, lambda step, name: place(name, gradient(step, name)))
    with pytest.raises(ValueError, match="parameter rows is sharded"):
        DeMo([("rows", parameters["rows"])], 0.1)
    return sharded, train(plain, gradient)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sharded_equals_whole_bit_for_bit(dtype):
    for sharded, whole in run_processes(_worker, 2, dtype):
        for stage, (ours, theirs) in enumerate(zip(sharded, whole, strict=True)):
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), (stage, name)
