"""Launch options and other choices that could not be settled without a GPU, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.errors import TritonError

from benchmarks import kernel_cases as make
from benchmarks.common import milliseconds, percentiles
from benchmarks.kernel_data import Data, Work
from psyche_fast.kernels import tuning
from psyche_fast.kernels.autotune import gpu_name, using
from psyche_fast.kernels.triton import operations

Options = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """One question.

    Attributes:
        name: what is varied.
        kernel: the section of the tuning table that the settings are for.
        builds: label and maker of what is timed.
        settings: options that are set, the rest as they are; "num_stages" is none of the table's.
    """

    name: str
    kernel: str
    builds: tuple[tuple[str, Callable[[Data, str], Work]], ...]
    settings: tuple[Options, ...]


def _encode(*ks: int) -> tuple[tuple[str, Callable[[Data, str], Work]], ...]:
    return tuple((f"encode k={k}", partial(make.encode, k=k)) for k in ks)


_APPLY = (("apply n=16 k=8", partial(make.apply, peers=16, signs=True)),)
_MANY = (("apply n=64 k=32", partial(make.apply, peers=64, signs=True, k=32)),)
_LOOKAHEAD = (("lookahead", partial(make.lookahead, copy=True)),)
_REGISTERS = {2: 255, 3: 168, 4: 128, 6: 80, 8: 64}

SWEEPS = (
    Sweep(
        "rows written to scratch, cache hints", "encode", _encode(8, 32),
        tuple(
            {"select_rows": rows, "stream": stream, "keep": keep}
            for rows in (False, True)
            for stream, keep in (("", ""), ("evict_first", ""), ("", "evict_last"),
                                 ("evict_first", "evict_last"))
        ),
    ),
    Sweep(
        "programs per multiprocessor", "encode", _encode(8),
        tuple({"ctas_per_sm": n} for n in (2, 3, 4, 6, 8)),
    ),
    Sweep(
        "registers, as many programs as fit", "encode", _encode(8),
        tuple({"ctas_per_sm": n, "maxnreg": r} for n, r in _REGISTERS.items()),
    ),
    Sweep("entries per chunk", "encode", _encode(1, 2, 4, 8, 16, 32, 48, 64), ({},)),
    Sweep(
        "registers, as many programs as fit", "apply", _APPLY,
        tuple({"ctas_per_sm": n, "maxnreg": r} for n, r in _REGISTERS.items()),
    ),
    Sweep(
        "tiles and warps", "encode", _encode(8),
        ({"tiles": 4, "num_warps": 4}, {"tiles": 8, "num_warps": 8}, {"tiles": 8, "num_warps": 4}),
    ),
    Sweep(
        "prefetch: stages of the loop over tiles", "apply", _APPLY,
        tuple({"num_stages": n} for n in (1, 2, 3)),
    ),
    Sweep(
        "prefetch: stages of the loop over tiles", "lookahead", _LOOKAHEAD,
        tuple({"num_stages": n} for n in (1, 2, 3)),
    ),
    Sweep(
        "warps", "apply", _APPLY, ({"num_warps": 4}, {"num_warps": 8, "maxnreg": 128}),
    ),
    Sweep(
        "entries at once", "apply", _MANY, tuple({"entries": n} for n in (512, 1024, 2048)),
    ),
    Sweep(
        "programs per multiprocessor", "lookahead", _LOOKAHEAD,
        tuple({"ctas_per_sm": n} for n in (2, 4, 8, 16)),
    ),
    Sweep(
        "registers", "encode", _encode(8), tuple({"maxnreg": n} for n in (96, 112, 144, 168)),
    ),
)  # fmt: skip


def run(
    data: Data, backend: str, *, budget_ms: float = 100.0, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure everything, most wanted first.

    Args:
        data: what on.
        backend: of the kernels.
        budget_ms: about how long each setting is timed.
        quick: only one setting of each sweep, and one of what is timed.

    Yields:
        A record per setting: with times if its results were right, with "fault" if it cannot run.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = (Path(folder) / f"{number}.toml" for number in count())
        for sweep in SWEEPS:
            default = tuning.options(sweep.kernel, data.device)
            for label, build in sweep.builds[: 1 if quick else None]:
                work = build(data, backend)
                for changes in sweep.settings[-1 if quick else None :]:
                    usual = {**default, "num_stages": 1}
                    record: dict[str, Any] = {
                        "sweep": sweep.name, "kernel": sweep.kernel, "case": label,
                        "options": changes, "default": changes.items() <= usual.items(),
                    }  # fmt: skip
                    with applied(sweep, changes, next(files), data.device):
                        yield record | _measured(work, backend, data, budget_ms)
                del work


@contextmanager
def applied(sweep: Sweep, changes: Options, path: Path, device: torch.device) -> Iterator[None]:
    """Within, the sweep's kernel runs with these options; `path` is a new file's."""
    table = {k: v for k, v in changes.items() if k != "num_stages"}
    options = {**tuning.options(sweep.kernel, device), **table}
    with (
        using(path, gpu_name(device), {sweep.kernel: options}),
        _stages(changes.get("num_stages")),
    ):
        yield


def _measured(work: Work, backend: str, data: Data, budget_ms: float) -> dict[str, Any]:
    try:
        check = work.check(backend)
    except TritonError as error:  # registers or shared memory do not suffice
        return {"fault": str(error).splitlines()[0]}
    if not check["ok"]:
        return {"check": check}
    ms = percentiles(milliseconds(work.calls[backend], data.device, budget_ms=budget_ms))
    return {"check": check, "ms": ms, "gb_per_s": work.bytes / ms["p50"] / 1e6}


def _stages(stages: int | None) -> AbstractContextManager[Any]:
    """Within, kernels are launched with so many stages; the table does not offer that."""
    if stages is None:
        return nullcontext()
    original = operations.launch_options

    def with_stages(kernel: str, device: torch.device) -> tuple[Options, Options]:
        ours, own = original(kernel, device)
        return {**ours, "num_stages": stages}, own

    return mock.patch.object(operations, "launch_options", with_stages)


def line(record: dict[str, Any]) -> str:
    """One line of the table."""
    options = ", ".join(f"{k} = {v!r}" for k, v in record["options"].items())
    start = f"{record['case']:<18} {options:<62}"
    if "ms" not in record:
        return f"{start} {record.get('fault') or record.get('check')}"
    mark = "  (default)" if record["default"] else ""
    return f"{start} {record['ms']['p50']:9.3f} ms {record['gb_per_s']:8.1f} GB/s{mark}"
