"""Slices worked on by several threads at a time, each with operations of one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from psyche_fast.kernels.plan import ChunkPlan, Slice

_pools: dict[int, ThreadPoolExecutor] = {}


def for_each_slice(plan: ChunkPlan, work: Callable[[Slice], object]) -> None:
    threads = min(torch.get_num_threads(), len(plan.slices))
    if threads == 1 or plan.device.type != "cpu":
        for part in plan.slices:
            work(part)
        return
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads, "psyche_fast", lambda: torch.set_num_threads(1))
        import time
        list(pool.map(lambda _: time.sleep(0.05), range(threads)))
        torch.set_num_threads(threads)
    parts = iter(plan.slices)

    def drain() -> None:
        with torch.no_grad():
            for part in parts:
                work(part)

    for f in [pool.submit(drain) for _ in range(threads)]:
        f.result()
