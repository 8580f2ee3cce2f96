"""Pack and unpack: what is compiled."""

from __future__ import annotations

import triton

from psyche_fast.kernels.pack import IndexCode, index_code
from psyche_fast.kernels.triton.launch import cpu_launch_options
from psyche_fast.kernels.triton.pack import (
    BOOL_SIGNS,
    FLOAT_SIGNS,
    PACK_BITS,
    UNPACK_BITS,
    pack_planes,
    tile_sizes,
    unpack_planes,
)
from tools.kernel_guard.case import Case, Loop


def compile_cases() -> list[Case]:
    """What the compile guard compiles: chunks of 64 x 64 with 1-bit results."""
    signs = [case for k in (4, 8, 32, 64) for case in _cases(k, index_code(4096, k))]
    return [*signs, *_cases(64, index_code(4096, 64), planes=2)]


def _cases(k: int, code: IndexCode, planes: int = 1) -> tuple[Case, Case]:
    shared = {
        "K": k,
        "LOW": code.low,
        "GAP": code.gap,
        "UPPER": code.upper,
        "BITS": code.bits + k * planes,
        "PLANES": planes,
    }
    what = "signs of fp32" if planes == 1 else f"codes of {planes} bits"
    options, own = cpu_launch_options("codec")
    groups, tile, entries = tile_sizes(code, PACK_BITS, own["elements"])
    pack_case = Case(
        kernel="pack",
        variant=f"64x64 k={k}, {what}",
        fn=pack_planes,
        signature={
            "indices": "*u16",
            "signs": "*fp32" if planes == 1 else "*u8",
            "planes": "*u8",
            "chunks": "i32",
            "groups": "i32",
            "index_stride": "i32",
            "sign_stride": "i32",
        },
        constexprs={
            **shared, "SIGNS": FLOAT_SIGNS if planes == 1 else BOOL_SIGNS, "G": groups,
            "TILE": tile, "ENTRIES": entries,
        },
        options=options,
        aligned=("indices", "signs"),  # bytes lie wherever a buffer has room
        loops=(
            Loop("low bits", triton.cdiv(k * code.low, tile)),
            Loop(
                "bit vector",
                triton.cdiv(code.upper, tile),
                (Loop("entries", triton.cdiv(k, entries)),),
            ),
            Loop("signs", triton.cdiv(k, tile)),
        ),
        tiles=8 * groups,
    )  # fmt: skip
    groups, tile, entries = tile_sizes(code, UNPACK_BITS, own["elements"])
    unpack_case = Case(
        kernel="unpack",
        variant=f"64x64 k={k}, {what.removesuffix(' of fp32')}, checked",
        fn=unpack_planes,
        signature={
            "planes": "*u8",
            "indices": "*u16",
            "signs": "*u8",
            "valid": "*u8",
            "chunks": "i32",
            "peer_stride": "i64",
        },
        constexprs={
            **shared, "TOTALK": code.totalk, "SIGNS": True, "CHECK": True, "ROWS": 8 * groups,
            "TILE": tile, "ENTRIES": entries,
        },
        options=options,
        aligned=("indices", "signs", "valid"),
        loops=(
            Loop("bit vector", triton.cdiv(code.upper, tile)),
            Loop("low bits", triton.cdiv(k, entries)),
            Loop("order", triton.cdiv(k - 1, entries)),
            Loop("signs", triton.cdiv(k, entries)),
        ),
        tiles=8 * groups,
    )  # fmt: skip
    return pack_case, unpack_case
