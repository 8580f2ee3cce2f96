"""Completion: what a shell is offered comes from the parser, so that it has every flag."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from psyche_fast.cli import cli
from psyche_fast.completion import SHELLS
from psyche_fast.config import FLAGS, flag


def offered(*words: str) -> list[tuple[str, str]]:
    """Kinds and values that are offered after these words, the last of which has been begun."""
    complete = BashComplete(cli, {}, "psyche-fast", "_PSYCHE_FAST_COMPLETE")
    return [(one.type, one.value) for one in complete.get_completions([*words[:-1]], words[-1])]


def values(*words: str) -> set[str]:
    return {value for _, value in offered(*words)}


def test_all_commands_and_all_flags_are_offered() -> None:
    assert values("") == set(cli.commands)
    assert values("d") == {name for name in cli.commands if name.startswith("d")}
    assert values("train", "--") >= {flag(name) for name in FLAGS}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "--loss", ""), {"auto", "plain", "chunked"}),
        (("train", "--loss", "c"), {"chunked"}),
        (("train", "--no-disti"), set()),
        (("train", "--no-distro-"), {"--no-distro-quantization"}),
        (("completion", ""), set(SHELLS)),
    ],
)
def test_what_is_offered_after_words(words: tuple[str, ...], expected: set[str]) -> None:
    assert values(*words) == expected


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("train", "--model", "my"), "dir"),
        (("train", "--data-path", "my"), "file"),
        (("train", "--config", "my"), "file"),
        (("train", "--secret-file", ""), "file"),
        (("tokenize", "my"), "file"),
        (("diff", "runs/"), "dir"),
    ],
)
def test_files_and_folders_are_left_to_the_shell(words: tuple[str, ...], kind: str) -> None:
    assert offered(*words) == [(kind, words[-1])]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_read_its_script(shell: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert "_PSYCHE_FAST_COMPLETE" in done.output
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "script").write_text(done.output)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_bash_completes_a_flag(tmp_path: Path) -> None:
    program = tmp_path / "psyche-fast"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m psyche_fast "$@"\n')
    program.chmod(0o755)
    script = CliRunner().invoke(cli, ["completion", "bash"]).output
    words = "COMP_WORDS=(psyche-fast train --compression-t) COMP_CWORD=2"
    call = f'{words}; _psyche_fast_completion psyche-fast; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{call}"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "--compression-topk"
