"""Which data set a path holds."""

from __future__ import annotations

from pathlib import Path

from psyche_fast import strict
from psyche_fast.data.dummy import DummyDataset
from psyche_fast.data.local import TOKEN_FILE_SUFFIXES, LocalDataset, token_files
from psyche_fast.data.mixture import MixtureDataset, Part
from psyche_fast.data.parquet import ParquetDataset, train_files
from psyche_fast.data.samples import Dataset
from psyche_fast.locations import DUMMY, MIXTURE, is_mixture, read_mixture, scheme


def open_dataset(
    path: str | Path, *, token_size: int = 2, sequence_length: int, seed: int | bytes | None = None
) -> Dataset:
    """Open what `--data-path` names.

    That is token files if a folder holds any, else the Parquet files of its train split; one file;
    `dummy:`; or a mixture of data sets, described by a `.toml` or `.json` file.

    Args:
        path: `--data-path`.
        token_size: bytes to a token of token files, 2 or 4; of no effect on Parquet.
        sequence_length: tokens to a sequence, L.
        seed: of the order, 32 bits or 32 bytes; None keeps the order of the files.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if there is neither, or the data set refuses its files.
    """
    name = str(path)
    if is_mixture(name) and not Path(name).is_dir():
        return _open_mixture(name.removeprefix(MIXTURE), token_size, sequence_length, seed)
    return _open_part(name, token_size, sequence_length, seed)


def _open_part(path: str, token_size: int, sequence_length: int, seed: int | bytes | None) -> Part:
    if path == DUMMY:
        return DummyDataset(sequence_length)
    if token_files(path):
        return LocalDataset(path, token_size, sequence_length, seed)
    if train_files(path):
        return ParquetDataset(path, sequence_length, seed)
    wanted = ", ".join(f"*{suffix}" for suffix in TOKEN_FILE_SUFFIXES)
    raise ValueError(
        f"no training data in {path} (--data-path): expected token files ({wanted}) or Parquet "
        "files of a train split; psyche-fast tokenize makes token files from text"
    )


def _open_mixture(
    path: str, token_size: int, sequence_length: int, seed: int | bytes | None
) -> MixtureDataset:
    what = f"--data-path {path}"
    if path.endswith(".toml"):
        described = strict.load_toml(path, what)
    else:
        try:
            described = strict.loads(Path(path).read_bytes(), what)
        except OSError as error:
            raise ValueError(f"{what}: {error.strerror}") from error
    mixture = read_mixture(described, what)
    folder = Path(path).parent
    parts = []
    for source in mixture.sources:
        # Beside the description, wherever the run is started.
        local = source.path != DUMMY and scheme(source.path) is None
        place = str(folder / Path(source.path).expanduser()) if local else source.path
        size = source.token_size or token_size
        parts.append(_open_part(place, size, sequence_length, source.key))
    if len(parts) > 1 and any(isinstance(part, DummyDataset) for part in parts):
        raise ValueError(f"{what}: {DUMMY} has no end and cannot be mixed")
    return MixtureDataset(parts, mixture.weights, mixture.key if seed is None else seed)
