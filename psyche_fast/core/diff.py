"""`psyche-fast diff`: where two checkpoints or two runs part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from psyche_fast.core.checkpoints import step_of
from psyche_fast.metrics import read_metrics
from psyche_fast.rank.state import FOLDER


@dataclass(frozen=True)
class Differences:
    """What differs.

    Attributes:
        lines: for the user, the first difference first; empty where nothing does.
        compared: what was looked at, in words.
    """

    lines: tuple[str, ...]
    compared: str


def differences(one: Path, other: Path) -> Differences:
    """Compares two checkpoints tensor by tensor, or two runs step by step, to the bit.

    Args:
        one: a checkpoint's folder, or a run's.
        other: the same kind of folder.

    Raises:
        ValueError: they are neither, or not of one kind, or a file cannot be read.
    """
    kinds = [(path / "checkpoints").is_dir() for path in (one, other)]
    for path, is_run in zip((one, other), kinds, strict=True):
        if not is_run and not list(path.glob("*.safetensors")):
            raise ValueError(f"{path} is neither a checkpoint nor a run directory")
    if kinds[0] != kinds[1]:
        raise ValueError(f"{one} and {other}: a run and a checkpoint; name two of one kind")
    if not kinds[0]:
        lines, count = _of_checkpoints(one, other)
        return Differences(tuple(lines), f"{count} tensors")
    return _of_runs(one, other)


def _of_runs(one: Path, other: Path) -> Differences:
    found = []
    metrics = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    losses = [{m["step"]: m.get("loss") for m in run} for run in metrics]
    steps = sorted(losses[0].keys() & losses[1].keys())
    parted = next((s for s in steps if losses[0][s] != losses[1][s]), None)
    if parted is not None:
        found.append(f"step {parted}: loss {losses[0][parted]} and {losses[1][parted]}")
    checkpoints = [
        {step: path for path in (run / "checkpoints").iterdir() if (step := step_of(path))}
        for run in (one, other)
    ]
    both = sorted(checkpoints[0].keys() & checkpoints[1].keys())
    if not steps and not both:
        raise ValueError(f"{one} and {other} have no step in common")
    for step in both:
        lines, _ = _of_checkpoints(checkpoints[0][step], checkpoints[1][step])
        if lines:
            found.append(f"checkpoint of step {step}: {lines[0]}")
            found += lines[1:]
            break
    return Differences(tuple(found), f"losses of {len(steps)} steps, {len(both)} checkpoints")


def _of_checkpoints(one: Path, other: Path) -> tuple[list[str], int]:
    """Lines, and how many tensors both have."""
    files = [_tensors(path) for path in (one, other)]
    lines = [
        f"{name} is only in {one if name in files[0] else other}"
        for name in sorted(files[0].keys() ^ files[1].keys())
    ]
    both = [name for name in files[0] if name in files[1]]
    for name in both:
        a, b = (_read(files[side][name], name) for side in (0, 1))
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            lines.append(f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
        elif not torch.equal(_bits(a), _bits(b)):
            x, y = a.double(), b.double()
            apart = x != y
            lines.append(
                f"{name}: {int(apart.sum())} of {a.numel()} elements, "
                f"by {float((x - y).abs().max()):.3g} at most"
            )
    return lines, len(both)


def _tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor: the model's first, then those of the state by their files."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(dict.fromkeys(_names(path), path))
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        found.update({f"{FOLDER}/{path.stem}/{name}": path for name in _names(path)})
    return found


def _names(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, "pt") as file:
            yield from file.keys()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, name: str) -> Tensor:
    prefix = f"{FOLDER}/{path.stem}/"
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name.removeprefix(prefix))
    return tensor


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
