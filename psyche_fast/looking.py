"""Commands that look at runs: a page about them, live or as a file; text of what they learnt."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from psyche_fast.start.logs import quiet_terminal

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


@click.command()
@click.argument("model", metavar="RUN|MODEL")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT",
              help="may be given several times (default: the lines of standard input)")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True,
              help="0 takes the likeliest token each time")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--tokenizer", help="folder or hub id (default: the model's own)")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N")
def generate(
    model: str,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokenizer: str | None,
    device: str,
) -> None:
    """Continue prompts with a run's newest checkpoint, a checkpoint, or any model."""
    quiet_terminal()
    if not prompts:
        prompts = tuple(filter(None, sys.stdin.read().splitlines()))
    if not prompts or "" in prompts:
        raise ValueError("wanted --prompt TEXT, or a prompt a line on standard input")
    from psyche_fast.core import generate as texts
    from psyche_fast.start.devices import choose_devices

    found = texts.find_model(model)
    if found != model:
        click.echo(f"checkpoint  {found}", err=True)
    chosen = choose_devices(device, 1).devices[0]
    told = texts.continued(
        found, prompts, tokenizer=tokenizer, tokens=max_new_tokens, temperature=temperature,
        seed=seed, device=str(chosen),
    )  # fmt: skip
    for prompt, text in zip(prompts, told, strict=True):
        if len(prompts) > 1:
            click.echo(f"--- {prompt!r} ---")
        click.echo(text)


COMMANDS = (report, watch, generate)
