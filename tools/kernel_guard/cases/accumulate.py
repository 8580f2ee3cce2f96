"""Accumulation and norms: what is compiled."""

from __future__ import annotations

from psyche_fast.kernels.triton.accumulate import BLOCK, PART, accumulate_blocks
from psyche_fast.kernels.triton.launch import cpu_launch_options
from tools.kernel_guard.case import Case, Loop


def compile_cases() -> list[Case]:
    """What the compile guard compiles."""
    cases = []
    for name, sums, norm in (
        ("add", True, False),
        ("add, norm", True, True),
        ("norm", False, True),
    ):
        for types, dtypes in (("bf16", 1), ("fp32", 4), ("bf16 and fp32", 5)):
            cases.append(
                Case(
                    kernel="accumulate",
                    variant=f"{name}, {types}",
                    fn=accumulate_blocks,
                    signature={
                        "tensors": "*i64",
                        "block_tensor": "*i32",
                        "partials": "*fp32",
                        "blocks": "i32",
                    },
                    constexprs={
                        "DTYPES": dtypes,
                        "SUMS": sums,
                        "NORM": norm,
                        "BLOCK": BLOCK,
                        "PART": PART,
                    },
                    options=cpu_launch_options("accumulate")[0],
                    loops=(Loop("blocks", trips=100, inner=(Loop("parts", trips=0.04),)),),
                    tiles=100,
                    elements=BLOCK,
                )
            )
    return cases
