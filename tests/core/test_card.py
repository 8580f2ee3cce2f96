"""The start-up card: what it counts and says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psyche_fast.config import RunConfig
from psyche_fast.core.card import card, costs_of, count_flops, held, peak_flops
from psyche_fast.models.source import resolve_model
from tests.tiny import llama_config, save_llama

CPU = torch.device("cpu")


def test_operations_are_those_of_the_products() -> None:
    length, config = 40, llama_config()
    heads, kv, hidden, inner = 4, 2, 32, 48
    head = hidden // heads
    # Per token and layer: projections of attention, its two products, the three of the MLP.
    layer = 2 * hidden * head * (2 * heads + 2 * kv) + 4 * heads * head * length
    layer += 2 * 3 * hidden * inner
    forward = 2 * layer + 2 * hidden * config.vocab_size
    # Backward has two products for each one of forward; nobody wants the gradient of embeddings.
    assert count_flops(config.to_dict(), length) == 3 * forward
    assert count_flops({"model_type": "llama", "hidden_size": "wide"}, 8) is None


def test_what_the_card_says(tmp_path: Path) -> None:
    source = resolve_model(str(save_llama(tmp_path / "model")))
    config = RunConfig.of(
        model=str(tmp_path / "model"), sequence_length=32, micro_batch=2, total_batch=4,
        distro=True, replicas=2, compression_chunk=16, param_dtype="bfloat16",
    )  # fmt: skip
    costs = costs_of(config, source, CPU)
    assert costs.need is not None
    lines = {line[:9].strip(): line[9:] for line in card(config, source, costs, CPU)}
    assert lines["dtypes"] == (
        "parameters bfloat16, masters float32, sums of gradients bfloat16, momentum float32, "
        "checkpoints bfloat16"
    )
    assert lines["loss"] == "plain: logits of a micro-batch are 24.6 kB"
    assert lines["kernels"].startswith("encode, apply, accumulate, pack: torch (there are no")
    times = costs.need.dense / costs.need.sent
    assert f"a rank and step, {times:.0f} times less than gradients" in lines["exchange"]
    assert " a rank by estimate: parameters " in lines["memory"]
    assert held(costs.need, 100, {"process_peak": 2100, "process": 1}) == [
        "memory   rank 0 has needed 2.00 kB since it began to load, libraries' own included; the "
        f"estimate was {lines['memory'].split(' a rank')[0]}"
    ]
    assert held(None, 0, {}) == []
    own = costs_of(config.replace(python_arch="a:b"), source, CPU)
    assert card(config, source, own, CPU)[-1] == (
        "memory   not estimated: --python-arch a:b is not Transformers'"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_cpu_can_do_is_measured(dtype: torch.dtype) -> None:
    peak, whose = peak_flops(CPU, dtype)
    assert 1e6 < peak < 1e14
    assert "measured here" in whose
