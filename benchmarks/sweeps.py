"""Launch options and other choices that could not be settled without a GPU, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.common import milliseconds, percentiles
from psyche_fast.bench import kernel_cases as make
from psyche_fast.bench.kernel_data import Data, Work
from psyche_fast.kernels import tuning
from psyche_fast.kernels.autotune import gpu_name, using

Options = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """One question.

    Attributes:
        name: what is varied.
        kernel: the section of the tuning table that the settings are for.
        builds: label and maker of what is timed.
        settings: options that are set, the rest as they are.
        quick: part of a dry run.
    """

    name: str
    kernel: str
    builds: tuple[tuple[str, Callable[[Data, str], Work]], ...]
    settings: tuple[Options, ...]
    quick: bool = True


def _encode(*ks: int) -> tuple[tuple[str, Callable[[Data, str], Work]], ...]:
    return tuple((f"encode k={k}", partial(make.encode, k=k)) for k in ks)


def _apply(**options: Any) -> tuple[str, Callable[[Data, str], Work]]:
    name = " ".join(f"{name} {value}" for name, value in options.items())
    return f"apply {name}", partial(make.apply, **options)


_LOOKAHEAD = (("lookahead", make.lookahead),)
_REGISTERS = {2: 255, 3: 168, 4: 128, 6: 80}

SWEEPS = (
    Sweep(
        "entries whose places alone are converted", "apply",
        (
            _apply(peers=4, signs=True, k=8), _apply(peers=16, signs=True, k=8),
            _apply(peers=64, signs=True, k=8), _apply(peers=64, signs=True, k=32),
            _apply(peers=16, signs=False, k=8),
        ),
        tuple({"scattered": n} for n in (0, 1024)),
    ),
    Sweep(
        "rows written to scratch, cache hints", "encode", _encode(8),
        tuple(
            {"select_rows": rows, "stream": "evict_first", "keep": keep}
            for rows in (False, True)
            for keep in ("", "evict_last")
        ),
    ),
    Sweep("entries per chunk", "encode", _encode(1, 4, 8, 16, 32, 64), ({},)),
    Sweep(
        "registers, as many programs as fit", "encode", _encode(8),
        tuple({"ctas_per_sm": n, "maxnreg": r} for n, r in _REGISTERS.items()),
    ),
    Sweep(
        # With 64 ptxas gives up: they do not suffice for a product of whole tiles.
        "registers, as many programs as fit", "apply", (_apply(peers=16, signs=True, k=8),),
        tuple({"ctas_per_sm": n, "maxnreg": r} for n, r in _REGISTERS.items()),
    ),
    Sweep(
        "programs per multiprocessor", "lookahead", _LOOKAHEAD,
        tuple({"ctas_per_sm": n} for n in (2, 4, 8, 16)),
    ),
)  # fmt: skip


def cases(
    data: Data, backend: str, *, budget_ms: float = 100.0, quick: bool = False
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Everything that is to be measured, most wanted first.

    Args:
        data: what on.
        backend: of the kernels.
        budget_ms: about how long each setting is timed.
        quick: only one setting of each quick sweep, and one of what is timed.

    Yields:
        A name for each setting, and what measures it. Data is made by the first that is called.
    """
    for sweep in SWEEPS:
        if quick and not sweep.quick:
            continue
        for label, build in sweep.builds[: 1 if quick else None]:
            work = cache(partial(build, data, backend))
            for changes in sweep.settings[-1 if quick else None :]:
                options = ", ".join(f"{k} = {v!r}" for k, v in changes.items())
                call = partial(measure, sweep, label, changes, work, backend, data, budget_ms)
                yield f"{sweep.name}: {label} {options}".rstrip(), call


def measure(
    sweep: Sweep,
    label: str,
    changes: Options,
    work: Callable[[], Work],
    backend: str,
    data: Data,
    budget_ms: float,
) -> dict[str, Any]:
    """Measure one setting; no times where its results are wrong, "refused" if it cannot run."""
    usual = tuning.options(sweep.kernel, data.device)
    record: dict[str, Any] = {
        "sweep": sweep.name, "kernel": sweep.kernel, "case": label,
        "options": changes, "default": changes.items() <= usual.items(),
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        applied(sweep, changes, Path(folder) / "table.toml", data.device),
    ):
        try:
            record["check"] = work().check(backend)
        except TritonError as error:  # registers or shared memory do not suffice
            return record | {"refused": str(error).splitlines()[0]}
        if not record["check"]["ok"]:
            return record
        call = work().calls[backend]
        record["ms"] = percentiles(milliseconds(call, data.device, budget_ms=budget_ms))
    return record | {"gb_per_s": work().bytes / record["ms"]["p50"] / 1e6}


@contextmanager
def applied(sweep: Sweep, changes: Options, path: Path, device: torch.device) -> Iterator[None]:
    """Within, the sweep's kernel runs with these options; `path` is a new file's."""
    options = {**tuning.options(sweep.kernel, device), **changes}
    with using(path, gpu_name(device), {sweep.kernel: options}):
        yield


def line(record: dict[str, Any]) -> str:
    """One line of the table."""
    if "fault" in record:
        return f"{record['name']:<81} FAULT {record['fault']}"
    options = ", ".join(f"{k} = {v!r}" for k, v in record["options"].items())
    start = f"{record['case']:<18} {options:<62}"
    if "ms" not in record:
        return f"{start} {record.get('refused') or record['check']}"
    mark = "  (default)" if record["default"] else ""
    return f"{start} {record['ms']['p50']:9.3f} ms {record['gb_per_s']:8.1f} GB/s{mark}"
