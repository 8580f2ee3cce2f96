"""`metrics.jsonl`: one strict JSON object per training step, appended and flushed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

_LOG = logging.getLogger(__name__)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl` file.

    A run that was killed may leave half a line at the end: a last line that has no newline and does
    not parse is left out.

    Args:
        path: The file.

    Returns:
        One dictionary per line, in the order of the file. Values that were not finite are None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than a torn last one is not a JSON object.
    """
    # Bytes, not text: a torn line may end inside a UTF-8 character.
    lines = Path(path).read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(msgspec.json.decode(line, type=dict[str, Any]))
        # msgspec's and UnicodeDecodeError are a ValueError
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline follows it
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


class MetricsWriter:
    """Appends one JSON object per step to a file and flushes it, so that a killed run keeps them.

    The fields of a line, where they are known: `step`, `loss`, `grad_norm`, `learning_rate`,
    `num_tokens`, `tokens_per_second`, `seconds` (by phase), `step_seconds`, `bytes_sent` (to other
    replicas, by one replica's ranks together), `bytes_received` (from them), `dense_bytes` (what an
    exchange of whole gradients would have sent), `nonfinite_losses`, `memory` (bytes by kind).

    An existing file is continued. Its torn last line, if a killed run left one, is removed.

    Args:
        path: The file; missing parent folders are created.
        drop_from_step: Removes the lines of an earlier run with `step >= drop_from_step`, for a run
            that starts again at that step. The file is replaced in one piece, so that a kill at any
            moment leaves either the old lines or the kept ones. None keeps all.
        tell: Hears once that lines cannot be written, as on a full disk: they wait for the next.

    Raises:
        ValueError: The existing file is not one of ours, or with `drop_from_step` has a line that
            has no step.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        drop_from_step: int | None = None,
        tell: Callable[[str], object] = _LOG.warning,
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._temporary.unlink(missing_ok=True)  # of a run that was killed while it began
        if self.path.exists():
            self._repair(drop_from_step)
        self._file = self.path.open("ab", buffering=0)
        self._tell = tell
        self._waiting = bytearray()
        self._is_late = False

    def _repair(self, drop_from_step: int | None) -> None:
        records = read_metrics(self.path)
        kept = records
        if drop_from_step is not None:
            for index, record in enumerate(records):
                if not isinstance(record.get("step"), int):
                    raise ValueError(f"{self.path}: record {index + 1} has no whole-number step")
            kept = [record for record in records if record["step"] < drop_from_step]
        whole = self.path.read_bytes()
        if len(kept) == len(records) and (not whole or whole.endswith(b"\n")):
            return
        with self._temporary.open("wb") as file:
            file.writelines(map(_line, kept))
            file.flush()
            os.fsync(file.fileno())
        self._temporary.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
            record: The fields; `step` is required. Non-finite floats are written as null.

        Raises:
            TypeError: JSON cannot hold a value. Tensors are refused rather than read: reading one
                on a GPU waits for the device, and that must be the step loop's decision.
            ValueError: The writer is closed.
        """
        if self._file.closed:
            raise ValueError(f"{self.path} is closed")
        self._waiting += _line(record)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._is_late = False
        except OSError as error:  # no reason to lose the run
            if not self._is_late:
                self._tell(f"{self.path}: lines have to wait: {error.strerror}")
            self._is_late = True

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file.closed:
            return
        self._flush()
        self._file.close()
        if self._waiting:
            self._tell(f"{self.path}: the last lines could not be written")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(record) + b"\n"
