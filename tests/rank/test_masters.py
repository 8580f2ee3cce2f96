"""fp32 masters of bf16 parameters: updates that a bf16 step would lose arrive all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from psyche_fast import config
from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM, load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.checkpoint import save_model
from psyche_fast.rank.optimizers import make_optimizer
from psyche_fast.rank.topology import Topology
from psyche_fast.rank.trainer import Trainer, trainable
from psyche_fast.schedules import Constant
from psyche_fast.sharding import full_tensor
from tests.groups import run_ranks
from tests.tiny import save_llama

ADAMW = config.Optimizer(weight_decay=0.1)
DISTRO = config.Optimizer(
    distro=True, weight_decay=0.1, compression_chunk=8, compression_topk=8, compression_decay=0.9,
)  # fmt: skip
LEARNING_RATE = 4e-4
"""The default: a quarter of half a bf16 step of a norm's weight of 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def load(folder: Path, topology: Topology, param: torch.dtype, master: torch.dtype) -> CausalLM:
    return load_model(
        resolve_model(str(folder)), device=torch.device("cpu"), param_dtype=param,
        master_dtype=master, shard_mesh=topology.shard_mesh, tensor_mesh=topology.tensor_mesh,
        group=topology.copy,
    )  # fmt: skip


def trained(
    folder: Path, options: config.Optimizer, param: torch.dtype, master: torch.dtype,
    topology: Topology | None = None, steps: int = 10,
) -> Trainer:  # fmt: skip
    topology = topology or Topology()
    model = load(folder, topology, param, master)
    optimizer = make_optimizer(options, trainable(model), topology.peers, model.masters)
    schedule = Constant(base_lr=LEARNING_RATE, warmup_init_lr=0.0, warmup_steps=0)
    training = config.Training(micro_batch=4, check_every=1)
    trainer = Trainer(model, topology, schedule, optimizer, training, 1.0)
    rows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(topology.replica))
    for step in range(1, steps + 1):
        trainer.train(step, Batch(rows))
        trainer.optimize(step)
    trainer.plain()
    return trainer


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(t.detach()).clone() for name, t in tensors.items()}


def test_adamw_moves_what_bf16_steps_cannot(folder: Path) -> None:
    start = load_file(folder / "model.safetensors")
    wide = whole(trained(folder, ADAMW, torch.float32, torch.float32).parameters)
    trainer = trained(folder, ADAMW, torch.bfloat16, torch.float32)
    narrow = trained(folder, ADAMW, torch.bfloat16, torch.bfloat16)
    masters = trainer.model.masters
    assert set(masters) == set(wide)
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(trainer.parameters[name], master.bfloat16())
        # AdamW's first steps are of the learning rate's size whatever the gradient's: where bf16
        # changes a small gradient's sign they differ, elsewhere they are fp32's.
        moved = wide[name] - start[name]
        assert (master - wide[name]).norm() < 0.2 * moved.norm(), name
    norms = [name for name in masters if "norm" in name]
    assert norms
    for name in norms:
        assert (masters[name] != start[name]).all(), name
        assert torch.equal(narrow.parameters[name], start[name].bfloat16()), name
    moments = trainer._optimizer.momentum()
    assert {m.dtype for m in moments.values()} == {torch.float32}
    assert list(moments) == list(trainer.parameters)


def test_distro_moves_what_bf16_steps_cannot(folder: Path) -> None:
    start = load_file(folder / "model.safetensors")
    trainer = trained(folder, DISTRO, torch.bfloat16, torch.float32)
    narrow = trained(folder, DISTRO, torch.bfloat16, torch.bfloat16)
    norms = [name for name in trainer.model.masters if "norm" in name]
    for name, master in trainer.model.masters.items():
        assert torch.equal(trainer.parameters[name], master.bfloat16())
        if name in norms:
            assert (master != start[name]).all(), name
            # Between 1 - 2^-8 and 1 a bf16 step is half as wide, so some steps down arrive.
            assert (narrow.parameters[name] == 1).float().mean() > 0.3, name
    assert norms


