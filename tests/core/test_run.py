"""`psyche-fast train`: what a run trains and writes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from psyche_fast.rank import state
from tests.groups import Command, Finished, run_command
from tests.processes import command, is_there, seconds_until_gone, wait_until
from tests.tiny import VOCABULARY

COMMON = [
    "--sequence-length", "32", "--micro-batch", "2", "--total-batch", "8", "--total-steps", "6",
    "--warmup-steps", "0", "--learning-rate", "0.01", "--param-dtype", "float32",
    "--device", "cpu", "--threads", "1",
]  # fmt: skip
DISTRO = ["--distro", "--compression-chunk", "16", "--compression-topk", "8"]


pytestmark = pytest.mark.processes


def start(
    place: Path, output: Path, *arguments: str, ranks: int = 1, data: Path | None = None
) -> Finished:
    """A run in processes that are forked; what rank 0 said."""
    return run_command(
        "train", "--model", str(place / "model"), "--data-path", str(data or place / "data"),
        "--output", str(output), *COMMON, *arguments, ranks=ranks,
    )[0]  # fmt: skip


def train(place: Path, output: Path, *arguments: str, ranks: int = 1) -> list[dict[str, Any]]:
    result = start(place, output, *arguments, ranks=ranks)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [m["loss"] for m in metrics]


def test_a_bad_batch_ends_the_run_after_the_steps_before_it(place: Path, tmp_path: Path) -> None:
    tokens = np.fromfile(place / "data" / "tokens.bin", dtype=np.uint16)
    tokens[3 * 8 * 32 + 40] = VOCABULARY + 44  # in the second row of step 4
    (tmp_path / "data").mkdir()
    tokens.tofile(tmp_path / "data" / "tokens.bin")
    result = start(
        place, tmp_path / "run", *DISTRO, "--replicas", "2", "--checkpoint-every", "3",
        ranks=2, data=tmp_path / "data",
    )  # fmt: skip
    assert result.returncode != 0
    outside = f"step 4: input_ids: token id {VOCABULARY + 44} in the data is outside the model"
    assert outside in result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "config.json").exists()


def test_documents_longer_than_their_row_end_the_run_before_its_step(
    place: Path, tmp_path: Path
) -> None:
    tokens = np.fromfile(place / "data" / "tokens.bin", dtype=np.uint16)[: 48 * 32]
    lengths = [[12, 20]] * 48
    lengths[2 * 8 + 6] = [20, 20]  # in step 3, of the second replica
    table = {"inputs": list(tokens.astype(np.int32).reshape(48, 32)), "sequence_lengths": lengths}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(table), tmp_path / "data" / "train-00000-of-00001.parquet")
    result = start(
        place, tmp_path / "run", *DISTRO, "--replicas", "2", ranks=2, data=tmp_path / "data"
    )
    assert result.returncode != 0
    assert "step 3: sequence_lengths: row 6 adds up to 40, more than the 32" in result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.fixture(scope="module")
def single(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(place, tmp_path_factory.mktemp("single") / "run", "--total-batch", "7")


def test_adamw_equals_a_plain_loop(place: Path, single: list[dict[str, Any]]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    tokens = torch.from_file(
        str(place / "data" / "tokens.bin"), size=20_000, dtype=torch.uint16
    ).long()
    expected, norms = [], []
    for step in range(1, 7):
        # a cosine from 0.01 to a tenth of it over 6 steps
        optimizer.param_groups[0]["lr"] = (
            0.001 + 0.009 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 6))).item()
        )
        rows = tokens[(step - 1) * 7 * 32 : step * 7 * 32].view(7, 32)
        loss = model(rows, labels=rows).loss
        loss.backward()
        expected.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses(single) == pytest.approx(expected, abs=1e-4)
    assert [m["grad_norm"] for m in single] == pytest.approx(norms, rel=1e-3)


def test_shards_and_slices_train_alike(
    place: Path, tmp_path: Path, single: list[dict[str, Any]]
) -> None:
    # 7 rows in micro-batches of 2 per rank: neither divides, and nothing may be dropped
    metrics = train(
        place, tmp_path / "run", "--total-batch", "7",
        "--data-parallelism", "2", "--tensor-parallelism", "2", ranks=4,
    )  # fmt: skip
    assert losses(metrics) == pytest.approx(losses(single), abs=1e-4)
    norms = [m["grad_norm"] for m in metrics]
    assert norms == pytest.approx([m["grad_norm"] for m in single], rel=1e-3)
    saved = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoints" / "step-000006"
    )
    assert all(p.isfinite().all() for p in saved.parameters())


def test_distro_replicas(place: Path, tmp_path: Path) -> None:
    metrics = train(
        place, tmp_path / "run", *DISTRO, "--distro-quantization", "--replicas", "2",
        "--check-every", "1", "--total-steps", "12", "--total-batch", "7", ranks=2,
    )  # fmt: skip
    found = losses(metrics)
    assert found[-1] < found[0] - 0.3
    last = metrics[-1]
    assert 0 < last["bytes_sent"] < last["dense_bytes"] / 20
    # The second replica's rows in 2 bytes a token, once, and little else.
    assert 3 * 32 * 2 <= last["batch_bytes"] < 4 * 32 * 2
    assert last["num_tokens"] == 12 * 7 * 32
    assert {"data", "send", "train", "counts", "optimize"} <= metrics[-2]["seconds"].keys()
    assert (tmp_path / "run" / "plots" / "loss.png").stat().st_size > 1000
    assert "replicas = 2" in (tmp_path / "run" / "config.toml").read_text()


def test_distro_is_the_same_however_a_replica_is_split(place: Path, tmp_path: Path) -> None:
    whole, split = (
        train(
            place, tmp_path / str(by), *DISTRO, "--replicas", "2", "--check-every", "1",
            "--tensor-parallelism", str(by), "--total-steps", "5", ranks=2 * by,
        )
        for by in (1, 2)
    )  # fmt: skip
    assert losses(split) == pytest.approx(losses(whole), abs=1e-3)
    # Each chunk is sent by one rank of a replica; what tensor parallelism leaves whole (norms) by
    # each of its ranks, and every rank rounds its message up.
    assert split[-1]["bytes_sent"] < 1.25 * whole[-1]["bytes_sent"]


def test_checkpoints_and_save_path(place: Path, tmp_path: Path) -> None:
    train(
        place, tmp_path / "run", "--checkpoint-every", "4", "--save-path", str(tmp_path / "final"),
        "--optim-stats", "--grad-accum-in-fp32", *DISTRO, "--param-dtype", "bfloat16",
        "--activation-checkpointing",
    )  # fmt: skip
    names = sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert model.dtype == torch.bfloat16
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["optim_stats"]["grad_norm/model.norm.weight"] > 0


def test_start_step_goes_on_where_the_data_and_the_schedule_are(
    place: Path, tmp_path: Path
) -> None:
    whole = train(place, tmp_path / "whole")
    part = train(place, tmp_path / "part", "--start-step", "4")
    assert [m["step"] for m in part] == [4, 5, 6]
    assert part[0]["learning_rate"] == whole[3]["learning_rate"]
    assert part[0]["loss"] != whole[0]["loss"], "other data than step 1's"


OWN_MODEL = """
import torch

