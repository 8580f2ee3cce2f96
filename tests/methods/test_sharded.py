"""Methods on shards (FSDP2, tensor parallelism, both) are those on whole tensors, to the bit."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from psyche_fast import methods as m
from psyche_fast.methods.exchanges import InProcess
from psyche_fast.sharding import part_of, placed_like
from tests.groups import run_ranks
from tests.methods.test_replica import METHODS, World, gradient, parameters

STEPS, BREAK = 7, 5
SOME = ("sparseloco", "distro", "muloco")
"""Methods on two ranks too."""
EXACT = {
    **{name: METHODS[name] for name in METHODS if name != "muloco"},
    "mean": replace(METHODS["sparseloco"], values="parameter", merge="mean", delay=0, mix=0.5),
    "diloco": m.get("diloco", every=3, chunk=8, values="parameter"),
    "demo, decay": m.get("demo", k=3, chunk=8, delay=1, outer=m.Sign(weight_decay=0.1)),
}
ROUNDED = {
    "muloco": METHODS["muloco"],
    "median": m.get("sparseloco", every=2, k=3, chunk=8, clip="median"),
    "demo-v2, Muon": m.get("demo-v2", k=3, chunk=8, values="parameter", outer=m.Muon()),
    "dense, Muon": m.get("dense", chunk=8, outer=m.Muon()),
}
"""Those with sums over whole tensors, or matrices."""
SLICED = {"layers.0.a": 0, "layers.2.b": 1}
"""What tensor parallelism cuts, along which dimension; across chunks, and on their edges."""


class Model(nn.Module):
    """The parameters of a world, but for the single number, which FSDP2 does not take."""

    def __init__(self, values):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.detach().clone()))


def sharded(values, shard_mesh, tensor_mesh):
    """Parameters by name, placed as a run's."""
    scale = values["scale"].detach().clone().requires_grad_()
    model = Model({n: v for n, v in values.items() if n != "scale"})
    if tensor_mesh is not None:
        for name, dim in SLICED.items():
            p = nn.Parameter(distribute_tensor(values[name].detach(), tensor_mesh, [Shard(dim)]))
            model.register_parameter(name.replace(".", "_"), p)
    if shard_mesh is not None:
        fully_shard(model, mesh=shard_mesh)
    found = dict(model.named_parameters())
    return {n: scale if n == "scale" else found[n.replace(".", "_")] for n in values}


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class Shards(World):
    """The same replicas, of which this rank has shards."""

    def __init__(self, method, meshes, seed=0, dtype=torch.float32):
        self.models = [sharded(parameters(seed, dtype), *meshes) for _ in range(2)]
        self.ranks = [
            m.Replica(method, model, replica=r, replicas=2) for r, model in enumerate(self.models)
        ]
        self.exchange, self.pending = InProcess(self.ranks), deque()

    def step(self):
        sent = []
        for r, (rank, model) in enumerate(zip(self.ranks, self.models, strict=True)):
            step = rank.step
            rank.before_forward(step)
            found = gradient(r, step, {n: full(p) for n, p in model.items()})
            for n, p in model.items():
                own = found[n]
                if isinstance(p, DTensor):
                    own = placed_like(own[part_of(p)].contiguous(), p)
                p.grad = own
            rank.local(0.02 / (1 + step))
            sent.append(rank.send())
        if sent[0] is not None:
            self.pending.append(self.exchange.deliver(sent))
        while self.ranks[0].due():
            came = self.pending.popleft()
            for rank in self.ranks:
                assert rank.receive(came.messages, came.leave_out) == {}

    def whole(self):
        return [full(p) for p in self.everything()]


def on_shards(rank):
    """Paths by placement and method, and where one ends that went on from a state."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    placed = {
        "2 x 1": (mesh["shard"], None),
        "1 x 2": (None, mesh["tensor"]),
        "2 x 2": (mesh["shard"], mesh["tensor"]),
    }
    found = {}
    for name, method in {**EXACT, **ROUNDED}.items():
        dtype = torch.float32 if name in EXACT else torch.float64
        for place, meshes in placed.items():
            if place != "2 x 2" and name not in SOME:
                continue
            world, paths = Shards(method, meshes, dtype=dtype), []
            for step in range(STEPS):
                if step == BREAK:
                    saved = world.saved()
                world.step()
                paths.append(world.whole())
            resumed = Shards(method, meshes, seed=1, dtype=dtype)
            resumed.load(saved)
            for _ in range(BREAK, STEPS):
                resumed.step()
            found[place, name] = paths, resumed.whole()
    return found


@pytest.mark.processes
def test_shards_are_as_whole_tensors():
    everywhere = run_ranks(on_shards, 4)
    for name, method in {**EXACT, **ROUNDED}.items():
        world = World(method, dtype=torch.float32 if name in EXACT else torch.float64)
        wanted = []
        for _ in range(STEPS):
            world.step()
            wanted.append([p.clone() for p in world.everything()])
        assert not all(map(torch.equal, wanted[0], wanted[-1]))
        for found in everywhere:
            for place in ("2 x 1", "1 x 2", "2 x 2"):
                if place != "2 x 2" and name not in SOME:
                    continue
                got, resumed = found[place, name]
                for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
                    if name in EXACT:
                        assert all(map(torch.equal, a, b)), (place, name, step)
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
                assert all(map(torch.equal, resumed, got[-1])), (place, name)
