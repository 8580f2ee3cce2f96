"""Cross-entropy in the logits' place: what is compiled."""

from __future__ import annotations

from psyche_fast.kernels.triton.cross_entropy import cross_entropy_rows
from psyche_fast.kernels.triton.launch import cpu_launch_options
from tools.kernel_guard.case import Case, Loop


def compile_cases() -> list[Case]:
    """What the compile guard compiles."""
    options, own = cpu_launch_options("cross_entropy")
    return [
        Case(
            kernel="cross_entropy",
            variant=f"{dtype} logits" + (", gradient" if gradient else ""),
            fn=cross_entropy_rows,
            signature={
                "logits": f"*{dtype}",
                "targets": "*i64",
                "losses": "*fp32",
                "V": "i32",
            },
            constexprs={"IGNORED": -100, "GRADIENT": gradient, "BLOCK": own["block"]},
            options=options,
            loops=(Loop("largest", 1), Loop("gradient", 1))[: 1 + gradient],
            elements=own["block"],
            aligned=("logits", "targets", "losses", "V"),  # as vocabularies mostly are
        )
        for dtype in ("bf16", "fp32")
        for gradient in (True, False)
    ]
