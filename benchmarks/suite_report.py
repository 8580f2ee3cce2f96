"""The report of `gpu_suite.py`: how it is written, and the short table at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 8
"""Faults of a section in the table."""


def write(path: Path, report: dict[str, Any]) -> None:
    """Write whole or not at all: a kill in between leaves the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def table(report: dict[str, Any]) -> str:
    """What was measured beside what the project aims at on an H200."""
    sections = report["sections"]
    lines = [f"{name:>12}  {_status(section)}" for name, section in sections.items()]
    lines += _faults(sections)
    lines.append("")
    lines += [f"{what:<58} {got:>14}  {aim}" for what, got, aim in _figures(sections)]
    if report["tiny"]:
        lines.append("\na dry run through the interpreter: its times mean nothing")
    return "\n".join(lines)


def _faults(sections: dict[str, Any]) -> Iterator[str]:
    """Cases that have failed or are wrong, the first of each section."""
    for name, section in sections.items():
        bad = [f"{r['name']}: {r['fault']}" for r in section.get("records", []) if "fault" in r]
        bad += [
            f"{r['name']}: WRONG {r['check']}"
            for r in section.get("records", [])
            if "check" in r and not r["check"]["ok"]
        ]
        bad += section.get("faults", []) + section.get("failed", [])
        for text in bad[:SHOWN]:
            yield f"{name:>12}  {text.splitlines()[0][:200]}"
        if len(bad) > SHOWN:
            yield f"{name:>12}  and {len(bad) - SHOWN} more"


def _status(section: dict[str, Any]) -> str:
    text = str(section["status"])
    if "seconds" in section:
        text += f", {section['seconds']:.0f} s"
    if "outcomes" in section:
        text += ", " + ", ".join(f"{n} {outcome}" for outcome, n in section["outcomes"].items())
        text += f" of {section['tests']}"
    for key in ("reason", "error"):
        if key in section:
            text += f": {str(section[key]).strip().splitlines()[-1]}"
    faults = sum("fault" in r for r in section.get("records", []))
    if faults:
        text += f", {faults} faults"
    if "left_out" in section:
        text += f", {len(section['left_out'])} left out for time"
    return text


def _figures(sections: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "figure", "measured", "aim (H200)"
    if "copy_gb_per_s" in sections["environment"]:
        yield "large copy", f"{sections['environment']['copy_gb_per_s']:.0f} GB/s", ""
    for record in sections["kernels"].get("records", []):
        if record.get("implementation") in ("triton", "interpret") and "ms" in record:
            name = f"{record['kernel']} {record['variant']}"
            aim = record["target_us_per_million"]
            text = f"{aim} us/M; " if aim else ""
            text += f"{100 * record['copy_fraction']:.0f} % of the copy"
            yield name, f"{record['us_per_million']:.2f} us/M", text
    yield from _steps(sections)
    train = sections["train"]
    if "ratio" in train:
        yield "train step, DisTrO / AdamW", f"{train['ratio']['p50']:.3f}", "<= 1.02"
        for name, gb in train["peak_gb"].items():
            yield f"train step, peak memory with {name}", f"{gb:.1f} GB", ""
    for name, (before, after) in _tuned(sections["autotune"].get("trials", [])).items():
        yield f"autotune, {name}", f"{before:.3f} ms", f"{after:.3f} ms with the best options"


def _steps(sections: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    steps = {r["name"]: r for r in sections["steps"].get("records", []) if "ms" in r}
    for name, record in steps.items():
        yield f"step: {name}", f"{record['ms']['p50']:.3f} ms", f"floor {record['floor_ms']:.3f}"
    ours = "Distro k=8"
    pairs = (
        (ours, "AdamW fused, fp32", "<= 1"),
        (ours, "AdamW fused, bf16", "<= 1.3"),
        ("plain DeMo k=8", "DeMo k=8", ">= 25"),
        ("plain DeMo k=32", "DeMo k=32", ">= 25"),
    )
    for top, bottom, aim in pairs:
        if top in steps and bottom in steps:
            ratio = steps[top]["ms"]["p50"] / steps[bottom]["ms"]["p50"]
            yield f"{top} / {bottom}", f"{ratio:.2f}", aim


def _tuned(trials: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Per kernel the untuned and the best time."""
    best: dict[str, tuple[float, float]] = {}
    for trial in trials:
        if trial["milliseconds"] is None or trial["fault"]:
            continue
        first, least = best.get(trial["kernel"], (trial["milliseconds"],) * 2)
        best[trial["kernel"]] = first, min(least, trial["milliseconds"])
    return best
