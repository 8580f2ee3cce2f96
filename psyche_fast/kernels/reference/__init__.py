"""The operations in plain PyTorch, on any device: transforms are batched over the class."""

from psyche_fast.kernels.reference.apply import apply, lookahead
from psyche_fast.kernels.reference.decode import subtract
from psyche_fast.kernels.reference.encode import encode

__all__ = ["apply", "encode", "lookahead", "subtract"]
