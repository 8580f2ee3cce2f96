"""The seeded order of a data set: Rust's `ChaCha8Rng` and `SliceRandom::shuffle`, bit for bit.

Psyche shuffles its sequences with `rand_chacha::ChaCha8Rng` and the slice shuffle of rand 0.9. A
run that is to see the same sequences at the same step needs the same permutation, so both are
restated below: the ChaCha block function (RFC 8439, 2.3, with 8 rounds and a 64-bit counter) on
NumPy arrays of blocks, and rand's draws, where one 32-bit word gives the targets of several
consecutive swaps for as long as the product of their ranges fits in 32 bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from psyche_fast.locations import seed_key

_WORD = 1 << 32
_BUFFERED_WORDS = 1 << 18
# From this range on no two ranges multiply to less than 2**32: every word gives one index.
_FIRST_SINGLE_RANGE = 1 << 16


def chacha_blocks(
    key: bytes, first_block: int, count: int, *, rounds: int = 8, stream: int = 0
) -> np.ndarray:
    """Key stream words of `count` consecutive ChaCha blocks.

    Args:
        key: 32 bytes.
        first_block: the 64-bit block counter of the first block (state words 12 and 13).
        count: number of blocks.
        rounds: an even number of rounds, 8 for ChaCha8 and 20 for RFC 8439.
        stream: the 64-bit stream number or nonce (state words 14 and 15).

    Returns:
        `uint32 [count * 16]`, in the order of the key stream.
    """
    assert len(key) == 32
    assert rounds % 2 == 0
    state = np.empty((16, count), dtype=np.uint32)
    constants = np.frombuffer(b"expand 32-byte k" + key, dtype="<u4")
    state[:12] = constants[:, None]
    counters = np.uint64(first_block) + np.arange(count, dtype=np.uint64)
    state[12] = counters & np.uint64(0xFFFFFFFF)
    state[13] = counters >> np.uint64(32)
    state[14] = stream & 0xFFFFFFFF
    state[15] = stream >> 32

    # One row of four words is one operand of four quarter rounds at once.
    a, b, c, d = (state[i : i + 4].copy() for i in range(0, 16, 4))
    for round_index in range(rounds):
        for left, right, moved, shift in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            left += right
            moved ^= left
            high = moved >> np.uint32(32 - shift)
            moved <<= np.uint32(shift)
            moved |= high
        # Column rounds turn into diagonal rounds (and back) by rotating the rows.
        turn = 1 if round_index % 2 == 0 else -1
        b, c, d = np.roll(b, -turn, 0), np.roll(c, -2 * turn, 0), np.roll(d, -3 * turn, 0)
    mixed = np.concatenate((a, b, c, d))
    mixed += state
    return np.ascontiguousarray(mixed.T).reshape(-1)


class _Words:
    """Random access to the words of one ChaCha8 key stream, generated in large runs."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._start = 0
        self._buffer = np.empty(0, dtype=np.uint32)

    def get(self, position: int, count: int) -> np.ndarray:
        """`uint32 [count]`: the words from `position` on."""
        offset = position - self._start
        if offset < 0 or offset + count > len(self._buffer):
            block = position // 16
            blocks = -(-max(count + 16, _BUFFERED_WORDS) // 16)
            self._buffer = chacha_blocks(self._key, block, blocks)
            self._start = block * 16
            offset = position - self._start
        return self._buffer[offset : offset + count]


def _grouped_targets(words: _Words, n: int) -> tuple[list[int], int]:
    """Swap targets for ranges below 2**16, where one word serves several indices.

    Returns:
        The targets of the indices 1, 2, ... (at most n - 1 of them) and the number of words used.
    """
    targets: list[int] = []
    last_range = min(n, _FIRST_SINGLE_RANGE - 1)
    # At most two words a group, and never more groups than ranges.
    stream = words.get(0, 2 * last_range).tolist()
    position = 0
    low_range = 2
    while low_range <= last_range:
        bound, end = low_range, low_range + 1
        while bound * end < _WORD:
            bound *= end
            end += 1
        chosen, low = divmod(stream[position] * bound, _WORD)
        position += 1
        if low > _WORD - bound:
            chosen += low + (stream[position] * bound >> 32) >= _WORD
            position += 1
        for size in range(low_range, end - 1):
            chosen, target = divmod(chosen, size)
            targets.append(target)
        targets.append(chosen)
        low_range = end
    return targets[: n - 1], position


def shuffled_order(n: int, seed: int | bytes) -> np.ndarray:
    """The order in which Psyche visits `n` sequences shuffled with `seed`.

    The generator is ChaCha8 keyed with the seed; one of 32 bits is 28 zero bytes and the number,
    big-endian. The shuffle is that of rand 0.9: for i = 1, 2, ... swap elements i and j, j drawn
    from [0, i].

    Args:
        n: number of sequences, below 2**32 - 1 (rand shuffles larger slices another way).
        seed: 0 to 2**32 - 1, or 32 bytes.

    Returns:
        `uint32 [n]`: element k is the index of the sequence that is visited as the k-th.

    Raises:
        ValueError: if `n` or `seed` is out of range.
    """
    words = _Words(_key(n, seed))
    order = array("I", bytes(4 * n))
    assert order.itemsize == 4

    def swap_all(first: int, targets: list[int]) -> None:
        # `order` starts as the identity, so what swap i moves away from position i is i.
        for i, j in enumerate(targets, first):
            order[i] = order[j]
            order[j] = i

    targets, position = _grouped_targets(words, n)
    swap_all(1, targets)
    for i, drawn in _single_draws(words, position, 1 + len(targets), n, 1):
        swap_all(i, drawn)
    return np.frombuffer(order, dtype=np.uint32) if n else np.empty(0, dtype=np.uint32)


def reversed_order(n: int, seed: int | bytes) -> np.ndarray:
    """The order in which Psyche visits the `n` samples of a mixture shuffled with `seed`.

    The generator is that of `shuffled_order`; for i = n-1, n-2, ... 1 swap elements i and j, each j
    drawn by itself (`random_range(0..=i)` of rand 0.9).

    Args:
        n: number of samples, below 2**32 - 1.
        seed: 0 to 2**32 - 1, or 32 bytes.

    Returns:
        `uint32 [n]`: element k is the index of the sample that is visited as the k-th.

    Raises:
        ValueError: if `n` or `seed` is out of range.
    """
    words = _Words(_key(n, seed))
    order = array("I", range(n))
    for i, drawn in _single_draws(words, 0, n - 1, 0, -1):
        for at, j in enumerate(drawn):
            order[i - at], order[j] = order[j], order[i - at]
    return np.frombuffer(order, dtype=np.uint32) if n else np.empty(0, dtype=np.uint32)


def _key(n: int, seed: int | bytes) -> bytes:
    if not 0 <= n < _WORD - 1:
        raise ValueError(f"a seeded order needs 0 to {_WORD - 2} sequences, got {n}")
    if isinstance(seed, int):
        if not 0 <= seed < _WORD:
            raise ValueError(f"the seed (--seed) must be between 0 and {_WORD - 1}, got {seed}")
        return seed_key(seed)
    if len(seed) != 32:
        raise ValueError(f"the seed (--seed-bytes) must be 32 bytes, got {len(seed)}")
    return seed


def _single_draws(
    words: _Words, position: int, first: int, end: int, way: int
) -> Iterator[tuple[int, list[int]]]:
    """Swap targets j in [0, i], a word or two each, for i = `first`, `first + way`, ... to `end`.

    Yields:
        an i, and the targets from it on.
    """
    index = first
    while (end - index) * way > 0:
        # A range m asks for a second word once in 2**32 / m draws, and all later words move on by
        # one; a window of about that length is drawn as if none did, and kept up to the first.
        count = max(256, min(_BUFFERED_WORDS // 4, _WORD // (index + 1)))
        count = min((end - index) * way, count)
        drawn = words.get(position, count + 1).astype(np.uint64)
        ranges = np.arange(index + 1, index + 1 + way * count, way, dtype=np.int64).astype(
            np.uint64
        )
        products = drawn[:count] * ranges
        low = products & np.uint64(0xFFFFFFFF)
        chosen = products >> np.uint64(32)
        again = np.flatnonzero(low > np.uint64(_WORD) - ranges)
        if again.size:
            at = int(again[0])
            carry = int(low[at]) + (int(drawn[at + 1]) * int(ranges[at]) >> 32) >= _WORD
            chosen[at] += np.uint64(carry)
            count = at + 1
            position += 1
        yield index, chosen[:count].tolist()
        position += count
        index += way * count
