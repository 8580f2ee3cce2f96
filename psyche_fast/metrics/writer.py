"""`metrics.jsonl`: one strict JSON object per training step, appended and flushed."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO


def _plain(value: Any, key: str) -> Any:
    """Turns one value into what strict JSON can hold; non-finite numbers become null.

    Tensors are refused rather than read: reading one on a GPU waits for the device, and that must
    be the step loop's decision.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):  # numpy's integers too
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"metric {key}: wanted a number, string, bool, None, list or mapping, "
        f"got {type(value).__name__}"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl` file.

    A run that was killed may leave half a line at the end: a last line that has no newline and does
    not parse is left out.

    Args:
        path: The file, or a run directory that holds `metrics.jsonl`.

    Returns:
        One dictionary per line, in the order of the file. Values that were not finite are None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than a torn last one is not a JSON object.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "metrics.jsonl"
    # Bytes, not text: a torn line may end inside a UTF-8 character.
    lines = file.read_bytes().split(b"\n")
    torn = len(lines) - 1  # what follows the last newline: empty unless the line is torn
    records: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if index == torn:
                break
            raise ValueError(f"{file}, line {index + 1}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{file}, line {index + 1}: wanted a JSON object, got {type(record).__name__}"
            )
        records.append(record)
    return records


class MetricsWriter:
    """Appends one JSON object per step to a file and flushes it, so that a killed run keeps them.

    The fields of a line, where they are known: `step`, `loss`, `grad_norm`, `learning_rate`,
    `num_tokens`, `tokens_per_second`, `seconds` (by phase), `step_seconds`, `bytes_sent` (to other
    replicas, by one replica's ranks together), `dense_bytes` (what an exchange of whole gradients
    would have sent), `nonfinite_losses`, `memory` (bytes by kind).

    An existing file is continued. Its torn last line, if a killed run left one, is removed.

    Args:
        path: The file; missing parent folders are made.
        drop_from_step: Removes the lines of an earlier run with `step >= drop_from_step`, for a run
            that starts again at that step. The file is replaced in one piece, so that a kill at any
            moment leaves either the old lines or the kept ones. None keeps all.

    Raises:
        ValueError: The existing file is not one of ours, or with `drop_from_step` has a line that
            has no step.
    """

    def __init__(self, path: str | os.PathLike[str], *, drop_from_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._repair(drop_from_step)
        self._file: TextIO | None = self.path.open("a", encoding="utf-8")

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
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for record in kept:
                file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
            record: The fields; `step` is required. Non-finite floats are written as null.

        Raises:
            TypeError: A value is no number, string, bool, None, list or mapping (a tensor, say).
            ValueError: `step` is missing or no whole number, or the writer is closed.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: the metrics writer is closed")
        plain = _plain(record, "record")
        step = plain.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"metric step: wanted a whole number, got {record.get('step')!r}")
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
