"""How long OpenMP's threads stay awake for the next loop; to be decided before torch is imported.

GCC's OpenMP, which torch brings, has idle threads spin for some milliseconds, but go to sleep at
once while it counts more threads than there are cores, asleep or not. Gloo copies what it has
gathered in threads of its own, each with a team of OpenMP's, which stays. So after the first
all-gather a rank that has all cores waited for threads to wake up in every loop: forward and
backward of a small model took 1.4 times as long, AdamW's step twice.
"""

from __future__ import annotations

from collections.abc import MutableMapping

_AWAKE = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""The second is what GCC's has by itself, some 3 ms, and the third what LLVM's has, in ms: without
them `active` is for ever."""


def stay_awake(environment: MutableMapping[str, str]) -> bool:
    """Have threads spin as long where more of them are counted than there are cores.

    Returns:
        Whether that changed something: nothing where one of the variables is set.
    """
    if _AWAKE.keys() & environment.keys():
        return False
    environment.update(_AWAKE)
    return True
