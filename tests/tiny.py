"""Tiny models and data for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY = 96


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.LlamaConfig(**{**fields, **changes})


def save_llama(folder: Path, **changes: Any) -> Path:
    """A randomly initialised Llama in fp32, always the same one."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(**changes))
    model.save_pretrained(folder)
    return folder


def save_tokens(folder: Path, tokens: int = 20_000, seed: int = 0) -> Path:
    """Token files of a text that can be learnt: each token mostly follows from the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ids = np.zeros(tokens, dtype=np.uint16)
    for at in range(1, tokens):
        ids[at] = (
            rng.integers(VOCABULARY) if rng.random() < 0.1 else (ids[at - 1] * 7 + 3) % VOCABULARY
        )
    ids.tofile(folder / "tokens.bin")
    return folder


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def batch_loss(model: torch.nn.Module, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy per real token, written out."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1)
    )
