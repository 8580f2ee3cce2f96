"""`psyche-fast results`: what a file of results holds, as a table and as gradients."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from psyche_fast.psyche.postcard import Reader
from psyche_fast.psyche.results import (
    SerializedDistroResult,
    TransmittableDistroResult,
    commitment,
    gradient,
    read_dump,
    read_list,
)

# result-NODE-step3-batchB[16, 31].vec-postcard
_NAME = re.compile(
    r".*-step(\d{1,10})-batchB(?:(\d{1,20})|\[(\d{1,20}), (\d{1,20})\])\.vec-postcard"
)


@dataclass(frozen=True)
class Dump:
    """What a file holds.

    Attributes:
        form: how it is written.
        results: one per parameter.
        step: the step; None where neither content nor name tells.
        batch_id: first and last sample; None likewise.
        trainer_nonce: of the transmitted form.
    """

    form: str
    results: Sequence[SerializedDistroResult]
    step: int | None = None
    batch_id: tuple[int, int] | None = None
    trainer_nonce: int | None = None


def read_file(path: Path) -> Dump:
    """Reads a file of results in any of its forms.

    They are the results one after the other (what a client writes to its folder of gradients), the
    transmitted form, and a list with its length in front.

    Raises:
        ValueError: it cannot be read, holds none, or is malformed; the form that the file agrees
            with for longest says where.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not data:
        raise ValueError(f"{path}: it is empty")
    forms: dict[str, Callable[[Reader], Any]] = {
        "a dump": read_dump,
        "a transmitted result": TransmittableDistroResult.read,
        "a list of results": read_list,
    }
    if path.name.endswith(".vec-postcard"):
        forms = {"a dump": read_dump}
    furthest, fault = -1, ""
    for form, read in forms.items():
        reader = Reader(data)
        try:
            value = read(reader)
            reader.end()
        except ValueError as error:
            if reader.at > furthest:
                furthest, fault = reader.at, f"as {form}, {error}"
            continue
        if isinstance(value, TransmittableDistroResult):
            return Dump(form, value.distro_results, value.step, value.batch_id, value.trainer_nonce)
        step, batch = _from_name(path.name)
        return Dump(form, value, step, batch)
    raise ValueError(f"{path} holds no results of Psyche's: {fault}")


def _from_name(name: str) -> tuple[int | None, tuple[int, int] | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        return None, None
    step, single, first, last = match.groups()
    batch = (int(single), int(single)) if single else (int(first), int(last))
    if int(step) >> 32 or max(batch) >> 64:
        return None, None
    return int(step), batch


def named(dump: Dump, model: str | None) -> dict[str, SerializedDistroResult]:
    """Results by their parameters' names, or by their numbers.

    Args:
        dump: the results.
        model: a folder, a `config.json` or a hub id; None for numbers.

    Raises:
        ValueError: the model's parameters are not those of the results.
    """
    if model is None:
        width = len(str(len(dump.results) - 1))
        return {f"{at:0{width}}": result for at, result in enumerate(dump.results)}
    # Later: it takes Transformers, and seconds.
    from psyche_fast.models.loading import parameter_shapes
    from psyche_fast.models.source import read_model

    shapes = parameter_shapes(read_model(model))
    if len(shapes) != len(dump.results):
        raise ValueError(
            f"--model has {len(shapes)} parameters, there are {len(dump.results)} results"
        )
    for (name, shape), result in zip(shapes.items(), dump.results, strict=True):
        if result.shape != (shape or (1,)):
            raise ValueError(
                f"--model: {name} has the shape {list(shape)}, its result {list(result.shape)}"
            )
    return dict(zip(shapes, dump.results, strict=True))


def table(dump: Dump, results: Mapping[str, SerializedDistroResult]) -> Iterator[str]:
    """Lines that say what there is.

    Args:
        dump: the file.
        results: by name, as `named` gives them.
    """
    where = "" if dump.step is None else f" of step {dump.step}"
    if dump.batch_id is not None:
        where += f", samples {dump.batch_id[0]} to {dump.batch_id[1]}"
    if dump.trainer_nonce is not None:
        where += f", nonce {dump.trainer_nonce}"
    plural = "" if len(dump.results) == 1 else "s"
    yield f"{dump.form}: {len(dump.results)} parameter{plural}{where}"
    if dump.step is not None and dump.batch_id is not None:
        yield f"commitment {commitment(dump.step, dump.batch_id, dump.results).hex()}"
    rows: list[Sequence[str]] = [
        ("parameter", "shape", "chunk", "chunks", "kept", "values", "bytes"),
        *(_row(name, result) for name, result in results.items()),
        ("all", "", "", "", "", "", f"{sum(map(_size, dump.results)):,}"),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([f"{name:<{widths[0]}}", *cells])


def _row(name: str, result: SerializedDistroResult) -> Sequence[str]:
    *lead, h, w = result.chunks
    there, all_of_them = prod(result.sparse_val.dims[:-1]), prod(lead)
    return (
        name,
        " x ".join(map(str, result.shape)) if len(result.xshape) != 3 else f"? {result.xshape}",
        f"{h} x {w}" if len(result.xshape) > 2 else str(w),
        f"{there:,}" if there == all_of_them else f"{there:,} of {all_of_them:,}",
        f"{result.k} of {result.totalk:,}",
        str(result.sparse_val.dtype).removeprefix("torch."),
        f"{_size(result):,}",
    )


def _size(result: SerializedDistroResult) -> int:
    return len(result.sparse_idx.data) + len(result.sparse_val.data)


def write_gradients(results: Mapping[str, SerializedDistroResult], path: Path) -> None:
    """Decodes results and writes them, fp32 in their parameters' shapes.

    Args:
        results: by name.
        path: a safetensors file; replaced where it exists.

    Raises:
        ValueError: a result is not to be decoded, naming it, or another suffix than `.safetensors`,
            or more than this machine's memory holds.
        OSError: the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"--decode: wanted a name that ends in .safetensors, got {path}")
    # One is there three times while it is transformed.
    sizes = [4 * prod(result.xshape) for result in results.values()]
    needed, free = sum(sizes) + 3 * max(sizes, default=0), psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"--decode: the gradients want {needed:,} bytes of memory, {free:,} are free"
        )
    tensors: dict[str, Tensor] = {}
    for name, result in results.items():
        try:
            tensors[name] = gradient(result)
        except ValueError as error:
            raise ValueError(f"--decode: result {name}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except SafetensorError as error:  # a full disk among others, and no OSError
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
