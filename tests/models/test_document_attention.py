"""Packed documents on PyTorch's own kernels: no mask, and what a mask would have given."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from psyche_fast.batch import Batch
from psyche_fast.rank.topology import Topology
from tests.groups import run_ranks
from tests.models.support import gradients, load
from tests.tiny import random_tokens, save_llama

LENGTH = 1024
PACKED = Batch(
    random_tokens(2, LENGTH), sequence_lengths=[[400, 1, 111, 512], [250, 200, 200, 200, 174]]
)
IDS = random_tokens(2, 12) % 64
SIZES = {"max_position_embeddings": LENGTH}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that anything inside returns, forward and backward."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_are_those_of_masks_and_no_mask_is_made(tmp_path: Path, recomputes: bool) -> None:
    folder = save_llama(tmp_path / "model", **SIZES)
    options = {"activation_checkpointing": recomputes}
    model = load(folder, **options)
    with Largest() as largest:
        found = gradients(model, PACKED)
    assert largest.nbytes < 2 * LENGTH * LENGTH
    masked = load(folder, attn_implementation="sdpa", **options)
    masked._keeps_documents_apart = True  # it is the way of architectures that go along with less
    with Largest() as largest:
        assert_same(found, gradients(masked, PACKED))
    assert largest.nbytes >= 2 * LENGTH * LENGTH, "the control sees the mask"


def test_rows_of_one_document_follow_packed_ones(save_model) -> None:
    folder = save_model("mistral", sliding_window=4)
    model, fresh = load(folder), load(folder)
    whole = Batch(IDS)
    gradients(model, Batch(IDS, sequence_lengths=[[5, 7], [12]]))
    assert_same(gradients(fresh, whole), gradients(model, whole))


def test_windows_that_only_the_mask_knows_stay_with_the_mask(save_model) -> None:
    folder = save_model("phimoe", sliding_window=4, num_local_experts=2)
    lengths = [[5, 7], [12]]
    model = load(folder)
    model.eval()
    packed, _ = model.forward(Batch(IDS, sequence_lengths=lengths))
    alone, _ = load(folder).forward(Batch(IDS[:1, 5:]))
    torch.testing.assert_close(packed[:1, 5:], alone, rtol=1e-4, atol=1e-5)


def test_each_packing_is_not_compiled_anew(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    folder = save_llama(tmp_path / "model", **SIZES)
    torch._dynamo.reset()
    traced = partial(torch.compile, backend="aot_eager")  # what is counted is traced
    with mock.patch.object(torch, "compile", traced):
        eager, compiled = load(folder), load(folder, compile_blocks=True)
    graphs = []
    for seed, cut in enumerate((10, 77, 128, 200)):
        batch = Batch(random_tokens(1, LENGTH, seed=seed), sequence_lengths=[[cut, LENGTH - cut]])
        assert_same(gradients(eager, batch), gradients(compiled, batch))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]


def _sharded(rank: int, folder: Path) -> list[dict[str, Tensor]]:
    topology = Topology.build(2, 1, torch.device("cpu"))
    sharded = load(folder, topology, activation_checkpointing=True)
    found = gradients(sharded, PACKED)
    return [found, gradients(load(folder), PACKED)]


@pytest.mark.processes
def test_shards(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", **SIZES)
    for found, expected in run_ranks(_sharded, 2, folder):
        assert_same(expected, found)
