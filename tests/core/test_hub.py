"""Models from the hub and checkpoints to it, against a stand-in for its endpoint."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from psyche_fast import cli
from psyche_fast.core.hub import HubUploads, check_hub
from psyche_fast.core.uploads import waited_for
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.state import FOLDER
from tests.groups import Command
from tests.hub import SETTINGS, Hub, serving
from tests.processes import wait_until
from tests.tiny import save_llama, save_tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = save_llama(tmp_path_factory.mktemp("model") / "model")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    for name in SETTINGS:
        monkeypatch.setattr(constants, name, getattr(constants, name))
    with serving(someone__llama=dict(files)) as hub:
        hub.use(tmp_path / "cache")
        yield hub


def gets(hub: Hub, name: str) -> list[str | None]:
    """The ranges that were asked for of a file."""
    return [r for method, path, r in hub.requests if method == "GET" and path.endswith("/" + name)]


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: Hub,
    files: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what it writes at a time
    hub.cut["model.safetensors"] = 1
    source = resolve_model("someone/llama")
    found = {file.name: file.read_bytes() for file in source.files}
    assert found == files
    written = len(files["model.safetensors"]) // 2 // 1000 * 1000
    assert gets(hub, "model.safetensors") == [None, f"bytes={written}-"]
    assert "100%" in capsys.readouterr().err, "a progress bar"


def test_a_reset_connection_is_tried_again(hub: Hub, files: dict[str, bytes]) -> None:
    """Which the hub's client leaves to others."""
    hub.cut["model.safetensors"], hub.reset = 1, True
    source = resolve_model("someone/llama")
    assert {file.name: file.read_bytes() for file in source.files} == files
    assert gets(hub, "model.safetensors") == [None, None]
    assert gets(hub, "config.json") == [None]


def test_a_download_that_failed_keeps_the_files_that_came(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.refuse["model.safetensors"] = 403
    with pytest.raises(ValueError, match=r"--model: 'someone/llama' .*403 Forbidden"):
        resolve_model("someone/llama")
    hub.refuse.clear()
    hub.requests.clear()
    assert {file.name for file in resolve_model("someone/llama").files} == files.keys()
    assert gets(hub, "config.json") == []
    assert gets(hub, "model.safetensors") == [None]
    # What is there needs nobody.
    hub.url = "http://127.0.0.1:9"
    hub.use(Path(resolve_model("someone/llama").files[0]).parents[3])
    assert {file.name for file in resolve_model("someone/llama").files} == files.keys()


@pytest.mark.parametrize("offline", [True, False])
def test_offline_is_one_clear_line(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offline: bool,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--model", "nobody/nothing", "--device", "cpu"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("\n") == 1
    assert "--model: 'nobody/nothing' is neither a folder nor downloadable from the hub: " in said
    assert ("outgoing traffic has been disabled" in said) == offline
    assert ("ConnectError" in said) == (not offline)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"step": step}))
    (path / "model.safetensors").write_bytes(bytes(step))
    (path / FOLDER).mkdir()
    (path / FOLDER / "rank-0.safetensors").write_bytes(b"what it goes on from")
    return path


