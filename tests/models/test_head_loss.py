"""The loss that never holds all logits: the plain one's numbers, at a fraction of its memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM, head_loss
from psyche_fast.rank.topology import Topology
from tests.groups import run_ranks
from tests.models.conftest import SaveModel
from tests.models.support import gradients, load
from tests.tiny import save_llama

ROWS = 131  # a prime: the last chunk is a short one
CHUNK = 4 * 101 * 64


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_loss._CHUNK_BYTES, "cpu", CHUNK)
    monkeypatch.setattr(head_loss, "PLAIN_BYTES", 0)


def _numbers(dtype: torch.dtype, bias: bool) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, 24).double(), torch.randn(101, 24).double() / 3
    tensors = [hidden, weight, *([torch.randn(101).double()] if bias else [])]
    targets = torch.randint(101, (ROWS,))
    targets[[0, 64, 130]] = -100
    return [t.to(dtype).requires_grad_() for t in tensors], targets


def _plain(tensors: list[Tensor], targets: Tensor) -> Tensor:
    logits = F.linear(*tensors)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum")


def _error(tensors: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(tensors, exact, strict=True)
    return [float((t.grad.double() - e.grad).norm() / e.grad.norm()) for t, e in pairs]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_err_no_more_than_the_plain_ones(dtype: torch.dtype, bias: bool) -> None:
    tensors, targets = _numbers(dtype, bias)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    (_plain(exact, targets) * 0.37).backward()
    (plain := _plain(tensors, targets)).mul(0.37).backward()
    allowed = _error(tensors, exact)
    for tensor in tensors:
        tensor.grad = None
    loss = head_loss.chunked_cross_entropy(*tensors, *([] if bias else [None]), targets)
    (loss * 0.37).backward()
    torch.testing.assert_close(loss, plain)
    for own, reference in zip(_error(tensors, exact), allowed, strict=True):
        assert own <= 1.05 * reference + 1e-7
    assert [t.grad.dtype for t in tensors] == [dtype] * len(tensors)


def test_nothing_counts_and_nothing_is_wanted() -> None:
    tensors, targets = _numbers(torch.float32, bias=True)
    loss = head_loss.chunked_cross_entropy(*tensors, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in tensors)
    tensors[1].requires_grad_(False)
    tensors[1].grad = None
    head_loss.chunked_cross_entropy(*tensors, targets).backward()
    assert tensors[1].grad is None
    with torch.no_grad():
        assert not head_loss.chunked_cross_entropy(*tensors, targets).requires_grad


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("phi", {}),  # a bias
    ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, **NO_DROPOUT}),
    ("mixtral", {"num_local_experts": 4, "output_router_logits": True}),
]


def _both(folder: Path, batch: Batch, **options: Any) -> list[dict[str, Tensor]]:
    return [gradients(load(folder, loss=kind, **options), batch) for kind in ("plain", "chunked")]


@pytest.mark.parametrize(("kind", "config"), MODELS, ids=["llama", "tied", "phi", "gpt2", "moe"])
def test_models_learn_the_same(save_model: SaveModel, kind: str, config: dict[str, Any]) -> None:
    rows = torch.randint(3, 64, (3, 40))
    labels = rows.clone()
    labels[1, 7:] = -100
    plain, chunked = _both(save_model(kind, **config), Batch(rows, labels=labels))
    assert plain.keys() == chunked.keys()
    for name in plain:
        torch.testing.assert_close(chunked[name], plain[name], atol=2e-6, rtol=1e-4)


def test_packed_rows(save_model: SaveModel) -> None:
    rows, positions = torch.randint(3, 64, (2, 16)), torch.arange(8).repeat(2, 2)
    plain, chunked = _both(save_model("llama"), Batch(rows, position_ids=positions))
    for name in plain:
        torch.testing.assert_close(chunked[name], plain[name], atol=2e-6, rtol=1e-4)


CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}),
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.06}),
]


@pytest.mark.parametrize(("kind", "config"), CHANGED, ids=[kind for kind, _ in CHANGED])
def test_models_that_change_their_logits_keep_them(
    save_model: SaveModel, kind: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder, batch = save_model(kind, **config), Batch(torch.randint(3, 64, (2, 16)))
    eager = {"attn_implementation": "eager"}
    plain = gradients(load(folder, loss="plain", **eager), batch)
    with caplog.at_level(logging.WARNING):
        automatic = gradients(load(folder, loss="auto", **eager), batch)
    assert "changes its logits" in caplog.text
    for name in plain:
        assert torch.equal(automatic[name], plain[name])
    with pytest.raises(ValueError, match=r"--loss chunked: .* changes its logits.*--loss plain"):
        gradients(load(folder, loss="chunked", **eager), batch)


def test_auto_goes_by_size(save_model: SaveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(save_model("llama"), loss="auto")
    batch = Batch(torch.randint(3, 64, (2, 16)))
    model.train()
    assert model.goes_without_logits(batch)
    monkeypatch.setattr(head_loss, "PLAIN_BYTES", 4 * 2 * 16 * 64)
    assert not model.goes_without_logits(batch)
    model.eval()
    monkeypatch.setattr(head_loss, "PLAIN_BYTES", 0)
    assert not model.goes_without_logits(batch)


def test_auto_takes_chunks_where_a_cpu_is_faster_with_them(
    save_model: SaveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batch = save_model("llama"), Batch(torch.randint(3, 64, (2, 16)))
    size = 4 * 2 * 16 * 64
    monkeypatch.setattr(head_loss, "PLAIN_BYTES", 8 * size)
    model = load(folder, loss="auto")
    model.train()
    for chunk, chunked in ((size - 1, True), (size, False)):
        monkeypatch.setitem(head_loss._CHUNK_BYTES, "cpu", chunk)
        assert model.goes_without_logits(batch) == chunked
    assert head_loss.plain_bytes("cuda") == 8 * size


def _sharded(rank: int, folder: Path) -> list[dict[str, Tensor]]:
    topology = Topology.build(2, 1, torch.device("cpu"))
    rows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    models: list[CausalLM] = [
        load(folder, topology, loss=kind) for kind in ("plain", "chunked", "chunked")
    ]
    batch = Batch(rows).share(topology.shard, 2)
    gradients(models[2], batch)  # its second step does not probe
    return [gradients(model, batch) for model in models]


@pytest.mark.processes
def test_shards(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    for plain, *others in run_ranks(_sharded, 2, folder):
        for chunked in others:
            for name in plain:
                torch.testing.assert_close(chunked[name], plain[name], atol=2e-6, rtol=1e-4)
