"""What a run needs beside the model to go on exactly where it was: one file per rank, no pickle.

A checkpoint's folder `state`: `rank-RRRRR.safetensors` has what only that rank has (moments or
momentum, its own results, results under way, random numbers), `parameters-RRRRR.safetensors` this
rank's part of parameters, masters and buffers, written by the ranks of the first replica alone.
`manifest.json`, written last, has their sizes and SHA-256, and the run that they are of.

torch's distributed checkpoints are not used: they pickle, have no checksums, and merge tensors of
one name silently where replicas differ (momentum).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from psyche_fast import strict

VERSION = 1
FOLDER = "state"
MANIFEST = "manifest.json"
_SHOWN = 3


class StateFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of a state."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a state is of; a folder without one holds none."""

    version: int
    step: int
    """The last one that is in it."""
    config: dict[str, Any]
    """The run's, resolved."""
    data: dict[str, Any]
    """What the batches come from."""
    machine: dict[str, str]
    """Versions and processors, on which the bits of what follows hang."""
    files: list[StateFile]


def write_part(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> StateFile:
    """Writes a file of a state, durably.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)
    except SafetensorError as error:  # a full disk among others, and no OSError
        raise OSError(f"{path}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StateFile(name=name, size=path.stat().st_size, sha256=digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes a state."""
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (folder / MANIFEST).write_bytes(encoded)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's state, whose files are there in their sizes.

    Raises:
        ValueError: there is none, it is another version's, or a file is not what it says.
    """
    path = folder / FOLDER / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    manifest = strict.read(text, Manifest, str(path))
    if manifest.version != VERSION:
        raise ValueError(f"{path}: version {manifest.version}, this program reads {VERSION}")
    for file in manifest.files:
        if Path(file.name).name != file.name:
            raise ValueError(f"{path}: {file.name!r} is no file of its folder")
        part = path.with_name(file.name)
        size = part.stat().st_size if part.is_file() else None
        if size != file.size:
            what = "is missing" if size is None else f"has {size} bytes, wanted {file.size}"
            raise ValueError(f"{part} {what}")
    return manifest


def check_sums(folder: Path, manifest: Manifest) -> None:
    """Checks every file's content.

    Raises:
        ValueError: one has changed; it is named.
    """
    for file in manifest.files:
        _check_sum(folder / FOLDER / file.name, file.sha256)


def _check_sum(path: Path, wanted: str) -> None:
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if digest != wanted:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's")


def read_part(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor] | None:
    """A file of a checkpoint's state; None where the state has none of that name.

    Raises:
        ValueError: it is damaged.
    """
    file = next((f for f in manifest.files if f.name == name), None)
    if file is None:
        return None
    path = folder / FOLDER / name
    _check_sum(path, file.sha256)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def parameters_file(place: int) -> str:
    """Of a rank of the first replica."""
    return f"parameters-{place:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Of any rank."""
    return f"rank-{rank:05d}.safetensors"


def fill(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies a state into the tensors that it is of, bit for bit.

    Args:
        targets: this rank's parts.
        state: has one for each, of the same shape and type, and no more.

    Raises:
        ValueError: it is not of these tensors; nothing has been changed.
    """
    if odd := sorted(set(state) ^ set(targets)):
        raise ValueError(
            "the state is another model's: it and the model do not both have "
            + ", ".join(odd[:_SHOWN])
        )
    for name, target in targets.items():
        own = state[name]
        if (own.shape, own.dtype) != (target.shape, target.dtype):
            raise ValueError(
                f"the state's {name} is {own.dtype} {list(own.shape)}, wanted {target.dtype} "
                f"{list(target.shape)}"
            )
    for name, target in targets.items():
        target.copy_(state[name])
