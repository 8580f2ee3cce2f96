"""Sharded parameters: the same bits as without sharding, in real processes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from psyche_fast.distro import Distro, DistroStep
from psyche_fast.distro.results import collect, collect_own, to_results
from tests.distro.support import random_arrays, to_parameters
from tests.groups import run_ranks

# Even and uneven shards along both dimensions, on chunks' edges and across chunks, one rank left
# with nothing, experts, a replicated one, a plain one.
PLACEMENTS = {
    "columns": ((16, 32), Shard(1)),
    "columns_cut": ((16, 8), Shard(1)),
    "experts": ((3, 16, 8), Shard(0)),
    "experts_cut": ((3, 8, 8), Shard(1)),
    "experts_rows": ((3, 16, 8), Shard(1)),
    "nothing": ((1, 8), Shard(0)),
    "odd_rows": ((15, 8), Shard(0)),
    "plain": ((8, 8), None),
    "replicated": ((24,), Replicate()),
    "rows": ((32, 24), Shard(0)),
    "rows_cut": ((24, 8), Shard(0)),
    "vector": ((32,), Shard(0)),
    "vector_cut": ((24,), Shard(0)),
}
SHAPES = {name: shape for name, (shape, _) in PLACEMENTS.items()}
CUT = ["columns_cut", "experts_cut", "odd_rows", "rows_cut", "vector_cut"]
ALIGNED = ["columns", "experts", "experts_rows", "nothing", "plain", "replicated", "rows", "vector"]


class Ahead(Distro):
    """Parameters stay in the look-ahead, as the trainer leaves them."""

    def error_correction(self, prev_lr):
        self.look_ahead(prev_lr)

    def generate(self, prev_self_results, prev_lr, lr):
        previous = collect_own(prev_self_results, self.layout)
        return to_results(self.layout, self.compress(previous, lr))

    def apply(self, results, lr):
        self.update(collect(results, self.layout), lr)


def train(kind, parameters, gradients, *, own_results=False):
    """Three steps as the trainer takes them; everything a user can see after each call."""
    distro = kind(
        parameters,
        compression_decay=0.9,
        compression_chunk=8,
        compression_topk=3,
        weight_decay=0.1,
    )
    previous, kept = None, []
    for step in range(4):
        distro.error_correction(0.02)
        kept.append({n: full(p) for n, p in parameters.items()})
        for name, p in parameters.items():
            p.grad = gradients(step, name)
        own = distro.generate(previous, 0.02, 0.02)
        if previous:
            distro.apply([previous, own], 0.02)
        kept.append({n: full(p) for n, p in parameters.items()})
        previous = own
        if own_results:  # a way over whole results, as an exchange without shards has it
            previous = distro.own_results(distro.whole_results(own))
    wholes = dict(zip(distro.names, distro.whole_results(own), strict=True))
    kept.append({n: r.sparse_val for n, r in wholes.items()})
    kept.append({n: r.sparse_idx for n, r in wholes.items()})
    distro.plain()
    kept.append({n: full(p) for n, p in parameters.items()})
    state = distro.state_dict()
    kept.append(state["delta"])
    distro.zero_optim()
    assert all((d == 0).all() for d in distro.state_dict()["delta"].values())
    distro.load_state_dict(state)
    kept.append(distro.state_dict()["delta"])
    distro.error_correction(0.02)
    kept.append({n: full(p) for n, p in parameters.items()})
    return kept


def full(tensor):
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def gradient(step, name, shapes, dtype):
    return torch.tensor(random_arrays(50 + step, shapes)[name]).to(dtype)


def assert_same(sharded, whole):
    for stage, (ours, theirs) in enumerate(zip(sharded, whole, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), (stage, name)


def place(mesh, name, tensor):
    placement = PLACEMENTS[name][1]
    return tensor if placement is None else distribute_tensor(tensor, mesh, [placement])


def _worker(rank, count, dtype):
    mesh = init_device_mesh("cpu", (count,))
    runs = []
    for kind in (Distro, Ahead):
        plain = to_parameters(random_arrays(0, SHAPES), dtype)
        shards = {n: place(mesh, n, p.detach().clone()).requires_grad_() for n, p in plain.items()}
        sharded = train(
            kind,
            shards,
            lambda step, name: place(mesh, name, gradient(step, name, SHAPES, dtype)),
            own_results=True,
        )
        runs.append((sharded, train(kind, plain, lambda s, n: gradient(s, n, SHAPES, dtype))))
    return runs


@pytest.mark.processes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sharded_equals_whole_bit_for_bit(dtype):
    for runs in run_ranks(_worker, 2, 2, dtype):
        for sharded, whole in runs:
            assert_same(sharded, whole)


COLLECTIVES = (
    "all_to_all_single", "all_gather", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "broadcast", "reduce_scatter_tensor", "new_group",
)  # fmt: skip


def _count(rank, count, names):
    """Collectives and element counts of a step after the first ones."""
    mesh = init_device_mesh("cpu", (count,))
    arrays = random_arrays(0, SHAPES)
    plain = to_parameters({n: arrays[n] for n in names}, torch.float32)
    parameters = {n: place(mesh, n, p.detach()).requires_grad_() for n, p in plain.items()}
    tested = DistroStep(parameters, compression_decay=0.9, compression_chunk=8, compression_topk=3)
    own = None
    for step in range(3):
        calls = []
        with (
            mock.patch.multiple(dist, **{n: _counted(n, calls) for n in COLLECTIVES}),
            mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("a full tensor")),
        ):
            tested.look_ahead(0.02)
            for name, p in parameters.items():
                p.grad = place(mesh, name, gradient(step, name, SHAPES, torch.float32))
            calls.clear()
            # The caller says that gradients are finite; looking at them takes a collective.
            own = tested.compress(own, 0.02, grad_scale=torch.ones(()))
            tested.update(own, 0.02)
    return calls, sum(e.values.numel() for e in own)


def _counted(name, calls):
    original = getattr(dist, name)

    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    return counted


@pytest.mark.processes
def test_shards_on_chunks_edges_need_no_collective():
    results = run_ranks(_count, 2, 2, ALIGNED)
    assert [calls for calls, _ in results] == [[], []]
    # Each rank sends what it owns, those that every rank has whole apart.
    chunks = {"columns": 8, "experts": 6, "experts_rows": 6, "nothing": 1, "rows": 12, "vector": 4}
    shared = {"plain": 1, "replicated": 3}
    sent = sum(values for _, values in results)
    assert sent == 3 * (sum(chunks.values()) + 2 * sum(shared.values()))


@pytest.mark.processes
def test_chunks_that_are_cut_cost_two_collectives_for_all_and_are_nobodys_twice():
    results = run_ranks(_count, 2, 2, CUT)
    assert [calls for calls, _ in results] == [["all_to_all_single"] * 2] * 2
    # odd_rows has chunks of 5 x 8.
    chunks = {"columns_cut": 2, "experts_cut": 3, "odd_rows": 3, "rows_cut": 3, "vector_cut": 3}
    assert sum(values for _, values in results) == 3 * sum(chunks.values())
    assert all(values > 0 for _, values in results)


class Block(nn.Module):
    """Sizes that tensor parallelism and FSDP2 cut on chunks' edges, and sizes that they do not."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.odd = nn.Linear(16, 12)
        self.back = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)


STYLES = {"up": ColwiseParallel, "down": RowwiseParallel, "odd": ColwiseParallel,
          "back": RowwiseParallel}  # fmt: skip


def _two_dimensional(rank, count, dtype):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    return [_block(mesh, kind, dtype) for kind in (Distro, Ahead)]


def _block(mesh, kind, dtype):
    torch.manual_seed(0)
    module = Block().to(dtype)
    plain = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in plain.items()}
    parallelize_module(module, mesh["tensor"], {n: style() for n, style in STYLES.items()})
    fully_shard(module, mesh=mesh["shard"])
    parameters = dict(module.named_parameters())
    assert any(len(p.placements) == 2 and p.placements[0] != Shard(0) for p in parameters.values())

    def sharded_gradient(step, name):
        p = parameters[name]
        whole = gradient(step, name, shapes, dtype)
        return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)

    sharded = train(kind, parameters, sharded_gradient, own_results=True)
    return sharded, train(kind, plain, lambda s, n: gradient(s, n, shapes, dtype))


@pytest.mark.processes
def test_strided_shards_of_fsdp2_over_tensor_parallelism():
    for runs in run_ranks(_two_dimensional, 4, 4, torch.float32):
        for sharded, whole in runs:
            assert_same(sharded, whole)
