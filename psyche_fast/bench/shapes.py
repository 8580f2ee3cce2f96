"""Parameter shapes that kernels and optimisers are measured on, as language models have them."""

from __future__ import annotations

import math
from typing import TypeAlias

Shapes: TypeAlias = list[tuple[int, ...]]


def gpt2(*, vocabulary: int, positions: int, width: int, layers: int) -> Shapes:
    """GPT-2 as transformers has it: linear layers `[in, out]` with biases, tied output layer."""
    block: Shapes = [
        *((width,), (width,)),
        *((width, 3 * width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    ]
    return [(vocabulary, width), (positions, width), *block * layers, (width,), (width,)]


def llama(
    *, vocabulary: int, width: int, layers: int, key_value: int, hidden: int, tied: bool
) -> Shapes:
    """Llama 3: linear layers `[out, in]` without biases; `key_value` is all key heads together."""
    block: Shapes = [
        *((width, width), (key_value, width), (key_value, width), (width, width)),
        *((hidden, width), (hidden, width), (width, hidden)),
        *((width,), (width,)),
    ]
    ends: Shapes = [(width,)] if tied else [(width,), (vocabulary, width)]
    return [(vocabulary, width), *block * layers, *ends]


SETS: dict[str, Shapes] = {
    # For Triton's interpreter: two chunks of 64 x 64, some of 1 x 64, a vector.
    "tiny": [(64, 128), (67, 64), (192,)],
    # For CPUs: 5.5 million elements.
    "small": gpt2(vocabulary=3008, positions=64, width=256, layers=6),
    # GPT-2. Its vocabulary is a prime number: the embedding falls into chunks of 1 x 64.
    "125M": gpt2(vocabulary=50257, positions=1024, width=768, layers=12),
    # The worst class alone.
    "prime": [(50257, 768)],
    # Llama-3.2-1B and Llama-3.1-8B.
    "1.2B": llama(
        vocabulary=128256, width=2048, layers=16, key_value=512, hidden=8192, tied=True
    ),
    "8B": llama(
        vocabulary=128256, width=4096, layers=32, key_value=1024, hidden=14336, tied=False
    ),
}  # fmt: skip


def elements(shapes: Shapes) -> int:
    """Number of elements of all parameters."""
    return sum(map(math.prod, shapes))
