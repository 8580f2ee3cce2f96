"""`psyche-fast profile`: what it sees of a run, that nothing of it stays; full memory."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch

from psyche_fast.batch import Batch
from psyche_fast.cli import cli, main
from psyche_fast.config import RunConfig
from psyche_fast.core import profile
from psyche_fast.errors import explain
from psyche_fast.kernels.reference import encode as twin
from psyche_fast.models.source import resolve_model
from psyche_fast.rank import memory
from psyche_fast.rank.serve import build_trainer
from tests.groups import run_command
from tests.tiny import random_tokens, save_llama, save_tokens


def arguments(folder: Path) -> list[str]:
    return [
        "--model", str(folder / "model"), "--data-path", str(folder / "data"),
        "--sequence-length", "32", "--micro-batch", "2", "--total-batch", "4", "--distro",
        "--compression-chunk", "16", "--param-dtype", "float32", "--device", "cpu",
        "--output", str(folder / "run"),
    ]  # fmt: skip


@pytest.mark.processes
def test_a_profile_of_a_run(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    save_tokens(tmp_path / "data")
    [done] = run_command("profile", *arguments(tmp_path), "--steps", "2", "--total-tokens", "1M")
    assert done.returncode == 0, done.stderr
    rows = {line[:34].strip(): line[34:].split() for line in done.stdout.splitlines()}
    for name in ("phase: train", "phase: optimize", "rank: optimizer.step"):
        calls, host, _, share = map(float, rows[name])
        assert calls == 1.0, name
        assert host > 0
        assert 0 < share <= 100
    assert float(rows["rank: forward"][0]) == 2.0, "micro-batches of a step"
    assert float(rows["kernel: encode.encode"][0]) >= 1.0
    events = json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    steps = [e for e in events if e.get("name", "").startswith("ProfilerStep")]
    assert {e["name"] for e in steps} == {"ProfilerStep#2", "ProfilerStep#3"}
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == profile.BEFORE + 2 + profile.AFTER


def test_it_takes_the_options_of_train() -> None:
    names = {name: {p.name for p in cli.commands[name].params} for name in ("train", "profile")}
    assert names["train"] - names["profile"] == {"dry_run", "max_restarts", "python"}
    assert names["profile"] - names["train"] == {"steps", "nvtx"}


def test_ranges_are_there_while_it_looks_on_and_then_gone(tmp_path: Path) -> None:
    config = RunConfig.of(
        model="m", data_path="d", sequence_length=16, micro_batch=1, total_batch=1, distro=True,
        compression_chunk=16, param_dtype="float32", device="cpu",
    )  # fmt: skip
    model = resolve_model(str(save_llama(tmp_path / "model")))
    trainer = build_trainer(config, model, torch.device("cpu"))
    call = twin.encode
    batch = Batch(random_tokens(1, 16))
    with profile._ranges(trainer):
        assert twin.encode is not call
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            trainer.train(1, batch)
            trainer.optimize(1)
    assert twin.encode is call
    assert not {"loss", "_forward_backward"} & (vars(trainer).keys() | vars(trainer.model).keys())
    assert not {"step", "receive"} & vars(trainer._optimizer).keys()
    counts = {e.key: e.count for e in seen.key_averages()}
    assert counts["rank: forward"] == counts["rank: forward and backward"] == 1
    assert counts["rank: optimizer.after_backward"] == counts["rank: optimizer.step"] == 1


def test_a_range_is_one_line_with_the_time_of_host_and_device() -> None:
    def average(key, count, cpu, device):
        return types.SimpleNamespace(
            key=key, count=count, cpu_time_total=cpu, device_time_total=device
        )

    averages = [
        average("aten::mm", 80, 5e3, 1e3),
        average("phase: train", 4, 6e3, 0.0),
        average("phase: train", 4, 0.0, 7e3),  # as the device saw it
        average("kernel: encode.encode", 8, 1e3, 2e3),
        *(average(f"ProfilerStep#{n}", 1, 2.5e3, 0.0) for n in range(4)),
    ]
    lines = [line.split() for line in profile.table(averages, 4)]
    assert lines[0][:6] == ["profile", "4", "steps", "of", "2.5", "ms,"]
    assert lines[2] == ["phase:", "train", "1.0", "1.50", "1.75", "60.0"]
    assert lines[3] == ["kernel:", "encode.encode", "2.0", "0.25", "0.50", "10.0"]
    assert len(lines) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_ranges_for_nsight_want_a_gpu(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["profile", *arguments(tmp_path), "--nvtx"])
    assert stopped.value.code == 2
    assert "--nvtx: ranges for Nsight Systems want a CUDA device" in capsys.readouterr().err


class Allocator:
    """In place of CUDA's."""

    def __init__(self, monkeypatch, fails: bool = False) -> None:
        self.fails = fails
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(memory, "dump_memory_snapshot", self.dump)

    def dump(self, path: Path) -> None:
        if self.fails:
            raise OSError("no space left on device")
        path.write_bytes(b"blocks")


def run_out(folder: Path, error: Exception) -> None:
    with memory.snapshot_if_full(folder, 3):
        raise error


def test_what_fills_a_gpu_is_written_down_and_said_where(tmp_path, monkeypatch) -> None:
    Allocator(monkeypatch)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    error.add_note("in phase train")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_out(tmp_path, error)
    path = tmp_path / "memory-rank-3.pickle"
    assert path.read_bytes() == b"blocks"
    line = explain(caught.value)
    assert line.startswith("out of memory, in phase train, what held it is in")
    assert str(path) in line


def test_a_snapshot_that_cannot_be_written_hides_nothing(tmp_path, monkeypatch, caplog) -> None:
    Allocator(monkeypatch, fails=True)
    with pytest.raises(torch.OutOfMemoryError):
        run_out(tmp_path, torch.OutOfMemoryError("CUDA out of memory."))
    assert "no snapshot of the memory: no space left on device" in caplog.text
    with pytest.raises(RuntimeError, match="another"):
        run_out(tmp_path, RuntimeError("another"))
    assert list(tmp_path.iterdir()) == []
