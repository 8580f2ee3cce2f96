"""Preprocessed Parquet data, as Psyche's preprocessed data provider reads it."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from psyche_fast.data.order import shuffled_order
from psyche_fast.data.remote import RemoteFile
from psyche_fast.data.samples import (
    Sample,
    check_range,
    check_token_ids,
    is_train,
    visible_files,
)

_FIXED_COLUMNS = ("inputs", "labels", "position_ids")
_COLUMNS = (*_FIXED_COLUMNS, "sequence_lengths")
_ALIASES = {"input_ids": "inputs"}
"""Names that others than Psyche give a column."""

_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list,
    pa.types.is_list_view, pa.types.is_large_list_view,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _RowGroup:
    path: Path | RemoteFile
    index: int
    """Number of the row group in its file."""
    first_row: int
    """Row of the file with which it begins."""
    rows: int


_Decoded = dict[str, np.ndarray]
"""The columns of one row group: integers `[rows, L]`, but of `sequence_lengths` all values; per row
their `offsets` `[rows + 1]`."""


def train_files(path: str | Path) -> list[Path]:
    """Parquet files of the train split below `path`, sorted.

    `path` may be one Parquet file. In a directory they are the files of every folder named `train`
    or `train-*` (`path` itself included); where there is no such folder, those whose own names
    begin with `train`. Names that begin with a dot are left out.

    Raises:
        FileNotFoundError: if `path` does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path} (--data-path)")
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    files = [p for p in visible_files(path) if p.suffix == ".parquet"]
    in_folder = [p for p in files if is_train(p.absolute().parent.name)]
    return in_folder or [p for p in files if p.name.startswith("train")]


