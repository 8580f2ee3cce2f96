"""Draws what `bench_kernels.py` or `gpu_suite.py` has measured.

python benchmarks/plot.py results.json --out folder

kernels.png: bytes per second of every kernel and implementation against a large copy. steps.png:
optimiser steps against AdamW. train.png: a whole train step and its memory. sweeps.png: launch
options. Pictures of what the file does not have are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLORS = {
    "triton": "#2a6fb0", "interpret": "#2a6fb0", "torch": "#8fb8de", "plain": "#c9c9c9",
}  # fmt: skip
OURS, OTHERS = "#2a6fb0", "#9a9a9a"

Records = list[dict[str, Any]]


def _title(environment: dict[str, Any]) -> str:
    where = environment.get("gpu") or environment.get("cpu")
    return f"{where}, torch {environment.get('torch')}, triton {environment.get('triton')}"


def kernels(records: Records, copy_gb_per_s: float, title: str, path: Path) -> None:
    """GB/s per case and implementation; the dashed line is the copy."""
    records = [r for r in records if "ms" in r]
    names = list(dict.fromkeys(f"{r['kernel']} {r['variant']}" for r in records))
    kinds = list(dict.fromkeys(r["implementation"] for r in records))
    height = 0.8 / len(kinds)
    _, axes = plt.subplots(figsize=(9, 0.36 * len(names) + 1.6), layout="constrained")
    for number, kind in enumerate(kinds):
        own = [r for r in records if r["implementation"] == kind]
        at = [names.index(f"{r['kernel']} {r['variant']}") + number * height for r in own]
        speeds = [r["gb_per_s"] for r in own]
        axes.barh(at, speeds, height, label=kind, color=COLORS[kind], align="edge")
        if number == 0:
            for y, r in zip(at, own, strict=True):
                text = f" {100 * r['copy_fraction']:.0f} %"
                axes.text(r["gb_per_s"], y + height / 2, text, va="center", fontsize=7)
    axes.axvline(copy_gb_per_s, color="black", linestyle="--", linewidth=1)
    axes.text(copy_gb_per_s, -0.3, "copy ", ha="right", va="bottom", fontsize=8)
    axes.set_yticks([i + 0.4 for i in range(len(names))], names, fontsize=8)
    axes.set_ylim(len(names), -0.8)
    axes.set_xlabel("GB/s of the bytes that have to be moved")
    axes.set_title(f"{records[0]['elements'] / 1e6:,.1f} M elements; {title}", fontsize=9)
    axes.legend(fontsize=8)
    _save(path)


def steps(records: Records, title: str, path: Path) -> None:
    """Milliseconds per optimiser step, on a logarithmic axis, with the ratio to AdamW."""
    rows = [(r["name"], r) for r in records if "ms" in r]
    adamw = {name: r["ms"]["p50"] for name, r in rows if name.startswith("AdamW")}
    _, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.6), layout="constrained")
    for y, (name, r) in enumerate(rows):
        ours = name.startswith(("DeMo", "Distro"))
        low, p50, high = (r["ms"][p] for p in ("p20", "p50", "p80"))
        error = [[p50 - low], [high - p50]]
        axes.barh(y, p50, 0.7, xerr=error, color=OURS if ours else OTHERS, ecolor="black")
        ratios = ", ".join(f"{p50 / ms:.2f}" for ms in adamw.values())
        axes.text(high, y, f"  {p50:.3g} ms ({ratios})", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.3)  # room for the text
    ratios = f" (ratios to {'; '.join(adamw)})" if adamw else ""
    axes.set_xlabel(f"ms per step, p50, p20 to p80{ratios}")
    axes.set_title(f"{records[0]['set']} parameters; {title}", fontsize=9)
    _save(path)


def train(report: dict[str, Any], title: str, path: Path) -> None:
    """A whole train step and its peak memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = list(report["step_ms"])
    update = [report["optimizer_ms"][n]["p50"] for n in names]
    whole = [report["step_ms"][n]["p50"] for n in names]
    model = [a - b for a, b in zip(whole, update, strict=True)]
    left.bar(names, model, color=OTHERS, label="forward and backward")
    left.bar(names, update, bottom=model, color=OURS, label="clip and optimiser")
    for x, ms in enumerate(whole):
        left.text(x, ms, f"{ms:.1f}", ha="center", va="bottom", fontsize=8)
    left.set_ylabel("ms per train step (p50)")
    left.legend(fontsize=7, loc="lower right")
    ratio = report["ratio"]["p50"]
    left.set_title(f"DisTrO / AdamW {ratio:.3f}", fontsize=9)
    peaks = report["peak_gb"]
    if peaks:
        right.bar(list(peaks), list(peaks.values()), color=OTHERS)
    right.set_ylabel("GB at the peak")
    right.set_title("memory" if peaks else "memory: not measured on a CPU", fontsize=9)
    size = f"{report['parameters'] / 1e6:,.0f} M parameters, {report['rows']} x {report['length']}"
    figure.suptitle(f"{size} tokens; {title}", fontsize=9)
    _save(path)


