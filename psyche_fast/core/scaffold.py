"""`psyche-fast init`: a configuration with every key explained, and a model to train."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from psyche_fast import presets
from psyche_fast.config import FLAGS, INSTEAD_OF, RunConfig, flag
from psyche_fast.data import load_tokenizer
from psyche_fast.data.tokenize import TOKENIZER_FOLDER
from psyche_fast.locations import FRESH
from psyche_fast.models.fresh import write_fresh

CONFIG = "run.toml"
MODEL = "model"


def init(folder: Path, names: Sequence[str], data_path: str | None, seed: int) -> list[str]:
    """Writes `run.toml`, and a fresh model where a preset of a size and tokens are given.

    Args:
        folder: to write to; made where it is missing.
        names: presets.
        data_path: what `train` is to have; a folder of `tokenize` has the model's tokenizer.
        seed: of the model's weights.

    Returns:
        Lines for the user: what is there, and what to do with it.

    Raises:
        ValueError: no such preset, or something of that name is there already.
        OSError: it cannot be written.
    """
    for name in (CONFIG, MODEL):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} is there already; name a new folder")
    values = presets.values_of(names, ())
    if data_path is not None:
        values["data_path"] = data_path
    size = str(values.get("model", "")).removeprefix(FRESH)
    tokenizer = None if data_path is None else Path(data_path, TOKENIZER_FOLDER)
    has_own = "model" in values and tokenizer is not None and tokenizer.is_dir()
    if has_own:
        values["model"] = str(folder / MODEL)
    text = commented(values, names)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    if has_own:
        assert tokenizer is not None
        chosen = load_tokenizer(tokenizer)
        write_fresh(folder / MODEL, size, chosen, values["sequence_length"], seed)
        lines.append(f"{folder / MODEL}: an untrained model for the tokenizer of {data_path}")
    partial = folder / f".{CONFIG}.{os.getpid()}"
    partial.write_text(text, encoding="utf-8")
    partial.rename(folder / CONFIG)
    return [
        *lines,
        f"{folder / CONFIG}: every key with what it does; those that are set stand without #",
        f"next: psyche-fast train --config {folder / CONFIG} --dry-run",
    ]


def commented(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """The text of a configuration: these values, and all other keys as comments.

    Args:
        values: by the flags' names.
        names: the presets that they are from, whose sources are named.
    """
    RunConfig.of(**values)  # refuses what does not go together
    lines = ["# A run of psyche-fast. Start it with `psyche-fast train --config FILE`; flags go"]
    lines += ["# over what stands here. A key with # before it has the value that is shown.", ""]
    for name in names:
        preset = presets.PRESETS[name]
        lines.append(f"# Preset {name}: {preset.what}.")
        for source in preset.sources:
            lines += textwrap.wrap(source, 98, initial_indent="#   ", subsequent_indent="#     ")
    section = None
    for name, known in FLAGS.items():
        if known.section != section:
            section = known.section
            lines += ["", f"[{section}]"]
        lines += textwrap.wrap(
            known.help, 98, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False
        )
        if name in values:
            lines.append(_assignment(name, values[name]))
        elif known.default is None:
            lines.append(f"# {name} =")
        elif INSTEAD_OF.get(name) in values:
            lines.append(f"# {name}: follows from {flag(INSTEAD_OF[name])[2:]}")
        else:
            lines.append(f"# {_assignment(name, known.default)}")
    return "\n".join(lines) + "\n"


def _assignment(name: str, value: Any) -> str:
    if name == "micro_batch" and value == 0:
        value = "auto"
    return msgspec.toml.encode({name: value}).decode().strip()
