"""What the kernels share: signs, split and exact products, transforms, means of entries.

Peers must come to the same bits on any GPU, so nothing here depends on how a compiler fuses: every
fused multiply-add is written out, and kernels are launched with `enable_fp_fusion=False`. What they
have to agree on, the direction of an update, is computed in products of integers in fp16 (see
`psyche_fast/integers.py`); between these are float32 operations, which IEEE defines, and where a
factor of an `fma` is a power of two, one rounding and two are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""Mask of a float32's magnitude. As bits, magnitudes are ordered like their values, and NaN above
infinity."""


@triton.jit
def sign_times(x, a):
    """`a * sign(x)` for float32, with sign(0) = 0. Three bit operations instead of two compares."""
    signed = a.to(tl.int32, bitcast=True) ^ (x.to(tl.int32, bitcast=True) & (-2147483648))
    return tl.where(x == 0, 0.0, signed.to(tl.float32, bitcast=True))


@triton.jit
def split(x):
    """`x ~ high + low` in bfloat16, 16 bits together.

    The high part is truncated, which is one logical operation; rounding it would unpack and pack.
    """
    high = (x.to(tl.int32, bitcast=True) & (-65536)).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def product(a_high, a_low, b_high, b_low):
    """`a @ b` of split operands, small terms first; error about 2^-16 of the terms."""
    c = tl.dot(a_low, b_high)
    c = tl.dot(a_high, b_low, c)
    return tl.dot(a_high, b_high, c)


@triton.jit
def add_product(c, a_high, a_low, b_high, b_low):
    """`c + a @ b` of split operands."""
    c = tl.dot(a_low, b_high, c)
    c = tl.dot(a_high, b_low, c)
    return tl.dot(a_high, b_high, c)


@triton.jit
def load_split(table, N: tl.constexpr):
    """High and low part of an `[N, N]` matrix of a basis table `[2, N, N]`."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    return tl.load(table + at), tl.load(table + N * N + at)


@triton.jit
def sandwich(x, table, EXACT: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """`left @ x @ right`; the table holds left `[2, H, H]` and then right `[2, W, W]`.

    With `EXACT`, `x` is a bfloat16 tensor and needs no splitting.
    """
    right_high, right_low = load_split(table + 2 * H * H, W)
    if EXACT:
        y = tl.dot(x, right_low)
        y = tl.dot(x, right_high, y)
    else:
        x_high, x_low = split(x)
        y = product(x_high, x_low, right_high, right_low)
    left_high, left_low = load_split(table, H)
    y_high, y_low = split(y)
    return product(left_high, left_low, y_high, y_low)


@triton.jit
def times_right(x, table, EXACT: tl.constexpr, W: tl.constexpr):
    """`x @ right` with `right` `[2, W, W]` in the table: the transform of chunks that are rows.

    With `EXACT`, `x` is a bfloat16 tensor and needs no splitting.
    """
    right_high, right_low = load_split(table, W)
    if EXACT:
        y = tl.dot(x, right_low)
        y = tl.dot(x, right_high, y)
    else:
        x_high, x_low = split(x)
        y = product(x_high, x_low, right_high, right_low)
    return y


@triton.jit
def reciprocal(n):
    """`1 / n` of positive int32 in float32, within 2^-22, by IEEE operations alone.

    The division instruction of GPUs is not correctly rounded, and may differ between generations.
    """
    x = tl.maximum(n, 1).to(tl.float32)
    r = (0x7EF311C3 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    r = r * tl.fma(-x, r, 2.0)
    r = r * tl.fma(-x, r, 2.0)
    return r * tl.fma(-x, r, 2.0)


@triton.jit
def power_of_two(exponent):
    """`2^exponent` for int32 within -126 .. 127, exact."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_entries(
    indices,
    values,
    at,
    m,
    first,
    shift,
    E: tl.constexpr,
    SIGNS: tl.constexpr,
    w: tl.constexpr,
    W: tl.constexpr,
):
    """Entries `first .. first + E` of a tile: place in the padded tile, fixed point, validity."""
    e = first + tl.arange(0, E)
    there = e < m
    place = tl.load(indices + at + e, mask=there, other=0).to(tl.int32)
    if w != W:
        row = place // w
        place = row * W + (place - row * w)
    value = tl.load(values + at + e, mask=there, other=0)
    if SIGNS:
        fixed = 1073741824.0 - 2147483648.0 * value.to(tl.float32)
    else:
        # In two steps: the factor for subnormal numbers is no float32.
        half = shift >> 1
        fixed = value.to(tl.float32) * power_of_two(half) * power_of_two(shift - half)
    return place, fixed, there


