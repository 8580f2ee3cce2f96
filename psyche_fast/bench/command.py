"""`psyche-fast bench`: the options, the table, the exit status."""

from __future__ import annotations

import logging
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from psyche_fast.start.logs import quiet_terminal

if TYPE_CHECKING:
    from psyche_fast.bench.results import Comparison
    from psyche_fast.bench.suite import Report


@click.command()
@click.option("--case", "texts", multiple=True, metavar="TEXT",
              help="only cases with this in their name, e.g. 'encode' or 'training'")  # fmt: skip
@click.option("--layers", help="whose shapes: tiny, small, 125M, prime, 1.2B, 8B "
              "(default: small on a CPU, 1.2B on a GPU)")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="how often each case is come back to; default: 3 on a CPU, 1 on a GPU",
)
@click.option("--milliseconds", type=click.FloatRange(min=0, min_open=True), default=100.0,
              show_default=True, help="about how long a case is timed in a round")  # fmt: skip
@click.option("--compare", "other", metavar="FILE|COMMIT",
              help="say what is slower than in a file of --out, or than another commit's code, "
              "which is run in turns with this")  # fmt: skip
@click.option("--fail-slower", type=click.FloatRange(min=0), metavar="PERCENT",
              help="status 1 if something is slower by more than this and the noise")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path),
              help="write the times as JSON, as pytest-benchmark does")  # fmt: skip
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path),
              help="write the table as an HTML page")  # fmt: skip
def bench(
    texts: tuple[str, ...],
    layers: str | None,
    device: str,
    rounds: int | None,
    milliseconds: float,
    other: str | None,
    fail_slower: float | None,
    out: Path | None,
    page: Path | None,
) -> None:
    """Time kernels, optimiser steps, the exchange and a step of training beside their floors."""
    quiet_terminal()
    if fail_slower is not None and other is None:
        raise ValueError("--fail-slower wants --compare: slower than what?")
    from psyche_fast.bench import results, suite
    from psyche_fast.bench.commits import Commit
    from psyche_fast.bench.page import write_page
    from psyche_fast.bench.shapes import SETS
    from psyche_fast.start.devices import choose_devices

    place = choose_devices(device, 1).devices[0]
    layers = layers or ("1.2B" if place.type == "cuda" else "small")
    if layers not in SETS:
        raise ValueError(f"--layers must be one of {', '.join(SETS)}, got {layers!r}")
    log = logging.getLogger("psyche_fast")
    with ExitStack() as stack:
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)  # shapes are odd on purpose
        then: Report | None = None
        commit: Commit | None = None
        if other is not None and Path(other).exists():
            then = results.read(Path(other), layers)
        elif other is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            commit = Commit(other, Path(folder))
        arguments = ["--layers", layers, "--device", str(place)]
        arguments += ["--milliseconds", str(milliseconds)]
        arguments += [word for text in texts for word in ("--case", text)]

        def between() -> None:
            if commit is not None:
                commit.round(arguments, layers)

        now = suite.measure(
            layers, place, texts, rounds, budget_ms=milliseconds, between=between, tell=_tell
        )
        if commit is not None:
            then = commit.report
    _tell("")
    for line in heading(now, layers):
        click.echo(line)
    compared = [] if then is None else results.compare(then, now)
    for line in table(now, compared):
        click.echo(line)
    if then is not None:
        for line in verdict(then, now, compared, str(other)):
            click.echo(line)
    if out is not None:
        results.write(out, now, layers)
        click.echo(f"{out}: compare with it by --compare, or by pytest-benchmark compare")
    if page is not None:
        write_page(page, now, layers, then, compared)
        click.echo(f"{page}: open it in a browser")
    if fail_slower is not None:
        worse = [c for c in compared if c.verdict == "slower" and 100 * c.change > fail_slower]
        if worse:
            names = "; ".join(f"{c.name} {c.change:+.0%}" for c in worse)
            raise RuntimeError(f"slower than {other} by more than {fail_slower:g} %: {names}")


def _tell(line: str) -> None:
    """What is being timed, on a terminal alone, in one line."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{line}", nl=False, err=True)


def heading(report: Report, layers: str) -> list[str]:
    """Where the figures are from."""
    e, speeds = report.environment, report.yardsticks
    device = e["gpu"] or f"{e['cpu']}, {e['threads']} threads"
    return [
        f"device      {device}",
        f"versions    torch {e['torch']}, triton {e['triton']}, Python {e['python']}, "
        f"commit {e['commit'] or 'unknown'}",
        f"floors      a copy moves {speeds['copy_gb_per_s']:.1f} GB/s, a product makes "
        f"{speeds['product_gflop_per_s']:.0f} GFLOP/s; layers of {layers!r}",
    ]


def table(report: Report, compared: list[Comparison]) -> list[str]:
    """A line for each case: usual time, quartiles, floor, and what is compared."""
    from psyche_fast.bench.results import quartiles

    beside = {c.name: c for c in compared}
    lines = [f"{'':<54} {'p50 ms':>9} {'p25':>9} {'p75':>9} {'floor ms':>9} {'% of it':>7}"]
    if compared:
        lines[0] += f" {'then ms':>9} {'change':>7}"
    for found in report.found:
        low, median, high = quartiles(sorted(found.times))
        taken = found.about.get("device_ms") or median
        line = (
            f"{found.full_name:<54} {median:9.3f} {low:9.3f} {high:9.3f} {found.floor_ms:9.3f} "
            f"{100 * found.floor_ms / taken:7.1f}"
        )
        c = beside.get(found.full_name)
        if c is not None:
            line += f" {c.then:9.3f} {c.change:+7.0%} {c.verdict}"
        lines.append(line.rstrip())
    return lines


def verdict(then: Report, now: Report, compared: list[Comparison], other: str) -> list[str]:
    """What the comparison comes to, and what speaks against believing it."""
    from psyche_fast.bench.results import Machine

    lines = []
    for what in ("cpu", "gpu", "threads", "torch", "triton"):
        a, b = then.environment.get(what), now.environment.get(what)
        if a != b:
            lines.append(f"warning     {what} was {a} then, is {b} now: other times are no wonder")
    machine = Machine.between(then, now)
    lines.append(
        f"machine     takes {machine.least:.2f} to {machine.most:.2f} times as long as then for "
        "a copy and a product: what is ours is slower or faster by what is beyond"
    )
    missing = {f.full_name for f in then.found} - {f.full_name for f in now.found}
    if missing:
        lines.append(f"not here    {', '.join(sorted(missing))}")
    for word in ("slower", "faster"):
        names = [f"{c.name} {c.change:+.0%}" for c in compared if c.verdict == word]
        lines.append(f"{word:<11} {'; '.join(names) or f'nothing by more than the noise, {other}'}")
    return lines
