"""`DeMo` and `DisTrO` on sharded replicas: the same bits as whole ones, and checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from psyche_fast.distro import DeMo, DisTrO
from tests.groups import run_ranks

SETTINGS = {"compression_decay": 0.9, "compression_topk": 3, "compression_chunk": 8}


class Model(nn.Module):
    """Shards on chunks' edges (first), across them (second, its bias), a norm for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.second = nn.Linear(32, 24)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


def model_of():
    torch.manual_seed(0)
    return Model()


def optimizer_of(kind, model, peers):
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if "norm" not in n]},
        {
            "params": [(n, p) for n, p in named.items() if "norm" in n],
            "method": "adamw", "lr": 0.02, "betas": (0.8, 0.9),
        },
    ]  # fmt: skip
    return kind(groups, lr=0.01, weight_decay=0.1, process_group=peers, **SETTINGS)


def backward(model, optimizer, replica, step):
    generator = torch.Generator().manual_seed(100 * replica + step)
    model(torch.randn(4, 16, generator=generator)).square().mean().backward()


def train(model, optimizer, replica, steps):
    for step in steps:
        backward(model, optimizer, replica, step)
        optimizer.step()
        optimizer.zero_grad()


def wholes(tensors):
    return {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for n, t in tensors.items()
    }


def plain(model, optimizer):
    if isinstance(optimizer, DisTrO):
        optimizer.eval()
    found = wholes(dict(model.named_parameters()))
    if isinstance(optimizer, DisTrO):
        optimizer.train()
    return found


def shard(model, mesh, form):
    if form == "fsdp":
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        plan = {
            "first": ColwiseParallel(output_layouts=Replicate()),
            "second": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(model, mesh, plan)  # the norm stays plain
    return model


def _whole(rank, kind):
    model = model_of()
    optimizer = optimizer_of(kind, model, None)
    train(model, optimizer, rank, range(4))
    return plain(model, optimizer)


def _sharded(rank, kind, form, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replica, peers = mesh.get_local_rank("replicate"), mesh.get_group("replicate")

    def fresh():
        model = shard(model_of(), mesh["shard"], form)
        return model, optimizer_of(kind, model, peers)

    model, optimizer = fresh()
    train(model, optimizer, replica, range(3))
    state = {"model": get_model_state_dict(model), "optimizer": {}}
    state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    dcp.save(state, checkpoint_id=folder)
    train(model, optimizer, replica, range(3, 4))
    model2, optimizer2 = fresh()
    _load(model2, optimizer2, folder)
    train(model2, optimizer2, replica, range(3, 4))
    gone_on, resumed = (plain(m, o) for m, o in ((model, optimizer), (model2, optimizer2)))
    train(model, optimizer, replica, range(4, 5))
    return gone_on, resumed, wholes(optimizer.state_dict()["state"][0]), plain(model, optimizer)


def _load(model, optimizer, folder, **options):
    options = StateDictOptions(**options)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def _one_shard(rank, kind, folder):
    """Goes on from what two shards of each replica have saved, on whole replicas."""
    model = model_of()
    optimizer = optimizer_of(kind, model, None)
    _load(model, optimizer, folder)
    train(model, optimizer, rank, range(3, 4))
    return plain(model, optimizer)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "form"), [(DeMo, "fsdp"), (DisTrO, "fsdp"), (DeMo, "tp")], ids=str
)
def test_shards_train_as_whole_replicas_do_and_resume_on_any_number(kind, form, tmp_path):
    folder = str(tmp_path / "checkpoint")
    whole = run_ranks(_whole, 2, kind)
    sharded = run_ranks(_sharded, 4, kind, form, folder)
    for gone_on, resumed, state, last in sharded:
        for name, tensor in whole[0].items():
            assert torch.equal(whole[1][name], tensor), name
            torch.testing.assert_close(gone_on[name], tensor, atol=2e-4, rtol=0, msg=name)
            assert torch.equal(gone_on[name], resumed[name]), f"resumed {name}"
            assert torch.equal(last[name], sharded[0][3][name]), "replicas agree"
        assert len([name for name in state if name.startswith("delta/replica-")]) == 1
    if form == "fsdp":
        for resumed in run_ranks(_one_shard, 2, kind, folder):
            for name, tensor in resumed.items():
                torch.testing.assert_close(tensor, whole[0][name], atol=2e-4, rtol=0, msg=name)
