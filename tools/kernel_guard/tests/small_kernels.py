"""Small kernels whose cost can be told by eye, for the tests of the ahead-of-time compiler."""

from __future__ import annotations

import triton
import triton.language as tl

from tools.kernel_guard.case import Case, Loop


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(x + at, mask=inside, other=0.0) + tl.load(y + at, mask=inside, other=0.0)
    tl.store(out + at, total, mask=inside)


@triton.jit
def nested(x, out, rows, columns, BLOCK: tl.constexpr):
    """A loop over rows, in it one over columns; a barrier of the block in every row's sum."""
    total = 0.0
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        line = tl.zeros([BLOCK], tl.float32)
        for column in tl.range(0, columns, BLOCK, loop_unroll_factor=1):
            line += tl.sqrt(tl.load(x + row * columns + column + tl.arange(0, BLOCK)))
        total += tl.sum(line)
    tl.store(out + tl.program_id(0), total)


@triton.jit
def rounds(x, out, N: tl.constexpr, K: tl.constexpr):
    """K rounds of a maximum over the whole block: barriers in each unless one warp has it all."""
    key = tl.load(x + tl.arange(0, N))
    for k in range(K):
        most = tl.max(key, 0)
        key = tl.where(key == most, -1, key)
        tl.store(out + k, most)


@triton.jit
def product(x, y, out, N: tl.constexpr, M: tl.constexpr):
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    left = tl.load(x + i[:, None] * M + j[None, :])
    right = tl.load(y + j[:, None] * N + i[None, :])
    tl.store(out + i[:, None] * N + i[None, :], tl.dot(left, right))


@triton.jit
def greedy(x, out, N: tl.constexpr):
    """Holds more than a thread's registers across a sum, so that it must spill."""
    i = tl.arange(0, N)
    values = tl.load(x + i)
    total = tl.sum(values)
    tl.store(out + i, values / total)


@triton.jit
def cleared(words, out, N: tl.constexpr, IN_ORDER: tl.constexpr):
    """Reads words and clears them, by other threads: stores are of 16 bytes, loads of more."""
    at = tl.arange(0, N)
    word = tl.load(words + at, cache_modifier=".cg")
    if IN_ORDER:
        tl.debug_barrier()
    tl.store(words + at, tl.zeros([N], tl.int32))
    tl.store(out + at, word.to(tl.float16))


FLOATS = {"x": "*fp32", "out": "*fp32"}
INTS = {"x": "*i32", "out": "*i32"}


def _rounds(variant: str, warps: int, k: int) -> Case:
    loop = Loop("rounds", k, marker=("REDUX", 1))
    constants = {"N": 128, "K": k}
    options = {"num_warps": warps}
    tags = frozenset({"rounds"})
    return Case("rounds", variant, rounds, INTS, constants, options, loops=(loop,), tags=tags)


def _nested(variant: str, *loops: Loop) -> Case:
    lines = {"x": "*fp32", "out": "*fp32", "rows": "i32", "columns": "i32"}
    return Case("nested", variant, nested, lines, {"BLOCK": 128}, loops=loops, tiles=10)


def _product(variant: str, n: int, m: int, **options: int) -> Case:
    square = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    return Case("product", variant, product, square, {"N": n, "M": m}, options)


def _cleared(variant: str, in_order: bool) -> Case:
    constants = {"N": 1024, "IN_ORDER": in_order}
    return Case("cleared", variant, cleared, {"words": "*i32", "out": "*fp16"}, constants)


def compile_cases() -> list[Case]:
    three = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}
    return [
        Case("add", "", add, three, {"BLOCK": 1024}),
        _nested("10 x 4", Loop("rows", 10, (Loop("columns", 4),))),
        _nested("10 x 5", Loop("rows", 10, (Loop("columns", 5),))),
        _nested("one loop", Loop("rows", 10)),
        _rounds("one warp", 1, 64),
        _rounds("four warps", 4, 64),
        _rounds("unrolled", 4, 2),
        _cleared("at once", False),
        _cleared("in order", True),
        _product("64", 64, 64),
        _product("wide", 64, 1024, num_warps=16),
        _product("thin", 64, 4),
        Case("greedy", "", greedy, FLOATS, {"N": 8192}, {"num_warps": 1, "maxnreg": 128}),
    ]
