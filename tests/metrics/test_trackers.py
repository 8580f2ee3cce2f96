"""Trackers get each step's numbers; the packages themselves are optional."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import types
import urllib.error
import urllib.request

import pytest

from psyche_fast.metrics import PsycheNames, make_tracker
from psyche_fast.metrics.trackers import make_endpoint
from psyche_fast.views import Tracking
from tests.processes import free_port

CONFIG = {"learning_rate": 4e-4, "distro": {"compression_topk": 4}}
LINE = {
    "step": 7,
    "loss": 2.5,
    "grad_norm": None,
    "learning_rate": 4e-4,
    "tokens_per_second": math.inf,
    "seconds": {"data": 0.25, "train": 1.0},
    "bytes_sent": 1234,
    "note": "text",
}
# null, non-finite values and text cannot be drawn; the step is the axis.
SCALARS = {
    "loss": 2.5,
    "learning_rate": 4e-4,
    "seconds/data": 0.25,
    "seconds/train": 1.0,
    "bytes_sent": 1234.0,
}


class FakeRun:
    id = "a1b2"

    def __init__(self):
        self.calls = []

    def log(self, data, step=None):
        self.calls.append(("log", data, step))

    def finish(self):
        self.calls.append(("finish",))


def test_none_needs_nothing_and_records_nothing(tmp_path):
    tracker = make_tracker("none", tmp_path, CONFIG)
    tracker.log(7, LINE)
    tracker.finish()
    assert os.listdir(tmp_path) == []


def test_wandb_gets_the_scalars_by_step(tmp_path, monkeypatch):
    run, started = FakeRun(), {}

    # The arguments of wandb 0.31 that are used here; another name would be a TypeError.
    def init(project=None, dir=None, name=None, config=None):
        started.update(project=project, dir=dir, name=name, config=config)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run_dir = tmp_path / "first"
    tracker = make_tracker("wandb", run_dir, CONFIG)
    tracker.log(7, LINE)
    tracker.finish()
    assert started == {
        "project": "psyche-fast",
        "dir": str(run_dir),
        "name": "first",
        "config": CONFIG,
    }
    assert run.calls == [("log", SCALARS, 7), ("finish",)]


def test_trackio_gets_the_scalars_by_step(tmp_path, monkeypatch):
    run, started = FakeRun(), {}

    def init(project, name=None, config=None):  # as in trackio 0.43
        started.update(project=project, name=name, config=config)
        return run

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    tracker = make_tracker("trackio", tmp_path / "second", CONFIG)
    tracker.log(7, LINE)
    tracker.finish()
    assert started == {"project": "psyche-fast", "name": "second", "config": CONFIG}
    assert run.calls == [("log", SCALARS, 7), ("finish",)]


@pytest.mark.parametrize(
    ("name", "before", "wanted"),
    [
        ("wandb", "a1b2", {"name": "run", "id": "a1b2", "resume": "allow"}),
        ("trackio", "first", {"name": "first", "resume": "allow"}),
        ("wandb", None, {"name": "run"}),
        ("trackio", None, {"name": "run"}),
    ],
)
def test_a_run_that_goes_on_is_the_same_one_there(tmp_path, monkeypatch, name, before, wanted):
    started = {}

    def init(**arguments):
        started.update(arguments)
        return FakeRun()

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    tracker = make_tracker(name, tmp_path / "run", CONFIG, id=before, first_step=5)
    started = {key: started[key] for key in started.keys() & {"name", "id", "resume"}}
    assert started == wanted
    assert tracker.id == ("a1b2" if name == "wandb" else wanted["name"])


def test_tensorboard_gets_each_scalar_by_step(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:  # as in torch.utils.tensorboard
        def __init__(self, log_dir=None, purge_step=None):
            calls.append(("open", log_dir, purge_step))

        def add_text(self, tag, text_string, global_step=None):
            calls.append(("text", tag, text_string))

        def add_scalar(self, tag, scalar_value, global_step=None):
            calls.append((tag, scalar_value, global_step))

        def close(self):
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tracker = make_tracker("tensorboard", tmp_path, CONFIG)
    tracker.log(7, LINE)
    tracker.finish()
    opened, (kind, tag, text), *scalars, closed = calls
    assert opened == ("open", str(tmp_path / "tensorboard"), None)
    assert (kind, tag) == ("text", "config")
    assert '"compression_topk": 4' in text
    assert scalars == [(name, value, 7) for name, value in SCALARS.items()]
    assert closed == ("close",)
    make_tracker("tensorboard", tmp_path, CONFIG, first_step=5)
    assert calls[-2] == ("open", str(tmp_path / "tensorboard"), 5)


def test_psyches_names_and_what_they_stand_for(tmp_path, monkeypatch):
    """Of 17 steps: the first is no more in the mean of 16."""
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    tracker = make_tracker("wandb", tmp_path, CONFIG, PsycheNames(3, 1024))
    for step in range(1, 18):
        tracker.log(
            step,
            {
                "step": step, "loss": 2.5, "grad_norm": 0.5, "learning_rate": 4e-4,
                "num_tokens": 100 * step, "tokens_per_second": 50.0 * step,
                "step_seconds": 2.0 / step, "seconds": {"train": 1.0 / step, "data": 0.1},
                "memory": {"process": 7}, "optim_stats": {"grad_norm/a.weight": 1.0},
            },
        )  # fmt: skip
    tracker.log(18, {"step": 18, "loss": 1e6, "learning_rate": 0.0})
    tracker.log(19, {"step": 19, "loss": math.nan})
    *_, (_, seventeenth, step), (_, infinite, _), (_, none, _) = run.calls
    assert step == 17
    seconds = sum(2.0 / n for n in range(2, 18))
    assert seventeenth == pytest.approx(
        {
            "train/loss": 2.5,
            "train/perplexity": math.exp(2.5),
            "train/confidence": 0.75,
            "train/lr": 4e-4,
            "train/total_tokens": 1700,
            "train/tokens_per_sec": 1600 / seconds,
            "train/global_token_batch_size": 100,
            "train/efficency": 0.5,
            "coordinator/num_clients": 3,
            "grad_norm": 0.5,
            "step_seconds": 2.0 / 17,
            "seconds/train": 1.0 / 17,
            "seconds/data": 0.1,
            "memory/process": 7,
            "optim_stats/grad_norm/a.weight": 1.0,
        }
    )
    assert infinite == {
        "train/loss": 1e6,
        "train/confidence": 1.0 - 1e5,
        "train/lr": 0.0,
        "coordinator/num_clients": 3.0,
    }
    assert none == {"coordinator/num_clients": 3.0}


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_a_value_error_that_says_what_to_install(tmp_path, monkeypatch, name):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(ValueError, match=rf"{name} .*pip install 'psyche-fast\[trackers\]'"):
        make_tracker(name, tmp_path, CONFIG)


def test_importing_the_metrics_imports_no_torch_matplotlib_or_tracker():
    heavy = ["torch", "matplotlib", "tensorboard", "trackio", "wandb", "numpy"]
    script = f"import psyche_fast.metrics, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard", "mlflow"])
def test_the_real_package_where_it_is_installed(tmp_path, name):
    pytest.importorskip(name, reason=f"{name} is an extra")
    script = (
        "import sys\n"
        "from psyche_fast.metrics import make_tracker\n"
        "from psyche_fast.views import Tracking\n"
        "options = Tracking(tracker_project='p', tracker_name='n', tracker_tag=('t', 'u'),\n"
        "                   tracker_offline=True)\n"
        "id = None\n"
        "for first in (1, 3):\n"
        f"    tracker = make_tracker({name!r}, sys.argv[1], {CONFIG!r}, id=id, first_step=first,\n"
        "                           options=options)\n"
        "    for step in (first, first + 1):\n"
        "        tracker.log(step, {'step': step, 'loss': 2.5 / step, 'seconds': {'data': 1}})\n"
        "    tracker.finish()\n"
        "    assert id is None or tracker.id == id\n"
        "    id = tracker.id\n"
    )
    # What leaves the run directory all the same would show elsewhere.
    environment = dict(os.environ, HOME=str(tmp_path), TRACKIO_SPACE_ID="nobody/nothing")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(run_dir)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = [path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size > 0]
    assert written, done.stderr
    assert not (tmp_path / "mlruns").exists()
    if name == "mlflow":
        with sqlite3.connect(run_dir / "mlflow.db") as database:
            steps = database.execute("select step, value from metrics where key = 'loss'")
            assert sorted(steps) == [(1, 2.5), (2, 1.25), (3, 2.5 / 3), (4, 0.625)]
            assert list(database.execute("select name, status from runs")) == [("n", "FINISHED")]


def test_project_name_tags_and_offline_are_handed_on(tmp_path, monkeypatch):
    options = Tracking(
        tracker_project="p", tracker_name="n", tracker_tag=("a", "b"), tracker_offline=True
    )
    for name in ("wandb", "trackio"):
        started = {}

        def init(started=started, **arguments):
            started.update(arguments)
            return FakeRun()

        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
        monkeypatch.setenv("TRACKIO_SPACE_ID", "nobody/nothing")
        make_tracker(name, tmp_path / "run", CONFIG, options=options)
        assert (started["project"], started["name"]) == ("p", "n")
        if name == "wandb":
            assert (started["tags"], started["mode"]) == (["a", "b"], "offline")
        else:
            assert started["config"]["tags"] == ["a", "b"]
            assert os.environ.get("TRACKIO_SPACE_ID") is None
            assert os.environ["TRACKIO_DIR"] == str(tmp_path / "run" / "trackio")
    monkeypatch.delenv("TRACKIO_DIR")


def test_prometheus_asks_for_the_newest_metrics(tmp_path):
    pytest.importorskip("prometheus_client", reason="prometheus_client is an extra")
    port = free_port()
    address = f"http://127.0.0.1:{port}/metrics"
    with make_endpoint(port, "127.0.0.1", tmp_path / "my run") as endpoint:
        endpoint.log(7, LINE)
        endpoint.log(8, {**LINE, "step": 8, "time": 1.8e9, "loss": 2.0})
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
        assert 'psyche_fast_step{run="my run"} 8.0\n' in text
        assert 'psyche_fast_loss{run="my run"} 2.0\n' in text
        assert 'psyche_fast_seconds_data{run="my run"} 0.25\n' in text
        assert 'psyche_fast_time_seconds{run="my run"} 1.8e+09\n' in text
        with pytest.raises(ValueError, match=f"--metrics-port {port} on 127.0.0.1: Address"):
            make_endpoint(port, "127.0.0.1", tmp_path)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)
    make_endpoint(0, "127.0.0.1", tmp_path).log(1, LINE)


def test_prometheus_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(
        ValueError, match=r"--metrics-port: .*pip install 'psyche-fast\[trackers\]'"
    ):
        make_endpoint(1234, "127.0.0.1", tmp_path)


@pytest.mark.parametrize(("name", "told"), [("wandb", {"exit_code": 1}), ("trackio", {})])
def test_a_tracker_is_finished_after_an_error_and_does_not_hide_it(
    tmp_path, monkeypatch, name, told
):
    calls = []

    class Run:
        id = "a1b2"

        def finish(self, **arguments):
            calls.append(arguments)
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=lambda **_: Run()))
    with pytest.raises(ValueError, match="the run's own"), make_tracker(name, tmp_path, CONFIG):
        raise ValueError("the run's own")
    with pytest.raises(OSError, match="no network"), make_tracker(name, tmp_path, CONFIG):
        pass
    assert calls == [told, {}]
