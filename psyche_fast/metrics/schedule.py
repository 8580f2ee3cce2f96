"""Learning rates and batch sizes by step, as lines and as a plot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from psyche_fast.config import RunConfig
from psyche_fast.metrics.formatting import format_count

_LINES = 24
_POINTS = 4000


def _steps(config: RunConfig, every: int) -> Iterator[tuple[int, float, int, int]]:
    """Some steps, with their rates and sequences, and the tokens up to their ends.

    These are every `every`-th, the ends, and those at which a phase of the schedule begins.
    """
    rates = config.schedule.learning_rates()
    first, last = config.schedule.start_step, config.schedule.total_steps
    wanted = {first, last, *config.schedule.phases()}
    length, sizes = config.model.sequence_length, config.batch_sizes
    grew = sizes.start < sizes.end
    for step, before, rows in sizes.steps(first, last):
        grown = grew and rows == sizes.end
        grew = grew and not grown
        if step in wanted or step % every == 0 or grown:
            yield step, rates.get_lr(step), rows, (before + rows) * length


def _round_interval(steps: int, parts: int) -> int:
    """About a `parts`-th of the steps, as 1, 2 or 5 times a power of ten."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if steps <= factor * power * parts:
                return factor * power
        power *= 10


def lines(config: RunConfig, every: int | None = None) -> Iterator[str]:
    """The lines of a table.

    Args:
        config: the run.
        every: steps from one line to the next; None for some two dozen lines.
    """
    first, last = config.schedule.start_step, config.schedule.total_steps
    every = every or _round_interval(last - first + 1, _LINES)
    yield f"{'step':>9} {'learning_rate':>14} {'total_batch':>12} {'tokens':>16}"
    for step, rate, rows, tokens in _steps(config, every):
        yield f"{step:>9} {rate:>14.6g} {rows:>12} {tokens:>16}"


def plot_schedule(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Draws learning rate and batch size by step.

    Args:
        config: the run.
        path: the file to write; its suffix is its format.

    Raises:
        ValueError: matplotlib does not know the format.
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    first, last = config.schedule.start_step, config.schedule.total_steps
    points = list(_steps(config, max(1, (last - first) // _POINTS)))
    steps = [step for step, *_ in points]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot(steps, [rate for _, rate, _, _ in points], color="#0072B2", linewidth=1.5)
    upper.set_ylabel("learning rate")
    lower.step(steps, [rows for _, _, rows, _ in points], color="#D55E00", where="post")
    lower.set_ylabel("sequences per step")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    tokens = format_count(points[-1][3])
    upper.set_title(f"{config.schedule.schedule} schedule, {tokens} tokens by step {last}")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
