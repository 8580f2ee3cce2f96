"""Documents packed into rows of one length, none cut that fits: best-fit decreasing.

Source: "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830): what is
longer than a row is cut into rows, and all pieces go, the longest first, each into the row that it
leaves the least room in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psyche_fast.batch import IGNORE

WINDOW = 1 << 24
"""Tokens that are packed together: more would need more memory and leave hardly less room."""
_ROW_GROUP = 256
_FILE_TOKENS = 1 << 28


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which pieces go into which row.

    Args:
        lengths: of the pieces, 1 to `size` each.
        size: of a row.

    Returns:
        The pieces' numbers of each row; every piece is in one.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the room that they have
    rooms = 0  # a bit for each room that some row has
    for piece in sorted(range(len(lengths)), key=lambda n: -lengths[n]):  # stable: as they came
        length = lengths[piece]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = size, len(rows)
            rows.append([piece])
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


class PackedWriter:
    """Packed rows in Parquet files, as `ParquetDataset` reads them.

    Columns are `inputs`, `labels` (-100 where a row is filled up), `position_ids`, which begin anew
    with each document, and `sequence_lengths`.

    Args:
        folder: to write to, `train-00000.parquet` and so on.
        size: tokens of a row.
        filler: token that rows are filled up with.

    Attributes:
        names: of the files.
        rows: written so far.
        tokens: of documents in them.
        cut: documents that were longer than a row.
    """

    def __init__(self, folder: Path, size: int, filler: int) -> None:
        self._folder, self._size, self._filler = folder, size, filler
        self._pieces: list[np.ndarray] = []
        self._held = 0
        self._file: pq.ParquetWriter | None = None
        self._in_file = 0
        self._random = np.random.default_rng(0)
        self.names: list[str] = []
        self.rows = self.tokens = self.cut = 0
        fields = ("inputs", "labels", "position_ids", "sequence_lengths")
        self._schema = pa.schema([(name, pa.list_(pa.int32())) for name in fields])

    def add(self, document: np.ndarray) -> None:
        """Take up a document's tokens."""
        self.cut += len(document) > self._size
        for at in range(0, len(document), self._size):
            self._pieces.append(document[at : at + self._size].astype(np.int32))
        self._held += len(document)
        if self._held >= WINDOW:
            self.flush()

    def flush(self) -> None:
        """Write rows of all that has been taken up, in an order of no meaning, always the same."""
        rows = best_fit([len(piece) for piece in self._pieces], self._size)
        # Else the rows of long documents would be trained on first.
        order = self._random.permutation(len(rows))
        for at in range(0, len(rows), _ROW_GROUP):
            self._write([rows[n] for n in order[at : at + _ROW_GROUP]])
        self.tokens += self._held
        self._pieces, self._held = [], 0

    def _write(self, rows: Iterable[list[int]]) -> None:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in self._schema.names}
        for row in rows:
            lengths = [len(self._pieces[piece]) for piece in row]
            room = self._size - sum(lengths)
            tokens = [self._pieces[piece] for piece in row]
            filler = np.full(room, self._filler, np.int32)
            columns["inputs"].append(np.concatenate([*tokens, filler]))
            ignored = np.full(room, IGNORE, np.int32)
            columns["labels"].append(np.concatenate([*tokens, ignored]))
            counted = [np.arange(n, dtype=np.int32) for n in (*lengths, room)]
            columns["position_ids"].append(np.concatenate(counted))
            columns["sequence_lengths"].append(np.array(lengths, np.int32))
            self.rows += 1
        if self._file is None:
            self.names.append(f"train-{len(self.names):05d}.parquet")
            self._file = pq.ParquetWriter(
                self._folder / self.names[-1], self._schema, compression="zstd"
            )
        self._file.write_table(pa.table(columns, schema=self._schema))
        self._in_file += len(columns["inputs"]) * self._size
        if self._in_file >= _FILE_TOKENS:
            self.close()

    def close(self) -> None:
        """Finish the file that is being written, on disk too."""
        if self._file is not None:
            self._file.close()
            self._file, self._in_file = None, 0
            descriptor = os.open(self._folder / self.names[-1], os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
