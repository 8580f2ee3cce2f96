"""A report as a file, in pytest-benchmark's format, and two reports beside each other.

`pytest-benchmark compare A.json B.json` reads such files too. What is slower is said by a rule of
our own, since a file's commit and another's rarely saw the same machine: see `Comparison`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_fast import __version__
from psyche_fast.bench.measure import write_json
from psyche_fast.bench.suite import Found, Report


@dataclass(frozen=True)
class Comparison:
    """One case, then and now.

    It is slower by more than the noise where even its fastest call now takes longer than its usual
    one did, faster where it is the other way round. The machine's own change is taken out first:
    a case is slower, or faster, by what is beyond `Machine`.

    Attributes:
        name: the case's.
        then: its usual (median) milliseconds in the other report.
        now: in this one.
        change: how much longer it takes, as a share; 0 where that is within what the machine has
            changed by.
        verdict: "slower", "faster", or "" where the difference is within the noise.
    """

    name: str
    then: float
    now: float
    change: float
    verdict: str


@dataclass(frozen=True)
class Machine:
    """How many times longer now takes what is not ours, a copy and a product of torch's own.

    Attributes:
        least: the one of the two that has changed for the better, or less for the worse.
        most: the other one.
    """

    least: float
    most: float

    @staticmethod
    def between(then: Report, now: Report) -> Machine:
        """Of two reports."""
        times = [then.yardsticks[name] / speed for name, speed in now.yardsticks.items()]
        return Machine(min(times), max(times))


def compare(then: Report, now: Report) -> list[Comparison]:
    """The cases that both reports have, in the order of `now`."""
    machine = Machine.between(then, now)
    others = {f.full_name: f for f in then.found}
    compared = []
    for found in now.found:
        other = others.get(found.full_name)
        if other is None:
            continue
        usual, before = statistics.median(found.times), statistics.median(other.times)
        expected = min(max(usual, before * machine.least), before * machine.most)
        verdict = ""
        if min(found.times) > before * machine.most:
            verdict = "slower"
        elif min(other.times) * machine.least > usual:
            verdict = "faster"
        change = usual / expected - 1
        compared.append(Comparison(found.full_name, before, usual, change, verdict))
    return compared


def merged(reports: Iterable[Report]) -> Report:
    """Several rounds as one report: all times, and the best of the yardsticks."""
    first, *others = reports
    found = {f.full_name: f for f in first.found}
    best = dict(first.yardsticks)
    for report in others:
        for name, speed in report.yardsticks.items():
            best[name] = max(speed, best.get(name, 0.0))
        for one in report.found:
            if one.full_name in found:
                found[one.full_name].times.extend(one.times)
            else:
                found[one.full_name] = one
    return Report(first.environment, best, list(found.values()))


def write(path: Path, report: Report, layers: str) -> None:
    """Writes a report.

    Args:
        path: the file; its folder is made.
        report: what was found.
        layers: that it was found on.
    """
    commit = str(report.environment["commit"] or "unversioned")
    write_json(
        path,
        {
            "machine_info": report.environment | {"layers": layers} | report.yardsticks,
            "commit_info": {"id": commit.removesuffix("-dirty"), "dirty": "-dirty" in commit},
            "benchmarks": [_benchmark(found) for found in report.found],
            "datetime": report.environment["date"],
            "version": __version__,
        },
    )


def _benchmark(found: Found) -> dict[str, Any]:
    seconds = sorted(ms / 1e3 for ms in found.times)
    low, median, high = quartiles(seconds)
    mean = statistics.fmean(seconds)
    return {
        "group": found.group,
        "name": found.name,
        "fullname": found.full_name,
        "params": None,
        "param": None,
        "extra_info": found.about | {"floor_ms": found.floor_ms},
        "options": {},
        "stats": {
            "min": seconds[0],
            "max": seconds[-1],
            "mean": mean,
            "stddev": statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
            "rounds": len(seconds),
            "median": median,
            "iqr": high - low,
            "q1": low,
            "q3": high,
            "iqr_outliers": 0,
            "stddev_outliers": 0,
            "outliers": "0;0",
            "ld15iqr": low,
            "hd15iqr": high,
            "ops": 1 / mean,
            "total": sum(seconds),
            "data": seconds,
            "iterations": 1,
        },
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def read(path: Path, layers: str) -> Report:
    """Reads what `write` wrote.

    Args:
        path: the file.
        layers: that it has to be of.

    Raises:
        ValueError: it is another file, or was measured on other layers.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        machine = data["machine_info"]
        yardsticks = {name: float(machine[name]) for name in _YARDSTICKS}
        of = machine["layers"]
        found = [
            Found(
                b["group"],
                b["name"],
                [1e3 * float(s) for s in b["stats"]["data"]],
                float(b["extra_info"]["floor_ms"]),
                b["extra_info"],
            )
            for b in data["benchmarks"]
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--compare {path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--compare {path}: wanted a file that `psyche-fast bench --out` wrote; {error!r}"
        ) from error
    if of != layers:
        raise ValueError(f"--compare {path} was measured on --layers {of}, this is {layers}")
    return Report(machine, yardsticks, [f for f in found if f.times])


_YARDSTICKS = ("copy_gb_per_s", "product_gflop_per_s")
