"""The estimate of a run against what real processes hold and send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from psyche_fast import cli
from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.core.estimate import estimate
from psyche_fast.models.source import read_config, resolve_model
from psyche_fast.rank.serve import build_trainer
from tests.groups import run_ranks
from tests.memory import (
    SLACK,
    anonymous,
    anonymous_peak,
    forget_peak,
    give_back_at_once,
    needs_proc,
)
from tests.tiny import llama_config

BASE: dict[str, Any] = {
    "distro": True, "distro_quantization": True, "sequence_length": 128, "micro_batch": 4,
    "compression_topk": 8, "param_dtype": "float32",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"distro": False, "distro_quantization": False},
    "bf16": {
        "param_dtype": "bfloat16", "grad_accum_in_fp32": True, "activation_checkpointing": True,
    },
    "shards": {"data_parallelism": 2},
    "slices": {"replicas": 2, "tensor_parallelism": 2, "delta_dtype": "bfloat16"},
}  # fmt: skip


def save(folder: Path, kind: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    settings = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=kind != "llama")
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder


def hold(rank: int, folder: Path, changes: dict[str, Any]) -> tuple[int, int]:
    """By how much a rank's process grows in three steps of two micro-batches; what it sends."""
    run = RunConfig.of(**{"attn_implementation": "sdpa", **BASE, **changes})
    parallelism, length = run.parallelism, run.model.sequence_length
    rows = 2 * run.training.micro_batch * parallelism.data_parallelism * parallelism.replicas
    warm = torch.randn(256, 256, requires_grad=True)
    (warm @ warm).sum().backward()  # threads and buffers that every process has once
    give_back_at_once()
    before = anonymous()
    trainer = build_trainer(run, resolve_model(str(folder)), torch.device("cpu"))
    most = 0
    for step in (1, 2, 3):
        for call in (
            lambda step: trainer.train(step, Batch(torch.randint(2048, (rows, length)))),
            trainer.optimize,
        ):
            # Of each part alone: pages of code that come in after a peak would be taken from it.
            forget_peak()
            call(step)
            most = max(most, anonymous_peak())
    return most - before, trainer.bytes_sent


@pytest.mark.processes
@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("name", RUNS)
def test_memory_and_bytes_are_those_of_a_run(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "model", "qwen3" if name == "shards" else "llama")
    run = RunConfig.of(**{**BASE, **RUNS[name]})
    found = estimate(read_config(resolve_model(str(folder))), run)
    grown, sent = run_ranks(hold, run.parallelism.world_size, folder, RUNS[name])[0]
    assert sent == found.sent
    assert 0.9 * found.memory < grown < 1.1 * found.memory + SLACK
    assert not dist.is_initialized()


def copied(rank: int, folder: Path, changes: dict[str, Any]) -> int:
    """Bytes of a rank's snapshot."""
    run = RunConfig.of(**{**BASE, **changes})
    trainer = build_trainer(run, resolve_model(str(folder)), torch.device("cpu"))
    given: list[Any] = []
    for step in (1, 2):
        trainer.train(step, Batch(torch.randint(2048, (4, 16))))
        trainer.optimize(step)
        if step == 1:
            trainer.take_snapshot(step, given.append)
    (files,) = given
    return sum(p.tensor.nbytes for pieces in files.values() for p in pieces.values())


@pytest.mark.processes
@pytest.mark.parametrize("name", ["adamw", "bf16", "shards"])
def test_a_snapshot_is_as_large_as_estimated(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "model", "llama")
    changes = {**RUNS[name], "sequence_length": 16}
    run = RunConfig.of(**{**BASE, **changes})
    found = estimate(read_config(resolve_model(str(folder))), run).snapshot
    (size, *_) = run_ranks(copied, run.parallelism.world_size, folder, changes)
    assert found == pytest.approx(size, rel=0.02)


# Llama 3.1 405B with 2 of its 126 layers: each takes as long as the next.
LAYER = 2 * 16384 * (16384 + 1024) + 3 * 16384 * 53248 + 2 * 16384
PARAMETERS = 2 * 128256 * 16384 + 16384 + 2 * LAYER
LLAMA_405B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 2,
    "num_attention_heads": 128, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def command(*words: str) -> Any:
    return CliRunner().invoke(cli.cli, ["estimate", *words], catch_exceptions=True)


