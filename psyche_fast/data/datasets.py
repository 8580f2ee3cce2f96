"""Which data set a path holds."""

from __future__ import annotations

from pathlib import Path

from psyche_fast.data.local import TOKEN_FILE_SUFFIXES, LocalDataset, token_files
from psyche_fast.data.parquet import ParquetDataset, train_files


def open_dataset(
    path: str | Path, *, token_size: int = 2, sequence_length: int, seed: int | None = None
) -> LocalDataset | ParquetDataset:
    """Open token files if `path` is or holds any, else the Parquet files of its train split.

    Args:
        path: a directory or one file (`--data-path`).
        token_size: bytes to a token of token files, 2 or 4; of no effect on Parquet.
        sequence_length: tokens to a sequence, L.
        seed: 32-bit seed of the order; None keeps the order of the files.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if there is neither, or the data set refuses its files.
    """
    if token_files(path):
        return LocalDataset(path, token_size, sequence_length, seed)
    if train_files(path):
        return ParquetDataset(path, sequence_length, seed)
    wanted = ", ".join(f"*{suffix}" for suffix in TOKEN_FILE_SUFFIXES)
    raise ValueError(
        f"no training data in {path} (--data-path): expected token files ({wanted}) or Parquet "
        "files of a train split; psyche-fast tokenize makes token files from text"
    )
