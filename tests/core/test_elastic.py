"""`--elastic`: replicas that are killed, come back and join, in whole runs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.groups import Command, run_command
from tests.processes import free_port, wait_until
from tests.tiny import save_llama, save_tokens

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    save_llama(folder / "model", num_hidden_layers=1)
    save_tokens(folder / "data")
    return folder


def flags(place: Path, output: Path, *more: str, steps: int = 100_000) -> list[str]:
    return [
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"),
        "--output", str(output), "--device", "cpu", "--sequence-length", "16",
        "--micro-batch", "2", "--total-batch", "7", "--total-steps", str(steps),
        "--learning-rate", "1e-3", "--param-dtype", "bfloat16", "--threads", "1", "--distro",
        "--distro-quantization", "--compression-chunk", "16", "--check-every", "1", *more,
    ]  # fmt: skip


def model(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def processes(core: Command) -> dict[int, int]:
    """The sidecars' process ids by rank."""
    import psutil

    found = {}
    for process in psutil.Process(core.pid).children(recursive=True):
        # A test's sidecars are forked: what they were started with is in their logs' names.
        log = os.readlink(f"/proc/{process.pid}/fd/1")
        if (match := re.search(r"rank-(\d+)\.log", log)) and process.status() != "zombie":
            found[int(match[1])] = process.pid
    return found


def children(launcher: Command) -> list[int]:
    """The process ids of a launcher's ranks."""
    import psutil

    return sorted(process.pid for process in psutil.Process(launcher.pid).children())


def wait_for_members(core: Command, run: Path, members: int, after: int = 0) -> dict[str, Any]:
    """Waits for a line of a step after `after` with so many members."""

    def is_there() -> bool:
        assert core.poll() is None, core.communicate()
        return any(line["step"] > after and line["members"] == members for line in lines(run))

    wait_until(is_there, 150)  # a Python that is started anew imports torch
    return next(x for x in lines(run) if x["step"] > after and x["members"] == members)


def test_with_nobody_lost_it_is_the_run_without(place: Path, tmp_path: Path) -> None:
    for name, more in (("rigid", []), ("elastic", ["--elastic", "--max-replicas", "3"])):
        arguments = flags(place, tmp_path / name, "--replicas", "2", *more, steps=4)
        (ended,) = run_command(*arguments)
        assert ended.returncode == 0, ended.stderr
    one, other = model(tmp_path / "rigid", 4), model(tmp_path / "elastic", 4)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert [(x["members"], x["lost_rows"], x["epoch"]) for x in lines(tmp_path / "elastic")] == [
        (2, 0, 0)
    ] * 4
    rigid = [x["loss"] for x in lines(tmp_path / "rigid")]
    assert [x["loss"] for x in lines(tmp_path / "elastic")] == pytest.approx(rigid, rel=1e-6)


