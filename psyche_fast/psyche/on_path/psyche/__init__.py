"""Stands in for Psyche's Python package: what its core imports by name, from psyche_fast."""

from psyche_fast.psyche.interface import PretrainedSourceRepoFiles, PretrainedSourceStateDict
from psyche_fast.psyche.model import make_causal_lm

try:
    # The core's own, which are part of its process.
    from _psyche_ext import (  # type: ignore[import-not-found]
        DistroResult,
        Trainer,
        start_process_watcher,
    )
except ImportError:
    from psyche_fast.distro import DistroResult
    from psyche_fast.psyche.trainer import Trainer
    from psyche_fast.start.parent import start_process_watcher

__all__ = [
    "DistroResult",
    "PretrainedSourceRepoFiles",
    "PretrainedSourceStateDict",
    "Trainer",
    "make_causal_lm",
    "start_process_watcher",
]
