"""Operations on chunks without transform: what is compiled."""

from __future__ import annotations

import triton
import triton.language as tl

from psyche_fast.kernels.triton.launch import TILE_ELEMENTS, cpu_launch_options, padded
from psyche_fast.kernels.triton.plain import encode_plain
from tools.kernel_guard.case import Case, Loop

_PLACE = {"members": "*i64", "table": "*i64"}
_ANCHOR = {"anchors": "*i64", "anchor_table": "*i64"}


def compile_cases() -> list[Case]:
    """What the compile guard compiles: blocks of a matrix and runs of a vector."""
    return [
        _encode_case(4096, 64, 128),
        _encode_case(4096, 64, 128, anchor=False),
        _encode_case(64, 64, 27),
        _encode_case(4096, 64, 0),
    ]


def _encode_case(length: int, w: int, k: int, *, anchor: bool = True) -> Case:
    options, _ = cpu_launch_options("plain")
    shape = f"{length // w}x{w}" if w < length else str(length)
    together = max(1, TILE_ELEMENTS // padded(length))
    return Case(
        kernel="encode_plain",
        variant=f"{shape} k={k} " + ("anchor" if anchor else "fp32 gradient"),
        fn=encode_plain,
        signature={
            **_PLACE,
            "delta": "*fp32",
            "previous_indices": "*u16",
            "previous_values": "*fp32",
            "indices": "*u16",
            "values": "*fp32",
            "rates": "*fp32",
            "scale": "*fp32",
            **_ANCHOR,
            "decay": "fp32",
            "share": "fp32",
            "chunks": "i32",
            "rate_step": "i32",
        },
        constexprs={
            "K": k, "M": k, "MP": triton.next_power_of_2(max(k, 1)), "R": together, "L": length,
            "N": padded(length), "w": w, "GRADIENT": tl.float32, "ANCHOR": anchor, "ALIGNED": True,
        },
        options=options,
        loops=(Loop("tiles", 100, inner=(Loop("bits", 31),) if k else ()),),
        tiles=100,
        elements=together * length,
    )  # fmt: skip
