"""Encode: what is compiled."""

from __future__ import annotations

import triton.language as tl

from psyche_fast.kernels.triton.encode import encode_tiles
from psyche_fast.kernels.triton.launch import cpu_launch_options, encode_constants, padded
from tools.kernel_guard.case import Case, Loop


def compile_cases() -> list[Case]:
    """What the compile guard compiles: the classes of shapes, dtypes and numbers of entries."""
    wide = [(64, 64, k, "fp32", "fp32") for k in (4, 8, 32, 64, 256)]
    narrow = [
        (64, 64, 8, "fp32", "bf16"),
        (64, 64, 8, "bf16", "bf16"),
        (64, 64, 32, "bf16", "bf16"),
    ]
    shapes = [(h, w, 8, "fp32", "fp32") for h, w in ((48, 64), (50, 50), (32, 64), (16, 16))]
    cases = [_case(*arguments) for arguments in wide + narrow + shapes]
    own = {"anchor": True, "transform": False}
    return [
        *cases,
        _case(64, 64, 8, "fp32", "fp32", anchor=True),
        _case(64, 64, 32, "fp32", "fp32", **own),
        _case(64, 64, 64, "fp32", "fp32", **own),
        _case(64, 64, 64, "fp32", "fp32", transform=False),
        _case(64, 64, 64, "fp32", "fp32", **own, flat=True),
    ]


def _case(
    h: int,
    w: int,
    k: int,
    delta: str,
    gradient: str,
    *,
    anchor: bool = False,
    transform: bool = True,
    flat: bool = False,
) -> Case:
    options, own = cpu_launch_options("encode")
    together = own["tiles"]
    constants = encode_constants(k, k)
    # Smaller tiles are reduced by shuffles instead, and their loop is not unrolled.
    marker = ("REDUX", 4) if min(padded(h), padded(w)) == 64 else None
    rounds = (Loop("rounds", k, marker=marker),) if constants["ROUNDS"] else ()
    decode = (Loop("previous", constants["MP"] // constants["MC"]),) if transform else ()
    inner = decode if constants["ROUNDS"] else (*decode, Loop("bits", 31))
    variant = f"{h}x{w} k={k} {delta} delta, "
    variant += "anchor, share" if anchor else f"{gradient} gradient"
    if not transform:
        variant += ", runs without transform" if flat else ", without transform"
    # Narrower tiles do not fill a warp each: their rounds have barriers.
    tags = {"rounds"} if constants["ROUNDS"] and min(padded(h), padded(w)) >= 32 else set()
    if (h, w) == (64, 64):
        # No preset transforms what it takes from an anchor: the two have few registers together.
        tags.add("64x64 anchored" if anchor and transform else "64x64")
    return Case(
        kernel="encode",
        variant=variant,
        fn=encode_tiles,
        signature={
            "members": "*i64",
            "table": "*i64",
            "delta": f"*{delta}",
            "split_basis": "*bf16",
            "rows_h": "*fp32",
            "rows_w": "*fp32",
            "zeros": "*i32",
            "previous_indices": "*u16",
            "previous_values": "*bf16" if transform else "*fp32",
            "indices": "*u16",
            "values": "*bf16" if transform else "*fp32",
            "scratch": "*fp32",
            "rates": "*fp32",
            "scale": "*fp32",
            "anchors": "*i64",
            "anchor_table": "*i64",
            "decay": "fp32",
            "share": "fp32",
            "tiles": "i32",
            "rate_step": "i32",
        },
        constexprs={
            **constants,
            "T": together,
            "h": h,
            "w": w,
            "H": padded(h),
            "W": padded(w),
            "GRADIENT": tl.float32 if gradient == "fp32" else tl.bfloat16,
            "ALIGNED": w % 8 == 0,
            "ANCHOR": anchor,
            "SHARE": anchor,
            "TRANSFORM": transform,
            "FLAT": flat,
            "SELECT_ROWS": own["select_rows"],
            "STREAM": own["stream"],
            "KEEP": own["keep"],
        },
        options=options,
        loops=(Loop("groups", 100, inner=(Loop("tiles", together, inner=inner), *rounds)),),
        tiles=100 * together,
        elements=h * w,
        tags=frozenset(tags),
    )
