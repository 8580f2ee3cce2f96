"""A page about runs: one HTML file that needs nothing else. Plotly.js draws, this says what.

A figure is what Plotly takes, `{"data": [...], "layout": {...}}`; the page (`page.html`) is told
figures, tables and texts as one JSON object, and `psyche-fast watch` tells it anew while a run
goes on.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from psyche_fast.metrics.formatting import format_bytes, format_count, format_duration
from psyche_fast.metrics.runs import Event, RunFiles, State, number, read_run, state_of

Numbers = Sequence[float | None]
Figure = dict[str, Any]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart."""
_STRETCHES = 600
"""Of a long run so many stretches are drawn, each by its smallest and largest value."""
_AREAS = 300
"""Of phases' times so many means are drawn: sums of extremes would be no step's."""
_EVENTS = 2000
_SAMPLES = 24
_EVENT_NAMES = {
    "refused_results": "refused results", "left_out_results": "replicas left out",
    "refused_gradients": "refused gradients", "nonfinite_losses": "losses not finite",
    "lost_rows": "rows lost", "members": "members change", "restart": "restart",
    "warning": "warnings", "error": "errors", "critical": "errors",
}  # fmt: skip
_PLACES = {"output", "port", "resume", "start_step", "tracker_name"}
"""Settings in which runs differ by where they are, not by what they do."""


def plotly_js() -> str:
    """The library that draws.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(f"plotly cannot be imported ({error}); pip install plotly") from error
    return str(get_plotlyjs())


def page(runs: Sequence[RunFiles] | None, *, refresh: float | None = None) -> str:
    """The page as HTML.

    Args:
        runs: what it is about; None where it asks for that itself.
        refresh: seconds after which it asks again, of whoever serves it; None for a file.
    """
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    names = "psyche_fast" if runs is None else ", ".join(run.name for run in runs)
    script = '<script src="plotly.min.js"></script>'
    if refresh is None:
        # No text of the library's ends a script, or the page would not be one.
        script = f"<script>{plotly_js().replace('</script', '<' + chr(92) + '/script')}</script>"
    for mark, text in (  # from the end on, so that no mark is looked for in what was filled in
        ("{{report}}", "null" if runs is None else to_json(report(runs))),
        ("{{refresh}}", json.dumps(refresh)),
        ("{{plotly}}", script),
        ("{{title}}", html.escape(names)),
    ):
        before, _, after = template.partition(mark)
        template = before + text + after
    return template


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page about run directories to a file, in one piece.

    Args:
        folders: one or several.
        output: the file; None for `report.html` in the first folder.

    Returns:
        The file.

    Raises:
        ValueError: there is nothing of a run in a folder.
        OSError: it cannot be written.
    """
    content = page([read_run(folder) for folder in folders])
    path = output or folders[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
    return path


def to_json(told: dict[str, Any]) -> str:
    """JSON that may stand in a script of a page."""
    text = json.dumps(told, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def report(runs: Sequence[RunFiles], now: float | None = None) -> dict[str, Any]:
    """All that the page says.

    Args:
        runs: what it is about, one or several.
        now: seconds since 1970.
    """
    now = time.time() if now is None else now
    runs = _with_own_names(runs)
    states = [state_of(run, now) for run in runs]
    return {
        "made": datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        "version": _version(),
        "runs": [_card(run, state) for run, state in zip(runs, states, strict=True)],
        "differences": _differences(runs),
        "figures": [figure for figure in _figures(runs) if figure is not None],
        "samples": [_samples(run) for run in runs if run.samples],
        "thinned": any(len(run.lines) > 2 * _STRETCHES for run in runs),
    }


def _version() -> str:
    try:
        return version("psyche-fast")
    except PackageNotFoundError:
        return ""


def _with_own_names(runs: Sequence[RunFiles]) -> list[RunFiles]:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return list(runs)


def _card(run: RunFiles, state: State) -> dict[str, Any]:
    """What is said of one run in words."""
    last: dict[str, Any] = run.lines[-1] if run.lines else {}
    rows: list[tuple[str, str]] = []

    def row(name: str, value: float | None, form: Callable[[float], str]) -> None:
        if value is not None:
            rows.append((name, form(value)))

    total = number(run.settings.get("total_steps"))
    row(
        "step",
        number(last.get("step")),
        lambda n: f"{n:.0f}" + (f" of {total:.0f}" if total else ""),
    )
    row("loss", _last(run.numbers("loss")), lambda n: f"{n:.4f}")
    row("held-out loss", _last(run.numbers("eval_loss")), lambda n: f"{n:.4f}")
    row("bits per byte", _last(run.numbers("eval_bits_per_byte")), lambda n: f"{n:.4f}")
    row("tokens", _last(run.numbers("num_tokens")), format_count)
    rates = [n for n in run.numbers("tokens_per_second") if n is not None]
    row(
        "tokens a second", median(rates) if rates else None, lambda n: f"{format_count(n)} (median)"
    )
    sent, dense = _total(run, "bytes_sent"), _total(run, "dense_bytes")
    if sent:
        less = f", {dense / sent:.0f} times less than gradients" if dense else ""
        rows.append(("sent by a replica", format_bytes(sent) + less))
    if run.times:
        rows.append(("time", format_duration(run.times[-1])))
    if run.lives > 1:
        rows.append(("restarts", str(run.lives - 1)))
    warnings = [e for e in run.events if e.kind in ("warning", "error", "critical")]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": state.name,
        "lines": state.lines,
        "rows": rows,
        "notes": run.notes,
        "warnings": [[_clock(e.time), e.text] for e in warnings[-20:]],
        "stacks": [[name, text] for name, text in run.stacks.items()],
    }


def _clock(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at).strftime("%m-%d %H:%M:%S")


def _last(values: Numbers) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)


