"""What `make kernels` prints: what each kernel costs on each GPU, and whether that is allowed."""

from __future__ import annotations

import dataclasses
import json
import linecache
from collections.abc import Sequence
from pathlib import Path

import click
from tqdm import tqdm

from psyche_fast.kernels.backends import describe, summary
from tools.kernel_guard import aot, limits

_COLUMNS = {
    "registers": "registers",
    "spills": "spills B",
    "shared": "shared B",
    "instructions": "instr/tile",
    "mma": "MMAs",
}


def report(
    *,
    targets: Sequence[str] = (),
    kernels: Sequence[str] = (),
    as_json: bool = False,
    check: bool = False,
    update_limits: bool = False,
    lines: str | None = None,
    provider: str = aot.PROVIDER,
    folder: Path = limits.FOLDER,
) -> None:
    """Compiles the kernels and prints what they cost.

    Args:
        targets: GPUs to compile for; none for all.
        kernels: texts of which a case's name contains one; none for all cases.
        as_json: print one JSON object instead of tables.
        check: compare with the limits.
        update_limits: rewrite the limits from what is measured.
        lines: attribute the instructions of the case whose name contains this to lines of source.
        provider: module with the cases.
        folder: where the files with the limits are.

    Raises:
        ValueError: an argument is wrong, or nothing can be compiled for want of Triton.
        RuntimeError: a limit is exceeded.
    """
    machine = summary()
    if not as_json:
        for line in describe(machine):
            click.echo(line)
    if machine["triton"] is None:
        raise ValueError("triton is not installed, so nothing can be compiled")
    if lines is not None:
        _print_lines(aot.attribute_one(lines, targets[0] if targets else "sm_90", provider))
        return
    measured = _measure(targets, kernels, provider)
    whole = not targets and not kernels
    known, version = limits.read_all(folder), machine["triton"]
    if update_limits:
        old = known.get(version, limits.Limits())
        known[version] = limits.updated(old, measured, version, whole=whole)
        path = limits.write(known[version], folder)
    allowed = limits.allowed(known, version)
    faults = limits.check(measured, allowed, whole=whole) if check else []
    if as_json:
        measurements = [dataclasses.asdict(one) for one in measured]
        click.echo(
            json.dumps({**machine, "measurements": measurements, "faults": faults}, indent=1)
        )
    else:
        _print_tables(measured)
        if update_limits:
            click.echo(f"\nwrote {path}")
        for fault in faults:
            click.echo(f"exceeded: {fault}")
    if faults:
        raise RuntimeError(f"{len(faults)} limits of the kernels are exceeded ({_of(allowed)})")
    if check and not as_json:
        click.echo(f"\n{len(measured)} compilations are within the limits ({_of(allowed)})")


def _of(allowed: limits.Limits) -> str:
    return f"those of Triton {allowed.triton}" if allowed.triton else "of any Triton, and slack"


def _measure(
    targets: Sequence[str], kernels: Sequence[str], provider: str
) -> list[aot.Measurement]:
    with tqdm(desc="compiling", unit="kernel", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return aot.measure_all(
            targets=targets or tuple(aot.TARGETS),
            kernels=kernels,
            provider=provider,
            progress=progress,
        )


def _print_tables(measured: Sequence[aot.Measurement]) -> None:
    width = max((len(one.name) for one in measured), default=0)
    heading = "".join(f"{title:>12}" for title in _COLUMNS.values())
    for target in aot.TARGETS.values():
        rows = [one for one in measured if one.target == target.name]
        if rows:
            click.echo(f"\n{f'{target.name} ({target.gpus})':{width}}{heading}")
        for one in rows:
            if one.refused is not None:
                click.echo(f"{one.name:{width}}  does not run: {one.refused}")
                continue
            values = [getattr(one, metric) for metric in _COLUMNS]
            cells = "".join(f"{'-' if v is None else format(v, ',.0f'):>12}" for v in values)
            note = f"  {one.uncounted}" if one.uncounted is not None else ""
            click.echo(f"{one.name:{width}}{cells}{note}")


def _print_lines(source_lines: Sequence[aot.SourceLine]) -> None:
    total = sum(line.instructions for line in source_lines)
    click.echo(f"\n{'instr/tile':>10} {'share':>6}  line")
    for line in source_lines:
        mix = sorted(line.opcodes.items(), key=lambda item: -item[1])
        opcodes = " ".join(f"{kind}:{n:.0f}" for kind, n in mix[:5])
        source = linecache.getline(line.file, line.line).strip()
        location = f"{Path(line.file).name}:{line.line}"
        click.echo(
            f"{line.instructions:10,.0f} {line.instructions / total:6.1%}  {location:20} "
            f"{source[:60]:60}  {opcodes}"
        )
    click.echo(f"{total:10,.0f}         in all")
