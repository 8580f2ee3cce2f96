"""The operations as Triton kernels: on GPUs, or on the CPU by Triton's interpreter."""

from triton import knobs

from psyche_fast.kernels.triton.accumulate import accumulate, squared_norms
from psyche_fast.kernels.triton.operations import apply, encode, lookahead, subtract
from psyche_fast.kernels.triton.pack import pack, unpack

if knobs.runtime.interpret:
    from psyche_fast.kernels.triton.interpreter import repair

    repair()

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
