"""All operations on chunks with one dimension: what is compiled."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from psyche_fast.kernels.triton.launch import ROW_ENTRIES, ROWS_PER_TILE, cpu_launch_options, padded
from psyche_fast.kernels.triton.rows import apply_rows, encode_rows, lookahead_rows, subtract_rows
from tools.kernel_guard.case import Case, Loop


def compile_cases() -> list[Case]:
    """What the compile guard compiles: lengths of chunks, and all four operations."""
    return [
        _encode_case(64, 8),
        _encode_case(64, 32),
        _encode_case(1, 1),
        _encode_case(64, 8, strided=True),
        _encode_case(64, 8, delta="bf16"),
        _encode_case(64, 8, delta="bf16", gradient="bf16"),
        _encode_case(64, 8, anchor=True),
        *_decode_cases(64, 16 * 8),
    ]


_PLACE = {"members": "*i64", "table": "*i64"}
_AHEAD = {"ahead_members": "*i64", "ahead_table": "*i64"}
_TILE = {"R": ROWS_PER_TILE}


def _encode_case(
    length: int,
    k: int,
    *,
    delta: str = "fp32",
    gradient: str = "fp32",
    strided: bool = False,
    anchor: bool = False,
) -> Case:
    options, _ = cpu_launch_options("rows")
    inner = () if k == length else (Loop("bits", 31),)
    variant = f"{length} k={k} {delta} delta, "
    variant += "anchor, share" if anchor else f"{gradient} gradient"
    return Case(
        kernel="encode_rows",
        variant=variant + ", columns" * strided,
        fn=encode_rows,
        signature={
            **_PLACE,
            "delta": f"*{delta}",
            "split_basis": "*bf16",
            "previous_indices": "*u8",
            "previous_values": "*bf16",
            "indices": "*u8",
            "values": "*bf16",
            "scratch": "*fp32",
            "rates": "*fp32",
            "scale": "*fp32",
            "anchors": "*i64",
            "anchor_table": "*i64",
            "decay": "fp32",
            "share": "fp32",
            "chunks": "i32",
            "rate_step": "i32",
        },
        constexprs={
            **_TILE,
            "K": k,
            "M": k,
            "MP": triton.next_power_of_2(k),
            "L": length,
            "W": padded(length),
            "GRADIENT": tl.float32 if gradient == "fp32" else tl.bfloat16,
            "STRIDED": strided,
            "ALIGNED": length % 8 == 0,
            "ANCHOR": anchor,
            "SHARE": anchor,
        },
        options=options,
        loops=(Loop("tiles", 100, inner=inner),),
        tiles=100,
        elements=ROWS_PER_TILE * length,
    )


def _decode_cases(length: int, m: int) -> list[Case]:
    options, _ = cpu_launch_options("rows")
    trips = -(-m // ROW_ENTRIES)
    result = {"indices": "*u8", "values": "*u8"}
    counts = {"chunks": "i32", "m": "i32"}
    shape = {**_TILE, "L": length, "W": padded(length)}
    addressing = {
        "PARAMETER": tl.float32,
        "COPY": tl.bfloat16,
        "STRIDED": False,
        "ALIGNED": length % 8 == 0,
    }
    decoding = {"MB": ROW_ENTRIES, "SIGNS": True}
    common: dict[str, Any] = {
        "options": options,
        "tiles": 100,
        "elements": ROWS_PER_TILE * length,
    }
    return [
        Case(
            kernel="apply_rows",
            variant=f"{length} {m} signs, fp32 parameter, fp32 delta, bf16 look-ahead",
            fn=apply_rows,
            signature={
                **_PLACE,
                **_AHEAD,
                "delta": "*fp32",
                "basis": "*fp16",
                **result,
                "words": "*i32",
                "rates": "*fp32",
                "shrinks": "*fp32",
                **counts,
                "rate_step": "i32",
                "shrink_step": "i32",
            },
            constexprs={**shape, **addressing, **decoding, "AHEAD": True},
            loops=(Loop("tiles", 100, inner=(Loop("count", trips),)),),
            **common,
        ),
        Case(
            kernel="subtract_rows",
            variant=f"{length} {m} signs, fp32 delta",
            fn=subtract_rows,
            signature={
                "delta": "*fp32",
                "split_basis": "*bf16",
                **result,
                "scratch": "*i32",
                **counts,
            },
            constexprs={**shape, **decoding},
            loops=(Loop("tiles", 100, inner=(Loop("count", trips), Loop("add", trips))),),
            **common,
        ),
        Case(
            kernel="lookahead_rows",
            variant=f"{length} fp32 delta, fp32 parameter, bf16 look-ahead",
            fn=lookahead_rows,
            signature={
                **_PLACE,
                **_AHEAD,
                "delta": "*fp32",
                "rates": "*fp32",
                "chunks": "i32",
                "rate_step": "i32",
            },
            constexprs={**shape, **addressing},
            loops=(Loop("tiles", 100),),
            **common,
        ),
    ]
