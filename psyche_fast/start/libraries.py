"""What GCC's OpenMP and glibc's allocator do beneath torch in ranks that compute on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, MutableMapping

_AWAKE = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""The second is what GCC's has by itself, some 3 ms, and the third what LLVM's has, in ms: without
them `active` is for ever."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`, from its `malloc.h`."""
_KEPT = (128 << 20, 32 << 20)
"""Bytes up to which freed memory is kept; versions before 2.35 take the second at most."""


def stay_awake(environment: MutableMapping[str, str]) -> bool:
    """Have OpenMP's idle threads spin as long where more are counted than there are cores.

    They spin for some milliseconds, but go to sleep at once while GCC's OpenMP counts more threads
    than cores, asleep or not. Gloo copies what it has gathered in threads of its own, each with a
    team, which stays. So after its first all-gather a rank that has all cores waited for threads to
    wake up in every loop: forward and backward of a small model took 1.4 times as long, AdamW's
    step twice. To be called before torch is imported.

    Returns:
        Whether that changed something: nothing where one of the variables is set.
    """
    if _AWAKE.keys() & environment.keys():
        return False
    environment.update(_AWAKE)
    return True


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Have glibc keep the memory that a step frees for the next one.

    Else what a step frees goes back to the kernel, as do large tensors by themselves, and the next
    one gets it page by page, zeroed: a tenth of a small model's step and more. What is kept is cut
    up, so that a process may hold a quarter more. The largest tensors still go back.

    Returns:
        Whether that is so: not where one of glibc's own variables is set, or there is no glibc.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # macOS, musl
        return False
    kept = any(mallopt(_MMAP_THRESHOLD, size) for size in _KEPT)
    return bool(kept and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
