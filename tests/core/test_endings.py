"""However a run ends, nothing is left open and nothing is left unsaid."""

from __future__ import annotations

import gc
import os
import pty
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch.distributed as dist

from psyche_fast.config import RunConfig
from psyche_fast.core import run as core
from psyche_fast.core.plan import make_plan
from psyche_fast.metrics import Tracker
from psyche_fast.start.spawn import Sidecars
from tests.groups import Command, fork_ranks, in_process
from tests.processes import wait_until
from tests.tiny import save_llama, save_tokens

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    save_llama(folder / "model")
    save_tokens(folder / "data")
    return folder


def _three_runs(place: Path, output: Path) -> tuple[list[str], list[int]]:
    """What the trackers and errors of runs say; descriptors that are open after each."""
    said: list[str] = []
    opened = []

    class Recorder(Tracker):
        def log(self, step: int, metrics: Mapping[str, object]) -> None:
            said.append(f"step {step}")
            if step == 2 and fails:
                raise ValueError("this step's line cannot be sent")

        def finish(self, *, failed: bool = False) -> None:
            said.append(f"finished {failed}")

    with (
        mock.patch.object(core, "make_tracker", side_effect=lambda *_, **__: Recorder()),
        mock.patch.object(core, "plot_run"),
    ):
        for name, fails in (("first", True), ("well", False), ("badly", True)):  # noqa: B007
            plan = make_plan(
                RunConfig.of(
                    model=str(place / "model"), data_path=str(place / "data"),
                    output=str(output / name), device="cpu", sequence_length=16, micro_batch=2,
                    total_batch=2, total_steps=3, param_dtype="float32", threads=1,
                )
            )  # fmt: skip
            try:
                core.run(plan)
            except ValueError as error:
                said.append(f"error {error}")
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()
            opened.append(psutil.Process().num_fds())
    return said, opened


def test_a_run_leaks_no_descriptor_and_finishes_its_tracker(place: Path, tmp_path: Path) -> None:
    said, opened = in_process(_three_runs, place, tmp_path)
    assert opened[0] == opened[1], "a run that ends well"
    assert opened[1] == opened[2], "a run that fails"
    well = ["step 1", "step 2", "step 3", "finished False"]
    badly = ["step 1", "step 2", "finished True", "error this step's line cannot be sent"]
    assert said == badly + well + badly
    log = (tmp_path / "badly" / "logs" / "rank-0.log").read_text()
    assert "rank 0 INFO where it happened:" in log
    assert log.rstrip().endswith("ValueError: this step's line cannot be sent")


def _refused_sidecar(log: Path) -> str | None:
    fork_ranks()
    with Sidecars("gloo", "udp://nowhere", 2) as sidecars:
        sidecars.spawn(1, None, log)
        sidecars.watch(grace=60)
        return sidecars.failure(60)


def test_a_sidecars_error_of_the_users_leaves_its_trace_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    log.write_text("2026-01-01 rank 1 ERROR of an earlier part of the run\n")
    message = in_process(_refused_sidecar, log)
    assert message is not None
    head, said = message.splitlines()
    assert "ended: exit status 1; the end of" in head
    assert said.endswith("rank 1 ERROR --init-method: wanted tcp://HOST:PORT, got 'udp://nowhere'")
    text = log.read_text()
    assert text.startswith("2026-01-01 rank 1 ERROR of an earlier part of the run\n")
    assert "Traceback (most recent call last)" in text


def test_what_an_earlier_part_of_the_run_said_is_not_taken_for_the_end(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    log.write_text("2026-01-01 rank 1 ERROR of an earlier part of the run\n")
    with Sidecars("gloo", "tcp://127.0.0.1:1", 2) as sidecars:
        sidecars.spawn(1, None, log)
        sidecars.kill()  # before it has said a word
        sidecars.watch(grace=60)
        message = sidecars.failure(60)
    assert message is not None
    assert message.endswith("ended: killed by SIGKILL")


def test_a_closed_terminal_ends_the_run_with_a_checkpoint(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ours, its = pty.openpty()
    core = Command(
        "train", "--model", str(place / "model"),
        "--data-path", str(place / "data"), "--output", str(output), "--device", "cpu",
        "--sequence-length", "16", "--micro-batch", "2", "--total-batch", "4", "--threads", "1",
        "--total-steps", "1000000", "--param-dtype", "float32", "--distro", "--replicas", "2",
        "--compression-chunk", "16", terminal=os.ttyname(its),
    )  # fmt: skip
    metrics = output / "metrics.jsonl"
    os.set_blocking(ours, False)

    def has_trained() -> bool:
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)  # or the run would wait to write
        return metrics.exists() and metrics.stat().st_size > 2000

    try:
        wait_until(lambda: core.poll() is not None or has_trained())
        assert core.poll() is None
    finally:
        os.close(its)
        os.close(ours)
    core.communicate()
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert (checkpoint / "model.safetensors").exists()
    assert core.returncode == 128 + signal.SIGHUP
