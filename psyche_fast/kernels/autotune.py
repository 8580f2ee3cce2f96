"""Measures launch options of the Triton kernels on the GPU at hand.

Opt-in: nothing calls this by itself. Every kernel runs on synthetic state with one group of options
varied after the other, the best so far kept. A setting counts only if it gives the same bits as the
options that the kernel has without tuning: peers with different GPUs, or with tables of different
age, must agree. What comes out is a table as `kernels/tuning.toml` has it; `write` stores it, and
`PSYCHE_FAST_TUNING` names the file to use.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psyche_fast.kernels import tuning
from psyche_fast.kernels.workloads import Workload, workload

Options = dict[str, Any]

_MARGIN = 0.99  # a setting has to be one percent faster to be preferred
_REGISTERS = {2: 255, 3: 168, 4: 128, 5: 96, 6: 80, 8: 64}  # that so many programs of 4 warps have

SEARCH: dict[str, tuple[tuple[Options, ...], ...]] = {
    "encode": (
        tuple({"ctas_per_sm": n, "maxnreg": r} for n, r in _REGISTERS.items()),
        ({"select_rows": True}, {"select_rows": False}),
        tuple({"stream": s, "keep": k} for s in ("", "evict_first") for k in ("", "evict_last")),
        ({"tiles": 4, "num_warps": 4}, {"tiles": 8, "num_warps": 8}, {"tiles": 8, "num_warps": 4}),
        tuple({"maxnreg": n} for n in (112, 120, 128, 144, 160)),
        tuple({"ctas_per_sm": n} for n in (3, 4, 5)),
    ),
    "apply": (
        # With 64 ptxas gives up: they do not suffice for a product of whole tiles.
        tuple({"ctas_per_sm": n, "maxnreg": r} for n, r in _REGISTERS.items() if r > 64),
        tuple({"scattered": n} for n in (0, 64, 128, 256, 1024)),
        tuple({"entries": n} for n in (256, 512, 1024)),
        ({"num_warps": 4}, {"num_warps": 8, "maxnreg": 128}, {"num_warps": 8, "maxnreg": 255}),
    ),
    "rows": (
        tuple({"num_warps": n} for n in (4, 8)),
        tuple({"ctas_per_sm": n} for n in (2, 3, 4, 6, 8)),
    ),
    "lookahead": (
        tuple({"num_warps": n} for n in (4, 8)),
        tuple({"ctas_per_sm": n} for n in (4, 6, 8, 12, 16)),
    ),
    "accumulate": (
        tuple({"num_warps": n} for n in (4, 8, 16)),
        tuple({"ctas_per_sm": n} for n in (2, 4, 6, 8)),
    ),
    "plain": (
        tuple({"num_warps": n} for n in (4, 8)),
        tuple({"ctas_per_sm": n} for n in (2, 3, 4, 6, 8)),
    ),
    "outer": (
        tuple({"num_warps": n} for n in (4, 8)),
        tuple({"ctas_per_sm": n} for n in (2, 3, 4, 6)),
        tuple({"entries": n} for n in (256, 512, 1024)),
    ),
    "cross_entropy": (
        tuple({"num_warps": n} for n in (4, 8, 16)),
        tuple({"block": n} for n in (1024, 2048, 4096, 8192)),
    ),
    "codec": (
        tuple({"num_warps": n} for n in (4, 8)),
        tuple({"elements": n} for n in (1024, 2048, 4096)),
    ),
}
"""Per kernel, groups of settings that are tried one group after the other."""


@dataclass(frozen=True)
class Trial:
    """One setting and how it did.

    Attributes:
        kernel: name of the kernel.
        changes: options that differ from the best until then; empty for the first, untuned run.
        milliseconds: median time, None where it failed.
        fault: why it does not count, None where it does.
    """

    kernel: str
    changes: Options
    milliseconds: float | None
    fault: str | None = None


def autotune(
    device: torch.device,
    kernels: Sequence[str] | None = None,
    budget_s: float = 120.0,
    *,
    record: Callable[[Trial], None] | None = None,
) -> dict[str, Options]:
    """Find the fastest launch options of each kernel on a GPU.

    Args:
        device: a CUDA device with nothing else to do and about 8 GB of free memory.
        kernels: which, of `SEARCH`; all where None.
        budget_s: seconds to spend, divided between the kernels. What has not been tried by then
            stays untried.
        record: is called with every trial.

    Returns:
        For each kernel all its options, to be given to `write`; not for one that fails as it is.

    Raises:
        ValueError: no CUDA device, or an unknown kernel.
        RuntimeError: every kernel fails as it is, or a setting has left the GPU unusable.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"autotuning needs a CUDA device, got {device}")
    return tune(
        device, kernels, budget_s, backend="triton", chunks=1 << 16, timer=_timer, record=record
    )


