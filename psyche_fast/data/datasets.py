"""Which data set a path holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psyche_fast import strict
from psyche_fast.data.dummy import DummyDataset
from psyche_fast.data.local import TOKEN_FILE_SUFFIXES, LocalDataset, token_files
from psyche_fast.data.mixture import MixtureDataset, Part
from psyche_fast.data.parquet import ParquetDataset, remote_train_files, train_files
from psyche_fast.data.remote import FEW_BYTES, MANY_BYTES, BlockCache, find
from psyche_fast.data.samples import Dataset
from psyche_fast.locations import (
    DUMMY,
    MIXTURE,
    Source,
    is_mixture,
    read_mixture,
    scheme,
    written_out,
)


def open_dataset(
    path: str | Path,
    *,
    token_size: int = 2,
    sequence_length: int,
    seed: int | bytes | None = None,
    cache: BlockCache | None = None,
) -> Dataset:
    """Open what `--data-path` names.

    That is token files if a folder holds any, else the Parquet files of its train split; one file;
    any of these behind a URL; `dummy:`; or a mixture of data sets, described by a `.toml` or
    `.json` file or in the path itself (`locations.mixture_path`).

    Args:
        path: `--data-path`.
        token_size: bytes to a token of token files, 2 or 4; of no effect on Parquet.
        sequence_length: tokens to a sequence, L.
        seed: of the order, 32 bits or 32 bytes; None keeps the order of the files.
        cache: of what is read from URLs; None for the user's.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if there is neither, or the data set refuses its files.
        OSError: if a server cannot be reached.
    """
    name, cache = str(path), cache or BlockCache()
    if is_mixture(name) and (name.startswith(MIXTURE) or not Path(name).is_dir()):
        return _open_mixture(name, token_size, sequence_length, seed, cache)
    return _open_part(Source(name, token_size), sequence_length, seed, cache, seed is not None)


def folders_of(dataset: Dataset) -> list[Path]:
    """This machine's folders that a data set is read from."""
    if isinstance(dataset, MixtureDataset):
        return list(dict.fromkeys(f for part in dataset.parts for f in folders_of(part)))
    path = getattr(dataset, "path", None)
    if not isinstance(path, Path):  # behind a URL, or nowhere
        return []
    return [path if path.is_dir() else path.parent]


def _open_part(
    source: Source,
    sequence_length: int,
    seed: int | bytes | None,
    cache: BlockCache,
    shuffled: bool,
) -> Part:
    path, token_size = source.path, source.token_size or 2
    if path == DUMMY:
        return DummyDataset(sequence_length)
    if scheme(path) is not None:
        # A shuffled sequence wants little more than itself, others have their neighbours follow.
        files = find(path, cache, FEW_BYTES if shuffled else MANY_BYTES)
        tokens = [file for file in files if file.suffix in TOKEN_FILE_SUFFIXES]
        if train := [] if tokens else remote_train_files(files):
            return ParquetDataset(path, sequence_length, seed, files=train)
        if not tokens and path.startswith("http"):
            tokens = files  # named one by one: whatever they are called
        if tokens:
            return LocalDataset(path, token_size, sequence_length, seed, files=tokens)
    elif token_files(path):
        return LocalDataset(path, token_size, sequence_length, seed)
    elif train_files(path):
        return ParquetDataset(path, sequence_length, seed)
    wanted = ", ".join(f"*{suffix}" for suffix in TOKEN_FILE_SUFFIXES)
    raise ValueError(
        f"no training data in {path} (--data-path): expected token files ({wanted}) or Parquet "
        "files of a train split; psyche-fast tokenize makes token files from text"
    )


def _describe(path: str, cache: BlockCache, what: str) -> Any:
    if scheme(path) is not None:
        [file] = find(path, cache, FEW_BYTES)
        return strict.loads(file.read(0, file.size), what)
    if path.endswith(".toml"):
        return strict.load_toml(path, what)
    try:
        return strict.loads(Path(path).read_bytes(), what)
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from error


def _open_mixture(
    name: str, token_size: int, sequence_length: int, seed: int | bytes | None, cache: BlockCache
) -> MixtureDataset:
    described, path = written_out(name), name.removeprefix(MIXTURE)
    if described is not None:  # paths are as others of a configuration, from where the run starts
        what, remote, folder = f"--data-path {MIXTURE}", False, Path()
    else:
        what, remote, folder = f"--data-path {path}", scheme(path) is not None, Path(path).parent
        described = _describe(path, cache, what)
    mixture = read_mixture(described, what)
    if mixture.sequence_length not in (None, sequence_length):
        raise ValueError(
            f"{what}: seq_len is {mixture.sequence_length}, --sequence-length {sequence_length}"
        )
    parts = []
    order = mixture.key if seed is None else seed
    for source in mixture.sources:
        # Beside the description, wherever the run is started.
        local = not remote and source.path != DUMMY and scheme(source.path) is None
        place = str(folder / Path(source.path).expanduser()) if local else source.path
        chosen = Source(place, source.token_size or token_size)
        shuffled = order is not None or source.key is not None
        parts.append(_open_part(chosen, sequence_length, source.key, cache, shuffled))
    if len(parts) > 1 and any(isinstance(part, DummyDataset) for part in parts):
        raise ValueError(f"{what}: {DUMMY} has no end and cannot be mixed")
    return MixtureDataset(parts, mixture.weights, order)
