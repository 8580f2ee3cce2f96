"""Experiment trackers: the same metrics as in `metrics.jsonl`, sent to a service or a viewer."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any, Self, TypeAlias

from psyche_fast.views import Tracking

_LOG = logging.getLogger(__name__)

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


class _MLflow(Tracker):
    """By its client, which has no state outside of it: a run of the user's own may be active."""

    def __init__(self, client: Any, metric: Any, id: str, names: Names) -> None:
        self.id = id
        self._client, self._metric, self._names = client, metric, names

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        now = round(1000 * float(metrics.get("time") or time.time()))
        values = [self._metric(n, v, now, step) for n, v in self._names(metrics).items()]
        for start in range(0, len(values), 1000):  # the most that a server takes at once
            self._client.log_batch(self.id, metrics=values[start : start + 1000])

    def finish(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class _Prometheus(Tracker):
    """The newest line's scalars, for whoever asks."""

    def __init__(self, package: Any, host: str, port: int, run: str) -> None:
        self._gauge, self._run = package.Gauge, run
        self._registry, self._gauges = package.CollectorRegistry(), dict[str, Any]()
        try:
            self._server, self._thread = package.start_http_server(
                port, addr=host, registry=self._registry
            )
        except OSError as error:
            raise ValueError(f"--metrics-port {port} on {host}: {error.strerror}") from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {"step": float(step), **flatten(metrics)}
        if "time" in metrics:
            values["time_seconds"] = float(metrics["time"])
        for name, value in values.items():
            known = "psyche_fast_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            if known not in self._gauges:
                self._gauges[known] = self._gauge(
                    known, f"{name} of metrics.jsonl", ["run"], registry=self._registry
                ).labels(self._run)
            self._gauges[known].set(value)

    def finish(self, *, failed: bool = False) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _package(name: str) -> str:
    return "mlflow" if name == "mlflow" else "'psyche-fast[trackers]'"


def check_tracker(name: str, options: Tracking | None = None) -> None:
    """Checks that what is to be told of a run is installed, without importing it.

    Raises:
        ValueError: A package is not installed.
    """
    if name != "none" and find_spec(name) is None:
        raise ValueError(f"--tracker {name} is not installed; pip install {_package(name)}")
    if options is not None and options.metrics_port and find_spec("prometheus_client") is None:
        raise ValueError(
            "--metrics-port: prometheus_client is not installed; "
            "pip install 'psyche-fast[trackers]'"
        )


def make_endpoint(port: int, host: str, run_dir: str | os.PathLike[str]) -> Tracker:
    """Begins to serve the newest metrics to Prometheus, at `/metrics`.

    Args:
        port: 0 for not at all.
        host: The address to listen on.
        run_dir: The run directory: its name is the label `run`.

    Returns:
        What takes the lines, a context manager that ends it.

    Raises:
        ValueError: The package cannot be imported, or the port is taken.
    """
    if not port:
        return Tracker()
    try:
        package = import_module("prometheus_client")
    except ImportError as error:
        raise ValueError(
            f"--metrics-port: prometheus_client cannot be imported ({error}); "
            "pip install 'psyche-fast[trackers]'"
        ) from error
    return _Prometheus(package, host, port, Path(run_dir).resolve().name)


def make_tracker(
    name: str,
    run_dir: str | os.PathLike[str],
    config: Mapping[str, Any],
    names: Names = flatten,
    *,
    id: str | None = None,
    first_step: int = 1,
    options: Tracking | None = None,
) -> Tracker:
    """Starts a tracker, or goes on with what an earlier part of the run has begun.

    Args:
        name: `none` (records nothing), `wandb`, `trackio`, `tensorboard` or `mlflow`.
        run_dir: The run directory: its name becomes the run's name unless the options give one, and
            wandb and tensorboard keep their local files in it; others do so offline.
        config: The resolved configuration, shown beside the run; anything JSON can hold.
        names: What the metrics are called; those of `metrics.jsonl` unless another one is given.
        id: What it called the run before; None for a new one.
        first_step: Where this part of the run begins.
        options: Project, name, tags, and whether anything may leave the run directory.

    Returns:
        The tracker, a context manager that finishes it.

    Raises:
        ValueError: The tracker's package cannot be imported.
    """
    if name == "none":
        return Tracker()
    folder, options = Path(run_dir).resolve(), options or Tracking()
    called = options.tracker_name or folder.name
    if name == "trackio" and options.tracker_offline:  # read when it is imported
        os.environ["TRACKIO_DIR"] = str(folder / "trackio")
        os.environ.pop("TRACKIO_SPACE_ID", None)
    try:
        module = import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ValueError(
            f"tracker: {name} cannot be imported ({error}); pip install {_package(name)}"
        ) from error
    if name == "tensorboard":
        # Steps that are gone through again are not shown twice.
        again = {"purge_step": first_step} if first_step > 1 else {}
        writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), **again)
        text = json.dumps(dict(config), indent=2, default=str)
        # Markdown shows text as it is when every line is indented by four spaces.
        writer.add_text("config", indent(text, "    "))
        if options.tracker_tag:
            writer.add_text("tags", ", ".join(options.tracker_tag))
        return _TensorBoard(writer, names)
    if name == "mlflow":
        return _start_mlflow(module, folder, called, config, names, id, options)
    project = options.tracker_project
    run: dict[str, Any] = {"project": project, "name": called, "config": dict(config)}
    if name == "wandb":
        if options.tracker_tag:
            run["tags"] = list(options.tracker_tag)
        if options.tracker_offline:
            run["mode"] = "offline"
        if id is not None:
            run |= {"id": id, "resume": "allow"}
        started = module.init(dir=str(folder), **run)
        return _RunTracker(started, names, started.id, failure={"exit_code": 1})
    if options.tracker_tag:  # it has no place of its own for them
        run["config"]["tags"] = list(options.tracker_tag)
    if id is not None:  # which is the name
        run |= {"name": id, "resume": "allow"}
    return _RunTracker(module.init(**run), names, run["name"])


def _start_mlflow(
    module: Any,
    folder: Path,
    called: str,
    config: Mapping[str, Any],
    names: Names,
    id: str | None,
    options: Tracking,
) -> Tracker:
    """A run at MLflow's server (`MLFLOW_TRACKING_URI`), or in a database in the run directory."""
    uri = f"sqlite:///{folder / 'mlflow.db'}" if options.tracker_offline else None
    client, project = module.MlflowClient(tracking_uri=uri), options.tracker_project
    if id is not None:
        client.update_run(id, status="RUNNING")
        return _MLflow(client, module.entities.Metric, id, names)
    experiment = client.get_experiment_by_name(project)
    artifacts = {"artifact_location": (folder / "mlartifacts").as_uri()} if uri else {}
    number = (
        client.create_experiment(project, **artifacts)
        if experiment is None
        else experiment.experiment_id
    )
    tags = dict.fromkeys(options.tracker_tag, "true")
    run = client.create_run(number, run_name=called, tags=tags)
    texts = ((key, str(value)[:6000]) for key, value in config.items())
    params = [module.entities.Param(key, text) for key, text in texts]
    for start in range(0, len(params), 100):  # the most that a server takes at once
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    return _MLflow(client, module.entities.Metric, run.info.run_id, names)