@triton.jit
def mean_coefficients(
    indices,
    values,
    at,
    m,
    scratch,
    E: tl.constexpr,
    ONE_PASS: tl.constexpr,
    SIGNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    w: tl.constexpr,
    NAMED: tl.constexpr = True,
    divisor=1,
):
    """Dense coefficients of one tile, each the mean over the entries that name it.

    Without NAMED, their sum divided by `divisor`.

    Entries are counted and then added up as integers, in scratch memory that only this program
    uses: the result is the same in whatever order they come. Integers are the mean times
    `2^shift`.

    Args:
        indices: `[tiles, m]`.
        values: `[tiles, m]`, floating point, or bool of signs (SIGNS).
        at: int64, the tile's first entry.
        m: entries per tile.
        scratch: int32 `[2, H * W]`, zero before and after.

    Returns:
        float32 `[H, W]`, and `shift`, int32.
    """
    counts = scratch
    sums = scratch + H * W
    all_places = tl.arange(0, H)[:, None] * W + tl.arange(0, W)[None, :]
    shift = 30
    if not SIGNS:
        if ONE_PASS:
            e = tl.arange(0, E)
            v = tl.load(values + at + e, mask=e < m, other=0).to(tl.float32)
            most = tl.max(v.to(tl.int32, bitcast=True) & MAGNITUDE, 0)
        else:
            many = tl.zeros([E], tl.int32)
            for first in range(0, m, E):
                e = first + tl.arange(0, E)
                v = tl.load(values + at + e, mask=e < m, other=0).to(tl.float32)
                many = tl.maximum(many, v.to(tl.int32, bitcast=True) & MAGNITUDE)
            most = tl.max(many, 0)
        # The largest magnitude comes to lie below 2^30.
        shift = 156 - (most >> 23)
    if ONE_PASS:
        place, fixed, there = load_entries(indices, values, at, m, 0, shift, E, SIGNS, w, W)
        if NAMED:
            tl.atomic_add(counts + place, 1, mask=there, sem="relaxed", scope="cta")
            tl.debug_barrier()
            # Atomics take place in the L2 cache, so nothing may be read from the L1.
            count = tl.load(counts + place, mask=there, other=1, cache_modifier=".cg")
            tl.debug_barrier()
            tl.store(counts + place, tl.zeros([E], tl.int32), mask=there)
        else:
            count = divisor
        share = (fixed * reciprocal(count)).to(tl.int32)
        tl.atomic_add(sums + place, share, mask=there, sem="relaxed", scope="cta")
        tl.debug_barrier()
        x = tl.load(sums + all_places, cache_modifier=".cg").to(tl.float32)
        tl.debug_barrier()
        tl.store(sums + place, tl.zeros([E], tl.int32), mask=there)
    else:
        if NAMED:
            for first in range(0, m, E):
                place, fixed, there = load_entries(
                    indices, values, at, m, first, shift, E, SIGNS, w, W
                )
                tl.atomic_add(counts + place, 1, mask=there, sem="relaxed", scope="cta")
            tl.debug_barrier()
        for first in range(0, m, E):
            place, fixed, there = load_entries(indices, values, at, m, first, shift, E, SIGNS, w, W)
            if NAMED:
                count = tl.load(counts + place, mask=there, other=1, cache_modifier=".cg")
            else:
                count = divisor
            share = (fixed * reciprocal(count)).to(tl.int32)
            tl.atomic_add(sums + place, share, mask=there, sem="relaxed", scope="cta")
        tl.debug_barrier()
        x = tl.load(sums + all_places, cache_modifier=".cg").to(tl.float32)
        tl.debug_barrier()
        tl.store(counts + all_places, tl.zeros([H, W], tl.int32))
        tl.store(sums + all_places, tl.zeros([H, W], tl.int32))
        tl.debug_barrier()
    return x, shift


