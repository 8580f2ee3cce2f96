"""psyche_fast: a fast trainer for low-communication LLM training with DisTrO and DeMo.

Importing the package is cheap: torch, triton and transformers are imported only when one of the
public names below is used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psyche_fast.distro import DeMo, DisTrO, Distro, DistroResult, quantize_1bit
    from psyche_fast.methods import LocalSteps
    from psyche_fast.schedules import LearningRateSchedule

__version__ = "0.1.0"

if os.environ.get("PSYCHE_FAST_KERNELS") == "interpret":
    # Triton wants to know before it is imported, which other libraries may do first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_LAZY = {
    "DeMo": "psyche_fast.distro",
    "DisTrO": "psyche_fast.distro",
    "Distro": "psyche_fast.distro",
    "DistroResult": "psyche_fast.distro",
    "quantize_1bit": "psyche_fast.distro",
    "LearningRateSchedule": "psyche_fast.schedules",
    "LocalSteps": "psyche_fast.methods",
}

__all__ = [
    "DeMo",
    "DisTrO",
    "Distro",
    "DistroResult",
    "LearningRateSchedule",
    "LocalSteps",
    "__version__",
    "quantize_1bit",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