def test_uploads_come_one_at_a_time_and_the_newest_next(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    hub.hold.clear()
    paths = {step: checkpoint(tmp_path, step) for step in (1, 2, 3)}
    up = HubUploads("someone/mine", said.append)
    with waited_for(up):
        up.push(1, paths[1])
        wait_until(hub.holding.is_set)
        assert up.busy == {paths[1]}
        up.push(2, paths[2])
        up.push(3, paths[3])
        assert up.busy == {paths[1], paths[3]}
        hub.hold.set()
    assert up.busy == set()
    assert hub.commits == [(f"step {n}", ["config.json", "model.safetensors"]) for n in (1, 3)]
    assert hub.repos["someone/mine"]["model.safetensors"] == bytes(3)
    told = [line for line in said if not line.startswith("uploading to someone/mine; Ctrl-C")]
    assert told == [f"checkpoint of step {step} uploaded to someone/mine" for step in (1, 3)]


def test_what_fails_is_said_with_a_way_to_go_on(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    hub.refuse |= {"/api/repos/create": 403, "/commit/": 403}
    path = checkpoint(tmp_path, 7)
    up = HubUploads("someone/llama", said.append)
    with waited_for(up):
        up.push(7, path)
    created, failed = (line for line in said if not line.startswith("uploading"))
    assert created.startswith("--push-to-hub someone/llama: cannot be created: ")
    assert re.match(
        r"--push-to-hub someone/llama: checkpoint of step 7 not uploaded: .*403.*; by hand: "
        rf"hf upload someone/llama {re.escape(str(path))} \. --exclude '{FOLDER}/\*'$",
        failed,
    )


def test_after_an_error_nothing_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    hub.hold.clear()
    path = checkpoint(tmp_path, 2)

    def run() -> None:
        up = HubUploads("someone/mine", said.append)
        with waited_for(up):
            up.push(2, path)
            wait_until(hub.holding.is_set)
            raise ValueError("the run's own")

    began = time.monotonic()
    with pytest.raises(ValueError, match="the run's own"):
        run()
    assert time.monotonic() - began < 20
    assert said == [
        f"not uploaded to someone/mine; to finish it: hf upload someone/mine {path} . "
        f"--exclude '{FOLDER}/*'"
    ]


def test_a_name_that_is_none_and_an_offline_client_are_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    check_hub("someone/mine")
    for name in ("a/b/c", "", "-x", "a b", "name"):
        with pytest.raises(ValueError, match="--push-to-hub: "):
            check_hub(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"--push-to-hub someone/mine: HF_HUB_OFFLINE is set"):
        check_hub("someone/mine")


def trained(arguments: list[str]) -> None:
    """`psyche-fast` that speaks to a stand-in, with a tracker that writes down what it gets."""
    url, cache, *arguments = arguments
    Hub(url=url).use(Path(cache))
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int) -> None:
            logged.append((step, metrics))

        def finish(self) -> None:
            Path(cache, "logged.json").write_text(json.dumps(logged))

    trackio = types.ModuleType("trackio")
    trackio.__spec__ = types.SimpleNamespace(name="trackio")  # type: ignore[assignment]
    trackio.init = lambda **_: Run()  # type: ignore[attr-defined]
    sys.modules["trackio"] = trackio
    cli.main(arguments)


@pytest.mark.processes
def test_a_run_from_the_hub_to_the_hub(files: dict[str, bytes], tmp_path: Path) -> None:
    """By id, with checkpoints of Psyche's names, of which two are kept, and its metrics' names."""
    save_tokens(tmp_path / "data")
    with serving(someone__llama=dict(files)) as hub:
        (tmp_path / "cache").mkdir()
        run = Command(
            hub.url, str(tmp_path / "cache"),
            "train", "--model", "someone/llama", "--data-path", str(tmp_path / "data"),
            "--output", str(tmp_path / "run"), "--sequence-length", "16", "--total-batch", "2",
            "--total-steps", "8", "--warmup-steps", "0", "--device", "cpu", "--threads", "1",
            "--checkpoint-every", "2", "--keep", "2", "--run-id", "my-run",
            "--push-to-hub", "someone/mine", "--tracker", "trackio", "--metric-names", "psyche",
            program="tests.core.test_hub:trained",
        )  # fmt: skip
        out, err = run.communicate()
        assert run.returncode == 0, err
    assert f"checkpoint  {tmp_path}/run/checkpoints/my-run-step8" in out
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    # One of them is left out where the one before it is being written.
    assert len(kept) == 2
    assert kept[-1] == "my-run-step8"
    assert hub.commits[-1][0] == "step 8"
    last = tmp_path / "run" / "checkpoints" / "my-run-step8"
    model = {f.name: f.read_bytes() for f in last.iterdir() if f.is_file()}
    assert hub.repos["someone/mine"] == model
    logged = json.loads((tmp_path / "cache" / "logged.json").read_text())
    assert [step for step, _ in logged] == list(range(1, 9))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for (_, metrics), line in zip(logged, map(json.loads, lines), strict=True):
        assert metrics["train/loss"] == line["loss"]
        assert metrics["train/lr"] == line["learning_rate"]
        assert metrics["train/global_token_batch_size"] == 32
        assert "loss" not in metrics


@pytest.mark.processes
def test_ctrl_c_ends_the_wait_for_an_upload_and_not_the_run(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    save_tokens(tmp_path / "data")
    with serving(someone__llama=dict(files)) as hub:
        (tmp_path / "cache").mkdir()
        hub.hold.clear()
        run = Command(
            hub.url, str(tmp_path / "cache"),
            "train", "--model", "someone/llama", "--data-path", str(tmp_path / "data"),
            "--output", str(tmp_path / "run"), "--sequence-length", "16", "--total-batch", "2",
            "--total-steps", "2", "--device", "cpu", "--threads", "1",
            "--push-to-hub", "someone/mine",
            program="tests.core.test_hub:trained",
        )  # fmt: skip
        wait_until(lambda: "uploading to someone/mine" in run.stderr(), 120)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(60)
        assert hub.commits == []
    assert run.returncode == 0, err
    path = tmp_path / "run" / "checkpoints" / "step-000002"
    assert f"not uploaded to someone/mine; to finish it: hf upload someone/mine {path} ." in err
    assert (path / "model.safetensors").exists()
