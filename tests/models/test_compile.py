"""`--compile`: the same losses and gradients, with whatever else a model is split or saved by."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import transformers
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.rank.topology import Topology
from tests.groups import run_ranks
from tests.models.support import gradients, load
from tests.tiny import VOCABULARY, random_tokens, save_llama

pytestmark = pytest.mark.slow

COMPILE = torch.compile
PACKED = Batch(random_tokens(2, 16), sequence_lengths=[[5, 11], [16]])
WHOLE = Batch(random_tokens(4, 16))


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def traced(function: Any) -> Any:
    """`torch.compile` without a compiler: what it traces, forward and backward, as PyTorch runs it.

    What the C++ compiler makes of that is PyTorch's affair, and takes it half a minute.
    """
    return COMPILE(function, backend="aot_eager")


def worst(
    folder: Path,
    topology: Topology,
    batches: list[Batch],
    how: Callable[..., Any] = traced,
    **options: Any,
) -> float:
    """The largest difference that compiling makes, in parts of the largest gradient."""
    eager = load(folder, topology, **options)
    torch._dynamo.reset()  # the code of blocks that an earlier test compiled is the same
    before = graphs()
    with mock.patch.object(torch, "compile", how):
        compiled = load(folder, topology, compile_blocks=True, **options)
    assert compiled.named_parameters().keys() == eager.named_parameters().keys()
    found = 0.0
    for batch in batches:
        one, other = gradients(eager, batch), gradients(compiled, batch)
        assert one.keys() == other.keys()
        for name, grad in one.items():
            if grad.numel():
                scale = max(float(grad.abs().max()), 1e-6)
                found = max(found, float((grad - other[name]).abs().max()) / scale)
    assert graphs() > before, "nothing was compiled"
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_losses_and_gradients_are_those_of_eager(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    assert worst(folder, Topology(), [WHOLE], how=COMPILE) < 1e-4


def test_packed_documents_are_traced_too(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    assert worst(folder, Topology(), [WHOLE, PACKED]) < 1e-4


def _split(rank: int, folder: Path, dp: int, tp: int) -> float:
    topology = Topology.build(dp, tp, torch.device("cpu"))
    return worst(folder, topology, [WHOLE], activation_checkpointing=dp > 1)


@pytest.mark.processes
def test_shards_of_both_kinds_are_compiled_too(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    assert max(run_ranks(_split, 4, folder, 2, 2)) < 1e-4


@pytest.mark.processes
def test_divided_experts_in_compiled_blocks(save_model: Any) -> None:
    folder = save_model(
        "mixtral", vocab_size=VOCABULARY, num_local_experts=4, num_experts_per_tok=2
    )
    assert max(run_ranks(_split, 2, folder, 1, 2)) < 1e-4


def test_modules_of_other_code_are_compiled_too(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    arch = f"{__name__}:build"
    assert worst(folder, Topology(), [WHOLE], architecture=arch) < 1e-4


class Other(torch.nn.Module):
    """Not Transformers' outside: its blocks are those of its `ModuleList`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        inner = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        self.model, self.lm_head = inner.model, inner.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Any) -> dict[str, Tensor]:
        logits = self.lm_head(self.model(input_ids, use_cache=False).last_hidden_state)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def build(config: dict[str, Any]) -> torch.nn.Module:
    """A module as a user's own code gives it."""
    return Other(config)
