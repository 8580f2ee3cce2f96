"""Flat token files, as Psyche's local data provider reads them."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from psyche_fast.data.order import shuffled_order
from psyche_fast.data.samples import (
    Sample,
    check_range,
    check_token_ids,
    is_train,
    visible_files,
)

logger = logging.getLogger(__name__)

TOKEN_FILE_SUFFIXES = (".bin", ".ds", ".npy")
_NPY_MAGIC = b"\x93NUMPY"
# How much of a file is looked at to tell 2-byte from 4-byte tokens, and from how many tokens on.
_PROBE_BYTES = 16384
_PROBE_MIN_TOKENS = 128
# No tokenizer has 2**22 entries, but two 2-byte tokens read as one reach that easily: bytes of text
# from 64 on, the letters, in their upper half suffice.
_MAX_TOKEN_ID = 1 << 22


@dataclass(frozen=True, slots=True)
class _TokenFile:
    path: Path
    offset: int
    """Byte where the tokens begin."""
    sequences: int


def token_files(path: str | Path) -> list[Path]:
    """Token files of a directory in sorted name order, or the one token file that `path` is.

    Of a directory without any, those of its sub-folders in the order of their paths: of the ones
    named `train` or `train-*` if there are such. Names that begin with a dot are left out.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path} (--data-path)")
    if not path.is_dir():
        return [path] if path.suffix in TOKEN_FILE_SUFFIXES and path.is_file() else []
    files = [p for p in visible_files(path) if p.suffix in TOKEN_FILE_SUFFIXES]
    own = [p for p in files if p.parent == path]
    if own:
        return sorted(own, key=lambda p: p.name)
    train = [p for p in files if any(is_train(part) for part in p.relative_to(path).parts[:-1])]
    return train or files


