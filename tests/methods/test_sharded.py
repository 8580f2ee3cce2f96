"""Methods on shards (FSDP2, tensor parallelism, both) are those on whole tensors, to the bit."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import psyche_fast
from psyche_fast import methods as m
from psyche_fast.methods.exchanges import InProcess
from psyche_fast.sharding import local_tensor, part_of, placed_like
from tests.groups import run_ranks
from tests.methods.test_replica import GOALS, METHODS, World, parameters

STEPS, BREAK = 6, 5
SOME = ("sparseloco", "distro", "muloco")
"""Methods on two ranks too, and gone on with from a state."""
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


def own(whole, like):
    """This rank's part of a whole tensor."""
    return whole[part_of(like)] if isinstance(like, DTensor) else whole


class Shards(World):
    """The same replicas, of which this rank has shards."""

    def __init__(self, method, meshes, seed=0, dtype=torch.float32):
        self.models = [sharded(parameters(seed, dtype), *meshes) for _ in range(2)]
        self.ranks = [
            m.Replica(method, model, replica=r, replicas=2) for r, model in enumerate(self.models)
        ]
        self.exchange, self.pending = InProcess(self.ranks), deque()

    def set_gradients(self, model, replica, step):
        set_gradients(model, replica, step)

    def parts(self):
        return [local_tensor(p.detach()).clone() for p in self.everything()]

    def parts_of(self, wholes):
        return [own(w, p) for w, p in zip(wholes, self.everything(), strict=True)]


def dtype_of(name):
    return torch.float32 if name in EXACT else torch.float64


def on_shards(rank, file):
    """Compares paths by placement and method, and goes on from a state."""
    wanted = torch.load(file)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    placed = {
        "2 x 1": (mesh["shard"], None),
        "1 x 2": (None, mesh["tensor"]),
        "2 x 2": (mesh["shard"], mesh["tensor"]),
    }
    for (name, method), (place, meshes) in product({**EXACT, **ROUNDED}.items(), placed.items()):
        if place != "2 x 2" and name not in SOME:
            continue
        world = Shards(method, meshes, dtype=dtype_of(name))
        for step in range(STEPS):
            if step == BREAK and name in SOME:
                saved = world.saved()
            world.step()
            got, parts = world.parts(), world.parts_of(wanted[name][step])
            if name in EXACT:
                assert all(map(torch.equal, got, parts)), (place, name, step)
            torch.testing.assert_close(got, parts, rtol=0, atol=1e-12)
        if name not in SOME:
            continue
        resumed = Shards(method, meshes, seed=1, dtype=dtype_of(name))
        resumed.load(saved)
        for _ in range(BREAK, STEPS):
            resumed.step()
        assert all(map(torch.equal, resumed.parts(), got)), (place, name)
    other = Shards(METHODS["sparseloco"], placed["2 x 1"])
    with pytest.raises(ValueError, match="which is of as many ranks, sharded alike"):
        Shards(METHODS["sparseloco"], placed["1 x 2"]).load(other.saved())
    with pytest.raises(ValueError, match="sharded, and a codebook"):
        Shards(replace(METHODS["sparseloco"], values="codebook4"), placed["2 x 1"])


@pytest.mark.processes
def test_shards_are_as_whole_tensors(tmp_path):
    wanted = {}
    for name, method in {**EXACT, **ROUNDED}.items():
        world, wanted[name] = World(method, dtype=dtype_of(name)), []
        for _ in range(STEPS):
            world.step()
            wanted[name].append([p.clone() for p in world.everything()])
        assert not any(map(torch.equal, wanted[name][0], wanted[name][-1])), name
    torch.save(wanted, tmp_path / "wanted.pt")
    run_ranks(on_shards, 4, tmp_path / "wanted.pt")


def in_a_loop(rank):
    """Two replicas of two ranks: collectives of Muon's step, and `LocalSteps` over gloo."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(parameters(), mesh["shard"], None)
    optimizer = m.MuonAdamW(model.items(), lr=0.02)
    whole = parameters()
    alone = m.MuonAdamW(whole.items(), lr=0.02)
    for step in range(3):
        for one in (model, whole):
            set_gradients(one, 0, step)
        alone.step()
        with CommDebugMode() as counted:
            optimizer.step()
        counts = {str(what): n for what, n in counted.get_comm_counts().items()}
        if step > 0:  # the first one asks who has what
            assert counts == {"c10d.alltoall_base_": 2}
    assert {type(s["momentum_buffer"]) for s in optimizer.state.values() if len(s) == 1} == {
        DTensor
    }
    muon = {n: (full(model[n]), whole[n].detach(), parameters()[n].detach()) for n in model}

    model, peers = sharded(parameters(), mesh["shard"], None), mesh.get_group("replicate")

    def local(group):
        inner = torch.optim.AdamW(model.items(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
        return psyche_fast.LocalSteps(
            inner, METHODS["sparseloco"], process_group=group, mix=0.0, delay=0
        )

    with pytest.raises(ValueError, match=r"spread over ranks \[\d, \d\], which are of one replica"):
        local(None)
    steps, found = local(peers), []
    replica = mesh.get_local_rank("replicate")
    (fragment,) = steps.replica.fragments
    faults = fragment.format.faults

    def damaged(turn, messages):
        """In the second round, of replica 0, on one rank alone."""
        if rank == 2 and turn == 1:
            messages[0, -1] ^= 1
        return faults(turn, messages)

    fragment.format.faults = damaged
    for step in range(STEPS):
        set_gradients(model, replica, step)
        steps.step()
        found.append({n: full(p) for n, p in steps.shared.items()})
    return muon, found


def set_gradients(model, replica, step):
    """`test_replica.gradient` of this rank's parts, for it goes by elements."""
    for n, p in model.items():
        goal = own(GOALS[replica][n].detach(), p)
        found = (local_tensor(p.detach()) - goal) * (1 + 0.1 * step)
        p.grad = placed_like(found, p) if isinstance(p, DTensor) else found


@pytest.mark.processes
def test_sharded_replicas_in_a_loop():
    """Muon with two all-to-alls a step, and what one rank refuses all do."""
    everywhere = run_ranks(in_a_loop, 4)
    muon, found = everywhere[0]
    for name, (ours, alone, before) in muon.items():
        assert (ours - alone).abs().max() < 2e-3, name  # bfloat16 inside
        assert (ours - before).abs().max() > 1e-2, name
    for _, other in everywhere[1:]:
        assert all(torch.equal(o[n], f[n]) for o, f in zip(other, found, strict=True) for n in f)
    world, wanted = World(replace(METHODS["sparseloco"], mix=0.0, delay=0)), []
    for rank in world.ranks:
        rank.receive = _without_first(rank.receive, rank)
    for step in range(STEPS):
        for r, (rank, model) in enumerate(zip(world.ranks, world.models, strict=True)):
            set_gradients(model, r, step)
            rank.local(0.02)
        sent = [rank.send() for rank in world.ranks]
        for rank in world.ranks if sent[0] is not None else ():
            rank.receive(torch.stack(sent))
        wanted.append({n: p.clone() for n, p in world.ranks[0].plain().items()})
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert all(torch.equal(a[n], b[n]) for n in a), step


def _without_first(receive, rank):
    return lambda messages: receive(messages, {0: "damaged"} if rank.step == 6 else {})
