"""Batches read in the background while the step before them runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Self

from psyche_fast.batch import Batch
from psyche_fast.data.samples import Dataset, Sample, collate
from psyche_fast.schedules import BatchSizes

_DEPTH = 2
"""Batches to hold ready."""
_JOIN_SECONDS = 2.0
"""How long `close` waits for a read that is under way; the thread is a daemon and ends after it."""


def step_samples(dataset: Dataset, position: int, rows: int) -> list[Sample]:
    """Samples from `position` on, wrapping round at the end of the data set."""
    end = position + rows
    samples: list[Sample] = []
    while position < end:
        first = position % len(dataset)
        count = min(end - position, len(dataset) - first)
        samples += dataset.get_samples(first, first + count - 1)
        position += count
    return samples


class BatchPrefetcher:
    """Iterator of `(step, batch)` for the steps `first_step` to `last_step`, both included.

    A thread reads a few batches ahead. A step uses the samples after those of the steps before it:
    with B of them to each, step t has (t-1)B .. tB-1. Ids beyond the end of the data set begin it
    anew, in the same order. An exception of the data set is raised by the
    `next()` that would have given the batch, and by every one after it. Use it as a context manager
    or call `close()`.

    Args:
        dataset: what to read.
        sizes: samples to a step, one number (`--total-batch`, at least 1) or by step.
        first_step: first step, from 1.
        last_step: last step; below `first_step` there are none.
    """

    def __init__(
        self, dataset: Dataset, sizes: int | BatchSizes, first_step: int, last_step: int
    ) -> None:
        self._dataset = dataset
        if isinstance(sizes, int):
            sizes = BatchSizes(start=sizes, end=sizes, warmup_tokens=0, sequence_length=1)
        self._steps = sizes.steps(first_step, last_step)
        self._room = threading.Semaphore(_DEPTH)
        self._ready: queue.SimpleQueue[tuple[int, Batch] | BaseException] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batch-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for step, position, rows in self._steps:
                self._room.acquire()
                if self._closed:
                    return
                samples = step_samples(self._dataset, position, rows)
                self._ready.put((step, collate(samples)))
            self._ready.put(StopIteration())
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            self._ready.put(error)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        item = StopIteration() if self._closed else self._ready.get()
        if self._closed:
            raise StopIteration
        if isinstance(item, BaseException):
            self._ready.put(item)  # for the next call
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        """Stop reading and drop what was read; afterwards there is no next batch. Idempotent."""
        self._closed = True
        self._room.release()
        self._ready.put(StopIteration())  # for a consumer that waits
        self._thread.join(_JOIN_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
