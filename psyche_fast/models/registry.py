"""Architectures by name: the Hugging Face ones and any other Python code."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from psyche_fast.config import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn

ENTRY_POINTS = "psyche_fast.models"

Builder = Callable[[dict[str, Any]], "nn.Module"]
"""Takes `config.json` as a dict and returns a module.

The module's `forward(input_ids, labels=None, position_ids=None)` takes int64 `[B, L]` tensors
and returns an object or dict with `loss` and `logits`, or a tuple `(loss, logits)`:
`logits` `[B, L, V]`, `loss` the mean over the shifted labels that are not -100 (None without
labels).
Where `position_ids` restart within a row, a document starts that must not see the one before.

The module may have `fsdp_modules`, the class names (or the modules) that FSDP2 shards one by one
(else every child of its `nn.ModuleList`s), and `tp_plan`, a dict from module name patterns
to Transformers' tensor-parallel styles. Parameters are built on the meta device and loaded from the
checkpoint by name; buffers keep the values that the constructor gives them.
"""

_BUILDERS: dict[str, Builder] = {}


def register(name: str, builder: Builder) -> None:
    """Makes `builder` available as `--python-arch name`.

    Raises:
        ValueError: the name is taken, or is of Psyche's `Hf...` or `module:function` form.
    """
    if is_huggingface(name) or ":" in name:
        raise ValueError(f"architecture name {name!r}: wanted no colon and no leading 'Hf'")
    if _BUILDERS.setdefault(name, builder) is not builder:
        raise ValueError(f"architecture {name!r} is registered already")


def is_huggingface(architecture: str) -> bool:
    """Whether it is `HfAuto` or another of Psyche's Hugging Face names (`HfLlama`, ...)."""
    return architecture.startswith("Hf")


def known() -> list[str]:
    """Names that `resolve` knows besides `module:function`."""
    installed = {point.name for point in entry_points(group=ENTRY_POINTS)}
    return ["HfAuto", *sorted(installed | _BUILDERS.keys())]


def resolve(architecture: str) -> Builder | None:
    """Finds an architecture.

    Args:
        architecture: `HfAuto` (or another `Hf...`), a registered name, an entry point of the
            group `psyche_fast.models`, or `module:function`.

    Returns:
        its builder, or None for the Hugging Face ones.

    Raises:
        ValueError: unknown, or it cannot be imported.
    """
    if is_huggingface(architecture):
        return None
    if architecture in _BUILDERS:
        return _BUILDERS[architecture]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == architecture:
            return _import(architecture, point.value)
    if ":" in architecture:
        return _import(architecture, architecture)
    raise ValueError(
        f"--python-arch: wanted one of {', '.join(known())}, or module:function; "
        f"got {architecture!r}"
    )


def check_named(architecture: str) -> None:
    """Checks an architecture that another machine has named: what is imported is run.

    Raises:
        ValueError: it is a `module:function` that nobody has allowed here.
    """
    allowed = os.environ.get(ARCHITECTURES, "").split(",")
    if ":" in architecture and architecture not in allowed:
        raise ValueError(
            f"rank 0 wants {architecture!r} to be imported, which nobody has allowed on this "
            f"machine: give --python-arch {architecture} here too, or {ARCHITECTURES}"
        )


def _import(architecture: str, target: str) -> Builder:
    module_name, _, function = target.partition(":")
    try:
        builder = import_module(module_name)
        for part in function.split("."):
            builder = getattr(builder, part)
    # The user's module may fail in any way.
    except Exception as error:
        raise ValueError(
            f"--python-arch: {architecture!r} cannot be imported (is it on PYTHONPATH?): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(builder):
        raise ValueError(
            f"--python-arch: {architecture!r} is {type(builder).__name__}, not a function"
        )
    return builder
