"""A whole step of training as a rank does it, without data and the core's word beside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.serve import build_trainer
from psyche_fast.start.libraries import keep_freed_memory

CASES = ("Llama, AdamW", "Llama, DisTrO")
_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"width": 192, "layers": 4, "vocabulary": 2048, "rows": 4, "length": 128},
    "cuda": {"width": 1024, "layers": 16, "vocabulary": 32000, "rows": 8, "length": 2048},
}


@dataclass(frozen=True)
class Step:
    """One step, again and again.

    Attributes:
        run: takes it: forward, backward, clipping, the optimiser's step.
        flops: of forward and backward, counted by torch, which on a CPU leaves out attention's own.
        tokens: that it trains.
    """

    run: Callable[[], object]
    flops: int
    tokens: int


@contextmanager
def step(name: str, device: torch.device) -> Iterator[Step]:
    """A model with its trainer, alone; DisTrO applies its own results.

    Args:
        name: one of `CASES`.
        device: where; a larger model on a GPU.
    """
    size = _SIZES[device.type]
    rows, length = size["rows"], size["length"]
    with tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder), size)
        config = RunConfig.of(
            model=folder,
            data_path="none",
            sequence_length=length,
            micro_batch=rows,
            total_batch=rows,
            warmup_steps=0,
            distro=name.endswith("DisTrO"),
            check_every=0,
            param_dtype="bfloat16" if device.type == "cuda" else "float32",
            attn_implementation="sdpa",
        )
        if device.type == "cpu":
            keep_freed_memory(os.environ)
        trainer = build_trainer(config, resolve_model(folder), device)
    ids = torch.randint(size["vocabulary"], (rows, length))
    counter = FlopCounterMode(display=False)
    with counter:
        trainer.model.loss(trainer.model.prepare(Batch(ids))).backward()
    at = 0

    def run() -> None:
        nonlocal at
        at += 1
        trainer.train(at, Batch(ids))
        trainer.optimize(at)

    yield Step(run, counter.get_total_flops(), rows * length)


def _save_model(folder: Path, size: dict[str, Any]) -> None:
    width = size["width"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64,
        num_hidden_layers=size["layers"],
        num_attention_heads=width // 64,
        max_position_embeddings=size["length"],
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
