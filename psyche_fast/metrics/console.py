"""Progress of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from psyche_fast.metrics.formatting import format_count, format_duration

# Weight of the newest step in the smoothed step time behind "time left": about the last 20 steps.
_NEWEST = 0.05


def _number(value: Any, form: str) -> str:
    """Formats a metric; a loss or norm that was not finite arrives as None or as a nan."""
    return "nan" if value is None else format(float(value), form)


_FORMS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {_number(value, '.3f')}",
    "grad_norm": lambda value: f"grad_norm {_number(value, '.2f')}",
    "learning_rate": lambda value: f"lr {_number(value, '.1e')}",
    "tokens_per_second": lambda value: f"{format_count(value or 0.0)} tok/s",
    "virtual_seconds": lambda value: f"virtual {format_duration(value or 0.0)}",
}


class Console:
    """Shows how far a run is, on one stream.

    On a terminal one line is redrawn: steps, loss, tokens per second, time left. Elsewhere (a file,
    CI) each step is a line of its own:

        step  12/100 | loss 3.214 | grad_norm 0.53 | lr 4.0e-04 | 12.3k tok/s | eta 00:03:12

    Args:
        total_steps: Number of the last step.
        start_step: Number of the first step of this run.
        stream: Where to print; standard error if None, which leaves standard output to results.
        clock: Seconds for the time left.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 1,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._last_time = clock()
        self._step_seconds: float | None = None
        self._bar: tqdm[Any] | None = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step - 1,
                file=self.stream,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
            )

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Shows one finished step.

        Args:
            metrics: The fields of its line in `metrics.jsonl`. `step` is required; `loss`,
                `grad_norm`, `learning_rate`, `tokens_per_second` and `virtual_seconds` are shown
                where present.
        """
        step = int(metrics["step"])
        left = self._time_left(step)
        if self._bar is not None:
            parts = self._parts(metrics, ("loss", "tokens_per_second", "virtual_seconds"))
            self._bar.set_description_str(" | ".join([*parts, f"{left} left"]), refresh=False)
            with self._until_closed():
                self._bar.update(step - self._bar.n)
            return
        head = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        parts = self._parts(metrics, tuple(_FORMS))
        self.message(" | ".join([head, *parts, f"eta {left}"]))

    def message(self, text: str) -> None:
        """Prints a line of text; a live progress line is redrawn below it."""
        with self._until_closed():
            if self._bar is not None:
                tqdm.write(text, file=self.stream)
            else:
                print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leaves the progress line as it stands and ends it; a second call does nothing."""
        if self._bar is not None:
            with self._until_closed():
                self._bar.close()

    @contextmanager
    def _until_closed(self) -> Iterator[None]:
        """A terminal that is closed, or a pipe that nobody reads, is no reason to end a run."""
        try:
            yield
        except OSError:
            self._bar, self.stream = None, open(os.devnull, "w")  # noqa: SIM115  # until the end

    def _time_left(self, step: int) -> str:
        """Smooths the wall-clock time between steps: checkpoints and loading count, as they do."""
        now = self._clock()
        seconds, self._last_time = now - self._last_time, now
        # The first step warms up (allocations, compilation): it says nothing about the rest.
        if self._step_seconds is None or step == self.start_step + 1:
            self._step_seconds = seconds
        else:
            self._step_seconds += _NEWEST * (seconds - self._step_seconds)
        return format_duration(self._step_seconds * (self.total_steps - step))

    @staticmethod
    def _parts(metrics: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
        return [_FORMS[name](metrics[name]) for name in names if name in metrics]

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