def test_a_large_model_from_its_config_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_405B))
    words = ["--model", str(file), "--distro", "--distro-quantization", "--replicas", "4"]
    words += ["--data-parallelism", "16", "--tensor-parallelism", "8", "--micro-batch", "1"]
    words += ["--activation-checkpointing", "--compression-topk", "8"]
    said = command(*words, "--json", "--bandwidth", "100Mbit", "--latency-ms", "20")
    assert said.exit_code == 0, said.output
    found = json.loads(said.output)
    assert found["total_parameters"] == PARAMETERS
    assert found["parameters"] == pytest.approx(PARAMETERS * 2 / 128, rel=0.01)
    # 12 bytes for each of a rank's chunks of 64 x 64
    assert found["sent"] == pytest.approx(PARAMETERS / 128 / 4096 * 12, rel=0.03)
    link = 8 * 3 * found["sent"] * 8 / 100e6
    assert found["exchange_seconds"] == pytest.approx(4 * 0.02 + link)
    table = command(*words).output
    assert "model       10.6G parameters" in table
    assert "times less than a dense exchange" in table


def test_a_method_over_a_link(tmp_path: Path) -> None:
    """Bytes of 4 replicas' all-gather, and of owners; up and down, by round and by step."""
    file = tmp_path / "config.json"
    small = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3}
    file.write_text(json.dumps({**LLAMA_405B, **small, **heads}))
    words = ["--model", str(file), "--replicas", "4", "--param-dtype", "float32", "--every", "12"]
    words += ["--uplink", "10Mbit", "--downlink", "100Mbit", "--latency-ms", "20"]
    found = {}
    for method in ("sparseloco", "diloco", "streaming-diloco"):
        said = command(*words, "--method", method, "--step-seconds", "0.5", "--json")
        assert said.exit_code == 0, said.output
        found[method] = json.loads(said.output)
    elements = found["diloco"]["elements"]
    sparse, dense, stream = found.values()
    assert sparse["sent"] == pytest.approx(elements / 4096 * 84, rel=0.02)
    assert sparse["rounds"]["up"] == [3 * sparse["sent"]] == sparse["rounds"]["down"]
    assert dense["rounds"]["up"] == [pytest.approx(2 * 2 * elements * 3 / 4, rel=0.02)]
    assert len(stream["rounds"]["up"]) == 3
    assert sum(stream["state"].values()) == 16 * elements
    up = 8 * sparse["rounds"]["up"][0] / 10e6
    assert sparse["exchange_seconds"] == pytest.approx(4 * 0.02 + up)
    assert sparse["over"]["loss"] == pytest.approx((4 * 0.02 + up) / (12 * 0.5))
    down = 8 * dense["rounds"]["down"][0] / 100e6
    up = 8 * dense["rounds"]["up"][0] / 10e6
    assert dense["exchange_seconds"] == pytest.approx(8 * 0.02 + max(up, down)), "two ways each"
    assert sparse["chosen"]["loss"] == 0
    assert sparse["chosen"]["every"] == 12
    table = command(*words, "--method", "sparseloco", "--step-seconds", "0.5").output
    assert "state       16.1 bytes per parameter and rank: shared 4, kept 4, own" in table
    assert "per rank and round of 12 steps" in table
    assert "chosen   --topk 64 --every 12 --delay" in table


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--uplink", "fast"], "--uplink: wanted a rate such as 100Mbit or 1Gbit, got 'fast'"),
        (["--link", "1Gbit,1ms", "--uplink", "1Gbit"], "--link and --uplink: give one of them"),
        (["--link", "1Gbit"], "link '1Gbit': wanted a rate and a latency"),
        (["--method", "loco"], "--method loco: method: wanted one of distro, demo"),
        (
            ["--bandwidth", "fast"],
            "--bandwidth: wanted a rate such as 100Mbit or 1Gbit, got 'fast'",
        ),
        (["--tensor-parallelism", "3"], "--tensor-parallelism 3 does not divide"),
        (["--model", "./nowhere"], "there is no folder './nowhere'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: list[str], says: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA_405B, "num_hidden_layers": 1}))
    said = command("--model", str(file), "--replicas", "1", *words)
    assert isinstance(said.exception, ValueError)
    assert says in str(said.exception)
    assert not dist.is_initialized()


def test_a_loss_without_logits_is_what_is_estimated() -> None:
    model = llama_config(vocab_size=131072, max_position_embeddings=512).to_dict()
    model["architectures"] = ["LlamaForCausalLM"]
    sizes = {}
    for loss in ("plain", "auto"):
        run = RunConfig.of(sequence_length=512, micro_batch=4, param_dtype="float32", loss=loss)
        sizes[loss] = estimate(model, run).activations
    logits = 4 * 4 * 512 * 131072
    assert sizes["plain"] > 2 * logits
    assert sizes["auto"] < 0.2 * logits
