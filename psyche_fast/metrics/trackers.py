"""Experiment trackers: the same metrics as in `metrics.jsonl`, sent to a service or a viewer."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any, Self, TypeAlias

_LOG = logging.getLogger(__name__)

_PROJECT = "psyche-fast"

Names: TypeAlias = Callable[[Mapping[str, Any]], dict[str, float]]
"""Turns a line of `metrics.jsonl` into scalars by the names that a tracker shows."""


class Tracker:
    """Receives the metrics of each step; this one records nothing.

    Use as a context manager: however the run ends, the tracker is finished.

    Attributes:
        id: What it calls the run, by which a later part of the run goes on with it; None where
            there is nothing to go on with.
    """

    id: str | None = None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records one step's metrics, as they are written to `metrics.jsonl`."""

    def finish(self, *, failed: bool = False) -> None:
        """Sends what is still waiting; nothing may be logged afterwards.

        Args:
            failed: Whether an error has ended the run.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
            return
        try:
            self.finish(failed=True)
        except Exception:  # the run's own error is the one to show
            _LOG.warning("the tracker could not be finished", exc_info=True)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens a metrics line to scalars: `{"seconds": {"data": 1}}` -> `{"seconds/data": 1.0}`.

    Strings, None and non-finite values are left out: trackers draw numbers. `step` and `time` are
    left out of the top level, where they are axes.
    """
    scalars: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            scalars.update(flatten(value, f"{prefix}{name}/"))
        elif name in ("step", "time") and not prefix:
            continue
        elif isinstance(value, int | float) and math.isfinite(value):
            scalars[prefix + name] = float(value)
    return scalars


class _RunTracker(Tracker):
    """wandb and trackio: `init` returns a run, whose `finish` takes `failure` after an error."""

    def __init__(
        self, run: Any, names: Names, id: str | None, failure: Mapping[str, Any] | None = None
    ) -> None:
        self.id = id
        self._run = run
        self._names = names
        self._failure = failure or {}

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(self._names(metrics), step=step)

    def finish(self, *, failed: bool = False) -> None:
        self._run.finish(**(self._failure if failed else {}))


class _TensorBoard(Tracker):
    def __init__(self, writer: Any, names: Names) -> None:
        self._writer = writer
        self._names = names

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in self._names(metrics).items():
            self._writer.add_scalar(name, value, global_step=step)

    def finish(self, *, failed: bool = False) -> None:
        self._writer.close()


def check_tracker(name: str) -> None:
    """Checks that a tracker's package is installed, without importing it.

    Raises:
        ValueError: The package is not installed.
    """
    if name != "none" and find_spec(name) is None:
        raise ValueError(f"--tracker {name} is not installed; pip install 'psyche-fast[trackers]'")


def make_tracker(
    name: str,
    run_dir: str | os.PathLike[str],
    config: Mapping[str, Any],
    names: Names = flatten,
    *,
    id: str | None = None,
    first_step: int = 1,
) -> Tracker:
    """Starts a tracker, or goes on with what an earlier part of the run has begun.

    Args:
        name: `none` (records nothing), `wandb`, `trackio` or `tensorboard`.
        run_dir: The run directory: its name becomes the run's name, and wandb and tensorboard keep
            their local files in it.
        config: The resolved configuration, shown beside the run; anything JSON can hold.
        names: What the metrics are called; those of `metrics.jsonl` unless another one is given.
        id: What it called the run before; None for a new one.
        first_step: Where this part of the run begins.

    Returns:
        The tracker, a context manager that finishes it.

    Raises:
        ValueError: The tracker's package cannot be imported.
    """
    if name == "none":
        return Tracker()
    folder = Path(run_dir).resolve()
    try:
        module = import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ValueError(
            f"tracker: {name} cannot be imported ({error}); pip install 'psyche-fast[trackers]'"
        ) from error
    if name == "tensorboard":
        # Steps that are gone through again are not shown twice.
        again = {"purge_step": first_step} if first_step > 1 else {}
        writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), **again)
        text = json.dumps(dict(config), indent=2, default=str)
        # Markdown shows text as it is when every line is indented by four spaces.
        writer.add_text("config", indent(text, "    "))
        return _TensorBoard(writer, names)
    run: dict[str, Any] = {"project": _PROJECT, "name": folder.name, "config": dict(config)}
    if name == "wandb":
        if id is not None:
            run |= {"id": id, "resume": "allow"}
        started = module.init(dir=str(folder), **run)
        return _RunTracker(started, names, started.id, failure={"exit_code": 1})
    if id is not None:  # which is the name
        run |= {"name": id, "resume": "allow"}
    return _RunTracker(module.init(**run), names, run["name"])
