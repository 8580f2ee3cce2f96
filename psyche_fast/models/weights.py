"""Checkpoint tensors on their way into a model that is split over ranks.

A rank reads only its own part of each tensor, straight from the file, so there is never a second
full copy of the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from psyche_fast.models.source import (
    ModelSource,
    TensorsSource,
    tensor_shapes,
    weight_files,
)
from psyche_fast.sharding import Ranges, part_of


class Reader(Protocol):
    """A checkpoint's tensors."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, part: Ranges | None = None) -> Tensor:
        """The tensor, or the part of it in the ranges, one per dimension."""


class _FilesReader:
    def __init__(self, shapes: dict[str, tuple[int, ...]], files: dict[str, safe_open]) -> None:
        self.shapes = shapes
        self._files = files

    def read(self, name: str, part: Ranges | None = None) -> Tensor:
        if not part:
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[part]


class _TensorsReader:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._tensors = tensors

    def read(self, name: str, part: Ranges | None = None) -> Tensor:
        tensor = self._tensors[name]
        return tensor[part] if part else tensor


@dataclass
class ShapesReader:
    """Tensors without content, on the meta device."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, part: Ranges | None = None) -> Tensor:
        """See `Reader`."""
        whole = torch.empty(self.shapes[name], device="meta")
        return whole[part] if part else whole


@contextmanager
def open_reader(source: ModelSource) -> Iterator[Reader]:
    """Opens a model's tensors; the files stay mapped until the end.

    Raises:
        ValueError: a file is missing or malformed.
    """
    if isinstance(source, TensorsSource):
        yield _TensorsReader(source.tensors)
        return
    shapes = tensor_shapes(source)
    with ExitStack() as stack:
        files = {}
        for path in weight_files(source):
            file = stack.enter_context(safe_open(path, framework="pt"))
            files.update(dict.fromkeys(file.keys(), file))
        yield _FilesReader(shapes, files)


@dataclass(frozen=True)
class Conversion:
    """Checkpoint tensors that make up model tensors only together (experts, fused projections).

    Attributes:
        target: the model's name that the sources are read for.
        sources: the names to read.
        convert: full tensors, by the place of their name in `sources`, to tensors by model name.
        experts: the number of the expert that each source belongs to; None where any belongs to
            none. Stacked in the order of their numbers along the first dimension, they may be
            converted a few at a time.
    """

    target: str
    sources: list[str]
    convert: Callable[[dict[int, Tensor]], dict[str, Tensor]]
    experts: list[int] | None = None


@dataclass(frozen=True)
class LoadPlan:
    """How the checkpoint's tensors become the model's.

    Attributes:
        direct: checkpoint name by model name; the tensor is the same.
        conversions: the others.
        unexpected: checkpoint names that the model has no place for.
        optional: model names that may be absent: buffers whose values the constructor gives.
    """

    direct: dict[str, str]
    conversions: list[Conversion] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    optional: frozenset[str] = frozenset()


def plan_by_name(module: nn.Module, names: Iterable[str]) -> LoadPlan:
    """The plan for a checkpoint that uses the module's own names."""
    known = module.state_dict().keys()
    names = list(names)
    return LoadPlan(
        direct={name: name for name in names if name in known},
        unexpected=[name for name in names if name not in known],
    )


@torch.no_grad()
def load_weights(
    module: nn.Module, reader: Reader, plan: LoadPlan, aliases: dict[str, str]
) -> None:
    """Fills a materialised module.

    Args:
        module: with plain or distributed parameters, on its device.
        reader: the checkpoint.
        plan: which tensor goes where.
        aliases: for each tied name the one that stands for it.

    Raises:
        ValueError: tensors missing, unexpected or of another shape, or two tensors of different
            values for weights that the configuration ties.
    """
    if plan.unexpected:
        raise ValueError(f"--model: the model has no place for {_some(plan.unexpected)}")
    targets = module.state_dict(keep_vars=True)
    loaded: set[str] = set()
    for name, source in plan.direct.items():
        shape = tuple(targets[name].shape)
        if reader.shapes[source] != shape:
            raise ValueError(
                f"--model: {source} has the shape {list(reader.shapes[source])}, "
                f"the configuration wants {list(shape)}"
            )
    if not isinstance(reader, ShapesReader):
        _check_tied(reader, plan, aliases)
    for name, source in plan.direct.items():
        target = targets[name]
        if aliases.get(name) in plan.direct:
            continue
        if isinstance(target, DTensor):
            part = part_of(target)
            if target.to_local().numel():
                target.to_local().copy_(reader.read(source, part))
        else:
            target.copy_(reader.read(source))
        loaded.add(aliases.get(name, name))
    for conversion in plan.conversions:
        for name, tensor, first in _converted(conversion, reader, targets):
            target = targets[name]
            if isinstance(target, DTensor):
                rows, *rest = part_of(target)
                rows = slice(rows.start - first, rows.stop - first)
                target.to_local().copy_(tensor[(rows, *rest)])
            else:
                target.copy_(tensor)
            loaded.add(aliases.get(name, name))
    missing = [n for n in targets if aliases.get(n, n) not in loaded and n not in plan.optional]
    if missing:
        raise ValueError(f"--model: the checkpoint lacks {_some(missing)}")


def _converted(
    conversion: Conversion, reader: Reader, targets: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, int]]:
    """Converted tensors by name, each from the row on that this rank needs first.

    Raises:
        ValueError: a name or a shape that is not the model's.
    """
    target = targets.get(conversion.target)
    chosen, first, own = list(range(len(conversion.sources))), 0, None
    if (
        isinstance(target, DTensor)
        and conversion.experts is not None
        and sorted(set(conversion.experts)) == list(range(target.shape[0]))
    ):
        # Only this rank's experts are read.
        rows = part_of(target)[0]
        chosen = [i for i in chosen if rows.start <= conversion.experts[i] < rows.stop]
        first, own = rows.start, rows.stop - rows.start
        if not chosen:
            yield conversion.target, target.to_local(), first
            return
    converted = conversion.convert({i: reader.read(conversion.sources[i]) for i in chosen})
    for name, tensor in converted.items():
        if name not in targets:
            raise ValueError(f"--model: the model has no place for {name}")
        wanted = list(targets[name].shape)
        if own is not None:
            wanted[0] = own
        if list(tensor.shape) != wanted:
            raise ValueError(
                f"--model: {name}, made of {_some(conversion.sources)}, has the shape "
                f"{list(tensor.shape)}, the configuration wants {wanted}"
            )
        yield name, tensor, first


def _check_tied(reader: Reader, plan: LoadPlan, aliases: dict[str, str]) -> None:
    """Old checkpoints hold tied weights twice; then they must be the same."""
    for alias, name in aliases.items():
        if alias not in plan.direct or name not in plan.direct:
            continue
        one, two = plan.direct[alias], plan.direct[name]
        rows = reader.shapes[one][0] if reader.shapes[one] else 1
        for start in range(0, rows, 4096):  # in blocks: embeddings are the largest tensors
            part = (slice(start, start + 4096),) if reader.shapes[one] else None
            if not torch.equal(reader.read(one, part), reader.read(two, part)):
                raise ValueError(
                    f"--model: the configuration ties {one} to {two}, but the checkpoint holds "
                    "different values; set tie_word_embeddings to false in config.json"
                )


def _some(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