def _total(run: RunFiles, name: str) -> float:
    return sum(v for v in run.numbers(name) if v is not None)


def _differences(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Settings that runs do not have in common: `{"names": [...], "rows": [[name, ...], ...]}`."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _PLACES)
    rows = []
    for name in names:
        values = [json.dumps(run.settings[name], default=str) if name in run.settings else "\u2014"
                  for run in runs]  # fmt: skip
        if len(set(values)) > 1:
            rows.append([name, *values])
    return {"names": [run.name for run in runs], "rows": rows}


def _samples(run: RunFiles) -> dict[str, Any]:
    """By prompt, evenly chosen over the run, the newest first."""
    prompts: dict[str, list[list[Any]]] = {}
    for sample in run.samples:
        told = prompts.setdefault(str(sample.get("prompt")), [])
        told.append([sample.get("step"), str(sample.get("text"))])
    chosen = {prompt: _spread(told)[::-1] for prompt, told in prompts.items()}
    return {"name": run.name, "prompts": [[p, told] for p, told in chosen.items()]}


def _spread(items: list[Any], most: int = _SAMPLES) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def _figures(runs: Sequence[RunFiles]) -> list[Figure | None]:
    tokens, steps, clock = "tokens", "step", _Clock.for_runs(runs)

    def of(name: str) -> Callable[[RunFiles], Numbers]:
        return lambda run: run.numbers(name)

    figures = [
        _lines("Loss against tokens", runs, _tokens, tokens, _LOSSES, "nats per token"),
        _lines("Loss against time", runs, clock.of, clock.unit, _LOSSES, "nats per token"),
        _lines("Loss against bytes sent", runs, _sent, "bytes sent by a replica", _LOSSES,
               "nats per token"),
        _lines("Held-out bits per byte", runs, _tokens, tokens,
               [("", of("eval_bits_per_byte"), "lines+markers")], "bits per byte"),
        _lines("Learning rate", runs, _steps, steps, [("", of("learning_rate"), "lines")], ""),
        _lines("Gradient norm", runs, _steps, steps, [("", of("grad_norm"), "lines")],
               "before clipping", log=True),
        _lines("Tokens per second", runs, _steps, steps, [("", of("tokens_per_second"), "lines")],
               "", zero=True),
        _lines("Exchange of a step", runs, _steps, steps,
               [(" sent", of("bytes_sent"), "lines"), (" received", of("bytes_received"), "lines"),
                (" dense gradients", of("dense_bytes"), "lines"),
                (" batch", of("batch_bytes"), "lines")],
               "bytes", log=True),
        _lines("Memory of rank 0", runs, _steps, steps,
               [(" process", _within("memory", "process"), "lines"),
                (" GPU peak", _within("memory", "cuda_peak_allocated"), "lines")],
               "bytes", zero=True),
        _lines("Replicas", runs, _steps, steps, [("", of("members"), "lines")], "", zero=True),
    ]  # fmt: skip
    return [*figures, *(_phases(run, len(runs) > 1) for run in runs), _happened(runs, clock)]


def _within(outer: str, name: str) -> Callable[[RunFiles], Numbers]:
    def values(run: RunFiles) -> Numbers:
        tables = (line.get(outer) for line in run.lines)
        return [number(t.get(name)) if isinstance(t, dict) else None for t in tables]

    return values


_LOSSES: list[tuple[str, Callable[[RunFiles], Numbers], str]] = [
    ("", lambda run: run.numbers("loss"), "lines"),
    (" held out", lambda run: run.numbers("eval_loss"), "lines+markers"),
]


def _steps(run: RunFiles) -> Numbers:
    return run.numbers("step")


def _tokens(run: RunFiles) -> Numbers:
    return run.numbers("num_tokens")


@dataclass(frozen=True)
class _Clock:
    """Time since a run began, in what suits the longest of them."""

    unit: str
    seconds: float

    @staticmethod
    def for_runs(runs: Sequence[RunFiles]) -> _Clock:
        longest = max((run.times[-1] for run in runs if run.times), default=0.0)
        if longest < 300:
            return _Clock("seconds", 1.0)
        return _Clock("minutes", 60.0) if longest < 10_800 else _Clock("hours", 3600.0)

    def of(self, run: RunFiles) -> Numbers:
        """Of a run's lines."""
        return [seconds / self.seconds for seconds in run.times]

    def when(self, run: RunFiles, event: Event) -> float | None:
        """Of an event; None where nobody knows."""
        if event.time is not None and run.began is not None:
            return (event.time - run.began) / self.seconds
        if event.step is None:
            return None
        for line, seconds in zip(run.lines, run.times, strict=True):
            if line["step"] == event.step:
                return seconds / self.seconds
        return None


def _sent(run: RunFiles) -> Numbers:
    known = (value or 0.0 for value in run.numbers("bytes_sent"))
    sums: list[float | None] = [total or None for total in accumulate(known)]
    return sums  # nothing is sent in the first steps


def _lines(
    title: str,
    runs: Sequence[RunFiles],
    x: Callable[[RunFiles], Numbers],
    x_title: str,
    series: Sequence[tuple[str, Callable[[RunFiles], Numbers], str]],
    y_title: str,
    *,
    log: bool = False,
    zero: bool = False,
) -> Figure | None:
    """A figure of lines, one for each run and series; None where there is nothing to show."""
    traces: list[Figure] = []
    for at, run in enumerate(runs):
        across = x(run)
        for which, (suffix, values, mode) in enumerate(series):
            up = values(run)
            if "markers" in mode:  # values of some steps only: no gaps between them
                pairs = [(a, b) for a, b in zip(across, up, strict=True) if None not in (a, b)]
            else:
                pairs = thinned(across, up)
            if log:
                pairs = [(a, b if b is None or b > 0 else None) for a, b in pairs]
            if not any(b is not None for _, b in pairs):
                continue
            traces.append(
                {
                    "type": "scatter", "mode": mode, "name": _safe(run.name + suffix),
                    "x": [a for a, _ in pairs], "y": [b for _, b in pairs],
                    "line": {"color": _COLOURS[at % len(_COLOURS)], "width": 1.5,
                             "dash": ("solid", "dot", "dash", "dashdot")[which % 4]},
                    "marker": {"size": 6}, "connectgaps": False,
                }
            )  # fmt: skip
    if not traces:
        return None
    y = {"title": {"text": y_title}, "type": "log" if log else "linear",
         "exponentformat": "SI"}  # fmt: skip
    if zero:
        y["rangemode"] = "tozero"
    layout = {"xaxis": {"title": {"text": x_title}, "exponentformat": "SI"}, "yaxis": y}
    return _figure(title, traces, layout)


def thinned(x: Numbers, y: Numbers) -> list[tuple[float | None, float | None]]:
    """Points of a line: of a long one the ends, and of each stretch its extremes and its gaps.

    Nothing is averaged away: the smallest and the largest value of each stretch are drawn, and a
    value that is not there leaves a gap.
    """
    pairs: list[tuple[float | None, float | None]] = [
        (a, b) for a, b in zip(x, y, strict=True) if a is not None
    ]
    if len(pairs) <= 2 * _STRETCHES:
        return pairs
    size = math.ceil(len(pairs) / _STRETCHES)
    kept = {0, len(pairs) - 1}
    for start in range(0, len(pairs), size):
        known = []
        gap = None
        for place in range(start, min(start + size, len(pairs))):
            value = pairs[place][1]
            if value is None:
                gap = place
            else:
                known.append((value, place))
        if known:
            kept |= {min(known)[1], max(known)[1]}
        if gap is not None:
            kept.add(gap)
    return [pairs[place] for place in sorted(kept)]


def _phases(run: RunFiles, several: bool) -> Figure | None:
    """Seconds of a step by phase, one upon the other; means over stretches of a long run."""
    tables = [t if isinstance(t := line.get("seconds"), dict) else {} for line in run.lines]
    names = dict.fromkeys(name for table in tables for name in table)
    if not names:
        return None
    size = math.ceil(len(tables) / _AREAS)
    starts = range(0, len(tables), size)
    steps = [run.lines[min(start + size, len(tables)) - 1]["step"] for start in starts]
    traces = []
    for at, name in enumerate(sorted(names)):
        values = [number(table.get(name)) or 0.0 for table in tables]
        parts = [values[start : start + size] for start in starts]
        traces.append(
            {
                "type": "scatter", "mode": "lines", "stackgroup": "one", "name": _safe(name),
                "x": steps, "y": [sum(part) / len(part) for part in parts],
                "line": {"width": 0.5, "color": _COLOURS[at % len(_COLOURS)]},
            }
        )  # fmt: skip
    mean = f", means of {size} steps" if size > 1 else ""
    title = f"Time of a step by phase{mean}" + (f": {run.name}" if several else "")
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "seconds"}}}
    return _figure(title, traces, layout)