def test_masters_begin_with_what_the_checkpoint_holds(folder: Path) -> None:
    start = load_file(folder / "model.safetensors")
    model = load(folder, Topology(), torch.bfloat16, torch.float32)
    for name, master in model.masters.items():
        assert torch.equal(master, start[name])
    assert not torch.equal(start["lm_head.weight"], start["lm_head.weight"].bfloat16())


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["masters", "none"])
def test_widening_a_part_at_a_time_changes_no_bit(
    folder: Path, master: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = whole(trained(folder, ADAMW, torch.bfloat16, master, steps=3).parameters)
    monkeypatch.setattr("psyche_fast.rank.optimizers._STEPPED_ELEMENTS", 1000)
    parts = whole(trained(folder, ADAMW, torch.bfloat16, master, steps=3).parameters)
    assert all(torch.equal(at_once[name], parts[name]) for name in at_once)


def test_a_refused_gradient_leaves_masters_and_moments(folder: Path) -> None:
    trainer = trained(folder, ADAMW, torch.bfloat16, torch.float32, steps=2)
    before = whole(trainer.model.masters), whole(dict(trainer._optimizer.momentum()))
    for parameter in trainer.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.inf)
    trainer._optimizer.after_backward(0.0, LEARNING_RATE, torch.tensor(torch.nan))
    trainer._optimizer.step(LEARNING_RATE)
    after = whole(trainer.model.masters), whole(dict(trainer._optimizer.momentum()))
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("save", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_types_of_checkpoints(
    folder: Path, tmp_path: Path, param: torch.dtype, save: torch.dtype | None
) -> None:
    """An fp32 checkpoint holds the masters' bits, and `config.json` says its type."""
    model = load_model(
        resolve_model(str(folder)), device=torch.device("cpu"), param_dtype=param,
        master_dtype=torch.float32, save_dtype=save,
    )  # fmt: skip
    save_model(tmp_path / "out", model, model.full_state_dict_iter(), ())
    saved, start = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    dtype = save or param
    for name, tensor in start.items():
        assert torch.equal(saved[name], tensor.to(dtype)), name
        assert saved[name].dtype == dtype
    said = json.loads((tmp_path / "out/config.json").read_text())["dtype"]
    assert said == str(dtype).removeprefix("torch.")


def _sharded(
    rank: int, folder: Path, dp: int, tp: int, options: config.Optimizer
) -> tuple[dict[str, Tensor], ...]:
    topology = Topology.build(dp, tp, torch.device("cpu"))
    trainer = trained(folder, options, torch.bfloat16, torch.float32, topology, steps=3)
    trainer.model._saved_as = torch.bfloat16, torch.float32
    saved = dict(trainer.model.full_state_dict_iter())
    return whole(trainer.parameters), whole(trainer.model.masters), saved


@pytest.mark.processes
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (1, 2)], ids=["FSDP2", "TP"])
@pytest.mark.parametrize("options", [ADAMW, DISTRO], ids=["AdamW", "DisTrO"])
def test_masters_of_shards(folder: Path, dp: int, tp: int, options: config.Optimizer) -> None:
    alone = whole(trained(folder, options, torch.bfloat16, torch.float32, steps=3).model.masters)
    start = load_file(folder / "model.safetensors")
    for rank, (parameters, masters, saved) in enumerate(
        run_ranks(_sharded, 2, folder, dp, tp, options)
    ):
        for name, master in masters.items():
            assert torch.equal(parameters[name], master.bfloat16())
            moved = alone[name] - start[name]
            # Sums in another order change some signs of small numbers.
            assert (master - alone[name]).norm() < 0.7 * moved.norm(), name
            if rank == 0:
                assert torch.equal(saved[name], master)
