"""The DisTrO step as a few coarse operations, each over one whole chunk class (`ChunkPlan`).

`encode.py`, `apply.py`, `accumulate.py`, `pack.py` and others have the public functions, with what
they take, check and return. Each calls the function of the same name in the module of the same
name of a backend: `"torch"` is plain PyTorch (`reference/`), `"triton"` the GPU kernels and
`"interpret"` the same kernels run by Triton's interpreter on the CPU (`triton/`). A backend that
cannot run is refused with an error; nothing falls back silently, and `backends.explain` says what
`"auto"` stands for and why.

Operations work in place on the tensors that they are given and never wait for the device. They are
for eager code: `torch.compile` belongs around a model's forward and backward, a step that is traced
is whatever torch makes of it. A step cannot be captured in a CUDA graph.
"""
