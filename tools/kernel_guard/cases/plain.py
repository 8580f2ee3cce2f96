"""What methods beside DisTrO have of their own: what is compiled."""

from __future__ import annotations

import triton
import triton.language as tl

from psyche_fast.kernels.triton.launch import (
    TILE_ELEMENTS,
    cpu_launch_options,
    entries_at_once,
    padded,
)
from psyche_fast.kernels.triton.outer import (
    COPY_LOCAL,
    KEEP_LOCAL,
    MIX_LOCAL,
    outer_plain,
    outer_tiles,
    row_entries,
)
from psyche_fast.kernels.triton.plain import encode_plain
from psyche_fast.kernels.triton.quantise import (
    dequantise_entries,
    encode_everything,
    entry_tile,
    quantise_entries,
)
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
        *(_everything_case(bits) for bits in (0, 2, 4, 8)),
        _everything_case(4, kept=False),
        *(case for k in (64, 128) for case in _entry_cases(k, 2)),
        *_entry_cases(4096, 4),
        _outer_case(8 * 64, how=COPY_LOCAL),
        _outer_case(8 * 64, nesterov=True, how=MIX_LOCAL),
        _outer_case(8 * 64, named=False),
        _outer_case(8, dense=True, nesterov=True, how=MIX_LOCAL),
        _outer_tiles_case(8 * 8),
        _outer_tiles_case(8 * 8, nesterov=True),
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


def _everything_case(bits: int, *, kept: bool = True) -> Case:
    options, _ = cpu_launch_options("plain")
    variant = f"64x64 {bits} bits anchor" if bits else "64x64 bf16 anchor"
    dtype, scale = ("u8" if bits else "bf16"), ("bf16" if bits == 2 else "fp32")
    return Case(
        kernel="encode_all",
        variant=variant + (", feedback" if kept else ""),
        fn=encode_everything,
        signature={
            **_PLACE, **_ANCHOR, "delta": "*fp32", "out": f"*{dtype}", "scales": f"*{scale}",
            "rates": "*fp32", "scale": "*fp32", "decay": "fp32", "share": "fp32", "chunks": "i32",
            "rate_step": "i32",
        },
        constexprs={
            "BITS": bits, "KEPT": kept, "TAKEN": int(kept), "R": 1, "L": 4096, "N": 4096, "w": 64,
            "GRADIENT": tl.float32, "ANCHOR": True, "ALIGNED": True,
        },
        options=options,
        loops=(Loop("tiles", 100, inner=(Loop("levels", 8),) if bits == 2 else ()),),
        tiles=100,
    )  # fmt: skip


def _entry_cases(k: int, bits: int) -> list[Case]:
    options, _ = cpu_launch_options("plain")
    width, together = entry_tile(k)
    scales = "*bf16" if bits == 2 else "*fp32"
    constants = {"K": k, "KP": width, "R": together, "BITS": bits}
    return [
        Case(
            kernel="quantise",
            variant=f"k={k} {bits} bits",
            fn=quantise_entries,
            signature={
                "values": "*fp32", "codes": "*u8", "scales": scales, "seen": "*fp32",
                "chunks": "i32",
            },
            constexprs=constants,
            options=options,
            loops=(Loop("levels", 8),) if bits == 2 else (),
            tiles=together,
            elements=k,
        ),
        Case(
            kernel="dequantise",
            variant=f"k={k} {bits} bits",
            fn=dequantise_entries,
            signature={"codes": "*u8", "scales": scales, "values": "*fp32", "chunks": "i32"},
            constexprs=constants,
            options=options,
            tiles=together,
            elements=k,
        ),
    ]  # fmt: skip


_TENSORS = {
    f"{which}{what}": "*i64"
    for which in ("", "u_", "own_", "since_")
    for what in ("members", "table")
}
_STEP = {
    "split_basis": "*bf16", "indices": "*u16", "values": "*fp32", "scratch": "*i32",
    "length": "fp32", "momentum": "fp32", "mix": "fp32", "share": "fp32",
}  # fmt: skip


def _outer_case(
    m: int,
    *,
    dense: bool = False,
    named: bool = True,
    nesterov: bool = False,
    how: int = KEEP_LOCAL,
) -> Case:
    options, _ = cpu_launch_options("outer")
    at_once = row_entries(1, m)
    passes = [Loop("largest", -(-m // at_once)), Loop("count", -(-m // at_once))]
    inner = (Loop("replicas", m - 1),) if dense else (*passes[: 1 + named], passes[-1])
    variant = f"64x64 {m} " + ("replicas" if dense else "entries" if named else "entries over R")
    variant += (", Nesterov" if nesterov else ", SGD") + ("", ", copy", ", mix")[how]
    return Case(
        kernel="outer_plain",
        variant=variant,
        fn=outer_plain,
        signature={**_TENSORS, **_STEP, "chunks": "i32", "m": "i32", "divisor": "i32"},
        constexprs={
            "MB": at_once, "DENSE": dense, "TRANSFORM": False, "NAMED": named, "SIGNS": False,
            "NESTEROV": nesterov, "MIX": how, "R": 1, "L": 4096, "N": 4096, "w": 64,
            "ALIGNED": True,
        },
        options=options,
        loops=(Loop("tiles", 100, inner=inner),),
        tiles=100,
    )  # fmt: skip


def _outer_tiles_case(m: int, *, nesterov: bool = False) -> Case:
    options, own = cpu_launch_options("outer")
    at_once, one_pass = entries_at_once(m, own["entries"])
    return Case(
        kernel="outer",
        variant=f"64x64 {m} values, " + ("Nesterov" if nesterov else "SGD"),
        fn=outer_tiles,
        signature={**_TENSORS, **_STEP, "tiles": "i32", "m": "i32", "divisor": "i32"},
        constexprs={
            "E": at_once, "ONE_PASS": one_pass, "NAMED": True, "SIGNS": False,
            "NESTEROV": nesterov, "MIX": KEEP_LOCAL, "h": 64, "w": 64, "H": 64, "W": 64,
            "ALIGNED": True,
        },
        options=options,
        loops=(Loop("tiles", 100),),
        tiles=100,
    )  # fmt: skip
