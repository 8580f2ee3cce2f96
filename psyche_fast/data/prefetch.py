"""Batches made in the background while the step before them runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from psyche_fast.batch import Batch
from psyche_fast.data.samples import Dataset, Sample, collate

# How long close() waits for a read that is under way; the thread is a daemon and ends after it.
_JOIN_SECONDS = 2.0


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

    A thread reads ahead by at most `depth` batches. Step t takes the samples (t-1)B .. tB-1 of the
    data set; ids beyond its end begin it anew, in the same order. An exception of the data set is
    raised by the `next()` that would have given the batch, and by every one after it. Use it as a
    context manager or call `close()`.

    Args:
        dataset: what to read.
        total_batch: samples to a step, B (`--total-batch`).
        first_step: first step, from 1.
        last_step: last step; below `first_step` there are none.
        depth: batches to hold ready, at least 1.

    Raises:
        ValueError: for a `total_batch`, `first_step` or `depth` below 1.
    """

    def __init__(
        self, dataset: Dataset, total_batch: int, first_step: int, last_step: int, depth: int = 2
    ) -> None:
        for name, value in (
            ("total batch (--total-batch)", total_batch),
            ("first step (--start-step)", first_step),
            ("prefetch depth", depth),
        ):
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, got {value}")
        self._dataset = dataset
        self._total_batch = total_batch
        self._steps = range(first_step, last_step + 1)
        self._depth = depth
        self._ready: deque[tuple[int, Batch]] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="batch-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                batch = collate(step_samples(self._dataset, self._total_batch, step))
                with self._changed:
                    self._ready.append((step, batch))
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready or self._finished)
            if self._closed:
                raise StopIteration
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Stop reading and drop what was read; afterwards there is no next batch. Idempotent."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(_JOIN_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
