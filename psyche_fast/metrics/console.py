"""Progress of a run: a card and a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from psyche_fast.metrics.formatting import format_bytes, format_count, format_duration

# Weight of the newest step in the smoothed step time behind "time left": about the last 20 steps.
_NEWEST = 0.05
_STEPS = 20
"""Steps over which shares of their time are given."""
_REDRAW = 0.1
"""Seconds between two drawings of the live line."""
_WORD = 9
"""Where a line of a card goes on behind its first word."""

_WAITS = {
    "data": ("data",), "device": ("train",), "link": ("send", "optimize", "counts"),
}  # fmt: skip
"""What a step's time goes to, and in which phases: the device's where the host computes or waits
for it, the link's where ranks wait for each other."""


def _number(value: Any, form: str) -> str:
    """Formats a metric; a loss or norm that was not finite arrives as None or as a nan."""
    return "nan" if value is None else format(float(value), form)


_FORMS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {_number(value, '.3f')}",
    "eval_bits_per_byte": lambda value: f"{_number(value, '.3f')} bits/byte held out",
    "grad_norm": lambda value: f"grad_norm {_number(value, '.2f')}",
    "learning_rate": lambda value: f"lr {_number(value, '.1e')}",
    "tokens_per_second": lambda value: f"{format_count(value or 0.0)} tok/s",
    "mfu": lambda value: f"MFU {100 * (value or 0.0):.1f}%",
    "virtual_seconds": lambda value: f"virtual {format_duration(value or 0.0)}",
}


class Console:
    """Shows what a run is and how far, on one stream.

    On a terminal one line is redrawn: steps, loss, tokens per second, share of what the device can
    do, what the time goes to, memory, time left. Elsewhere (a file, CI) there is a line in so many
    seconds, and one for the first and the last step:

        step  12/100 | loss 3.214 | grad_norm 0.53 | lr 4.0e-04 | 12.3k tok/s | eta 00:03:12

    Args:
        total_steps: Number of the last step.
        start_step: Number of the first step of this run.
        stream: Where to print; standard error if None, which leaves standard output to results.
        every: Seconds between plain lines; 0 for a line a step.
        clock: Seconds for the time left.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 1,
        *,
        stream: TextIO | None = None,
        every: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.stream = sys.stderr if stream is None else stream
        self._every = every
        self._clock = clock
        self._last_time = clock()
        self._shown: float | None = None
        self._step_seconds: float | None = None
        self._recent: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=_STEPS)
        self._bar: Progress | None = None
        if self.stream.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[said]}", markup=False),
                console=_terminal(self.stream),
                auto_refresh=False,
                # What others write is theirs: standard error may be a log file's by now.
                redirect_stdout=False,
                redirect_stderr=False,
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=total_steps, completed=start_step - 1, said=""
            )
            with self._until_closed():
                self._bar.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Shows one finished step.

        Args:
            metrics: The fields of its line in `metrics.jsonl`. `step` is required; what there is
                to show of others is shown.
        """
        step = int(metrics["step"])
        left = self._time_left(step)
        is_edge = step in (self.start_step, self.total_steps)
        if self._bar is not None:
            seconds = metrics.get("seconds")
            if isinstance(seconds, Mapping):
                self._recent.append((float(metrics.get("step_seconds") or 0.0), seconds))
            parts = self._parts(metrics, ("loss", "tokens_per_second", "mfu", "virtual_seconds"))
            parts += [*self._shares(), *_memory(metrics), f"{left} left"]
            said = " | ".join(parts)
            due = is_edge or self._shown is None or self._clock() - self._shown >= _REDRAW
            with self._until_closed():
                self._bar.update(self._task, completed=step, said=said, refresh=due)
            self._shown = self._clock() if due else self._shown
            return
        now = self._clock()
        wanted = is_edge or self._shown is None or "eval_bits_per_byte" in metrics
        if not wanted and now - (self._shown or 0.0) < self._every:
            return
        self._shown = now
        head = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        parts = self._parts(metrics, tuple(_FORMS))
        self.message(" | ".join([head, *parts, f"eta {left}"]))

    def message(self, text: str) -> None:
        """Prints a line of text; a live progress line is redrawn below it."""
        with self._until_closed():
            if self._bar is not None:
                self._bar.console.print(Text(text), soft_wrap=True)
            else:
                print(text, file=self.stream, flush=True)

    def card(self, lines: Sequence[str]) -> None:
        """Prints lines of a word and what there is to say."""
        with self._until_closed():
            print_card(lines, self.stream, None if self._bar is None else self._bar.console)

    def close(self) -> None:
        """Leaves the progress line as it stands and ends it; a second call does nothing."""
        if self._bar is not None:
            with self._until_closed():
                self._bar.stop()

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

    def _shares(self) -> list[str]:
        """Of the time of the last steps, what went to data, device and link."""
        whole = sum(seconds for seconds, _ in self._recent)
        if not whole:
            return []
        shares = {
            name: sum(by.get(phase, 0.0) for _, by in self._recent for phase in phases) / whole
            for name, phases in _WAITS.items()
        }
        return [" ".join(f"{name} {100 * min(share, 1):.0f}%" for name, share in shares.items())]

    @staticmethod
    def _parts(metrics: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
        return [_FORMS[name](metrics[name]) for name in names if name in metrics]

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _terminal(stream: TextIO) -> Terminal:
    return Terminal(file=stream, highlight=False, emoji=False)


def _memory(metrics: Mapping[str, Any]) -> list[str]:
    memory = metrics.get("memory")
    if not isinstance(memory, Mapping):
        return []
    for name in ("cuda_peak_allocated", "process"):
        if name in memory:
            return [format_bytes(memory[name])]
    return []


def print_card(
    lines: Sequence[str], stream: TextIO | None = None, terminal: Terminal | None = None
) -> None:
    """Prints lines of a word and what there is to say: a table on a terminal, else as they are.

    Args:
        lines: a word, in nine columns, and text.
        stream: where to; standard error if None.
        terminal: of the stream, where there is one by now.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        for line in lines:
            print(line, file=stream, flush=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        word, text = line[:_WORD].strip(), line[_WORD:]
        style = "bold yellow" if word == "warning" else "bold cyan"
        table.add_row(Text(word, style=style), Text(text))
    (terminal or _terminal(stream)).print(Padding(table, (0, 1)))


class WarnOnce(logging.Handler):
    """Hands warnings to the user's console, one of each kind.

    Args:
        tell: takes a line.
        where: the file that has them all.
    """

    def __init__(self, tell: Callable[[str], None], where: str) -> None:
        super().__init__(logging.WARNING)
        self._tell, self._where = tell, where
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Tells of it, unless one like it has been told, or it has been told otherwise."""
        kind = record.getMessage() if record.msg == "%s" else str(record.msg)
        if kind in self._seen or getattr(record, "is_told", False):
            return
        self._seen.add(kind)
        further = f" (more of this kind: {self._where})" if kind != record.getMessage() else ""
        self._tell(f"warning  {record.getMessage()}{further}")
