"""Random positions that all replicas draw alike: Philox 4x32-10 (Salmon et al., SC 2011).

A number is a function of seed, round, parameter, chunk and position alone, so that positions do not
depend on who works on a chunk.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> Tensor:
    """The first of four words of Philox 4x32-10.

    Args:
        counter: four int64 tensors of words of 32 bits, that broadcast.
        key: two words.

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


def positions(name: str, chunks: Tensor, size: int, k: int, *, seed: int, turn: int) -> Tensor:
    """Which `k` of the `size` elements of some of a parameter's chunks are sent in a round.

    Those of the smallest numbers, counter (position, chunk, round's low and high word) and key
    (seed, name); the lower position of equal ones.

    Args:
        name: the parameter's.
        chunks: their numbers in the whole parameter, int64 `[n]`.
        size: elements of a chunk.
        k: how many of them.
        seed: the method's.
        turn: number of the round.

    Returns:
        int64 `[n, k]`, ascending, on the device of `chunks`.
    """
    words = [torch.tensor(w & _MASK, device=chunks.device) for w in (turn, turn >> 32)]
    position = torch.arange(size, device=chunks.device)
    numbers = philox((position, chunks.unsqueeze(1), *words), (seed & _MASK, name_key(name)))
    order = ((numbers << 30) | position).sort(dim=1).indices[:, :k]
    return order.sort(dim=1).values
