"""Completion of the command line in a shell: from the parser itself, which the shell asks."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
# Flags of `train` and its like that name what is on this machine, and as what a shell completes it.
_PLACES = {
    "model": "dir", "output": "dir", "save_path": "dir", "resume": "dir", "fork": "dir",
    "data_cache": "dir", "data_path": "file", "secret_file": "file", "tls_key": "file",
    "tls_cert": "file", "tls_ca": "file",
}  # fmt: skip


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what completes this command: eval "$(psyche-fast completion bash)" in ~/.bashrc."""
    group = context.find_root()
    chosen = get_completion_class(shell)
    assert chosen is not None, shell
    # The variable is the one that click looks for under this name.
    script = chosen(group.command, {}, "psyche-fast", "_PSYCHE_FAST_COMPLETE")
    click.echo(script.source())


def places(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Has the shell complete files or folders, for flags that name some."""
    kind = _PLACES.get(parameter.name or "")
    return [] if kind is None else [CompletionItem(incomplete, type=kind)]