def sweeps(records: Records, title: str, path: Path) -> None:
    """GB/s of every setting, one panel per question; the usual one is dark."""
    panels: dict[tuple[str, str], Records] = {}
    for r in records:
        if "ms" in r:
            panels.setdefault((r["sweep"], r["kernel"]), []).append(r)
    columns = 3
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(15, 2.6 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, ((name, kernel), own) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, own)
        axes.set_title(f"{kernel}: {name}", fontsize=9)
    figure.suptitle(f"GB/s; {title}", fontsize=9)
    _save(path)


def _panel(axes: Axes, records: Records) -> None:
    several = len({r["case"] for r in records}) > 1
    labels = []
    for r in records:
        options = ", ".join(f"{k}={v!r}" for k, v in r["options"].items())
        labels.append(f"{r['case']} {options}" if several or not options else options)
    speeds = [r["gb_per_s"] for r in records]
    colors = [OURS if r["default"] else OTHERS for r in records]
    axes.barh(range(len(records)), speeds, color=colors)
    axes.set_yticks(range(len(records)), labels, fontsize=6)
    axes.invert_yaxis()


def _save(path: Path) -> None:
    plt.savefig(path, dpi=130)
    plt.close()


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all that a report has.

    Args:
        report: as `bench_kernels.py` or `gpu_suite.py` writes it.
        folder: where pictures go.

    Returns:
        The pictures' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = report.get("sections")
    if sections is None:
        sections = {
            "environment": {"environment": report["environment"]},
            "kernels": {k: report[k] for k in ("copy_gb_per_s", "records")},
            "steps": {"records": report["steps"]},
        }
    title = _title(sections.get("environment", {}).get("environment", {}))
    drawn = []

    def picture(name: str, timed: bool) -> Path | None:
        if not timed:
            return None
        drawn.append(folder / f"{name}.png")
        return drawn[-1]

    found = {name: sections.get(name, {}).get("records", []) for name in sections}
    timed = {name: any("ms" in r for r in records) for name, records in found.items()}
    if path := picture("kernels", timed.get("kernels", False)):
        kernels(found["kernels"], sections["kernels"]["copy_gb_per_s"], title, path)
    if path := picture("steps", timed.get("steps", False)):
        steps(found["steps"], title, path)
    if path := picture("train", "ratio" in sections.get("train", {})):
        train(sections["train"], title, path)
    if path := picture("sweeps", timed.get("sweeps", False)):
        sweeps(found["sweeps"], title, path)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures")
    arguments = parser.parse_args()
    drawn = draw(json.loads(arguments.report.read_text(encoding="utf-8")), arguments.out)
    if not drawn:
        sys.exit(f"{arguments.report} holds nothing that has been timed")
    print("\n".join(map(str, drawn)))


if __name__ == "__main__":
    main()
