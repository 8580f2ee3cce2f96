"""Plots of a finished or running run, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from psyche_fast.metrics.formatting import format_bytes, format_count
from psyche_fast.metrics.writer import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG = logging.getLogger(__name__)

# Two colours of Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#9a9a9a"

Records = list[dict[str, Any]]


class _NothingToDrawError(Exception):
    """The metrics do not hold what a plot needs; the message says what is missing."""


def _column(records: Records, name: str) -> list[float]:
    """Returns one field of each record, nan where it was not finite or is missing."""
    values = [record.get(name) for record in records]
    if all(value is None for value in values):
        raise _NothingToDrawError(f"no step has a {name}")
    return [math.nan if value is None else float(value) for value in values]


def _smoothed(values: list[float], window: int) -> list[float]:
    """Returns the mean of the last `window` values up to each one, nan values left out."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def _draw_loss(axes: Axes, records: Records) -> None:
    steps, losses = _column(records, "step"), _column(records, "loss")
    window = max(1, len(losses) // 50)
    if window > 1:
        axes.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=0.8, label="each step")
        axes.plot(
            steps,
            _smoothed(losses, window),
            color=_BLUE,
            linewidth=1.8,
            label=f"mean of the last {window} steps",
        )
        axes.legend(frameon=False)
    else:
        axes.plot(steps, losses, color=_BLUE, linewidth=1.5, marker="o", markersize=2.5)
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy loss (nats per token)")


def _draw_loss_vs_bytes(axes: Axes, records: Records) -> None:
    losses = _column(records, "loss")

    def total(name: str) -> list[float]:
        known = (0.0 if math.isnan(value) else value for value in _column(records, name))
        return list(accumulate(known))

    sent, dense = total("bytes_sent"), total("dense_bytes")
    if sent[-1] <= 0:
        raise _NothingToDrawError("no bytes were sent (a single replica has no peers)")
    for name, total_bytes, color in (
        ("sent", sent, _BLUE),
        ("whole gradients would have sent", dense, _ORANGE),
    ):
        # A logarithmic axis has no zero: the first step sent nothing.
        points = [(x, y) for x, y in zip(total_bytes, losses, strict=True) if x > 0]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=color,
            linewidth=1.5,
            label=f"{name}: {format_bytes(total_bytes[-1])}",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.xaxis.set_minor_formatter("")
    axes.legend(frameon=False, loc="lower left")  # both curves end low on the right
    saved = f": {format_count(dense[-1] / sent[-1])} times fewer" if dense[-1] > 0 else ""
    axes.set_title(f"Training loss against bytes sent{saved}")
    axes.set_xlabel("bytes sent since the first step")
    axes.set_ylabel("cross-entropy loss (nats per token)")


def _draw_throughput(axes: Axes, records: Records) -> None:
    steps, rates = _column(records, "step"), _column(records, "tokens_per_second")
    middle = median(rate for rate in rates if not math.isnan(rate))
    axes.plot(steps, rates, color=_BLUE, linewidth=1.2)
    axes.axhline(
        middle,
        color=_GREY,
        linestyle="--",
        linewidth=1.2,
        label=f"median {format_count(middle)} tokens/s",
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.legend(frameon=False)
    axes.set_title("Training throughput")
    axes.set_xlabel("step")
    axes.set_ylabel("tokens per second")


_PLOTS: dict[str, Callable[[Axes, Records], None]] = {
    "loss.png": _draw_loss,
    "loss_vs_bytes.png": _draw_loss_vs_bytes,
    "throughput.png": _draw_throughput,
}


def plot_run(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draws a run's plots into `plots/` of its run directory.

    `loss.png` (loss by step), `loss_vs_bytes.png` (loss by bytes sent, beside what an exchange of
    whole gradients would have sent) and `throughput.png` (tokens per second by step). A plot whose
    fields the metrics do not hold is left out, and a warning is logged that says which and why.

    Args:
        run_dir: The run directory with `metrics.jsonl`.

    Returns:
        The files drawn, in the order above.

    Raises:
        FileNotFoundError: There is no `metrics.jsonl`.
        ValueError: It is damaged.
    """
    # Without pyplot there is no display and no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    folder = Path(run_dir)
    records = read_metrics(folder / "metrics.jsonl")
    drawn = []
    for name, draw in _PLOTS.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        try:
            draw(axes, records)
        except _NothingToDrawError as reason:
            _LOG.warning("%s is left out: %s", name, reason)
            continue
        target = folder / "plots" / name
        target.parent.mkdir(exist_ok=True)
        figure.savefig(target, dpi=120)
        drawn.append(target)
    return drawn
