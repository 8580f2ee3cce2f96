"""Experiment trackers: the same metrics as in `metrics.jsonl`, sent to a service or a viewer."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TRACKERS = ("none", "wandb", "trackio", "tensorboard")

_LOG = logging.getLogger(__name__)

_PROJECT = "psyche-fast"


class Tracker:
    """Receives the metrics of each step; this one records nothing.

    Use as a context manager: however the run ends, the tracker is finished.
    """

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records one step's metrics, as they are written to `metrics.jsonl`."""

    def finish(self, *, failed: bool = False) -> None:
        """Sends what is still waiting; nothing may be logged afterwards.

        Args:
            failed: Whether an error has ended the run.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
            return
        try:
            self.finish(failed=True)
        except Exception:  # the run's own error is the one to show
            _LOG.warning("the tracker could not be finished", exc_info=True)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens a metrics line to scalars: `{"seconds": {"data": 1}}` -> `{"seconds/data": 1.0}`.

    Strings, None and non-finite values are left out: trackers draw numbers. `step` is left out of
    the top level, where it is the axis.
    """
    scalars: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            scalars.update(flatten(value, f"{prefix}{name}/"))
        elif name == "step" and not prefix:
            continue
        elif isinstance(value, int | float) and math.isfinite(value):
            scalars[prefix + name] = float(value)
    return scalars


class _RunTracker(Tracker):
    """wandb and trackio: `init` returns a run.

    Args:
        run: The run.
        failure: Arguments of its `finish` after an error.
    """

    def __init__(self, run: Any, failure: Mapping[str, Any] | None = None) -> None:
        self._run = run
        self._failure = failure or {}

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(flatten(metrics), step=step)

    def finish(self, *, failed: bool = False) -> None:
        self._run.finish(**(self._failure if failed else {}))


class _TensorBoard(Tracker):
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in flatten(metrics).items():
            self._writer.add_scalar(name, value, global_step=step)

    def finish(self, *, failed: bool = False) -> None:
        self._writer.close()


def check_tracker(name: str) -> None:
    """Looks whether a tracker's package is there, without importing it.

    Raises:
        ValueError: The name is unknown, or the package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"--tracker: wanted one of {', '.join(TRACKERS)}, got {name!r}")
    if name != "none" and find_spec(name) is None:
        raise ValueError(f"--tracker {name} is not installed; pip install 'psyche-fast[trackers]'")


def make_tracker(name: str, run_dir: str | os.PathLike[str], config: Mapping[str, Any]) -> Tracker:
    """Starts a tracker.

    Args:
        name: One of `TRACKERS`. `none` records nothing.
        run_dir: The run directory: its name becomes the run's name, and wandb and tensorboard keep
            their local files in it.
        config: The resolved configuration, shown beside the run; anything JSON can hold.

    Returns:
        The tracker, a context manager that finishes it.

    Raises:
        ValueError: The name is unknown, or the tracker's package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"tracker: wanted one of {', '.join(TRACKERS)}, got {name!r}")
    if name == "none":
        return Tracker()
    folder = Path(run_dir).resolve()
    try:
        if name == "wandb":
            import wandb

            return _RunTracker(
                wandb.init(
                    project=_PROJECT, name=folder.name, dir=str(folder), config=dict(config)
                ),
                failure={"exit_code": 1},
            )
        if name == "trackio":
            import trackio

            return _RunTracker(
                trackio.init(project=_PROJECT, name=folder.name, config=dict(config))
            )
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tracker: {name} cannot be imported ({error}); pip install 'psyche-fast[trackers]'"
        ) from error
    writer = SummaryWriter(log_dir=str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
    text = json.dumps(dict(config), indent=2, default=str)
    # Markdown shows text as it is when every line is indented by four spaces.
    writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))  # type: ignore[no-untyped-call]
    return _TensorBoard(writer)
