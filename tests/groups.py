"""Runs a function on several ranks of a gloo group, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def _rank(
    function: Callable[..., Any],
    rank: int,
    world: int,
    file: str,
    args: tuple[Any, ...],
    queue: Any,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=rank, world_size=world,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        value = function(rank, *args)
        # bytes, not shared memory: the process is gone before the tensors are looked at
        with tempfile.NamedTemporaryFile(delete=False) as out:
            torch.save(value, out)
        queue.put((rank, out.name, None))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        queue.close()
        queue.join_thread()
        os._exit(1)


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """The values that ``function(rank, *args)`` returns, in rank order.

    The processes are forked from a server that has imported torch already: seconds are saved.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "transformers"])
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "store")
        processes = [
            context.Process(target=_rank, args=(function, r, world, file, args, queue))
            for r in range(world)
        ]
        for process in processes:
            process.start()
        values: dict[int, Any] = {}
        for _ in processes:
            rank, name, error = queue.get(timeout=100)
            assert error is None, error
            values[rank] = torch.load(name, weights_only=False)
            os.unlink(name)
        for process in processes:
            process.join(30)
    return [values[rank] for rank in range(world)]
