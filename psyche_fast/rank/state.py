"""What a run needs beside the model to go on exactly where it was: one file per rank, no pickle.

A checkpoint's folder `state`: `rank-RRRRR.safetensors` has what only that rank has (moments or
momentum, its own results, results under way, random numbers), `parameters-RRRRR.safetensors` this
rank's part of parameters, masters and buffers, written by the ranks of the first replica alone.
`manifest.json`, written last, has their sizes and SHA-256, and the run that they are of.

torch's distributed checkpoints (DCP) are not used: they pickle, have no checksums, merge tensors of
one name silently where replicas differ (momentum), and two saves at once hang.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast import strict
from psyche_fast.rank.checkpoint import sync
from psyche_fast.sharding import Ranges, local_tensor, part_of

VERSION = 2
_READ = (1, 2)
"""Versions that are read; the first one said nothing of trackers and of the model's files."""
_ROWS = "@rows"
_PLACES = "places"
FOLDER = "state"
MANIFEST = "manifest.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "BOOL": torch.bool,
}  # fmt: skip


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
    tracker: dict[str, str] = {}
    """What trackers call the run, by their names."""
    files: list[StateFile]
    model: list[StateFile] = []
    """The Hugging Face folder's files around the state."""
    sha256: str = ""
    """Of all this; empty before the second version."""

    def digest(self) -> str:
        """What `sha256` has to be."""
        without = msgspec.structs.replace(self, sha256="")
        return hashlib.sha256(msgspec.json.encode(without)).hexdigest()

    def paths(self, folder: Path) -> list[tuple[Path, StateFile]]:
        """All files of the checkpoint in a folder."""
        return [
            *((folder / FOLDER / file.name, file) for file in self.files),
            *((folder / file.name, file) for file in self.model),
        ]


class _Version(msgspec.Struct):
    """What every version's manifest says."""

    version: int


@dataclass(frozen=True)
class Piece:
    """A rank's part of something that is the whole run's.

    Attributes:
        tensor: the part.
        place: where it lies in the whole; None for all of it.
        whole: the whole's sizes. Those of dimensions beyond `place` are the part's.
        rows: in place of `place`, which rows of the whole the part has: int64 `[n]`.
        dtype: the type that it has in files; None for the tensor's.
    """

    tensor: Tensor
    place: Ranges | None = None
    whole: tuple[int, ...] = ()
    rows: Tensor | None = None
    dtype: torch.dtype | None = None

    def on_host(self, *, copy: bool = False) -> Piece:
        """The same in host memory and in the type that it has in files."""
        tensor = self.tensor.detach().to("cpu", self.dtype or self.tensor.dtype, copy=copy)
        return replace(self, tensor=tensor, dtype=None)


def piece_of(tensor: Tensor) -> Piece:
    """This rank's part of a tensor that may be distributed."""
    local = local_tensor(tensor.detach())
    if not isinstance(tensor, DTensor):
        return Piece(local)
    return Piece(local, part_of(tensor), tuple(tensor.shape))


State = Mapping[str, Piece]
Places = dict[str, list[tuple[int, int, int]]]
"""For each dimension of what a file has, where it begins and ends in the whole, and its size."""


