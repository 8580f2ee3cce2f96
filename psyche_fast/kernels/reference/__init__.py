"""The operations in plain PyTorch, on any device: transforms are batched over the class."""

from psyche_fast.kernels.reference.accumulate import accumulate, squared_norms
from psyche_fast.kernels.reference.apply import apply, lookahead
from psyche_fast.kernels.reference.decode import subtract
from psyche_fast.kernels.reference.encode import encode
from psyche_fast.kernels.reference.pack import pack, unpack

__all__ = [
    "accumulate",
    "apply",
    "encode",
    "lookahead",
    "pack",
    "squared_norms",
    "subtract",
    "unpack",
]
