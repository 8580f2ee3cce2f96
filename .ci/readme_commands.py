"""Runs the commands of README.md and of pages of docs/: what people type is known to work.

    .venv/bin/python .ci/readme_commands.py [--list] [--readme FILE ...] [--timeout 300]

Every fenced ```bash block needs a marker on the last line before it that is not blank:

    <!-- ci: run -->            the block is run
    <!-- ci: skip REASON -->    it is not, and the reason is printed

The blocks run in the order of the files, each in a bash of its own that stops at the first error,
with the virtual environment's commands on PATH and no standard input. All of them run in one
temporary copy of the repository: what a block writes the next ones find, and nothing is left
behind.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PAGES = ("README.md", "docs/running.md", "docs/psyche.md", "docs/python.md", "docs/performance.md")
_FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")
_MARKER = re.compile(r"^\s*<!--\s*ci:\s*(?P<text>.*?)\s*-->\s*$")
_SHELLS = {"sh", "shell", "console", "shell-session", "zsh"}
_NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis", ".benchmarks"
)


@dataclass(frozen=True)
class Block:
    """One bash block: its first line's number in the file, its text, and why it is not run."""

    line: int
    script: str
    skip_reason: str | None


def parse(text: str) -> list[Block]:
    """Finds the bash blocks of a Markdown text.

    Raises:
        ValueError: A block has no marker or an unknown one, a marker has no block, a shell block is
            called something other than bash, or a fence is not closed.
    """
    blocks: list[Block] = []
    marker: tuple[int, str] | None = None
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line, number = lines[at], at + 1
        at += 1
        fence = _FENCE.match(line)
        if fence is None:
            found = _MARKER.match(line)
            if marker is not None and line.strip():
                raise ValueError(f"line {marker[0]}: marker without a bash block after it")
            if found is not None:
                marker = (number, found["text"])
            continue
        body: list[str] = []
        closing = re.compile(rf"^\s*{re.escape(fence['fence'][0])}{{{len(fence['fence'])},}}\s*$")
        while at < len(lines) and not closing.match(lines[at]):
            body.append(lines[at])
            at += 1
        if at == len(lines):
            raise ValueError(f"line {number}: this fence is not closed")
        at += 1
        language = fence["language"].lower()
        if language in _SHELLS:
            raise ValueError(f"line {number}: call a shell block bash, not {language}")
        if language != "bash":
            if marker is not None:
                raise ValueError(f"line {marker[0]}: marker without a bash block after it")
            continue
        if marker is None:
            raise ValueError(
                f"line {number}: a bash block needs <!-- ci: run --> or <!-- ci: skip REASON --> "
                "before it"
            )
        verb, _, reason = marker[1].partition(" ")
        if (verb, reason) != ("run", "") and not (verb == "skip" and reason):
            raise ValueError(f"line {marker[0]}: wanted run or skip REASON, got {marker[1]!r}")
        script = textwrap.dedent("\n".join(body)) + "\n"
        blocks.append(Block(number + 1, script, reason or None))
        marker = None
    if marker is not None:
        raise ValueError(f"line {marker[0]}: marker without a bash block after it")
    return blocks


def run(block: Block, folder: Path, timeout: float) -> int:
    """Runs one block in a folder and returns its exit status, 124 if it took too long."""
    environment = dict(os.environ, CI="true")
    environment["PATH"] = f"{_ROOT / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    # A session of its own: a block that hangs is ended with everything it started.
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-x", "-c", block.script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def _copy_repository(target: Path) -> None:
    """Copies the working tree; .venv is shared by a link, and file times are kept for make."""
    shutil.copytree(_ROOT, target, ignore=_NOT_COPIED)
    if (_ROOT / ".venv").exists():
        (target / ".venv").symlink_to(_ROOT / ".venv")


def main(arguments: list[str] | None = None) -> int:
    """Runs or lists the blocks; returns the process's exit status."""
    parser = argparse.ArgumentParser(description="Runs the commands of README.md and docs/.")
    pages = [_ROOT / page for page in _PAGES]
    parser.add_argument("--readme", type=Path, nargs="+", default=pages, help="files, in order")
    parser.add_argument("--list", action="store_true", help="print the blocks, run nothing")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one block")
    options = parser.parse_args(arguments)
    blocks: list[tuple[str, Block]] = []
    for page in options.readme:
        try:
            found = parse(page.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"{page.name}: {error}", file=sys.stderr)
            return 2
        blocks += [(page.name, block) for block in found]
    if not any(block.skip_reason is None for _, block in blocks):
        print(f"{options.readme[0].name}: no bash block to run", file=sys.stderr)
        return 2
    if options.list:
        for name, block in blocks:
            verdict = f"skip ({block.skip_reason})" if block.skip_reason else "run"
            print(f"{name}, line {block.line}: {verdict}")
            print(textwrap.indent(block.script, "    "), end="")
        return 0
    failed = []
    with tempfile.TemporaryDirectory(prefix="psyche-fast-readme-") as temporary:
        folder = Path(temporary) / "psyche-fast"
        _copy_repository(folder)
        for name, block in blocks:
            where = f"{name}, line {block.line}"
            if block.skip_reason:
                print(f"-- {where}: skipped: {block.skip_reason}", flush=True)
                continue
            print(f"-- {where}", flush=True)
            start = time.monotonic()
            status = run(block, folder, options.timeout)
            print(f"-- {where}: status {status}, {time.monotonic() - start:.1f} s", flush=True)
            if status != 0:
                failed.append(where)
    if failed:
        print(f"failed blocks: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
