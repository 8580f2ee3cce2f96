"""The classes that models of one's own are made of."""

from psyche_fast.psyche.interface import (
    CausalLM,
    PretrainedSourceRepoFiles,
    PretrainedSourceStateDict,
)
from psyche_fast.psyche.model import make_causal_lm

__all__ = ["CausalLM", "PretrainedSourceRepoFiles", "PretrainedSourceStateDict", "make_causal_lm"]
