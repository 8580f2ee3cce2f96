"""Random positions that all replicas draw alike: Philox 4x32-10 (Salmon et al., SC 2011).

A number is a function of seed, round, parameter, chunk and position alone, so that positions do not
depend on who works on a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 6
_MIX = (0x9E3779B1 - (1 << 32), 0x85EBCA6B - (1 << 32))  # odd, as int32


def philox(counter: tuple[Tensor, ...], key: tuple[int, Tensor]) -> Tensor:
    """The first of four words of Philox 4x32-10.

    Args:
        counter: four int64 tensors of words of 32 bits, that broadcast.
        key: two words, the second one of them for each.

    Returns:
        int64, each from 0 to 2^32 - 1.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # modulo 2^64: the bits are right
        a, b, c, d = (
            ((second >> 32) & _MASK) ^ b ^ low,
            second & _MASK,
            ((first >> 32) & _MASK) ^ d ^ high,
            first & _MASK,
        )
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return a


def name_key(name: str) -> int:
    """32 bits of a parameter's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def keys(numbers: Mapping[str, Tensor], *, seed: int, turn: int) -> Tensor:
    """What `positions` goes by, of chunks of parameters.

    Args:
        numbers: by parameter the chunks' numbers in the whole parameter, int64 `[n]`.
        seed: the method's.
        turn: number of the round.

    Returns:
        int64 `[n, 6]` of numbers of 32 bits, of one parameter's chunks after the other's.
    """
    chunks = torch.cat(list(numbers.values())).unsqueeze(1)
    names = _names(tuple((name, len(own)) for name, own in numbers.items()), chunks.device)
    rounds = torch.arange(_ROUNDS, device=chunks.device)
    # Filled in where they are used: what comes from the host would wait for the device.
    words = [chunks.new_full((), w & _MASK) for w in (turn, turn >> 32)]
    return philox((rounds, chunks, *words), (seed & _MASK, names))


@lru_cache(maxsize=32)
def _names(counts: tuple[tuple[str, int], ...], device: torch.device) -> Tensor:
    """The key of each chunk's parameter, `[n, 1]`; `counts` are the parameters' chunks."""
    keys = torch.tensor([name_key(name) for name, _ in counts])
    return keys.repeat_interleave(torch.tensor([n for _, n in counts])).to(device).unsqueeze(1)


def positions(keys: Tensor, size: int, k: int) -> Tensor:
    """Which `k` of the `size` elements of chunks are sent in a round.

    Where a permutation of `0 .. size - 1` takes the first `k`: six rounds of an unbalanced Feistel
    network over the bits of a position, the upper half changed by the lower one and the other way
    round, each with a key of Philox: counter (round of the network, chunk, turn's low and high
    word), key (seed, name). What falls at `size` or beyond goes through again. So the work is that
    of `k` numbers, not of `size`.

    Args:
        keys: of the chunks.
        size: elements of a chunk, up to 2^30.
        k: how many of them.

    Returns:
        int64 `[n, k]`, ascending, on the keys' device.
    """
    bits = (size - 1).bit_length()
    low = (bits + 1) // 2
    own = _signed(keys).unsqueeze(2)
    places = torch.arange(k, dtype=torch.int32, device=keys.device).expand(len(keys), k)
    places = _permuted(places, own, low, bits - low)
    # Nothing is beyond a power of two, and no device is waited for.
    while size < 1 << bits and bool((beyond := places >= size).any()):
        again = _permuted(places, own, low, bits - low)
        places = torch.where(beyond, again, places)
    return places.sort(dim=1).values.to(torch.int64)


def _permuted(places: Tensor, keys: Tensor, low: int, high: int) -> Tensor:
    """Another place for each, int32 `[n, k]`, of `2^(low + high)`; keys are `[n, rounds, 1]`.

    Arithmetic is modulo 2^32; int32 has half the bytes of int64.
    """
    lower, upper = places & ((1 << low) - 1), places >> low
    for number, key in enumerate(keys.unbind(1)):
        source, bits = (lower, high) if number % 2 == 0 else (upper, low)
        mixed = (source + key).mul_(_MIX[0])
        mixed ^= (mixed >> 15).bitwise_and_((1 << 17) - 1)  # a shift of unsigned numbers
        mixed = mixed.mul_(_MIX[1]).bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1)
        if number % 2 == 0:
            upper = mixed.bitwise_xor_(upper)
        else:
            lower = mixed.bitwise_xor_(lower)
    return (upper << low).bitwise_or_(lower)


def _signed(words: Tensor) -> Tensor:
    """The int32 of the same 32 bits."""
    return torch.where(words >> 31 != 0, words - (1 << 32), words).to(torch.int32)
