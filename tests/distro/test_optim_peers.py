"""`DeMo` and `DisTrO` between processes: what all have to decide alike, and what is refused."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from psyche_fast import DeMo, DisTrO
from tests.groups import run_ranks

SETTINGS = {"compression_decay": 0.9, "compression_topk": 3, "compression_chunk": 8}


def model_of():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.LayerNorm(24))


def optimizer_of(kind, model):
    norm = {"params": list(model[1].named_parameters("1")), "method": "adamw", "lr": 0.02}
    return kind([{"params": list(model[0].named_parameters("0"))}, norm], lr=0.01, **SETTINGS)


def loss_of(model, rank, step):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * rank + step))
    return (model(x) - x[:, :1]).square().mean()


def said():
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("psyche_fast").addHandler(handler)
    return found


def plain(model, optimizer):
    if isinstance(optimizer, DisTrO):
        optimizer.eval()
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    if isinstance(optimizer, DisTrO):
        optimizer.train()
    return found


def _decisions(rank, kind):
    """What happens to one rank alone, step after step; the parameters after each."""
    model = model_of()
    optimizer = optimizer_of(kind, model)
    adamw = torch.optim.AdamW(model_of()[1].parameters(), lr=0.02, weight_decay=0.0, fused=True)
    (twins,) = (group["params"] for group in adamw.param_groups)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, rank, step)).backward()
        norm = model[1]
        gradients = [p.grad.clone() / scaler.get_scale() for p in norm.parameters()]
        if step == 1 and rank == 0:
            model[0].weight.grad[0, 0] = math.inf  # all leave the step out
        if step == 3 and rank == 1:
            norm.bias.grad = None  # zero beside the other's
            gradients[1].zero_()
        if step == 4:
            norm.weight.grad = None  # on all: left alone
        scaler.step(optimizer)
        scaler.update(2.0**4)
        if step != 1:
            for p, g in zip(twins, gradients, strict=True):
                dist.all_reduce(g)
                p.grad = g / dist.get_world_size()
            if step == 4:
                twins[0].grad = None
            adamw.step()
        seen.append(plain(model, optimizer))
        for p, twin in zip(norm.parameters(), twins, strict=True):
            torch.testing.assert_close(p, twin, atol=1e-6, rtol=0)
    refused = int(optimizer.refused)
    optimizer.zero_grad()
    loss_of(model, rank, 7).backward()
    if rank == 1:
        model[0].weight.grad[0, 0] = math.nan  # without a scaler: only this rank's is left out
        model[1].weight.grad.fill_(7.0)
    optimizer.step()
    seen.append(plain(model, optimizer))
    if kind is DisTrO:
        optimizer.flush()
    assert optimizer.data_receive > optimizer.data_transmit > 0
    return seen, refused, int(optimizer.refused)


@pytest.mark.processes
@pytest.mark.parametrize("kind", [DeMo, DisTrO])
def test_peers_decide_alike(kind):
    first, second = run_ranks(_decisions, 2, kind)
    for step, (mine, theirs) in enumerate(zip(first[0], second[0], strict=True)):
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), (step, name)
            left_out = step == 1 or (step == 4 and name == "1.weight")
            if step and (kind is DeMo or name.startswith("1") or step > 2):
                assert torch.equal(tensor, first[0][step - 1][name]) == left_out, (step, name)
    assert first[1:] == (0, 0)
    assert second[1:] == (0, 1)


def _checkpoints(rank, kind, folder, world):
    """Saved by three replicas, loaded by two, flat and with names; and not by another one."""
    found = {}
    for flat in (True, False):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model = model_of()
        optimizer = optimizer_of(kind, model)
        at = f"{folder}/{flat}"
        if world == 3:
            for step in range(3):
                optimizer.zero_grad()
                loss_of(model, rank, step).backward()
                optimizer.step()
            state = get_optimizer_state_dict(model, optimizer, options=options)
            dcp.save({"optimizer": state}, checkpoint_id=at)
        else:
            state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
            dcp.load(state, checkpoint_id=at)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        found[flat] = {
            f"{n}/{key}": optimizer.state[p][key].clone()
            for n, p in model.named_parameters()
            for key in (("delta",) if n[0] == "0" else ("exp_avg", "step"))
        }
        optimizer.zero_grad()
        loss_of(model, rank, 5).backward()
        optimizer.step()
        found[flat]["plain"] = plain(model, optimizer)["0.weight"]
        if kind is DisTrO:
            optimizer.flush()
    own = optimizer.state_dict()
    others = [None] * world
    dist.all_gather_object(others, own)
    with pytest.raises(ValueError, match=rf"replica {(rank + 1) % world} in the saved .*{rank}: "):
        optimizer.load_state_dict(others[(rank + 1) % world])
    return found


@pytest.mark.processes
@pytest.mark.parametrize("kind", [DeMo, DisTrO])
def test_each_replica_takes_up_its_own_among_any_number(kind, tmp_path):
    saved = run_ranks(_checkpoints, 3, kind, str(tmp_path), 3)
    loaded = run_ranks(_checkpoints, 2, kind, str(tmp_path), 2)
    for rank, found in enumerate(loaded):
        for flat, state in found.items():
            for key, tensor in state.items():
                same = loaded[0] if key == "plain" else saved[rank]  # after a further step
                assert torch.equal(tensor, same[flat][key]), key
    assert not torch.equal(saved[0][True]["0.weight/delta"], saved[1][True]["0.weight/delta"])


def _ddp(rank, hooked):
    said_here = said()
    model = DistributedDataParallel(model_of())
    if hooked == "hook":
        model.register_comm_hook(None, noop_hook)
    optimizer = DeMo(model.parameters(), lr=0.01, **SETTINGS)
    for step in range(3):
        optimizer.zero_grad()
        if hooked == "no_sync":
            with model.no_sync():
                loss_of(model, rank, step).backward()
        else:
            loss_of(model, rank, step).backward()
        optimizer.step()
    return said_here, [p.detach() for p in model.parameters()]


@pytest.mark.processes
@pytest.mark.parametrize("hooked", ["no_sync", "hook", "averaged"])
def test_ddp_is_explained_where_it_averages(hooked):
    ranks = run_ranks(_ddp, 2, hooked)
    for messages, parameters in ranks:
        about = [m for m in messages if "all peers have the same gradients" in m]
        assert len(about) == (hooked == "averaged")
        assert all("no_sync" in m and "noop_hook" in m for m in about)
        for p, q in zip(parameters, ranks[0][1], strict=True):
            assert torch.equal(p, q)


def _placements(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    hsdp = fully_shard(model_of(), mesh=mesh)
    advice = r"mesh's dimension replicate.*fully_shard\(model, mesh=mesh\['shard'\]\)"
    for peers in (None, mesh.get_group("replicate")):
        with pytest.raises(ValueError, match=advice):
            DeMo(hsdp.parameters(), lr=0.01, process_group=peers)
    shards = fully_shard(model_of(), mesh=mesh["shard"])
    with pytest.raises(ValueError, match=r"distributed over ranks \[\d, \d\] of 4: DisTrO has to"):
        DisTrO(shards.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"are peers of this rank by process_group"):
        DeMo(shards.parameters(), lr=0.01, process_group=mesh.get_group("shard"))
    whole = fully_shard(model_of(), mesh=init_device_mesh("cpu", (4,)))
    alone = DeMo(whole.parameters(), lr=0.01, **SETTINGS)  # one replica
    loss_of(whole, rank, 0).backward()
    alone.step()
    return alone.data_receive == alone.data_transmit


@pytest.mark.processes
def test_meshes_that_would_average_gradients_are_refused():
    assert run_ranks(_placements, 4) == [True] * 4