def test_replicas_are_killed_and_come_back(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    core = Command(*flags(place, run, "--replicas", "4", "--elastic"))
    wait_for_members(core, run, 4)
    before = processes(core)
    step = lines(run)[-1]["step"]
    os.kill(before[2], signal.SIGKILL)  # no neighbour of rank 0's in the ring
    killed = time.monotonic()
    gone = wait_for_members(core, run, 3, step)
    assert time.monotonic() - killed < 5  # 1.5 s where the machine is ours
    assert gone["nonfinite_losses"] == 0
    back = wait_for_members(core, run, 4, gone["step"])
    assert (gone["epoch"], back["epoch"]) == (1, 2)
    after = processes(core)
    assert after.pop(2) != before.pop(2)
    assert after == before
    core.send_signal(signal.SIGTERM)
    _, said = core.communicate(timeout=60)
    assert core.returncode == 128 + signal.SIGTERM, said
    assert "replica 2 is gone (rank 2: killed by SIGKILL); going on with 0, 1, 3" in said
    assert "replica 2 joins; going on with 0, 1, 2, 3" in said
    rows = [x["lost_rows"] for x in lines(run)]
    assert 0 < sum(rows) <= 3 * 2, "of the steps that had been sent, a replica's"
    # Each step's bits have been compared by then; what was written is gone on from.
    last = lines(run)[-1]["step"]
    more = ["--replicas", "2", "--elastic", "--resume", "auto"]
    arguments = flags(place, run, *more, steps=last + 2)
    (ended,) = run_command(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert [x["step"] for x in lines(run)][-2:] == [last + 1, last + 2]


def sidecar(port: int, rank: int, ranks: int = 1, world: int = 3) -> list[str]:
    return [
        "sidecar", "--elastic", "--main-host", "127.0.0.1", "--port", str(port), "--world-size",
        str(world), "--start-rank", str(rank), "--num-local-ranks", str(ranks), "--backend", "gloo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "split", [pytest.param("--data-parallelism", marks=pytest.mark.slow), "--tensor-parallelism"]
)
def test_a_replica_of_two_ranks_joins_from_elsewhere(
    place: Path, tmp_path: Path, split: str
) -> None:
    """It was not there at the start; one of its ranks is killed, and it joins again."""
    run, port = tmp_path / "run", free_port()
    more = ["--replicas", "2", "--max-replicas", "3", "--elastic", split, "2"]
    core = Command(*flags(place, run, *more, "--port", str(port), "--checkpoint-every", "3"))
    wait_for_members(core, run, 2)
    for _ in range(2):
        step = lines(run)[-1]["step"]
        other = Command(*sidecar(port, 4, 2, 6))
        joined = wait_for_members(core, run, 3, step)
        (victim, _) = children(other)
        os.kill(victim, signal.SIGKILL)
        wait_for_members(core, run, 2, joined["step"])
        _, said = other.communicate(timeout=30)
        assert other.returncode == 1
        assert "killed by SIGKILL" in said
    core.send_signal(signal.SIGTERM)
    _, said = core.communicate(timeout=60)
    assert core.returncode == 128 + signal.SIGTERM, said
    assert said.count("replica 2 joins; going on with 0, 1, 2") == 2
    assert said.count("replica 2 is gone (it does not answer); going on with 0, 1") == 2


def test_one_that_is_cut_off_is_left_out_and_never_trains_on(place: Path, tmp_path: Path) -> None:
    """A stopped process stands for a cut network: it answers nothing, and knows of nothing."""
    run, port = tmp_path / "run", free_port()
    more = ["--replicas", "2", "--local-ranks", "1", "--elastic", "--timeout", "3"]
    core = Command(*flags(place, run, *more, "--port", str(port)))
    other = Command(*sidecar(port, 1, world=2))
    wait_for_members(core, run, 2)
    (rank,) = children(other)
    step = lines(run)[-1]["step"]
    os.kill(rank, signal.SIGSTOP)
    wait_for_members(core, run, 1, step)
    os.kill(rank, signal.SIGCONT)
    _, said = other.communicate(timeout=30)
    assert other.returncode == 1
    assert "lost another rank: replica 1 had not answered in time, and the others go on" in said
    core.send_signal(signal.SIGKILL)
    core.wait(20)


def test_replicas_end_with_their_leader(place: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    more = ["--replicas", "3", "--local-ranks", "1", "--elastic"]
    core = Command(*flags(place, run, *more, "--port", str(port)))
    others = [Command(*sidecar(port, rank)) for rank in (1, 2)]
    wait_for_members(core, run, 3)
    core.send_signal(signal.SIGKILL)
    for other in others:
        _, said = other.communicate(timeout=20)
        assert other.returncode == 1
        assert "lost another rank" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--replicas", "1", "--elastic"], "--elastic needs --replicas of at least 2"),
        (["--replicas", "2", "--max-replicas", "3"], "--max-replicas needs --elastic"),
        (["--replicas", "3", "--elastic", "--max-replicas", "2"], "--max-replicas 2 is less than"),
        (["--replicas", "2", "--elastic", "--max-replicas", "8"], "--total-batch 7 is less than --"
         "max-replicas 8"),
        (["--replicas", "2", "--elastic", "--device-backend", "nccl"], "goes over gloo"),
        (["--replicas", "2", "--elastic", "--no-distro", "--no-distro-quantization", "--method",
          "dense", "--param-dtype", "float32"], "--elastic wants --method distro, got dense"),
        (["--replicas", "2", "--elastic", "--data-parallelism", "2", "--local-ranks", "3"],
         "a replica's 2 ranks are started together"),
    ],
)  # fmt: skip
def test_what_cannot_be_elastic_is_refused(
    place: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    (ended,) = run_command(*flags(place, tmp_path / "run", *more, "--dry-run"))
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