class LocalDataset:
    """Sequences of `*.npy`, `*.bin` and `*.ds` files: little-endian uint16 or uint32 tokens.

    The files of a directory follow one another in sorted name order. With L tokens of s bytes to a
    sequence, the sequences of a file start at the byte offsets `range(0, size - L*s, L*s)`, as in
    Psyche: one that would end exactly at the end of the file is not used. A `.npy` file that has
    NumPy's header is read from behind it, any other from its first byte.

    Sequences are read from disk one by one when asked for; nothing is kept in memory but the order
    (4 bytes a sequence, with a seed only).

    Args:
        path: a directory of token files, or one such file (`--data-path`).
        token_size: bytes to a token, 2 or 4 (`--token-size`).
        sequence_length: tokens to a sequence, L (`--sequence-length`).
        seed: of the order, 32 bits or 32 bytes, see `shuffled_order`; None for that of the files.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if there is no token file, a file disagrees with the token size, or no file is
            long enough for one sequence. A file too short for one is skipped with a warning.
    """

    def __init__(
        self,
        path: str | Path,
        token_size: int = 2,
        sequence_length: int = 2048,
        seed: int | bytes | None = None,
    ) -> None:
        if token_size not in (2, 4):
            raise ValueError(f"the token size (--token-size) must be 2 or 4, got {token_size}")
        if sequence_length < 1:
            raise ValueError(
                f"the sequence length (--sequence-length) must be at least 1, got {sequence_length}"
            )
        self.path = Path(path)
        self.token_size = token_size
        self.sequence_length = sequence_length
        self._dtype = np.dtype(f"<u{token_size}")
        self._files = self._index_files()
        # _ends[f] is the number of sequences in the files up to and with file f.
        self._ends = np.cumsum([file.sequences for file in self._files]).tolist()
        self._order = None if seed is None else shuffled_order(len(self), seed)

    def _index_files(self) -> list[_TokenFile]:
        paths = token_files(self.path)
        if not paths:
            wanted = ", ".join(f"*{suffix}" for suffix in TOKEN_FILE_SUFFIXES)
            raise ValueError(f"no token files ({wanted}) in {self.path} (--data-path)")
        sequence_bytes = self.sequence_length * self.token_size
        files: list[_TokenFile] = []
        longest = 0
        for path in paths:
            offset, size = self._token_span(path)
            longest = max(longest, size // self.token_size)
            if sequences := len(range(0, size - sequence_bytes, sequence_bytes)):
                self._check_token_size(path, offset, size)
                files.append(_TokenFile(path, offset, sequences))
        if not files:
            raise ValueError(
                f"no file in {self.path} fills a sequence of {self.sequence_length} tokens: it "
                f"takes more than that and the longest has {longest} "
                "(--sequence-length, --data-path)"
            )
        for path in sorted({*paths} - {file.path for file in files}):
            logger.warning(
                "%s is skipped: it has no more than %d tokens (--sequence-length)",
                path, self.sequence_length,
            )  # fmt: skip
        return files

    def _token_span(self, path: Path) -> tuple[int, int]:
        """Byte offset of the first token and number of bytes from there on."""
        with path.open("rb") as file:
            has_header = path.suffix == ".npy" and file.read(len(_NPY_MAGIC)) == _NPY_MAGIC
        offset = self._npy_offset(path) if has_header else 0
        size = path.stat().st_size - offset
        if size % self.token_size:
            raise ValueError(
                f"{path} holds {size} bytes of tokens, not a multiple of {self.token_size} "
                "(--token-size)"
            )
        return offset, size

    def _npy_offset(self, path: Path) -> int:
        try:
            array = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{path} is damaged, or no .npy file of integers: {error}") from None
        if array.dtype != self._dtype:
            raise ValueError(
                f"{path} holds {array.dtype.name} ({array.dtype.str}), expected "
                f"{self._dtype.name} ({self._dtype.str}) for {self.token_size}-byte tokens "
                "(--token-size)"
            )
        if not array.flags.c_contiguous:
            raise ValueError(f"{path} is in Fortran order: save it in C order")
        return int(array.offset)

    def _check_token_size(self, path: Path, offset: int, size: int) -> None:
        """Refuse files whose first tokens only make sense at the other token size."""
        count = min(size, _PROBE_BYTES) // self.token_size
        if count < _PROBE_MIN_TOKENS:
            return
        tokens = np.fromfile(path, self._dtype, count, offset=offset)
        if self.token_size == 4:
            wrong = int(tokens.max()) >= _MAX_TOKEN_ID
        else:
            # The upper halves of 4-byte tokens stay small whatever the tokenizer.
            low, high = tokens[0::2], tokens[1::2]
            most, largest = int(high.max()), int(low.max())
            small = most == 0 < largest  # ids of fewer than 2 bytes: every second one is 0
            wrong = small or most < _MAX_TOKEN_ID >> 16 <= largest
        if wrong:
            raise ValueError(
                f"{path} looks like {6 - self.token_size}-byte tokens, not "
                f"{self.token_size}-byte ones (--token-size)"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get_samples(self, first: int, last: int) -> list[Sample]:
        """Samples `first` to `last`, both included, in the (seeded) order.

        Raises:
            ValueError: if the range is empty or reaches past the end of the data set, or a file has
                become shorter since it was opened.
        """
        check_range(first, last)
        if last >= len(self):
            raise ValueError(
                f"sample {last} is past the end of {self.path}, which has {len(self)} sequences of "
                f"{self.sequence_length} tokens"
            )
        return self.get_ids(range(first, last + 1))

    def get_ids(self, ids: Iterable[int]) -> list[Sample]:
        """The samples of these ids, each below the length.

        Raises:
            ValueError: a file has become shorter since it was opened.
        """
        return [self._sample(i) for i in ids]

    def _sample(self, sample_id: int) -> Sample:
        index = sample_id if self._order is None else int(self._order[sample_id])
        which = bisect_right(self._ends, index)
        in_file = index - (self._ends[which - 1] if which else 0)
        tokens = self._read(self._files[which], in_file)
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        return Sample(input_ids, labels=input_ids)

    def _read(self, file: _TokenFile, in_file: int) -> np.ndarray:
        # Read, not mapped: a mapped file that is truncated kills the process with SIGBUS, and a
        # directory of thousands of files would hold as many descriptors.
        start = file.offset + in_file * self.sequence_length * self.token_size
        tokens = np.fromfile(file.path, self._dtype, self.sequence_length, offset=start)
        if len(tokens) != self.sequence_length:
            raise ValueError(f"{file.path} has become shorter since it was opened")
        return tokens

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look at the first sequence of every file (64 files at most).

        Raises:
            ValueError: if a token id is not below `vocab_size`.
        """
        for file in self._files[:64]:
            check_token_ids(self._read(file, 0), vocab_size, str(file.path))
