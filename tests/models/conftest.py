"""Tiny models on disk, as users have them: folders that save_pretrained wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SaveModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Saves a randomly initialised model: `save_model("llama", max_shard_size=..., **config)`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def save(model_type: str = "llama", *, max_shard_size: str = "1GB", **config: Any) -> Path:
        torch.manual_seed(0)
        settings = AutoConfig.for_model(model_type, **{**TINY, **config})
        model = AutoModelForCausalLM.from_config(settings)
        with torch.no_grad():
            for param in model.parameters():  # norms and biases too: all zeros would hide faults
                param.add_(torch.randn_like(param) * 0.02)
        folder = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return save
