"""What a GPU's memory held when there was none left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from psyche_fast.compat import dump_memory_snapshot
from psyche_fast.errors import is_out_of_memory

log = logging.getLogger(__name__)


@contextmanager
def snapshot_if_full(folder: Path, rank: int) -> Iterator[None]:
    """Writes the allocator's snapshot where the block runs out of a GPU's memory; the error passes.

    It says which blocks there were, and how large; under `psyche-fast profile` also who had asked
    for each. The error's line says where it is.

    Args:
        folder: takes `memory-rank-N.pickle`.
        rank: this one.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and torch.cuda.is_available():
            path = folder / f"memory-rank-{rank}.pickle"
            try:
                dump_memory_snapshot(path)
            except (OSError, RuntimeError) as failed:  # the first error is what counts
                log.warning("no snapshot of the memory: %s", failed)
            else:
                error.add_note(f"what held it is in {path} (https://pytorch.org/memory_viz)")
        raise
