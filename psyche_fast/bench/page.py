"""The table of `psyche-fast bench` as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from pathlib import Path

from psyche_fast.bench.results import Comparison, quartiles
from psyche_fast.bench.suite import Report

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem;
  color-scheme: light dark; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
meter { width: 6rem; }
.slower { background: #e6000033; }
.faster { background: #00a65a33; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; overflow-wrap: anywhere; }
"""


def write_page(
    path: Path, report: Report, layers: str, then: Report | None, compared: list[Comparison]
) -> None:
    """Writes the page.

    Args:
        path: the file; its folder is made.
        report: what was found.
        layers: that it was found on.
        then: what it is compared with, if anything.
        compared: case by case.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = {c.name: c for c in compared}
    columns = ["case", "p50 ms", "p25", "p75", "floor ms", "of the floor"]
    columns += ["then ms", "change"] if compared else []
    rows = []
    for found in report.found:
        low, median, high = quartiles(sorted(found.times))
        share = found.floor_ms / (found.about.get("device_ms") or median)
        cells = [html.escape(found.full_name), *(f"{v:.3f}" for v in (median, low, high))]
        cells += [
            f"{found.floor_ms:.3f}",
            f'<meter value="{min(share, 1):.4f}"></meter> {share:.1%}',
        ]
        c = beside.get(found.full_name)
        if compared:
            cells += ["", ""] if c is None else [f"{c.then:.3f}", f"{c.change:+.0%} {c.verdict}"]
        name = f' class="{c.verdict}"' if c is not None and c.verdict else ""
        rows.append(f"<tr{name}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    facts = {"layers": layers, **report.environment, **report.yardsticks}
    if then is not None:
        facts["compared with commit"] = then.environment.get("commit")
        facts["of"] = then.environment.get("date")
    described = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>"
        for k, v in facts.items()
        if v is not None
    )
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>psyche-fast bench</title><style>{_STYLE}</style></head><body>"
        "<h1>psyche-fast bench</h1><p>The floor is the least that a case can take: its bytes at "
        "the speed of a copy, of the link (exchange), or its FLOPs at the speed of a product "
        '(training).</p><div class="wide"><table><thead><tr>'
        + "".join(f"<th>{name}</th>" for name in columns)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div><h2>Where</h2>"
        f"<dl>{described}</dl></body></html>\n",
        encoding="utf-8",
    )
