"""What a run is told to be before its first step, beside the plan's summary: the start-up card.

What it costs, by `estimate` and by counting operations, is found out while other ranks start.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from psyche_fast.compat import FakeTensorMode, TorchDispatchMode, without_values
from psyche_fast.config import RunConfig
from psyche_fast.core.estimate import Estimate, estimate
from psyche_fast.kernels.backends import explain
from psyche_fast.metrics.formatting import format_bytes, format_count
from psyche_fast.models import head_loss, huggingface
from psyche_fast.models.source import FilesSource, read_config, tensor_shapes, vocabulary_size

log = logging.getLogger("psyche_fast.core")

_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "GH200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12,
    "A40": 150e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""bf16 operations a second of dense products with fp32 sums, from NVIDIA's data sheets."""
_MEASURED = 0.05
"""Seconds of products where no data sheet says what a device can do."""
_SMALL = 5_000_000
"""Parameters below which nobody asks what a run costs; the demo has a million."""


@dataclass(frozen=True)
class Costs:
    """What a run needs.

    Attributes:
        need: by `estimate`; None where there is none.
        why_not: the reason for that.
        token_flops: operations of forward and backward for a token; None where they are not known.
    """

    need: Estimate | None
    why_not: str
    token_flops: float | None


def costs_at_start(config: RunConfig, source: FilesSource, device: torch.device) -> Costs:
    """`costs_of`, but of models so small that to count would take longer than their first step."""
    if sum(math.prod(shape) for shape in tensor_shapes(source).values()) < _SMALL:
        return Costs(None, "the model is small", None)
    return costs_of(config, source, device)


def costs_of(config: RunConfig, source: FilesSource, device: torch.device) -> Costs:
    """What a run needs; before this process has joined others.

    Args:
        config: the run, resolved.
        source: the model's files.
        device: rank 0's.
    """
    if config.model.python_arch != "HfAuto":
        return Costs(None, f"--python-arch {config.model.python_arch} is not Transformers'", None)
    model = read_config(source)
    try:
        need, why_not = estimate(model, config, device.type), ""
    # Architectures fail in any way where tensors have no content; that is no reason to end a run.
    except Exception as error:
        need, why_not = None, str(error).removeprefix("estimate: ")
    return Costs(need, why_not, count_flops(model, config.model.sequence_length))


def count_flops(model: dict[str, Any], length: int) -> float | None:
    """Operations of forward and backward for a token, as the model's products have them.

    Counted on tensors without content, attention over the whole sequence as PaLM's authors do
    (arXiv 2204.02311, appendix B); what is recomputed to save memory does not count.

    Args:
        model: `config.json`.
        length: tokens of a sequence.

    Returns:
        None for a model that cannot be gone through without values.
    """
    try:
        with torch.device("meta"):
            module: nn.Module = huggingface.build(model, torch.bfloat16, "eager", length)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.to_empty(device="cpu")
            ids = torch.zeros(1, length, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter, _WithoutValues() as answers:
                module(input_ids=ids, use_cache=False).logits.float().sum().backward()
    # Architectures fail in any way where tensors have no content, or eager attention is not known.
    except Exception as error:
        log.info("operations are not counted: %s", error)
        return None
    return None if answers.has_groups else counter.get_total_flops() / length


class _WithoutValues(TorchDispatchMode):
    """Answers what would want values.

    Attributes:
        has_groups: whether there were grouped products, whose operations hang on values.
    """

    has_groups = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator."""
        self.has_groups |= "_grouped_mm" in str(func)
        return without_values(func, args, kwargs or {})


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """What a device can do in a second, and who says so."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in _PEAKS.items():
            if known in name:
                return peak, f"of {name}'s {format_count(peak)} operations a second"
    side = 4096 if device.type == "cuda" else 512
    one = torch.ones(side, side, dtype=dtype, device=device)
    count, began, best = 0, time.perf_counter(), 0.0
    while time.perf_counter() - began < _MEASURED or count < 3:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        at = time.perf_counter()
        one @ (one if count % 2 else one.mT)  # backward's and forward's, which may differ much
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, count = max(best, 2 * side**3 / (time.perf_counter() - at)), count + 1
    return best, f"of {format_count(best)} operations a second, measured here"


def card(config: RunConfig, source: FilesSource, costs: Costs, device: torch.device) -> list[str]:
    """Lines as the plan's summary has them: a word, and what there is to say.

    Args:
        config: the run, resolved.
        source: the model's files.
        costs: as of `costs_of`.
        device: rank 0's.
    """
    name, reason = explain(device)
    lines = [
        f"dtypes   {_dtypes(config)}",
        f"loss     {_loss(config, read_config(source), device)}",
    ]
    if config.optimizer.distro and device.type != "cuda":  # of GPUs the summary says more
        lines.append(f"kernels  encode, apply, accumulate, pack: {name} ({reason})")
    need = costs.need
    if need is not None and need.sent:
        less = (
            f"{need.dense / need.sent:.0f} times less than gradients ({format_bytes(need.dense)})"
        )
        lines.append(f"exchange {format_bytes(need.sent)} a rank and step, {less}")
    if need is None:
        lines.append(f"memory   not estimated: {costs.why_not}")
    else:
        parts = ("parameters", "gradients", "optimizer", "activations", "workspace", "unsharded")
        named = ((part, getattr(need, part)) for part in parts)
        shown = ", ".join(f"{part} {format_bytes(size)}" for part, size in named if size)
        lines.append(f"memory   {format_bytes(need.memory)} a rank by estimate: {shown}")
    return lines


def _dtypes(config: RunConfig) -> str:
    model, optimizer = config.model, config.optimizer
    wide = model.param_dtype == "float32"
    kinds = {
        "parameters": model.param_dtype,
        "masters": "the parameters" if wide else model.master_dtype,
        "sums of gradients": "float32"
        if config.training.grad_accum_in_fp32 or config.training.defer_grad_sync
        else model.param_dtype,
        **({"momentum": optimizer.delta_dtype} if optimizer.distro else {}),
        "checkpoints": model.save_dtype or model.param_dtype,
    }
    return ", ".join(f"{name} {kind}" for name, kind in kinds.items())


def _loss(config: RunConfig, model: dict[str, Any], device: torch.device) -> str:
    if config.model.liger:
        return "Liger's kernels, without logits"
    vocabulary = vocabulary_size(model)
    if vocabulary is None:
        return f"{config.model.loss}, the model's own"
    size = 4 * config.training.micro_batch * config.model.sequence_length * vocabulary
    whole = f"logits of a micro-batch are {format_bytes(size)}"
    if config.model.loss != "auto":
        return f"{config.model.loss}, as asked for ({whole})"
    if size <= head_loss.plain_bytes(device.type):
        return f"plain: {whole}"
    if config.parallelism.tensor_parallelism > 1:
        return f"plain: {whole}, and the head is split over ranks"
    return f"chunked where the model allows it: {whole}"


def held(need: Estimate | None, before: int, memory: Mapping[str, int]) -> list[str]:
    """What rank 0 holds beside what it was estimated to hold: a line, or none.

    Args:
        need: the estimate.
        before: bytes of the process before it loaded the model.
        memory: as of `metrics.memory_bytes`, after some steps.
    """
    if need is None:
        return []
    on_gpu = memory.get("cuda_peak_allocated")
    now = memory["process_peak"] - before if on_gpu is None else on_gpu
    of = "since it began to load, libraries' own included"
    if on_gpu is not None:
        of = "of tensors on its GPU"
    return [
        f"memory   rank 0 has needed {format_bytes(now)} {of}; the estimate was "
        f"{format_bytes(need.memory)}"
    ]