@triton.jit
def nearest(x, scale):
    """The integer nearest to `x * scale`, ties to even, for a power of two and results to 2^22."""
    return tl.fma(x, scale, 12582912.0) - 12582912.0


@triton.jit
def limbs(y):
    """`y = 512 high + low` of integers up to 2^18: fp16 up to 512 and 256."""
    high = nearest(y, 0.001953125)
    return high.to(tl.float16), tl.fma(high, -512.0, y).to(tl.float16)


@triton.jit
def exact_product(a_high, a_low, b_high, b_low):
    """`P(A, B)`. The fma also keeps Triton from adding up in the accumulator of a product."""
    c = tl.dot(a_low, b_high)
    c = tl.dot(a_high, b_low, c)
    return tl.fma(tl.dot(a_high, b_high), 512.0, c)


@triton.jit
def load_limbs(table, N: tl.constexpr):
    """High and low limbs of an `[N, N]` matrix of a table `[2, N, N]`."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    return tl.load(table + at), tl.load(table + N * N + at)


@triton.jit
def exact_sandwich(c_high, c_low, table, H: tl.constexpr, W: tl.constexpr):
    """What has the direction's sign; the table holds `B_h` `[2, H, H]` and `B_w^T` `[2, W, W]`."""
    left_high, left_low = load_limbs(table, H)
    z = exact_product(left_high, left_low, c_high, c_low)
    most = tl.maximum(tl.max(tl.abs(z), 1), 1.0).to(tl.int32, bitcast=True)
    z = nearest(z, power_of_two(144 - (most >> 23))[:, None])
    z_high, z_low = limbs(z)
    right_high, right_low = load_limbs(table + 2 * H * H, W)
    return exact_product(z_high, z_low, right_high, right_low)


@triton.jit
def largest_exponent(values, at, m, there, first_entries, MB: tl.constexpr):
    """Exponent field of the largest magnitude of `m` entries, over the last dimension."""
    many = tl.zeros(first_entries.shape, tl.int32)
    for first in range(0, m, MB):
        e = first + first_entries
        v = tl.load(values + at + e, mask=there & (e < m), other=0).to(tl.float32)
        many = tl.maximum(many, v.to(tl.int32, bitcast=True) & MAGNITUDE)
    return tl.max(many, len(many.shape) - 1) >> 23


@triton.jit
def tally(value, half, rest, SIGNS: tl.constexpr, WORD: tl.constexpr):
    """What an entry adds to its coefficient's word: its integer above, 1 below.

    `half` and `rest` are the factor of values in two steps: that of subnormal numbers is no
    float32.
    """
    if SIGNS:
        amount = 65537 - 131072 * value.to(tl.int32)
    else:
        amount = (value.to(tl.float32) * half * rest).to(tl.int32).to(tl.int64) * 65536 + 1
    return amount.to(WORD)


@triton.jit
def mean_limbs(word, SIGNS: tl.constexpr):
    """Limbs of a coefficient.

    Float32 divides but for one unit; the remainder says which way, for signs modulo 2^32.
    """
    count = word & 65535
    total = (word - count) >> 16
    n = tl.maximum(count.to(tl.int32), 1)
    if SIGNS:
        total = total.to(tl.int32)
        s = tl.abs(total)
        q = (s.to(tl.float32) * reciprocal(n) * 262144.0).to(tl.int32)
        unit = n
        rest = (s << 18) - q * n
    else:
        s = tl.abs(total)
        q = ((s >> 12).to(tl.float32) * reciprocal(n)).to(tl.int32)
        unit = n.to(tl.int64) * 4096
        rest = s - q.to(tl.int64) * unit
    q = tl.where(rest < 0, q - 1, q)
    rest = tl.where(rest < 0, rest + unit, rest)
    q = tl.where(rest >= unit, q + 1, q)
    rest = tl.where(rest >= unit, rest - unit, rest)
    q += (2 * rest >= unit).to(tl.int32)  # halves away from zero
    return limbs(tl.where(total < 0, -q, q).to(tl.float32))


