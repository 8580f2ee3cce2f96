"""Apply, subtract and look-ahead: what is compiled."""

from __future__ import annotations

import triton.language as tl

from psyche_fast.kernels.triton.apply import apply_tiles, lookahead_tiles, subtract_tiles
from psyche_fast.kernels.triton.launch import cpu_launch_options, entries_at_once, padded
from tools.kernel_guard.case import Case, Loop


def compile_cases() -> list[Case]:
    """What the compile guard compiles: peers' numbers, dtypes, shapes, look-ahead."""
    cases = [
        _case(64, 64, 16 * 8),
        _case(64, 64, 16 * 8, delta="bf16"),
        _case(64, 64, 16 * 8, parameter="bf16"),
        _case(64, 64, 16 * 8, copy="fp32"),
        _case(64, 64, 16 * 8, signs=False),
        _case(64, 64, 16 * 8, ahead=False),
        _case(64, 64, 64 * 8),
        _case(64, 64, 256 * 32),
        _case(50, 50, 16 * 8),
        _case(16, 16, 16 * 8),
    ]
    for h, w in ((64, 64), (50, 50)):
        cases += [_lookahead_case(h, w), _subtract_case(h, w, 8)]
    return cases


_ADDRESSES = {
    "members": "*i64",
    "table": "*i64",
    "ahead_members": "*i64",
    "ahead_table": "*i64",
}


def _tile(h: int, w: int) -> dict[str, int]:
    return {"h": h, "w": w, "H": padded(h), "W": padded(w)}


def _case(
    h: int,
    w: int,
    m: int,
    *,
    ahead: bool = True,
    delta: str = "fp32",
    parameter: str = "fp32",
    copy: str = "bf16",
    signs: bool = True,
) -> Case:
    options, own = cpu_launch_options("apply")
    at_once, one_pass = entries_at_once(m, own["entries"], own["scattered"])
    variant = f"{h}x{w} {m} {'signs' if signs else 'values'}, {parameter} parameter"
    variant += f", {delta} delta, {copy} look-ahead" if ahead else ", no look-ahead"
    loops: tuple[Loop, ...] = ()
    if not one_pass:
        loops = (
            Loop("count", -(-m // at_once)),
            Loop("convert", max(1, padded(h) * padded(w) // 1024)),
        )
    if not signs:
        loops = (Loop("largest", -(-m // at_once)), *loops)
    return Case(
        kernel="apply",
        variant=variant,
        fn=apply_tiles,
        signature={
            **_ADDRESSES,
            "delta": f"*{delta}",
            "basis": "*fp16",
            "indices": "*u16",
            "values": "*u8" if signs else "*bf16",
            "words": "*i32" if signs else "*i64",
            "planes": "*fp16",
            "rates": "*fp32",
            "shrinks": "*fp32",
            "tiles": "i32",
            "m": "i32",
            "rate_step": "i32",
            "shrink_step": "i32",
        },
        constexprs={
            **_tile(h, w),
            "E": at_once,
            "ONE_PASS": one_pass,
            "SIGNS": signs,
            "AHEAD": ahead,
            "SHRINK": True,
            "PARAMETER": tl.float32 if parameter == "fp32" else tl.bfloat16,
            "COPY": tl.float32 if copy == "fp32" else tl.bfloat16,
            "ALIGNED": w % 8 == 0,
        },
        options=options,
        loops=(Loop("tiles", 100, inner=loops),),
        tiles=100,
        elements=h * w,
        tags=frozenset({"64x64"} if (h, w) == (64, 64) else ()),
    )


def _lookahead_case(h: int, w: int) -> Case:
    options, _ = cpu_launch_options("lookahead")
    return Case(
        kernel="lookahead",
        variant=f"{h}x{w} fp32 delta, fp32 parameter, bf16 look-ahead",
        fn=lookahead_tiles,
        signature={
            **_ADDRESSES,
            "delta": "*fp32",
            "rates": "*fp32",
            "tiles": "i32",
            "rate_step": "i32",
        },
        constexprs={
            **_tile(h, w),
            "PARAMETER": tl.float32,
            "COPY": tl.bfloat16,
            "ALIGNED": w % 8 == 0,
        },
        options=options,
        loops=(Loop("tiles", 100),),
        tiles=100,
        elements=h * w,
        tags=frozenset({"64x64"} if (h, w) == (64, 64) else ()),
    )


def _subtract_case(h: int, w: int, m: int) -> Case:
    options, own = cpu_launch_options("apply")
    at_once, one_pass = entries_at_once(m, own["entries"])
    assert one_pass
    return Case(
        kernel="subtract",
        variant=f"{h}x{w} {m} values, fp32 delta",
        fn=subtract_tiles,
        signature={
            "delta": "*fp32",
            "split_basis": "*bf16",
            "indices": "*u16",
            "values": "*bf16",
            "scratch": "*i32",
            "tiles": "i32",
            "m": "i32",
        },
        constexprs={**_tile(h, w), "E": at_once, "ONE_PASS": one_pass, "SIGNS": False},
        options=options,
        loops=(Loop("tiles", 100),),
        tiles=100,
        elements=h * w,
        tags=frozenset({"64x64"} if (h, w) == (64, 64) else ()),
    )
