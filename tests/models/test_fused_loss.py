"""A loss that takes the output layer's weight itself, as Liger's does, on FSDP2's shards.

Liger's kernels want a GPU; what FSDP2 makes of their way to the weight does not: the stand-in here
has the signature and the arithmetic of Liger's forward, in PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import CausalLMOutput

from psyche_fast.batch import Batch
from psyche_fast.models import huggingface, load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.topology import Topology
from tests.groups import run_ranks
from tests.tiny import random_tokens, save_llama


def fused_forward(
    self: Any, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor, **kwargs: Any
) -> CausalLMOutput:
    kwargs.pop("return_dict")
    hidden = self.model(input_ids, **kwargs).last_hidden_state
    weight = self.lm_head.weight
    assert not isinstance(weight, DTensor), "a kernel would read a shard as the whole"
    logits = F.linear(hidden, weight)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return CausalLMOutput(loss=total / num_items_in_batch, logits=None)


def fuse(model: nn.Module, device: torch.device) -> None:
    model.forward = MethodType(fused_forward, model)


def _gradients(rank: int, folder: Path, recomputes: bool) -> list[dict[str, Tensor]]:
    topology = Topology.build(2, 1, torch.device("cpu"))
    batch = Batch(random_tokens(4, 12)).share(topology.shard, 2)
    found = []
    for liger in (False, True):
        with mock.patch.object(huggingface, "apply_liger", fuse):
            model = load_model(
                resolve_model(str(folder)), device=torch.device("cpu"),
                param_dtype=torch.float32, shard_mesh=topology.shard_mesh, group=topology.copy,
                activation_checkpointing=recomputes, liger=liger,
            )  # fmt: skip
        model.train()
        loss = model.loss(batch)
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        grads = {n: p.grad for n, p in model.named_parameters().items()}
        assert all(isinstance(grad, DTensor) for grad in grads.values())
        whole = {n: grad.full_tensor() for n, grad in grads.items() if isinstance(grad, DTensor)}
        found.append({"": total, **whole})
    return found


@pytest.mark.processes
@pytest.mark.parametrize(("tied", "recomputes"), [(False, False), (True, True)])
def test_a_fused_loss_on_shards(tmp_path: Path, tied: bool, recomputes: bool) -> None:
    folder = save_llama(tmp_path / "model", tie_word_embeddings=tied)
    for plain, fused in run_ranks(_gradients, 2, folder, recomputes):
        assert plain.keys() == fused.keys()
        for name, grad in plain.items():
            torch.testing.assert_close(fused[name], grad, rtol=1e-5, atol=1e-7)
