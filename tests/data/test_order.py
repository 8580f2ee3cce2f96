"""The seeded order against published vectors and a plain restatement of rand 0.9."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest

from psyche_fast.data.order import chacha_blocks, reversed_order, shuffled_order

MASK = 0xFFFFFFFF


def test_chacha20_block_of_rfc_8439_section_2_3_2():
    expected = (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )
    # RFC: counter 1, nonce 00000009 0000004a 00000000, in state words 12 to 15.
    words = chacha_blocks(
        bytes(range(32)), 0x09000000_00000001, 3, rounds=20, stream=0x00000000_4A000000
    )
    assert " ".join(f"{w:08x}" for w in words[:16]) == expected
    assert words.shape == (48,)


def test_known_order():
    assert shuffled_order(12, 1).tolist() == [4, 8, 7, 6, 2, 10, 5, 3, 11, 0, 1, 9]


# --- an independent, scalar restatement ---------------------------------------------------------


def oracle_words(seed: int):
    """ChaCha8 key stream, word by word, after RFC 8439's pseudocode."""

    def quarter(x, a, b, c, d):
        for p, q, r, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) & MASK
            x[r] ^= x[p]
            x[r] = (x[r] << n | x[r] >> 32 - n) & MASK

    key = struct.unpack("<8I", bytes(28) + seed.to_bytes(4, "big"))
    counter = 0
    while True:
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key]
        start += [counter & MASK, counter >> 32, 0, 0]
        x = list(start)
        for _ in range(4):
            for column in range(4):
                quarter(x, column, 4 + column, 8 + column, 12 + column)
            for i in range(4):
                quarter(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
        yield from ((a + b) & MASK for a, b in zip(x, start, strict=True))
        counter += 1


def oracle_shuffle(n: int, words) -> tuple[list[int], int]:
    """Element by element, as the increasing uniform sampler of rand 0.9 goes about it."""
    order = list(range(n))
    second_words = left = chunk = 0
    for i in range(1, n):
        if left == 0:
            product, factor = i + 1, i + 2
            while product * factor <= MASK:
                product *= factor
                factor += 1
            left = factor - (i + 1)
            wide = next(words) * product
            chunk, low = wide >> 32, wide & MASK
            if low > (-product) & MASK:
                second_words += 1
                if low + (next(words) * product >> 32) > MASK:
                    chunk += 1
        left -= 1
        if left:
            chunk, j = divmod(chunk, i + 1)
        else:
            j = chunk
        order[i], order[j] = order[j], order[i]
    return order, second_words


@pytest.mark.parametrize("n", [0, 1, 2, 3, 12, 13, 14, 300, 1624, 1627])
@pytest.mark.parametrize("seed", [0, 7, MASK])
def test_small_orders_equal_the_scalar_ones(n, seed):
    assert shuffled_order(n, seed).tolist() == oracle_shuffle(n, oracle_words(seed))[0]


@pytest.mark.parametrize(("n", "seed"), [(65534, 5), (65537, 6), (65538, 7), (200_003, 8)])
def test_large_orders_equal_the_scalar_ones(n, seed):
    """Over the change from grouped to single draws, and many windows of single draws."""
    words = iter(chacha_blocks(bytes(28) + struct.pack(">I", seed), 0, 40_000).tolist())
    expected, second_words = oracle_shuffle(n, words)
    assert second_words > 100  # the rare case is covered
    assert shuffled_order(n, seed).tolist() == expected


def test_millions_of_sequences_take_seconds_and_four_bytes_each():
    n = 1_000_000
    start = time.perf_counter()
    order = shuffled_order(n, 3)
    assert time.perf_counter() - start < 10
    assert order.nbytes == 4 * n
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_outside_32_bits_is_refused(seed):
    with pytest.raises(ValueError, match=r"--seed.*4294967295"):
        shuffled_order(10, seed)


def test_more_sequences_than_rand_counts_in_32_bits_are_refused():
    with pytest.raises(ValueError, match="4294967295"):
        shuffled_order(MASK, 0)


def oracle_reversed(n: int, key: bytes) -> list[int]:
    words = iter(chacha_blocks(key, 0, n // 8 + 4).tolist())
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        wide = next(words) * (i + 1)
        j, low = wide >> 32, wide & MASK
        if low > (-(i + 1)) & MASK and low + (next(words) * (i + 1) >> 32) > MASK:
            j += 1
        order[i], order[j] = order[j], order[i]
    return order


@pytest.mark.parametrize("n", [0, 1, 2, 3, 300, 70_001, 200_003])
def test_reversed_orders_equal_the_scalar_ones(n):
    key = bytes(range(3, 35))
    assert reversed_order(n, key).tolist() == oracle_reversed(n, key)


def test_a_seed_of_bytes_is_the_whole_key():
    assert np.array_equal(shuffled_order(500, bytes(28) + b"\x00\x00\x01\x07"),
                          shuffled_order(500, 0x107))  # fmt: skip
    assert not np.array_equal(shuffled_order(500, b"\x01" + bytes(31)), shuffled_order(500, 0))
    with pytest.raises(ValueError, match=r"--seed-bytes.* 32 bytes, got 31"):
        shuffled_order(5, bytes(31))


def test_order_of_two_sequences_in_psyches_own_tests():
    assert shuffled_order(2, bytes(range(1, 33))).tolist() == [0, 1]
