"""The wire code, to and from bit planes, one launch per chunk class (and for all peers).

A program handles groups of eight chunks, whose bits share bytes. To write, the entries' bits are
added up in words of up to 32. To read, the rank of a set bit is a running count, and the bit writes
the upper part of the entry of that rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from psyche_fast.kernels.triton.launch import launch_options, on_device, written

if TYPE_CHECKING:
    from psyche_fast.kernels.pack import IndexCode


PACK_BITS, UNPACK_BITS = 32, 128  # at once; a word has 32
NO_SIGNS, BOOL_SIGNS, FLOAT_SIGNS = 0, 1, 2


@triton.jit
def _store_bits(planes, bits, shift, group, at, groups, end, BITS: tl.constexpr):
    """Join bits `[G, 8, TILE]` of eight chunks each and store them as plane `at`, below `end`."""
    joined = tl.sum(bits << shift, 1)
    mask = (group < groups) & (at < end)
    tl.store(planes + group.to(tl.int64) * BITS + at, joined.to(tl.uint8), mask=mask)


@triton.jit
def pack_planes(
    indices, signs, planes, chunks, groups, index_stride, sign_stride,
    K: tl.constexpr, LOW: tl.constexpr, GAP: tl.constexpr, UPPER: tl.constexpr,
    SIGNS: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
    ENTRIES: tl.constexpr, PLANES: tl.constexpr = 1,
):  # fmt: skip
    """Bit planes of `8 * G` chunks.

    Args:
        indices: unsigned `[chunks, K]`, ascending; rows `index_stride` apart.
        signs: uint8 or floating point `[chunks, K]`, rows `sign_stride` apart; read with `SIGNS`.
        planes: uint8 `[groups, BITS]`, written.
        chunks: number of chunks.
        groups: `ceil(chunks / 8)`.
        index_stride: see `indices`.
        sign_stride: see `signs`.
        K: entries per chunk.
        LOW: low bits per entry.
        GAP: what rank adds to the position of an entry's upper bit.
        UPPER: length of the bit vector.
        SIGNS: 0 for none, 1 for bytes of PLANES bits, 2 for numbers.
        BITS: `K * LOW + UPPER`, and `K * PLANES` more with `SIGNS`.
        G: groups per program.
        TILE: bits that are written at once, up to 32.
        ENTRIES: entries that are read at once for the bit vector.
    """
    first_group = tl.program_id(0) * G
    group = first_group + tl.arange(0, G)[:, None]
    lane = tl.arange(0, TILE)[None, :]
    shift = tl.arange(0, 8)[None, :, None]
    chunk = (first_group + tl.arange(0, G)[:, None, None]) * 8 + shift
    live = chunk < chunks
    entries = indices + chunk.to(tl.int64) * index_stride
    bit = tl.arange(0, TILE)[None, None, :]
    if LOW > 0:
        for start in range(0, K * LOW, TILE):
            at = start + bit
            index = tl.load(entries + at // LOW, mask=live & (at < K * LOW), other=0)
            bits = (index.to(tl.int32) >> (at % LOW)) & 1
            _store_bits(planes, bits, shift, group, start + lane, groups, K * LOW, BITS)
    for start in range(0, UPPER, TILE):
        # The bits of a chunk as one integer: no two entries share a position, so adding joins them.
        word = tl.zeros([G, 8], tl.int32)
        for first in range(0, K, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)[None, None, :]
            mask = live & (entry < K)
            index = tl.load(entries + entry, mask=mask, other=0).to(tl.int32)
            position = (index >> LOW) + GAP * entry - start
            named = mask & (position >= 0) & (position < TILE)
            word += tl.sum(tl.where(named, 1 << (position & (TILE - 1)), 0), 2)
        bits = (word[:, :, None] >> bit) & 1
        end = K * LOW + UPPER
        _store_bits(planes, bits, shift, group, K * LOW + start + lane, groups, end, BITS)
    if SIGNS > 0:
        values = signs + chunk.to(tl.int64) * sign_stride
        for start in range(0, K, TILE):
            at = start + bit
            value = tl.load(values + at, mask=live & (at < K), other=0)
            position = K * LOW + UPPER + start + lane
            if SIGNS == 1:
                bits = value.to(tl.int32)
            else:
                bits = (value.to(tl.float32) < 0).to(tl.int32)
            if PLANES == 1:
                _store_bits(planes, bits, shift, group, position, groups, BITS, BITS)
            else:
                for plane in tl.static_range(PLANES):
                    end = K * LOW + UPPER + (plane + 1) * K
                    one = (bits >> plane) & 1
                    _store_bits(planes, one, shift, group, position + plane * K, groups, end, BITS)


@triton.jit
def _load_bits(source, at, shift, mask):
    """Bit `at` of each chunk, 0 or 1 as int32; 0 where masked."""
    return (tl.load(source + at, mask=mask, other=0).to(tl.int32) >> shift) & 1


@triton.jit
def unpack_planes(
    planes, indices, signs, valid, chunks, peer_stride,
    TOTALK: tl.constexpr, K: tl.constexpr, LOW: tl.constexpr, GAP: tl.constexpr,
    UPPER: tl.constexpr, SIGNS: tl.constexpr, CHECK: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr, PLANES: tl.constexpr = 1,
):  # fmt: skip
    """Entries of `ROWS` chunks of one peer from bit planes of any content.

    Args:
        planes: uint8 `[peers, groups, BITS]`, peers `peer_stride` apart.
        indices: unsigned `[chunks, peers, K]`, written.
        signs: uint8 `[chunks, peers, K]`, written with `SIGNS`.
        valid: uint8 `[peers, chunks]`; with `CHECK` set to 0 where indices are not well-formed.
        chunks: number of chunks.
        peer_stride: see `planes`.
        TOTALK: coefficients of a chunk.
        K: entries per chunk and peer.
        LOW: low bits per entry.
        GAP: what rank adds to the position of an entry's upper bit.
        UPPER: length of the bit vector.
        SIGNS: read a sign, or code of PLANES bits, per entry.
        CHECK: write `valid`.
        BITS: `K * LOW + UPPER`, and `K * PLANES` more with `SIGNS`.
        ROWS: chunks per program, a multiple of 8.
        TILE: bits of the bit vector that are read at once.
        ENTRIES: entries that are read at once.
    """
    peer, peers = tl.program_id(1), tl.num_programs(1)
    chunk = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = chunk < chunks
    shift = chunk % 8
    source = planes + peer.to(tl.int64) * peer_stride + (chunk // 8).to(tl.int64) * BITS
    target = (chunk.to(tl.int64) * peers + peer) * K
    lane = tl.arange(0, TILE)[None, :]
    entry_lane = tl.arange(0, ENTRIES)[None, :]
    if UPPER > 0:
        # The set bit of rank r tells the upper part of entry r ...
        count = tl.zeros([ROWS, 1], tl.int32)
        for start in range(0, UPPER, TILE):
            at = start + lane
            bits = _load_bits(source, K * LOW + at, shift, live & (at < UPPER))
            rank = count + tl.cumsum(bits, 1) - bits
            upper = (at - GAP * rank).to(indices.dtype.element_ty)
            tl.store(indices + target + rank, upper, mask=(bits != 0) & (rank < K))
            count += tl.sum(bits, 1, keep_dims=True)
        tl.debug_barrier()
        # ... which the low part joins. An entry that no bit names becomes 0, to be in range too.
        faults = tl.zeros([ROWS, ENTRIES], tl.int32)
        for start in range(0, K, ENTRIES):
            entry = start + entry_lane
            mask = live & (entry < K)
            named = mask & (entry < count)
            index = tl.load(indices + target + entry, mask=named, other=0).to(tl.int32) << LOW
            for bit in tl.static_range(LOW):
                index |= _load_bits(source, entry * LOW + bit, shift, named) << bit
            faults |= (index >= TOTALK).to(tl.int32)
            index = tl.minimum(index, TOTALK - 1)
            # With more threads than entries several hold one entry: all read it before one writes.
            tl.debug_barrier()
            tl.store(indices + target + entry, index.to(indices.dtype.element_ty), mask=mask)
        if CHECK:
            tl.debug_barrier()
            for start in range(0, K - 1, ENTRIES):
                entry = start + entry_lane
                mask = live & (entry < K - 1)
                one = tl.load(indices + target + entry, mask=mask, other=0)
                next_one = tl.load(indices + target + entry + 1, mask=mask, other=1)
                faults |= (one >= next_one).to(tl.int32)
            fine = (count == K) & (tl.sum(faults, 1, keep_dims=True) == 0)
            flag = valid + peer.to(tl.int64) * chunks + chunk
            tl.store(flag, tl.zeros([ROWS, 1], tl.uint8), mask=live & (fine == 0))
    if SIGNS:
        for start in range(0, K, ENTRIES):
            entry = start + entry_lane
            mask = live & (entry < K)
            bits = _load_bits(source, K * LOW + UPPER + entry, shift, mask)
            for plane in tl.static_range(1, PLANES):
                at = K * LOW + UPPER + plane * K + entry
                bits |= _load_bits(source, at, shift, mask) << plane
            tl.store(signs + target + entry, bits.to(tl.uint8), mask=mask)


def tile_sizes(code: IndexCode, most: int, elements: int) -> tuple[int, int, int]:
    """Groups per program, bits (up to `most`) and entries at once.

    `[groups, 8, bits]` has the given number of elements.
    """
    tile = min(max(triton.next_power_of_2(max(code.upper, 1)), 8), most)
    entries = min(triton.next_power_of_2(code.k), tile)
    return max(1, elements // (8 * tile)), tile, entries


def pack(
    code: IndexCode, indices: Tensor, signs: Tensor | None, planes: Tensor, count: int
) -> None:
    """See `psyche_fast.kernels.reference.pack.pack`."""
    groups, bits = planes.shape
    if groups == 0:
        return
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    mode = NO_SIGNS
    if signs is None:
        signs = planes
    else:
        signs = signs if signs.stride(1) == 1 else signs.contiguous()
        mode = FLOAT_SIGNS if signs.is_floating_point() else BOOL_SIGNS
        signs = signs.view(torch.uint8) if mode == BOOL_SIGNS else signs
    options, own = launch_options("codec", planes.device)
    per_program, tile, entries = tile_sizes(code, PACK_BITS, own["elements"])
    with on_device(planes.device):
        pack_planes[(triton.cdiv(groups, per_program),)](
            indices,
            signs,
            planes,
            len(indices),
            groups,
            indices.stride(0),
            signs.stride(0),
            K=code.k,
            LOW=code.low,
            GAP=code.gap,
            UPPER=code.upper,
            SIGNS=mode,
            BITS=bits,
            G=per_program,
            TILE=tile,
            ENTRIES=entries,
            PLANES=max(1, count),
            **options,
        )
    written(planes)


def unpack(
    code: IndexCode,
    planes: Tensor,
    indices: Tensor,
    signs: Tensor | None,
    valid: Tensor | None,
    count: int,
) -> None:
    """See `psyche_fast.kernels.reference.pack.unpack`; `indices` and `signs` are contiguous."""
    peers, groups, bits = planes.shape
    options, own = launch_options("codec", planes.device)
    per_program, tile, entries = tile_sizes(code, UNPACK_BITS, own["elements"])
    with on_device(planes.device):
        unpack_planes[(triton.cdiv(groups, per_program), peers)](
            planes,
            indices,
            planes if signs is None else signs.view(torch.uint8),
            planes if valid is None else valid.view(torch.uint8),
            len(indices),
            planes.stride(0),
            TOTALK=code.totalk,
            K=code.k,
            LOW=code.low,
            GAP=code.gap,
            UPPER=code.upper,
            SIGNS=signs is not None,
            CHECK=valid is not None,
            BITS=bits,
            ROWS=8 * per_program,
            TILE=tile,
            ENTRIES=entries,
            PLANES=max(1, count),
            **options,
        )
    written(indices, signs, valid)
