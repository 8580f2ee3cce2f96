"""The exchange between two replicas on this machine: DisTrO's results, and the dense gradient.

Both are ranks of a gloo group over loopback, in processes of their own, as replicas on two machines
talk to each other (what is inside a replica goes over NCCL there). Its floor is the bytes that a
rank receives at the speed of the same group's largest messages.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from psyche_fast.bench.kernel_data import Data
from psyche_fast.bench.shapes import SETS, elements
from psyche_fast.distro import exchange
from psyche_fast.distro.message import MessageFormat

RESULTS, DENSE = "results of two replicas, k=8, signs", "dense gradients, bfloat16"
CASES = (RESULTS, DENSE)
_LARGE = 16 << 20
_LEAST, _MOST = 3, 50


class Pair:
    """Two ranks that exchange as often as they are told to.

    Args:
        name: one of `CASES`: whose bytes travel.
        layers: a name of `SETS`.

    Attributes:
        size: bytes that each rank receives of the other.
        gb_per_s: at which the other's bytes come where they are many at once.
    """

    def __init__(self, name: str, layers: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = get_context("spawn")
        self._mine, theirs = zip(*(context.Pipe() for _ in range(2)), strict=True)
        self._ranks = [
            context.Process(
                target=_rank,
                args=(rank, self._folder.name, name, layers, theirs[rank]),
                daemon=True,
            )
            for rank in range(2)
        ]
        for process in self._ranks:
            process.start()
        for end in theirs:
            end.close()
        self.size, self.gb_per_s = self._answers()

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for end, process in zip(self._mine, self._ranks, strict=True):
            end.close()  # which ends the rank
            process.join(20)
            process.kill()
        self._folder.cleanup()

    def times(self, budget_ms: float) -> Sequence[float]:
        """Milliseconds of each exchange, about as many as fit into a time."""
        [first] = self._ask(1)
        count = min(_MOST, max(_LEAST, int(budget_ms / max(first, 1e-3))))
        return self._ask(count)

    def _ask(self, count: int) -> Sequence[float]:
        for end in self._mine:
            end.send(count)
        times: Sequence[float] = self._answers()
        return times

    def _answers(self) -> tuple:  # type: ignore[type-arg]
        """What both ranks say; of times those of the first."""
        try:
            first, _ = (end.recv() for end in self._mine)
        except EOFError:
            raise RuntimeError("a rank of the exchange has ended before its time") from None
        answer: tuple = first  # type: ignore[type-arg]
        return answer


def _rank(rank: int, folder: str, name: str, layers: str, told: Connection) -> None:
    """One of the two: says size and speed, then the times of as many exchanges as it is told."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    run, size = (_results if name == RESULTS else _dense)(layers, group)
    large = torch.zeros(_LARGE, dtype=torch.uint8)
    seconds = [_seconds(partial(_gather, large, group)) for _ in range(8)]
    told.send((size, _LARGE / min(seconds) / 1e9))
    try:
        while True:
            count = told.recv()
            dist.barrier()
            told.send([1e3 * _seconds(run) for _ in range(count)])
    except EOFError:
        dist.destroy_process_group()


def _gather(message: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return exchange.start(message, group).wait()


def _results(layers: str, group: dist.ProcessGroup) -> tuple[Callable[[], object], int]:
    """Packing, the exchange, checking and unpacking."""
    data = Data(SETS[layers], torch.device("cpu"), torch.float32)
    layout = data.layout(8)
    form = MessageFormat(layout, ["torch"] * len(layout.plans), signs=True)
    entries = [data.entries(plan, 1, signs=False) for plan in layout.plans]

    def run() -> object:
        return form.unpack(_gather(form.pack(entries), group))

    received, faults = form.unpack(_gather(form.pack(entries), group))
    if received is None or faults:
        raise RuntimeError(f"what has travelled is refused: {faults}")
    return run, form.size


def _dense(layers: str, group: dist.ProcessGroup) -> tuple[Callable[[], object], int]:
    gradient = torch.zeros(elements(SETS[layers]), dtype=torch.bfloat16)
    return partial(dist.all_reduce, gradient, group=group), gradient.nbytes


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
