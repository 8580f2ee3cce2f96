"""Flat token files, as Psyche's local and HTTP data providers read them."""

from __future__ import annotations

import io
import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch

from psyche_fast.data.order import shuffled_order
from psyche_fast.data.remote import RemoteFile, fetch
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
_NPY_HEADER_BYTES = 1 << 16  # no header of one array is longer
# How much of a file is looked at to tell 2-byte from 4-byte tokens, and from how many tokens on.
_PROBE_BYTES = 16384
_PROBE_MIN_TOKENS = 128
# How many files' beginnings are looked at for such faults, on disk and behind URLs.
_LOOKED_AT, _LOOKED_AT_REMOTE = 64, 16
# No tokenizer has 2**22 entries, but two 2-byte tokens read as one reach that easily: bytes of text
# from 64 on, the letters, in their upper half suffice.
_MAX_TOKEN_ID = 1 << 22


@dataclass(frozen=True, slots=True)
class _TokenFile:
    path: Path | RemoteFile
    offset: int
    """Byte where the tokens begin."""
    sequences: int


def token_files(path: str | Path) -> list[Path]:
    """Token files of a directory in sorted name order, or the one token file that `path` is.

    Of a directory without any, those of its sub-folders in the order of their paths: of the ones
    named `train` or `train-*` if there are such. Names that begin with a dot are left out.

    Raises:
        FileNotFoundError: there is no `path`.
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
    NumPy's header is read from behind it, any other from its first byte. Of a file behind a URL one
    token more has to be there, as with Psyche's HTTP provider: `range(0, size - L*s - s, L*s)`.

    Sequences are read from disk one by one when asked for; nothing is kept in memory but the order
    (4 bytes a sequence, with a seed only).

    Args:
        path: a directory of token files, or one such file (`--data-path`).
        token_size: bytes to a token, 2 or 4 (`--token-size`).
        sequence_length: tokens to a sequence, L (`--sequence-length`).
        seed: of the order, 32 bits or 32 bytes, see `shuffled_order`; None for that of the files.
        files: those that `path` stands for where it is a URL.

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
        *,
        files: Sequence[RemoteFile] = (),
    ) -> None:
        if token_size not in (2, 4):
            raise ValueError(f"the token size (--token-size) must be 2 or 4, got {token_size}")
        if sequence_length < 1:
            raise ValueError(
                f"the sequence length (--sequence-length) must be at least 1, got {sequence_length}"
            )
        self.path = path if files else Path(path)
        self.token_size = token_size
        self.sequence_length = sequence_length
        self._dtype = np.dtype(f"<u{token_size}")
        self._files = self._index_files(files or token_files(path))
        # _ends[f] is the number of sequences in the files up to and with file f.
        self._ends = np.cumsum([file.sequences for file in self._files]).tolist()
        self._order = None if seed is None else shuffled_order(len(self), seed)

    def _index_files(self, paths: Sequence[Path | RemoteFile]) -> list[_TokenFile]:
        if not paths:
            wanted = ", ".join(f"*{suffix}" for suffix in TOKEN_FILE_SUFFIXES)
            raise ValueError(f"no token files ({wanted}) in {self.path} (--data-path)")
        sequence_bytes = self.sequence_length * self.token_size
        files: list[_TokenFile] = []
        longest = 0
        # At once, where that takes time: the beginnings that are looked at.
        looked_at = [path for path in paths if isinstance(path, RemoteFile)]
        looked_at = [
            path for n, path in enumerate(looked_at)
            if n < _LOOKED_AT_REMOTE or path.suffix == ".npy"
        ]  # fmt: skip
        fetch((path, 0, min(path.size, _PROBE_BYTES)) for path in looked_at)
        for path in paths:
            offset, size = self._token_span(path)
            longest = max(longest, size // self.token_size)
            end = size - sequence_bytes - (self.token_size if isinstance(path, RemoteFile) else 0)
            if sequences := len(range(0, end, sequence_bytes)):
                if isinstance(path, Path) or path in looked_at:
                    self._check_token_size(path, offset, size)
                files.append(_TokenFile(path, offset, sequences))
        if not files:
            raise ValueError(
                f"no file in {self.path} fills a sequence of {self.sequence_length} tokens: it "
                f"takes {'2 tokens ' if isinstance(paths[0], RemoteFile) else ''}more than that "
                f"and the longest has {longest} "
                "(--sequence-length, --data-path)"
            )
        for path in [path for path in paths if path not in {file.path for file in files}]:
            logger.warning(
                "%s is skipped: it has no more than %d tokens (--sequence-length)",
                path, self.sequence_length + isinstance(path, RemoteFile),
            )  # fmt: skip
        return files

    def _token_span(self, path: Path | RemoteFile) -> tuple[int, int]:
        """Byte offset of the first token and number of bytes from there on."""
        size = path.size if isinstance(path, RemoteFile) else path.stat().st_size
        offset = 0
        if path.suffix == ".npy":
            head = _read(path, 0, min(size, _NPY_HEADER_BYTES))
            if head.startswith(_NPY_MAGIC):
                offset = self._npy_offset(path, head, size)
        size -= offset
        if size % self.token_size:
            raise ValueError(
                f"{path} holds {size} bytes of tokens, not a multiple of {self.token_size} "
                "(--token-size)"
            )
        return offset, size

    def _npy_offset(self, path: Path | RemoteFile, head: bytes, size: int) -> int:
        try:
            dtype, in_c_order, offset = _npy_header(head, size)
        # NumPy reads it with Python's own parser, which has errors of its own.
        except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
            raise ValueError(f"{path} is damaged, or no .npy file of integers: {error}") from None
        if dtype != self._dtype:
            raise ValueError(
                f"{path} holds {dtype.name} ({dtype.str}), expected "
                f"{self._dtype.name} ({self._dtype.str}) for {self.token_size}-byte tokens "
                "(--token-size)"
            )
        if not in_c_order:
            raise ValueError(f"{path} is in Fortran order: save it in C order")
        return int(offset)

    def _check_token_size(self, path: Path | RemoteFile, offset: int, size: int) -> None:
        """Refuse files whose first tokens only make sense at the other token size."""
        count = min(size, _PROBE_BYTES) // self.token_size
        if count < _PROBE_MIN_TOKENS:
            return
        tokens = np.frombuffer(_read(path, offset, count * self.token_size), self._dtype)
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
        places = [self._place(i) for i in ids]
        # Those behind URLs at once, not one after the other.
        ranges = [(file.path, *self._span(file, at)) for file, at in places]
        fetch((f, at, length) for f, at, length in ranges if isinstance(f, RemoteFile))
        return [self._sample(file, at) for file, at in places]

    def _place(self, sample_id: int) -> tuple[_TokenFile, int]:
        """The file of a sample, and its number there."""
        index = sample_id if self._order is None else int(self._order[sample_id])
        which = bisect_right(self._ends, index)
        return self._files[which], index - (self._ends[which - 1] if which else 0)

    def _sample(self, file: _TokenFile, in_file: int) -> Sample:
        input_ids = torch.from_numpy(self._read(file, in_file).astype(np.int64))
        return Sample(input_ids, labels=input_ids)

    def _span(self, file: _TokenFile, in_file: int) -> tuple[int, int]:
        """First byte and length of a sequence."""
        length = self.sequence_length * self.token_size
        return file.offset + in_file * length, length

    def _read(self, file: _TokenFile, in_file: int) -> np.ndarray:
        start, length = self._span(file, in_file)
        data = _read(file.path, start, length)
        if len(data) != length:
            raise ValueError(f"{file.path} has become shorter since it was opened")
        return np.frombuffer(data, self._dtype)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Look at the first sequence of every file (64 files at most, 16 behind URLs).

        Raises:
            ValueError: if a token id is not below `vocab_size`.
        """
        remote = isinstance(self._files[0].path, RemoteFile)
        for file in self._files[: _LOOKED_AT_REMOTE if remote else _LOOKED_AT]:
            check_token_ids(self._read(file, 0), vocab_size, str(file.path))


def _npy_header(head: bytes, size: int) -> tuple[np.dtype, bool, int]:
    """Type, whether it is in C order, and the first byte of the array in a file's head."""
    file = io.BytesIO(head)
    read, version = np.lib.format.read_array_header_2_0, np.lib.format.read_magic(file)
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0
    elif version not in ((2, 0), (3, 0)):
        raise ValueError(f"format version {version} is unknown")
    shape, in_fortran_order, dtype = read(file)
    length = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or size - file.tell() < length:
        raise ValueError(f"it cannot hold {dtype} of shape {shape}")
    return dtype, not in_fortran_order or len(shape) < 2, file.tell()


def _read(path: Path | RemoteFile, offset: int, length: int) -> bytes:
    """Bytes of a file; fewer where one on disk ends before."""
    if isinstance(path, RemoteFile):
        return path.read(offset, length)
    # Read, not mapped: a mapped file that is truncated kills the process with SIGBUS, and a
    # directory of thousands of files would hold as many descriptors.
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
