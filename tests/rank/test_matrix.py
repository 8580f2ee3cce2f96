"""Replicas x shards x tensor parallelism in up to 8 processes against the replicas in one process.

The oracle has no process group at all: one trainer per replica, each with its share of the batch,
that are handed one another's results as Psyche's rank 0 would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from psyche_fast import config
from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.core.estimate import estimate
from psyche_fast.distro import DistroResult, DistroStep
from psyche_fast.distro.results import collect, collect_own, quantize_1bit, to_results
from psyche_fast.models.source import read_config, resolve_model
from psyche_fast.rank.counts import Totals
from psyche_fast.rank.optimizers import Optimizer, distro_options, make_optimizer
from psyche_fast.rank.topology import Topology
from psyche_fast.rank.trainer import Trainer, trainable
from psyche_fast.schedules import Constant
from tests.groups import run_ranks
from tests.models.support import load
from tests.tiny import VOCABULARY, random_tokens

STEPS, LR = 4, 5e-4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
# More than two replicas; tensor parallelism alone; both kinds of shards; shards of four.
LAYOUTS = [(4, 1, 1), (2, 1, 2), (2, 2, 2), (2, 4, 1)]

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    place = tmp_path_factory.mktemp("matrix")
    for name, (kind, changes) in MODELS.items():
        torch.manual_seed(0)
        settings = AutoConfig.for_model(kind, **SIZES, **changes)
        AutoModelForCausalLM.from_config(settings).save_pretrained(place / name)
    return {name: place / name for name in MODELS}


def batches() -> list[Batch]:
    return [Batch(random_tokens(8, 16, seed=seed)) for seed in range(STEPS)]


def schedule() -> Constant:
    return Constant(base_lr=LR, warmup_init_lr=0.0, warmup_steps=0)


OPTIONS = config.Optimizer(
    distro=True, weight_decay=0.1, compression_decay=0.9, compression_topk=4,
    compression_chunk=16, distro_quantization=True,
)  # fmt: skip


def trainer(folder: Path, topology: Topology) -> Trainer:
    model = load(folder, topology)
    optimizer = make_optimizer(OPTIONS, trainable(model), topology.peers)
    training = config.Training(micro_batch=2, check_every=1)
    return Trainer(model, topology, schedule(), optimizer, training, OPTIONS.max_grad_norm)


class Handed(DistroStep, Optimizer):
    """DisTrO on results that are handed over between steps, where ranks would exchange them."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(parameters, master_dtype=torch.bfloat16, **distro_options(OPTIONS))
        self.received: list[list[DistroResult]] = []
        self.generated: list[DistroResult] = []

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        entries = self.compress(collect_own(self.received, self.layout), lr, grad_scale=factor)
        self.generated = to_results(self.layout, entries)

    def step(self, lr: float) -> None:
        self.update(collect(self.received, self.layout), lr)


def replica(folder: Path) -> tuple[Trainer, Handed]:
    """One replica in this process."""
    model = load(folder, Topology())
    optimizer = Handed(trainable(model))
    training = config.Training(micro_batch=2, check_every=0)
    clip = OPTIONS.max_grad_norm
    return Trainer(model, Topology(), schedule(), optimizer, training, clip), optimizer


def in_one_process(folder: Path, replicas: int) -> tuple[list[float], dict[str, Tensor]]:
    trainers = [replica(folder) for _ in range(replicas)]
    own: list[list[Any]] = [[] for _ in trainers]
    losses = []
    for step, batch in enumerate(batches(), start=1):
        outputs = []
        for r, (one, optimizer) in enumerate(trainers):
            optimizer.received = own[r] and [own[r]]
            outputs.append(one.train(step, batch.share(r, replicas)))
        losses.append(sum(float(o.loss) for o in outputs) / replicas)
        if step > 1:
            for one, optimizer in trainers:
                optimizer.received = [quantize_1bit(result) for result in own]
                one.optimize(step)
        own = [optimizer.generated for _, optimizer in trainers]
    first = trainers[0][0]
    first.plain()
    return losses, dict(first.model.full_state_dict_iter())


def in_processes(
    rank: int, folders: dict[str, Path], dp: int, tp: int
) -> dict[str, tuple[list[float], dict[str, Tensor], int]]:
    found = {}
    topology = Topology.build(dp, tp, torch.device("cpu"))
    for name, folder in folders.items():
        own = trainer(folder, topology)
        losses = []
        for step, batch in enumerate(batches(), start=1):
            output = own.train(step, batch.share(topology.replica, topology.replicas))
            losses.append(Totals(output, own).wait().loss)
            own.optimize(step)  # which checks that the replicas hold the same bits
        own.check_replicas(STEPS)
        own.plain()
        parameters = {k: t for k, t in own.model.full_state_dict_iter() if t is not None}
        found[name] = losses, parameters, own.bytes_sent
    return found if rank == 0 else {}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Callable[[str, int], tuple[list[float], dict[str, Tensor]]]:
    """`in_one_process` of a model by name and a number of replicas."""
    return cache(lambda name, replicas: in_one_process(folders[name], replicas))


@pytest.mark.parametrize(("replicas", "dp", "tp"), LAYOUTS)
def test_losses_and_parameters_are_those_of_one_process(
    folders: dict[str, Path],
    alone: Callable[[str, int], tuple[list[float], dict[str, Tensor]]],
    replicas: int,
    dp: int,
    tp: int,
) -> None:
    before = {n: dict(load(f, Topology()).full_state_dict_iter()) for n, f in folders.items()}
    # In one layout torch compares what the ranks call; elsewhere collectives are as users run them.
    check = (replicas, dp, tp) == (2, 4, 1)
    found = run_ranks(in_processes, replicas * dp * tp, folders, dp, tp, check_collectives=check)[0]
    for name, folder in folders.items():
        losses, parameters = alone(name, replicas)
        assert found[name][0] == pytest.approx(losses, abs=1e-4)
        run = RunConfig.of(
            replicas=replicas, data_parallelism=dp, tensor_parallelism=tp, param_dtype="float32",
            **msgspec.structs.asdict(OPTIONS),
        )  # fmt: skip
        if name != "experts":  # which an estimate cannot go through in fp32
            assert found[name][2] == estimate(read_config(resolve_model(str(folder))), run).sent
        trained = found[name][1]
        assert trained.keys() == parameters.keys()
        elements = sum(t.numel() for t in parameters.values())
        moved = sum((t - before[name][k]).abs().sum() for k, t in trained.items()) / elements
        assert moved > LR, "several updates"
        # An update is one of two numbers for each element: all of them are the same but where a
        # coefficient is so near to another, or to 0, that the order of a sum decides.
        flipped = sum(((t - parameters[k]).abs() > 1e-4).sum() for k, t in trained.items())
        assert flipped / elements < 0.005
        same = [(t - parameters[k]).abs() for k, t in trained.items()]
        assert max(d[d <= 1e-4].max() for d in same) < 1e-6