def remote_train_files(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Those of a URL's files that `train_files` takes; a URL of one file is that file's."""
    parquet = [f for f in files if f.suffix == ".parquet"]
    if len(files) == 1:
        return parquet
    in_folder = [f for f in parquet if is_train(f.name.parent.name)]
    return in_folder or [f for f in parquet if f.name.name.startswith("train")]


class ParquetDataset:
    """Rows of Parquet files, one training sequence each.

    Column `inputs` (or `input_ids`) is required; `labels` and `position_ids` are optional and, like
    it, hold exactly L integers a row; `sequence_lengths` (optional, any length) holds the lengths
    of the documents packed into the row. Sample ids wrap around modulo the number of rows.

    Row groups are decoded when first asked for and kept, up to `cache_bytes` altogether, the least
    recently used dropped first. With a seed every batch touches many row groups, so data larger
    than the cache is decoded over and over: write it with small row groups, or shuffled and train
    without a seed.

    Args:
        path: a directory (see `train_files`) or one Parquet file (`--data-path`).
        sequence_length: integers to a row, L (`--sequence-length`).
        seed: of the order, 32 bits or 32 bytes, see `shuffled_order`; None for that of the files.
        files: those that `path` stands for where it is a URL.
        cache_bytes: how much decoded data is kept; the row group in use is kept in any case.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if there is no train split or no row in it, a file is no Parquet file, columns
            are missing, of a wrong type or not the same in all files, or rows are not L long.
    """

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        seed: int | bytes | None = None,
        *,
        files: Sequence[RemoteFile] = (),
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.path = path if files else Path(path)
        self.sequence_length = sequence_length
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[int, _Decoded] = OrderedDict()
        self._columns, self._groups = self._index_files(files or train_files(path))
        # _ends[g] is the number of rows in the row groups up to and with group g.
        self._ends = np.cumsum([group.rows for group in self._groups]).tolist()
        self._decode(0)  # so that a wrong sequence length shows before training starts
        self._order = None if seed is None else shuffled_order(len(self), seed)

    def _index_files(self, paths: Sequence[Path | RemoteFile]) -> tuple[list[str], list[_RowGroup]]:
        if not paths:
            raise ValueError(
                f"no Parquet files of a train split in {self.path} (--data-path): "
                "expected a folder train or train-*, or files whose names begin with train"
            )
        columns: list[str] | None = None
        groups: list[_RowGroup] = []
        for path in paths:
            try:
                with pq.ParquetFile(_readable(path)) as file:
                    metadata, schema = file.metadata, file.schema_arrow
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
            names = self._check_schema(path, schema)
            if columns is not None and names != columns:
                raise ValueError(f"{path} has columns {names}, {paths[0]} has {columns}")
            columns = names
            row = 0
            for index in range(metadata.num_row_groups):
                rows = metadata.row_group(index).num_rows
                if rows:
                    groups.append(_RowGroup(path, index, row, rows))
                row += rows
        if not groups:
            raise ValueError(f"no rows in the train split of {self.path} (--data-path)")
        assert columns is not None
        return columns, groups

    @staticmethod
    def _check_schema(path: Path | RemoteFile, schema: pa.Schema) -> list[str]:
        names = {_ALIASES.get(name, name) for name in schema.names}
        columns = [name for name in _COLUMNS if name in names]
        if "inputs" not in columns:
            raise ValueError(f"{path} has no column 'inputs' (or 'input_ids'), only {schema.names}")
        for name in columns:
            kind = schema.field(_stored(name, schema.names)).type
            if not any(is_kind(kind) for is_kind in _LISTS) or not pa.types.is_integer(
                kind.value_type
            ):
                raise ValueError(f"{path}: column '{name}' is {kind}, expected lists of integers")
        return columns

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get_samples(self, first: int, last: int) -> list[Sample]:
        """Samples `first` to `last`, both included, in the (seeded) order, modulo the row count.

        Raises:
            ValueError: if the range is empty, or a row read is not L long.
        """
        check_range(first, last)
        return self.get_ids(range(first, last + 1))

    def get_ids(self, ids: Iterable[int]) -> list[Sample]:
        """The samples of these ids, modulo the row count.

        Raises:
            ValueError: a row read is not L long.
        """
        rows = [self._row(i % len(self)) for i in ids]
        samples: dict[int, Sample] = {}
        # Row group by row group, so that each is decoded once whatever the cache holds.
        for row in sorted(set(rows)):
            samples[row] = self._sample(row)
        return [samples[row] for row in rows]

    def _row(self, sample_id: int) -> int:
        return sample_id if self._order is None else int(self._order[sample_id])

    def _sample(self, row: int) -> Sample:
        which = bisect_right(self._ends, row)
        decoded = self._decode(which)
        at = row - (self._ends[which - 1] if which else 0)
        tensors = {
            name: torch.from_numpy(decoded[name][at].astype(np.int64))
            for name in _FIXED_COLUMNS
            if name in decoded
        }
        lengths = None
        if "sequence_lengths" in decoded:
            start, stop = decoded["offsets"][at : at + 2]
            lengths = tuple(decoded["sequence_lengths"][start:stop].tolist())
        input_ids = tensors["inputs"]
        labels = tensors.get("labels", input_ids)
        return Sample(input_ids, labels, tensors.get("position_ids"), lengths)

    def _decode(self, which: int) -> _Decoded:
        if which in self._cache:
            self._cache.move_to_end(which)
            return self._cache[which]
        group = self._groups[which]
        try:
            with pq.ParquetFile(_readable(group.path)) as file:
                names = {name: _stored(name, file.schema_arrow.names) for name in self._columns}
                table = file.read_row_group(group.index, columns=list(names.values()))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"cannot read {group.path}: {error}") from None
        decoded: _Decoded = {}
        for name in self._columns:
            values, counts = _flatten(group, name, table.column(names[name]))
            if name in _FIXED_COLUMNS:
                self._check_counts(group, name, counts)
                values = values.reshape(group.rows, self.sequence_length)
            else:
                decoded["offsets"] = np.concatenate(([0], np.cumsum(counts)))
            decoded[name] = values
        self._cache[which] = decoded
        while len(self._cache) > 1 and self._cached_bytes() > self._cache_bytes:
            self._cache.popitem(last=False)
        return decoded

    def _cached_bytes(self) -> int:
        return sum(array.nbytes for decoded in self._cache.values() for array in decoded.values())

    def _check_counts(self, group: _RowGroup, name: str, counts: np.ndarray) -> None:
        wrong = np.flatnonzero(counts != self.sequence_length)
        if wrong.size:
            at = int(wrong[0])
            raise ValueError(
                f"{group.path}, row {group.first_row + at}, column '{name}': {counts[at]} "
                f"integers, expected {self.sequence_length} (--sequence-length)"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look at the inputs of the first row group.

        Raises:
            ValueError: if a token id is not below `vocab_size`.
        """
        inputs = self._decode(0)["inputs"]
        check_token_ids(inputs, vocab_size, str(self._groups[0].path))


def _readable(path: Path | RemoteFile) -> Any:
    return path.open() if isinstance(path, RemoteFile) else path


def _stored(name: str, stored: Sequence[str]) -> str:
    """A column's name in a file."""
    return name if name in stored else next(n for n in stored if _ALIASES.get(n) == name)


def _flatten(group: _RowGroup, name: str, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of a list column, and per row how many of them are its own."""
    at = pc.index(column.is_null(), True).as_py()
    if at >= 0:
        raise ValueError(f"{group.path}, row {group.first_row + at}, column '{name}': no value")
    if pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    values = pc.list_flatten(column)
    at = pc.index(values.is_null(), True).as_py()
    if at >= 0:
        row = group.first_row + pc.list_parent_indices(column)[at].as_py()
        raise ValueError(f"{group.path}, row {row}, column '{name}': a missing integer")
    return values.to_numpy(), pc.list_value_length(column).to_numpy()