def write_part(folder: Path, name: str, pieces: State) -> StateFile:
    """Writes a file of a state, durably.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    tensors = {n: p.on_host().tensor.contiguous() for n, p in pieces.items()}
    places = {
        n: [[r.start, r.stop, size] for r, size in zip(p.place, p.whole, strict=True)]
        for n, p in pieces.items()
        if p.place is not None
    }
    for n, p in pieces.items():
        if p.rows is not None:
            tensors[n + _ROWS] = torch.cat([p.rows.cpu(), torch.tensor(p.whole[:1])])
    try:
        save_file(tensors, path, {_PLACES: msgspec.json.encode(places).decode()})
    except SafetensorError as error:  # a full disk among others, and no OSError
        raise OSError(f"{path}: {error}") from error
    return sealed(path)


def sealed(path: Path) -> StateFile:
    """Brings a file to disk; what the manifest says of it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StateFile(name=path.name, size=path.stat().st_size, sha256=digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes a state, durably."""
    manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (folder / MANIFEST).write_bytes(encoded)
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, whose files are there in their sizes.

    Raises:
        ValueError: there is none, it is another version's, or a file is not what it says.
    """
    path = folder / FOLDER / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if (version := strict.read(text, _Version, str(path)).version) not in _READ:
        raise ValueError(f"{path}: version {version}, this program reads {_READ[0]} to {_READ[-1]}")
    manifest = strict.read(text, Manifest, str(path))
    if version > 1 and manifest.sha256 != manifest.digest():
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it says")
    for part, file in manifest.paths(folder):
        if Path(file.name).name != file.name:
            raise ValueError(f"{path}: {file.name!r} is no file of its folder")
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
    for path, file in manifest.paths(folder):
        _check_sum(path, file.sha256)


def _check_sum(path: Path, wanted: str) -> None:
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if digest != wanted:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's")


def parameters_file(place: int) -> str:
    """Of a rank of the first replica."""
    return f"parameters-{place:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Of any rank."""
    return f"rank-{rank:05d}.safetensors"


class Reader:
    """Reads this rank's pieces of a state that ranks placed otherwise may have written.

    Args:
        folder: the state's.
        files: what its manifest says of them.
        first: the file that most likely has what this rank wants.
        names: further ones that may.
        are_new: whether they have just been written: they are not checked then.

    Raises:
        ValueError: a file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        files: Iterable[StateFile],
        first: str,
        names: Sequence[str],
        *,
        are_new: bool = False,
    ) -> None:
        sums = {file.name: file.sha256 for file in files}
        self._paths = [folder / n for n in dict.fromkeys([first, *names]) if n in sums]
        self._sums, self._are_new = sums, are_new
        self._files: dict[Path, tuple[Any, Places, set[str]]] = {}

    def __len__(self) -> int:
        """How many files there are."""
        return len(self._paths)

    def names(self) -> set[str]:
        """What the first file has."""
        return {n for n in self._open(self._paths[0])[2] if not n.endswith(_ROWS)}

    def tensor(self, name: str) -> Tensor:
        """A tensor of the first file, as it is.

        Raises:
            ValueError: it has none of that name.
        """
        try:
            tensor: Tensor = self._open(self._paths[0])[0].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._paths[0]} has no {name}") from error
        return tensor

    def fill(self, pieces: State) -> None:
        """Copies a state into the tensors that it is of, bit for bit.

        Raises:
            ValueError: it is not of these; nothing has been changed.
        """
        read = {name: self.read(name, piece) for name, piece in pieces.items()}
        for name, tensor in read.items():
            pieces[name].tensor.copy_(tensor)

    def read(self, name: str, like: Piece) -> Tensor:
        """This rank's part of something, on the CPU.

        Args:
            name: its name.
            like: a tensor of the part's sizes and type, and where it lies.

        Raises:
            ValueError: the state has no such thing, of other sizes, or not all of it.
        """
        wanted, rows = like.tensor, like.rows
        result = torch.empty(wanted.shape, dtype=wanted.dtype)
        left, covered = wanted.numel(), None
        if rows is not None:
            positions = torch.full((like.whole[0],), -1, dtype=torch.int64)
            positions[rows.cpu()] = torch.arange(len(rows))
            missing = torch.ones(len(rows), dtype=torch.bool)
        for path in self._paths:
            file, places, names = self._open(path)
            if name not in names:
                continue
            if rows is not None:
                numbers, whole = _row_numbers(file, name)
                self._check(name, file, like, (whole,))
                at = positions[numbers]
                result[at[at >= 0]] = file.get_tensor(name)[at >= 0]
                missing[at[at >= 0]] = False
                left = int(missing.sum())
            else:
                theirs = [(start, stop) for start, stop, _ in places.get(name, [])]
                self._check(name, file, like, tuple(r[2] for r in places.get(name, [])))
                target = _copy_overlap(file, name, theirs, like, result)
                if all(r == slice(0, n) for r, n in zip(target, result.shape, strict=True)):
                    return result
                # Ranks may have the same part: what is there is marked.
                covered = (
                    torch.zeros(result.shape, dtype=torch.bool) if covered is None else covered
                )
                covered[target] = True
                left = covered.numel() - int(covered.sum())
            if left == 0:
                return result
        if wanted.numel() == 0:
            return result
        raise ValueError(f"the state has no {name}, or not all of it: it is another model's")

    def _check(self, name: str, file: Any, like: Piece, whole: tuple[int, ...]) -> None:
        kept = file.get_slice(name)
        sizes, dtype = list(kept.get_shape()), _DTYPES.get(kept.get_dtype())
        own = list(like.tensor.shape)
        if whole:
            sizes[: len(whole)] = whole
        if like.whole:
            own[: len(like.whole)] = like.whole
        if (sizes, dtype) != (own, like.tensor.dtype):
            raise ValueError(
                f"the state's {name} is {dtype} {sizes}, wanted {like.tensor.dtype} {own}"
            )

    def _open(self, path: Path) -> tuple[Any, Places, set[str]]:
        if path not in self._files:
            if not self._are_new:
                _check_sum(path, self._sums[path.name])
            try:
                file = safe_open(path, "pt")
                places = msgspec.json.decode((file.metadata() or {})[_PLACES], type=Places)
            except (SafetensorError, KeyError, msgspec.DecodeError) as error:
                raise ValueError(f"{path} is no file of a state: {error}") from error
            self._files[path] = file, places, set(file.keys())
        return self._files[path]


def _row_numbers(file: Any, name: str) -> tuple[Tensor, int]:
    """Which rows of the whole a file has of something, and how many there are.

    Raises:
        ValueError: it does not say so.
    """
    rows = file.get_slice(name).get_shape()[:1]
    try:
        numbers = file.get_tensor(name + _ROWS)
    except SafetensorError as error:
        raise ValueError(f"the state does not say which rows of {name} it has") from error
    if numbers.dtype != torch.int64 or list(numbers.shape) != [n + 1 for n in rows]:
        raise ValueError(f"the state's rows of {name} are {numbers.dtype} {list(numbers.shape)}")
    numbers, whole = numbers[:-1], int(numbers[-1])
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < whole:
        raise ValueError(f"the state has rows of {name} that are not among its {whole}")
    return numbers, whole


def _copy_overlap(
    file: Any, name: str, theirs: list[tuple[int, int]], like: Piece, result: Tensor
) -> Ranges:
    """Copies what a file has of a piece; where in the piece that is."""
    if like.place is None and not theirs:
        result.copy_(file.get_tensor(name))
        return tuple(slice(0, size) for size in result.shape)
    sizes = list(like.whole or like.tensor.shape)
    there = file.get_slice(name).get_shape()[: len(theirs)]
    if not len(there) == len(theirs) <= len(sizes):
        raise ValueError(f"the state's place of {name}, {theirs}, is not of {sizes}")
    for (start, stop), size, length in zip(theirs, sizes, there, strict=False):
        if not 0 <= start <= stop <= size or stop - start != length:
            raise ValueError(f"the state's place of {name}, {theirs}, is not of {sizes}")
    own = [(r.start, r.stop) for r in like.place or [slice(0, size) for size in sizes]]
    theirs = theirs or [(0, size) for size in sizes]
    both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(own, theirs, strict=True)]
    both = [(start, max(start, stop)) for start, stop in both]
    target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, own, strict=True))
    if all(start < stop for start, stop in both):
        source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, theirs, strict=True))
        result[target] = file.get_slice(name)[source]
    return target