def _happened(runs: Sequence[RunFiles], clock: _Clock) -> Figure | None:
    """Faults, restarts and refusals on the time axis."""
    traces = []
    for at, run in enumerate(runs):
        events = _spread([e for e in run.events if clock.when(run, e) is not None], _EVENTS)
        if not events:
            continue
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": _safe(run.name),
                "x": [clock.when(run, e) for e in events],
                "y": [_EVENT_NAMES.get(e.kind, e.kind) for e in events],
                "text": [_safe(_told(e)) for e in events], "hoverinfo": "x+text",
                "marker": {"size": 10, "symbol": "x-thin", "line": {
                    "width": 2, "color": _COLOURS[at % len(_COLOURS)]}},
            }
        )  # fmt: skip
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": clock.unit}},
        "yaxis": {"automargin": True, "type": "category"},
    }
    return _figure("Faults, restarts, refusals", traces, layout)


def _told(event: Event) -> str:
    step = f"step {event.step}: " if event.step is not None else ""
    text = step + event.text
    return text if len(text) <= 160 else text[:159] + "\u2026"


def _safe(text: str) -> str:
    """Plotly takes some HTML in what it shows."""
    return html.escape(text, quote=False)


def _figure(title: str, traces: list[Figure], layout: Figure) -> Figure:
    return {"title": title, "data": traces, "layout": layout}
