"""Where Psyche's own package has the abstract class and the sources."""

from psyche_fast.psyche.interface import (
    CausalLM,
    PretrainedSourceRepoFiles,
    PretrainedSourceStateDict,
)

__all__ = ["CausalLM", "PretrainedSourceRepoFiles", "PretrainedSourceStateDict"]
