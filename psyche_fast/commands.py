"""Commands that start no run: what they say of files, of this machine and of its kernels."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Literal

import click

from psyche_fast.bench.command import bench
from psyche_fast.completion import completion
from psyche_fast.doctor.command import doctor
from psyche_fast.start import probe
from psyche_fast.start.logs import quiet_terminal


@click.command()
@click.argument("file", type=click.Path())
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              help="file to write (default: standard output)")  # fmt: skip
@click.option("--run-id", help="of a run file (default: the configuration's)")
def convert(file: str, output: Path | None, run_id: str | None) -> None:
    """Turn Psyche's run file into our configuration, or ours into Psyche's."""
    from psyche_fast import conversion

    text, notes = conversion.convert(file, run_id)
    for note in notes:
        click.echo(note, err=True)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="folder to write")
@click.option("--tokenizer", help="folder or hub id; left out: one is trained on the inputs")
@click.option("--vocab-size", default=8192, show_default=True, type=click.IntRange(min=257),
              help="of a tokenizer that is trained")  # fmt: skip
@click.option("--token-size", type=click.Choice(["2", "4"]), help="bytes per token; default: fits")
@click.option("--text-key", default="text", show_default=True, help="of jsonl and parquet")
@click.option("--errors", type=click.Choice(["strict", "skip"]), default="strict",
              show_default=True, help="text that is not UTF-8: an error, or left out")  # fmt: skip
@click.option("--glob", "globs", multiple=True, help="which files of a folder, e.g. '*.py'")
@click.option("--pack", type=click.IntRange(min=2), metavar="LENGTH",
              help="pack whole documents into rows of so many tokens, kept apart")  # fmt: skip
def tokenize(
    inputs: tuple[Path, ...],
    output: Path,
    tokenizer: str | None,
    vocab_size: int,
    token_size: str | None,
    text_key: str,
    globs: tuple[str, ...],
    pack: int | None,
    errors: Literal["strict", "skip"],
) -> None:
    """Turn text files, folders, jsonl or Parquet into token files."""
    quiet_terminal()
    from psyche_fast.data import find_files, iter_texts, load_tokenizer, tokenize_files
    from psyche_fast.data import train_tokenizer as learn

    if tokenizer is None:
        files = find_files(inputs, globs or None)
        chosen = learn(iter_texts(files, text_key=text_key, errors=errors), vocab_size)
    else:
        chosen = load_tokenizer(tokenizer)
    summary = tokenize_files(
        inputs,
        chosen,
        output,
        token_size=int(token_size) if token_size else None,
        text_key=text_key,
        globs=globs or None,
        errors=errors,
        pack=pack,
        tokenizer_name=tokenizer,
        progress=sys.stderr.isatty(),
    )
    what = f"{summary.documents:,} documents, {summary.tokens:,} tokens"
    if pack is None:
        what += f" of {summary.token_size} bytes"
    else:
        assert summary.rows is not None
        full = summary.tokens / summary.rows / pack
        what += f" in {summary.rows:,} rows of {pack}, {full:.1%} full, {summary.cut:,} cut"
    click.echo(f"{what} in {len(summary.files)} files -> {output}")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--preset", "presets", multiple=True, metavar="NAME",
              help="20M 125M 350M 1B, slow medium fast: for a model, for a link")  # fmt: skip
@click.option("--data-path", help="a folder of tokenize: its tokenizer is the model's")
@click.option("--seed", default=0, show_default=True, help="of the model's weights")
def init(folder: Path, presets: tuple[str, ...], data_path: str | None, seed: int) -> None:
    """Write a commented configuration, and an untrained model of a preset's size."""
    quiet_terminal()
    from psyche_fast.core.scaffold import init as make

    for line in make(folder, presets, data_path, seed):
        click.echo(line)


@click.command("psyche-path")
def psyche_path() -> None:
    """Print the folder to put first on PYTHONPATH of a core of Psyche's."""
    click.echo(Path(__file__).with_name("psyche") / "on_path")


@click.command()
@click.option("--autotune", is_flag=True, help="measure launch options on this machine's GPU")
@click.option("--kernel", "kernels", multiple=True, metavar="TEXT",
              help="with --autotune: only kernels with this in their name")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="tuning.toml",
              show_default=True, help="with --autotune: file that takes them")  # fmt: skip
@click.option("--device", default="cuda", show_default=True, help="with --autotune: which GPU")
def kernels(autotune: bool, kernels: tuple[str, ...], out: Path, device: str) -> None:
    """Say which kernels run on this machine and why, or tune them for this machine's GPU."""
    if not autotune:
        from psyche_fast.kernels.backends import describe, summary

        for line in describe(summary()):
            click.echo(line)
        return
    from psyche_fast.kernels import autotune as tuner
    from psyche_fast.start.devices import choose_gpu

    chosen = choose_gpu(device)
    table = tuner.autotune(chosen, kernels or None)
    tuner.write(out, tuner.gpu_name(chosen), table)
    click.echo(f"{out}: launch options of {', '.join(table)} for {tuner.gpu_name(chosen)}")
    click.echo(f"use them with PSYCHE_FAST_TUNING={out}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--decode", type=click.Path(path_type=Path), metavar="OUT.safetensors",
              help="write the gradients that the results stand for")  # fmt: skip
@click.option("--model", help="folder or hub id: its parameters' names instead of numbers")
def results(file: Path, decode: Path | None, model: str | None) -> None:
    """Show the DisTrO results in a file of Psyche's, and decode them into gradients."""
    quiet_terminal()
    from psyche_fast.psyche import dump

    found = dump.read_file(file)
    named = dump.named(found, model)
    for line in dump.table(found, named):
        click.echo(line)
    if decode is not None:
        dump.write_gradients(named, decode)
        click.echo(f"{decode}: gradients of {len(named)} parameters")


@click.command()
@click.argument("one", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
def diff(one: Path, other: Path) -> None:
    """Compare two checkpoints, or two runs: the first step and parameter that differ; status 1."""
    from psyche_fast.core.diff import differences

    found = differences(one, other)
    for line in found.lines:
        click.echo(line)
    if found.lines:
        sys.exit(1)
    click.echo(f"the same, to the bit: {found.compared}")


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--save-dtype", type=click.Choice(["bfloat16", "float32"]),
              help="the parameters' type; float32: the masters (default: the run's)")  # fmt: skip
def export(checkpoint: Path, out: Path, save_dtype: str | None) -> None:
    """Make a Hugging Face folder of a checkpoint's state, whatever ranks have written it."""
    quiet_terminal()
    from psyche_fast.core.export import export as make

    step = make(checkpoint, out, save_dtype)
    click.echo(f"{out}: the model of step {step}")


@click.command()
@click.option("--host", default="0.0.0.0", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(1, 65535), default=probe.PORT, show_default=True)
def link(host: str, port: int) -> None:
    """Answer another machine's `estimate --link HOST`, until Ctrl-C: what the link carries."""
    from psyche_fast.start.network import listen

    with listen(host, port) as listener:
        click.echo(f"listening at {host} port {port}; on the other machine: psyche-fast estimate "
                   f"--link {platform.node()}:{port} ...")  # fmt: skip
        probe.serve(listener, click.echo)


COMMANDS = (
    bench, init, convert, tokenize, psyche_path, kernels, results, diff, export, link, doctor,
    completion,
)  # fmt: skip
