"""The operations in plain PyTorch, on any device: grouped, batched, no loop over parameters in the transforms."""

from psyche_fast.kernels.reference.apply import apply, lookahead
from psyche_fast.kernels.reference.decode import subtract
from psyche_fast.kernels.reference.encode import encode

__all__ = ["apply", "encode", "lookahead", "subtract"]
