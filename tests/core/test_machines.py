"""A further machine's launcher against a core that waits for it, both on this machine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import transformers

from tests.groups import Command
from tests.processes import free_port, wait_until
from tests.tiny import save_llama, save_tokens

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machines")
    save_llama(folder / "model")
    save_tokens(folder / "data")
    return folder


def start(place: Path, output: Path, port: int, *more: str, steps: int = 3) -> Command:
    return Command(
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"),
        "--output", str(output), "--device", "cpu", "--sequence-length", "16",
        "--micro-batch", "2", "--total-batch", "6", "--total-steps", str(steps),
        "--param-dtype", "float32", "--threads", "1", "--distro", "--replicas", "3",
        "--compression-chunk", "16", "--local-ranks", "2", "--port", str(port), *more,
    )  # fmt: skip


def flags(port: int) -> list[str]:
    return [
        "sidecar", "--main-host", "127.0.0.1", "--port", str(port), "--world-size", "3",
        "--start-rank", "2", "--backend", "gloo",
    ]  # fmt: skip


def test_ranks_of_another_machine(place: Path, tmp_path: Path) -> None:
    port = free_port()
    other = Command(*flags(port))
    wait_until(lambda: other.poll() is not None or other.stderr().endswith("\n"))
    assert other.stderr().startswith(
        f"psyche-fast: waiting for the core: nobody listens at 127.0.0.1:{port} yet (Connection "
        "refused); is psyche-fast train running there"
    )
    core = start(place, tmp_path / "run", port)
    _, said = core.communicate()
    assert core.returncode == 0, said
    assert "waiting for 1 ranks from other machines: psyche-fast sidecar --main-host" in said
    _, errors = other.communicate()
    assert other.returncode == 0, errors
    for rank in (1, 2):  # spawned by the core and by the launcher
        log = (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
        assert log.count(f"rank {rank} INFO loaded") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[-1])["bytes_sent"] > 0
    transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoints" / "step-000003"
    )


def test_machines_that_share_no_folder_write_models(place: Path, tmp_path: Path) -> None:
    """Each has an `--output` of its own by that name."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    port = free_port()
    arguments = [
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"),
        "--output", "run", "--device", "cpu", "--sequence-length", "16", "--micro-batch", "2",
        "--total-batch", "6", "--total-steps", "4", "--threads", "1", "--distro", "--replicas", "2",
        "--compression-chunk", "16", "--local-ranks", "1", "--port", str(port),
        "--checkpoint-every", "2",
    ]  # fmt: skip
    core = Command(*arguments, folder=folders[0])
    other = Command(
        "sidecar", "--main-host", "127.0.0.1", "--port", str(port), "--world-size", "2",
        "--start-rank", "1", "--backend", "gloo", folder=folders[1],
    )  # fmt: skip
    _, said = core.communicate()
    _, errors = other.communicate()
    assert core.returncode == other.returncode == 0, said + errors
    for step in (2, 4):
        assert f"--resume will not know the checkpoint of step {step}: rank 1 wrote" in said
        model = folders[0] / "run" / "checkpoints" / f"step-{step:06d}"
        assert not (model / "state").exists()
        transformers.AutoModelForCausalLM.from_pretrained(model)
    for folder in folders:
        assert not list((folder / "run" / "checkpoints").glob(".*"))


def test_ranks_come_in_by_a_secret(place: Path, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for path in (right, wrong):
        path.touch(0o600)
        path.write_text(path.name * 8)
    port = free_port()
    core = start(place, tmp_path / "run", port, "--secret-file", str(right))
    wait_until(lambda: core.poll() is not None or "waiting for 1 ranks" in core.stderr())
    assert f"--backend gloo --secret-file {right}" in core.stderr()
    stranger = Command(*flags(port), "--secret-file", str(wrong))
    _, errors = stranger.communicate()
    assert stranger.returncode == 1
    assert "does not let rank 2 in: is --secret-file the same there?" in errors
    assert "Traceback" not in errors.split("rank 2 ERROR", 1)[1]
    other = Command(*flags(port), "--secret-file", str(right))
    _, said = core.communicate()
    _, errors = other.communicate()
    assert core.returncode == other.returncode == 0, said + errors
    assert "the door has refused " in said
    assert " knocks, most from 127.0.0.1; logs/rank-0.log" in said
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "the door: knock 1 from 127.0.0.1 is refused: it does not know the secret" in log
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_launcher_fails_with_its_core(place: Path, tmp_path: Path) -> None:
    port = free_port()
    core = start(place, tmp_path / "run", port, steps=100_000)
    other = Command(*flags(port))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: core.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
    assert core.poll() is None, core.communicate()
    core.send_signal(signal.SIGKILL)
    _, errors = other.communicate(timeout=20)
    assert other.returncode == 1
    assert "rank 2 ERROR lost another rank" in errors
    assert "rank 2 (pid" in errors


# PyTorch's own way of using an older processor's instructions only.
OLDER = {"ATEN_CPU_CAPABILITY": "default"}
needs_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU is as old as there are"
)


@needs_vectors
def test_several_generations_train_together(place: Path, tmp_path: Path) -> None:
    """The check of replicas at every step ends a run whose parameters differ by a bit."""
    port = free_port()
    core = start(place, tmp_path / "run", port, "--check-every", "1")
    other = Command(*flags(port), environment=OLDER)
    _, said = core.communicate(timeout=100)
    _, errors = other.communicate(timeout=30)
    assert core.returncode == other.returncode == 0, said + errors
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
