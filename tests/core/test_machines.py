"""A further machine's launcher against a core that waits for it, both on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from tests import processes
from tests.processes import command, free_port, wait_until
from tests.tiny import save_llama, save_tokens

pytestmark = pytest.mark.processes


def start(
    place: Path, output: Path, port: int, *flags: str, steps: int = 3
) -> subprocess.Popen[str]:
    save_llama(place / "model")
    save_tokens(place / "data")
    return processes.start(
        command(
            "train", "--model", str(place / "model"),
            "--data-path", str(place / "data"), "--output", str(output), "--device", "cpu",
            "--sequence-length", "16", "--micro-batch", "2", "--total-batch", "6",
            "--total-steps", str(steps), "--param-dtype", "float32", "--threads", "1",
            "--distro", "--replicas", "3", "--compression-chunk", "16",
            "--local-ranks", "2", "--port", str(port), *flags,
        )
    )  # fmt: skip


def launch(port: int, **environment: str) -> subprocess.Popen[str]:
    return processes.start(
        command(
            "sidecar", "--main-host", "127.0.0.1",
            "--port", str(port), "--world-size", "3", "--start-rank", "2",
            "--backend", "gloo",
        ),
        env={**os.environ, **environment},
    )  # fmt: skip


def test_ranks_of_another_machine(tmp_path: Path) -> None:
    port = free_port()
    core = start(tmp_path, tmp_path / "run", port)
    other = launch(port)
    _, said = core.communicate(timeout=100)
    assert core.returncode == 0, said
    assert "waiting for 1 ranks from other machines: psyche-fast sidecar --main-host" in said
    _, errors = other.communicate(timeout=30)
    assert other.returncode == 0, errors
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[-1])["bytes_sent"] > 0
    transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoints" / "step-000003"
    )


def test_a_launcher_alone_says_what_it_waits_for() -> None:
    port = free_port()
    alone = launch(port)
    assert alone.stderr is not None
    said = alone.stderr.readline()  # blocks until it speaks; the test's time limit is the limit
    assert said.startswith("psyche-fast: waiting for the core: nobody listens at 127.0.0.1:")
    assert f"{port} yet (Connection refused); is psyche-fast train running there" in said


def test_the_launcher_fails_with_its_core(tmp_path: Path) -> None:
    port = free_port()
    core = start(tmp_path, tmp_path / "run", port, steps=100_000)
    other = launch(port)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: core.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
    assert core.poll() is None, core.communicate()
    core.send_signal(signal.SIGKILL)
    core.communicate()
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
def test_several_generations_train_together(tmp_path: Path) -> None:
    """The check of replicas at every step ends a run whose parameters differ by a bit."""
    port = free_port()
    core = start(tmp_path, tmp_path / "run", port, "--check-every", "1")
    other = launch(port, **OLDER)
    _, said = core.communicate(timeout=100)
    _, errors = other.communicate(timeout=30)
    assert core.returncode == other.returncode == 0, said + errors
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
