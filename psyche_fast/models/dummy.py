"""A model for trying a run out (`--model dummy:`)."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def model_folder() -> Path:
    """The folder of a Llama of one small layer, always the same one, made where it is missing.

    It lies in the user's cache (`XDG_CACHE_HOME`, else `~/.cache`). The vocabulary is Llama 2's.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "psyche_fast"
    folder = cache / "dummy-model-1"
    if folder.is_dir():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".dummy-model-", dir=cache))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(made)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
