"""Commands that look at runs: a page about them, live or as a file."""

from __future__ import annotations

from pathlib import Path

import click

_RUNS = click.argument(
    "runs", nargs=-1, required=True, metavar="RUN [RUN ...]", type=click.Path(path_type=Path)
)


@click.command()
@_RUNS
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              help="file to write (default: report.html of the first run)")  # fmt: skip
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Write a page about runs: one HTML file that works offline, and on a phone."""
    from psyche_fast.metrics.formatting import format_bytes
    from psyche_fast.metrics.report import write

    path = write(runs, output)
    click.echo(f"page        {path} ({format_bytes(path.stat().st_size)})")


@click.command()
@_RUNS
@click.option("--port", type=click.IntRange(0, 65535), default=8321, show_default=True,
              help="on 127.0.0.1; 0 = a free one")  # fmt: skip
@click.option("--refresh", type=click.FloatRange(min=0.5), default=5.0, show_default=True,
              help="seconds from look to look")  # fmt: skip
def watch(runs: tuple[Path, ...], port: int, refresh: float) -> None:
    """Serve the page about runs on this machine, up to date while they go on."""
    from psyche_fast.metrics.live import PageServer

    with PageServer(runs, port, refresh) as server:
        click.echo(f"page        {server.url} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("ended", err=True)


COMMANDS = (report, watch)