@triton.jit
def count_entries(
    indices,
    values,
    at,
    m,
    words,
    first,
    half,
    rest,
    E: tl.constexpr,
    SIGNS: tl.constexpr,
    W: tl.constexpr,
    w: tl.constexpr,
):
    """Add up entries `first .. first + E` of a tile; their places in the padded tile."""
    e = first + tl.arange(0, E)
    there = e < m
    place = tl.load(indices + at + e, mask=there, other=0).to(tl.int32)
    if w != W:
        row = place // w
        place = row * W + (place - row * w)
    value = tl.load(values + at + e, mask=there, other=0)
    amount = tally(value, half, rest, SIGNS, words.dtype.element_ty)
    tl.atomic_add(words + place, amount, mask=there, sem="relaxed", scope="cta")
    return place, there


@triton.jit
def exact_means(
    indices,
    values,
    at,
    m,
    words,
    planes,
    E: tl.constexpr,
    ONE_PASS: tl.constexpr,
    SIGNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    w: tl.constexpr,
):
    """Limbs of one tile's mean coefficients, `[H, W]`.

    Args:
        indices: `[tiles, m]`.
        values: `[tiles, m]`, floating point, or bool of signs (SIGNS).
        at: int64, the tile's first entry.
        m: entries per tile.
        words: integers `[H * W]` of scratch that only this program uses, zero before and after;
            int64 for values, and for signs from 2^15 entries on.
        planes: fp16 `[2, H * W]` of such scratch; ONE_PASS: zero before and after.
    """
    zero: tl.constexpr = words.dtype.element_ty
    half = 1.0
    rest = 1.0
    if not SIGNS:
        shift = 156 - largest_exponent(values, at, m, True, tl.arange(0, E), E)
        half = power_of_two(shift >> 1)
        rest = power_of_two(shift - (shift >> 1))
    all_places = tl.arange(0, H)[:, None] * W + tl.arange(0, W)[None, :]
    if ONE_PASS:
        place, there = count_entries(indices, values, at, m, words, 0, half, rest, E, SIGNS, W, w)
        tl.debug_barrier()
        # Atomics take place in the L2 cache, so nothing may be read from the L1.
        word = tl.load(words + place, mask=there, other=1, cache_modifier=".cg")
        high, low = mean_limbs(word, SIGNS)
        tl.store(planes + place, high, mask=there)
        tl.store(planes + H * W + place, low, mask=there)
        tl.debug_barrier()
        tl.store(words + place, tl.zeros([E], zero), mask=there)
        c_high = tl.load(planes + all_places)
        c_low = tl.load(planes + H * W + all_places)
        tl.debug_barrier()
        tl.store(planes + place, tl.zeros([E], tl.float16), mask=there)
        tl.store(planes + H * W + place, tl.zeros([E], tl.float16), mask=there)
    else:
        for first in range(0, m, E):
            count_entries(indices, values, at, m, words, first, half, rest, E, SIGNS, W, w)
        tl.debug_barrier()
        # Every place is converted: places are neighbours, entries are not.
        N: tl.constexpr = 1024 if H * W > 1024 else H * W
        for first in range(0, H * W, N):
            place = first + tl.arange(0, N)
            high, low = mean_limbs(tl.load(words + place, cache_modifier=".cg"), SIGNS)
            tl.store(planes + place, high)
            tl.store(planes + H * W + place, low)
        # Threads do not load and store the same places: before it, they would clear others' words.
        tl.debug_barrier()
        tl.store(words + all_places, tl.zeros([H, W], zero))
        c_high = tl.load(planes + all_places)
        c_low = tl.load(planes + H * W + all_places)
        tl.debug_barrier()
    return c_high, c_low
