"""Writes the reference of commands and of configuration keys: `python -m tools.reference`.

All of it comes from the code: click's commands, and the fields of `psyche_fast.config`.
`--check` says whether what is there is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import click

from psyche_fast.cli import cli
from psyche_fast.config import FLAGS, flag

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"


def commands() -> str:
    """The page of commands; what `train` takes by fields of the configuration is on its own."""
    lines = [
        "# Commands",
        "",
        "`psyche-fast COMMAND --help` says the same. Options that are keys of the configuration are in",
        "[configuration](configuration.md).",
    ]
    context = click.Context(cli, info_name="psyche-fast")
    for name in cli.list_commands(context):
        command = cli.commands[name]
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        usage = " ".join(a.make_metavar(click.Context(command)) for a in arguments)
        lines += ["", f"## psyche-fast {name}", "", command.help or "", ""]
        lines += ["```text", f"psyche-fast {name} [OPTIONS] {usage}".rstrip(), "```", ""]
        options = [p for p in command.params if isinstance(p, click.Option)]
        own = [p for p in options if not _is_key(p)]
        if own:
            lines += ["| option | what | default |", "| --- | --- | --- |"]
            lines += [_row(p) for p in own]
        shared = [p for p in options if _is_key(p)]
        if len(shared) == len(FLAGS):
            lines += ["", "And every key of the [configuration](configuration.md) as a flag."]
        elif shared:
            names = ", ".join(f"`{flag(str(p.name))}`" for p in shared)
            lines += ["", f"And, of the [configuration](configuration.md): {names}."]
    return "\n".join(lines) + "\n"


def configuration() -> str:
    """The page of configuration keys, by section."""
    lines = [
        "# Configuration",
        "",
        "Each key is a flag of `psyche-fast train` (`total_batch` is `--total-batch`) and a key of",
        "`--config FILE.toml`, in the table of its section or without. `psyche-fast init` writes a file",
        "with all of them.",
    ]
    section = None
    for name, known in FLAGS.items():
        if known.section != section:
            section = known.section
            lines += ["", f"## {section}", "", "| key | type | default | what |"]
            lines += ["| --- | --- | --- | --- |"]
        default = "" if known.default is None else f"`{_value(known.default)}`"
        lines.append(f"| `{name}` | {_kind(known.kind)} | {default} | {_cell(known.help)} |")
    return "\n".join(lines) + "\n"


def _is_key(option: click.Option) -> bool:
    """Whether an option is a key of the configuration, and not one of the same name."""
    known = FLAGS.get(str(option.name))
    return known is not None and option.help == known.help


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{n}`" for n in (*option.opts, *option.secondary_opts))
    default = option.default
    shown = default is not None and isinstance(default, str | int | float) and option.show_default
    value = f"`{_value(default)}`" if shown and not option.is_flag else ""
    return f"| {names} | {_cell(option.help or '')} | {value} |"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _kind(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "list"
    words = get_args(kind)
    if words:
        return ", ".join(f"`{word}`" for word in words)
    return {"str": "text", "int": "number", "float": "number", "bool": "true or false"}[
        kind.__name__
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PAGES = {"commands.md": commands, "configuration.md": configuration}


def main(check: bool) -> int:
    """Writes the pages, or says which are not up to date."""
    old = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        old.append(name)
        if not check:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and old:
        print(f"docs/reference: {', '.join(old)} not up to date: python -m tools.reference")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] == ["--check"]))
