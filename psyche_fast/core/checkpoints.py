"""What a run's checkpoints are called, and which of them are kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from psyche_fast.config import Run
from psyche_fast.models.source import FilesSource, weight_files


def checkpoint_name(step: int, run_id: str | None) -> str:
    """The folder of a step's checkpoint: ours, or with a run's id as Psyche calls it."""
    return f"step-{step:06d}" if run_id is None else f"{run_id}-step{step}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name, ours or Psyche's, is of; None of other names."""
    match = re.fullmatch(r"(?:step-|\w[\w.-]*-step)(\d+)", path.name, re.ASCII)
    return None if match is None else int(match[1])


def prune(newest: Path, step: int, run: Run, spared: Collection[Path]) -> list[Path]:
    """Removes a run's older checkpoints but for the last few, and those of every so many steps.

    What is not complete, is a link or is called otherwise is neither counted nor touched, and no
    more are checkpoints of later steps, which an earlier part of the run may have left.

    Args:
        newest: the checkpoint that has just been written, which stays.
        step: its step.
        run: `keep` checkpoints stay, the newest included, or all if it is 0; and those of steps
            that `keep_every` divides, unless it is 0.
        spared: folders that stay in any case, resolved.

    Returns:
        What was removed.

    Raises:
        OSError: one cannot be removed; the older ones are still there.
    """
    run_id = run.run_id
    if not run.keep:
        return []
    pattern = r"step-(\d{6,})" if run_id is None else re.escape(run_id) + r"-step(\d+)"
    older: dict[int, Path] = {}
    for path in newest.parent.iterdir():
        match = re.fullmatch(pattern, path.name, re.ASCII)
        if match is None or int(match[1]) >= step:
            continue
        if path.name == checkpoint_name(int(match[1]), run_id) and _complete(path):
            older[int(match[1])] = path
    removed = []
    for number in sorted(older, reverse=True)[run.keep - 1 :]:
        path = older[number]
        lasts = run.keep_every > 0 and number % run.keep_every == 0
        if lasts or path.resolve() in spared:
            continue
        # One that is half removed must not look like a checkpoint. The next save removes these.
        going = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        path.rename(going)
        shutil.rmtree(going)
        removed.append(path)
    return removed


def _complete(path: Path) -> bool:
    """Whether a folder has a configuration and all its weights, as a save leaves it."""
    if path.is_symlink() or not (path / "config.json").is_file():
        return False
    try:
        weight_files(FilesSource(tuple(path.iterdir())))
    except ValueError:
        return False
    return True