def tune(
    device: torch.device,
    kernels: Sequence[str] | None,
    budget_s: float,
    *,
    backend: str,
    chunks: int,
    timer: Callable[[Callable[[], object], torch.device], float],
    record: Callable[[Trial], None] | None = None,
) -> dict[str, Options]:
    """`autotune` on any device, of any size, by any timer; for tests and dry runs.

    Args:
        device: see `autotune`, as for `kernels`, `budget_s` and `record`.
        kernels: see `autotune`.
        budget_s: see `autotune`.
        backend: "triton" or "interpret".
        chunks: number of chunks of 64 x 64 that most kernels work on.
        timer: milliseconds of a call.
        record: see `autotune`.

    Raises:
        ValueError: as `autotune`.
        RuntimeError: as `autotune`.
    """
    names = list(SEARCH) if kernels is None else list(kernels)
    for name in names:
        if name not in SEARCH:
            raise ValueError(f"no kernel {name!r} to tune; known are {', '.join(SEARCH)}")
    gpu = gpu_name(device)
    table = {name: tuning.options(name, device) for name in SEARCH}
    failed: dict[str, str | None] = {}
    total, shown = sum(1 + sum(map(len, SEARCH[name])) for name in names), count(1)
    with tempfile.TemporaryDirectory() as folder:
        files = (Path(folder) / f"{number}.toml" for number in count())
        begun = time.monotonic()
        for done, name in enumerate(names):
            share = (begun + budget_s - time.monotonic()) / (len(names) - done)
            work = workload(name, device, backend, chunks)

            def attempt(
                options: Options, name: str = name, work: Workload = work
            ) -> tuple[float, list[Tensor]]:
                with using(next(files), gpu, {**table, name: options}):
                    return timer(work.run, device), work.bits()

            for trial in _search(name, table, attempt, time.monotonic() + share):
                _show(trial, next(shown), total)
                if record is not None:
                    record(trial)
                if trial.milliseconds is None:
                    if not trial.changes:
                        failed[name] = trial.fault
                    if device.type == "cuda":
                        # Raises where the fault sticks to this process: nothing more would run.
                        torch.cuda.synchronize(device)
            del work, attempt
    if failed and failed.keys() == set(names):
        raise RuntimeError("; ".join(f"{name}: {fault}" for name, fault in failed.items()))
    return {name: table[name] for name in names if name not in failed}


def _search(
    kernel: str,
    table: dict[str, Options],
    attempt: Callable[[Options], tuple[float, list[Tensor]]],
    deadline: float,
) -> Iterator[Trial]:
    """Try settings until the deadline (of `time.monotonic`), leaving the best in the table."""
    try:
        fastest, expected = attempt(table[kernel])
    except Exception as error:
        yield Trial(kernel, {}, None, _first_line(error))
        return
    yield Trial(kernel, {}, fastest)
    for changes in chain(*SEARCH[kernel]):
        candidate = {**table[kernel], **changes}
        if candidate == table[kernel]:
            continue
        if time.monotonic() > deadline:
            return
        try:
            milliseconds, result = attempt(candidate)
        except Exception as error:  # registers or shared memory do not suffice, say
            yield Trial(kernel, changes, None, _first_line(error))
            continue
        if not all(_same_bits(a, b) for a, b in zip(result, expected, strict=True)):
            yield Trial(kernel, changes, milliseconds, "other bits than without tuning")
            continue
        if milliseconds < _MARGIN * fastest:
            fastest = milliseconds
            table[kernel] = candidate
        yield Trial(kernel, changes, milliseconds)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def write(path: Path, gpu: str, table: dict[str, Options]) -> None:
    """Store a table in a tuning file, beside what other GPUs' sections it has.

    Args:
        path: the file; created where missing, otherwise rewritten without its comments.
        gpu: as `torch.cuda.get_device_name` gives it.
        table: options per kernel.

    Raises:
        ValueError: the file exists and is no tuning file.
    """
    sections = tuning.read(path) if path.exists() else {}
    sections[gpu] = {**sections.get(gpu, {}), **table}
    lines = ["# Measured launch options; see psyche_fast/kernels/tuning.toml.\n"]
    for name, chosen in sorted(sections.items()):
        lines.append(f"\n[{json.dumps(name)}]\n")
        for kernel, options in sorted(chosen.items()):
            # What JSON makes of numbers, strings and truth is TOML too.
            pairs = ", ".join(f"{k} = {json.dumps(v)}" for k, v in options.items())
            lines.append(f"{kernel} = {{ {pairs} }}\n")
    path.write_text("".join(lines), encoding="utf-8")


@contextmanager
def using(path: Path, gpu: str, table: dict[str, Options]) -> Iterator[None]:
    """Within, kernels take their options from a table.

    Args:
        path: where the table is written; a new one each time, since files are read once.
        gpu: as for `write`.
        table: options per kernel.
    """
    write(path, gpu, table)
    before = os.environ.get(tuning.ENVIRONMENT)
    os.environ[tuning.ENVIRONMENT] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ[tuning.ENVIRONMENT]
        else:
            os.environ[tuning.ENVIRONMENT] = before


def gpu_name(device: torch.device) -> str:
    """The section of a device in a tuning file."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _timer(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds on a GPU, caches cleared in between."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return float(do_bench(call, warmup=5, rep=40, return_mode="median"))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _show(trial: Trial, number: int, total: int) -> None:
    """Print a trial as a line."""
    changes = ", ".join(f"{k} = {v!r}" for k, v in trial.changes.items()) or "as it is"
    result = "failed" if trial.milliseconds is None else f"{trial.milliseconds:.4f} ms"
    fault = f"  ({trial.fault})" if trial.fault else ""
    print(f"{trial.kernel:>10} {number:>3}/{total}  {result:>12}  {changes}{fault}", flush=True)
