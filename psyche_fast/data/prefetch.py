"""Batches read in the background while the step before them runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Self

from psyche_fast.batch import Batch
from psyche_fast.data.samples import Dataset, Sample, collate

_DEPTH = 2
"""Batches to hold ready."""
_JOIN_SECONDS = 2.0
"""How long `close` waits for a read that is under way; the thread is a daemon and ends after it."""


def step_samples(dataset: Dataset, total_batch: int, step: int) -> list[Sample]:
    """Samples (t-1)B .. tB-1 of step t (from 1), wrapping round at the end of the data set."""
    position = (step - 1) * total_batch
    end = position + total_batch
    samples: list[Sample] = []
    while position < end:
        first = position % len(dataset)
        count = min(end - position, len(dataset) - first)
        samples += dataset.get_samples(first, first + count - 1)
        position += count
    return samples


class BatchPrefetcher:
    """Iterator of `(step, batch)` for the steps `first_step` to `last_step`, both included.

    A thread reads a few batches ahead. Step t uses the samples (t-1)B .. tB-1 of the data set; ids
    beyond its end begin it anew, in the same order. An exception of the data set is raised by the
    `next()` that would have given the batch, and by every one after it. Use it as a context manager
    or call `close()`.

    Args:
        dataset: what to read.
        total_batch: samples to a step, B (`--total-batch`), at least 1.
        first_step: first step, from 1.
        last_step: last step; below `first_step` there are none.
    """

    def __init__(self, dataset: Dataset, total_batch: int, first_step: int, last_step: int) -> None:
        self._dataset = dataset
        self._total_batch = total_batch
        self._steps = range(first_step, last_step + 1)
        self._room = threading.Semaphore(_DEPTH)
        self._ready: queue.SimpleQueue[tuple[int, Batch] | BaseException] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batch-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for step in self._steps:
                self._room.acquire()
                if self._closed:
                    return
                samples = step_samples(self._dataset, self._total_batch, step)
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
