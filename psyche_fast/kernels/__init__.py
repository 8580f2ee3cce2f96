"""The DisTrO step as a few coarse operations, each over one whole chunk class (`ChunkPlan`).

Every operation dispatches by backend to a function of the same name: `"torch"` is plain PyTorch
(`kernels/reference/`), `"triton"` the GPU kernels and `"interpret"` the same kernels run by
Triton's interpreter on the CPU (`kernels/triton/`). A backend that cannot run is refused with an
error; nothing falls back silently, and `explain` says what `"auto"` takes and why.

Operations work in place on the tensors that they are given and never wait for the device.
"""

from __future__ import annotations

from psyche_fast.kernels.apply import apply, lookahead, subtract
from psyche_fast.kernels.backends import explain, resolve_backend
from psyche_fast.kernels.encode import encode

__all__ = ["apply", "encode", "explain", "lookahead", "resolve_backend", "subtract"]