class Bigram(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config["vocab_size"], config["vocab_size"])

    def forward(self, input_ids, labels=None, position_ids=None):
        logits = self.table(input_ids)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return {"loss": loss, "logits": logits}

def build(config):
    return Bigram(config)
"""


def test_any_python_model(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "mine.py").write_text(OWN_MODEL)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 96}')
    save_file({"table.weight": torch.zeros(96, 96)}, tmp_path / "model" / "model.safetensors")
    result = subprocess.run(
        command(
            "train", "--python-arch", "mine:build", "--model", str(tmp_path / "model"),
            "--data-path", str(place / "data"), "--output", str(tmp_path / "run"),
            *COMMON, *DISTRO, "--replicas", "2", "--learning-rate", "0.3", "--weight-decay", "0",
        ),
        capture_output=True, text=True, timeout=110, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["loss"] < json.loads(metrics[0])["loss"] - 0.3


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def start_long_run(place: Path, output: Path) -> tuple[Command, psutil.Process]:
    core = Command(
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"),
        "--output", str(output), *COMMON, *DISTRO, "--replicas", "2", "--total-steps", "100000",
    )  # fmt: skip
    metrics = output / "metrics.jsonl"
    wait_until(lambda: core.poll() is not None or size(metrics) > 2000)
    assert core.poll() is None, core.communicate()
    (sidecar,) = psutil.Process(core.pid).children()
    return core, sidecar


def test_killed_sidecar_ends_the_run_by_name(place: Path, tmp_path: Path) -> None:
    core, sidecar = start_long_run(place, tmp_path / "run")
    sidecar.send_signal(signal.SIGKILL)
    started = time.monotonic()
    _, stderr = core.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert core.returncode == 1
    assert re.search(rf"error: rank 1 \(pid {sidecar.pid}\) ended: killed by SIGKILL", stderr)
    assert "Traceback" not in stderr


def test_killed_core_takes_its_sidecars_along(place: Path, tmp_path: Path) -> None:
    core, sidecar = start_long_run(place, tmp_path / "run")
    core.send_signal(signal.SIGKILL)
    assert seconds_until_gone(sidecar) < 1
    core.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_stopped_run_leaves_a_checkpoint(
    place: Path, tmp_path: Path, number: signal.Signals
) -> None:
    core, sidecar = start_long_run(place, tmp_path / "run")
    core.send_signal(number)
    _, stderr = core.communicate(timeout=20)
    assert core.returncode == 128 + number, stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    manifest = state.read_manifest(checkpoint)  # and it can go on from there
    assert checkpoint.name == f"step-{manifest.step:06d}"
    assert not is_there(sidecar)
