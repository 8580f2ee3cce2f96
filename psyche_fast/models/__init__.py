"""Models: where they come from, how they are built, split over ranks and called.

`source` finds and checks a model's files without loading it; `registry` knows the
architectures; `load_model` builds one and returns the `CausalLM` that training uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psyche_fast.models.attention import choose_attention
    from psyche_fast.models.causal_lm import CausalLM
    from psyche_fast.models.loading import load_model
    from psyche_fast.models.registry import register

# Lazily: checking a model's files must not wait for torch and transformers.
_LAZY = {
    "CausalLM": "causal_lm",
    "choose_attention": "attention",
    "load_model": "loading",
    "register": "registry",
}

__all__ = ["CausalLM", "choose_attention", "load_model", "register"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
