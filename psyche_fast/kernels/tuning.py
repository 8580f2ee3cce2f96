"""Launch options of the Triton kernels: a table per GPU, and defaults for GPUs not in it."""

from __future__ import annotations

import os
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = "PSYCHE_FAST_TUNING"

Table = dict[str, dict[str, dict[str, Any]]]


def options(kernel: str, device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel on a device.

    Args:
        kernel: "encode", "apply" and so on, a key of `tuning.toml`.
        device: a CUDA device; any other takes the defaults.

    Raises:
        ValueError: the file that `PSYCHE_FAST_TUNING` names is missing or malformed.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return _options(kernel, name, os.environ.get(ENVIRONMENT))


@cache
def _options(kernel: str, gpu: str, path: str | None) -> dict[str, Any]:
    shipped = _shipped()
    chosen = dict(shipped["default"][kernel])
    tables = [shipped] if path is None else [shipped, read(Path(path))]
    for table in tables:
        for section in ("default", gpu):
            chosen.update(table.get(section, {}).get(kernel, {}))
    return chosen


@cache
def _shipped() -> Table:
    text = files("psyche_fast.kernels").joinpath("tuning.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def read(path: Path) -> Table:
    """Read a tuning file and check that it names known kernels and options.

    Raises:
        ValueError: naming file, section and key.
    """
    try:
        table: Table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{ENVIRONMENT}={path}: {error}") from error
    known = _shipped()["default"]
    for gpu, kernels in table.items():
        for kernel, chosen in kernels.items():
            if kernel not in known:
                raise ValueError(
                    f"{path}: [{gpu}] has {kernel!r}, known kernels are {', '.join(known)}"
                )
            for key, value in chosen.items():
                if key not in known[kernel] or type(value) is not type(known[kernel][key]):
                    raise ValueError(
                        f"{path}: [{gpu}] {kernel}.{key} = {value!r}; known options are "
                        + ", ".join(f"{k} ({type(v).__name__})" for k, v in known[kernel].items())
                    )
    return table
