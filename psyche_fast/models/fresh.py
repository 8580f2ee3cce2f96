"""Models that are made on the spot: `--model dummy:` to try a run out, `fresh:20M` to train."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_fast.locations import FRESH
from psyche_fast.presets import fresh_shape

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

_VOCABULARY = 32000
"""Llama 2's."""
_DUMMY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def dummy_folder() -> Path:
    """The folder of a Llama of one small layer, always the same one, made where it is missing."""
    return _cached("dummy-model-1", _DUMMY, tied=False)


def fresh_folder(name: str) -> Path:
    """The folder of `fresh:NAME`, an untrained Llama of a preset's shape for Llama 2's tokenizer.

    It is made where it is missing, with the seed 0.

    Raises:
        ValueError: there is none of that name.
        OSError: no room for it.
    """
    size = name.removeprefix(FRESH)
    return _cached(f"fresh-{size}-1", fresh_shape(size), tied=True)


def fresh_config(name: str) -> str:
    """The `config.json` of `fresh:NAME`, for which nothing is made.

    Raises:
        ValueError: there is none of that name.
    """
    config = _config(fresh_shape(name.removeprefix(FRESH)), tied=True)
    config.architectures = ["LlamaForCausalLM"]
    return str(config.to_json_string())


def write_fresh(
    folder: Path, size: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int
) -> None:
    """Writes an untrained Llama of a preset's shape, for a tokenizer, which is put beside it.

    Args:
        folder: to write to, which must not be there.
        size: the preset's name.
        tokenizer: whose ids it knows; the vocabulary is the next multiple of 64.
        sequence_length: positions.
        seed: of its weights.
    """
    ids = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    _write(
        folder, fresh_shape(size), tied=True, seed=seed, vocabulary=64 * -(-len(tokenizer) // 64),
        max_position_embeddings=sequence_length, **ids,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def _cached(name: str, shape: Mapping[str, int], *, tied: bool) -> Path:
    """A model in the user's cache (`XDG_CACHE_HOME`, else `~/.cache`)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "psyche_fast"
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _write(folder, shape, tied=tied)
    return folder


def _config(
    shape: Mapping[str, int],
    *,
    tied: bool,
    vocabulary: int = _VOCABULARY,
    max_position_embeddings: int = 2048,
    **ids: Any,
) -> LlamaConfig:
    from transformers import LlamaConfig

    fields: dict[str, Any] = {**shape, **ids}
    return LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied, **fields,
    )  # fmt: skip


def _write(
    folder: Path, shape: Mapping[str, int], *, tied: bool, seed: int = 0, **options: Any
) -> None:
    import torch
    import transformers
    from transformers import LlamaForCausalLM

    shows = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # "Writing model shards"
    config = _config(shape, tied=tied, **options)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        needed = sum(math.prod(p.shape) * p.element_size() for p in model.parameters())
        if shutil.disk_usage(made).free < needed:
            raise OSError(f"{folder}: no room for a model of {needed / 1e9:.1f} GB")
        model.save_pretrained(made)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    finally:
        if shows:
            transformers.utils.logging.enable_progress_bar()
        shutil.rmtree(made, ignore_errors=True)
