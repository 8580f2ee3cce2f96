"""The operations as Triton kernels: on GPUs, or on the CPU by Triton's interpreter."""

from triton import knobs

from psyche_fast.kernels.triton.operations import apply, encode, lookahead, subtract

if knobs.runtime.interpret:
    from psyche_fast.kernels.triton.interpreter import repair

    repair()

__all__ = ["apply", "encode", "lookahead", "subtract"]
