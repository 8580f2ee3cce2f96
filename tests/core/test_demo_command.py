"""The demo in its short form: it has to learn, save bytes, and leave what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests.groups import run_command


@pytest.mark.processes
def test_forty_steps_of_the_demo_learn(tmp_path: Path) -> None:
    # In shards, as .ci/run's demo is not.
    output = tmp_path / "demo"
    (result,) = run_command(
        "demo", "--max-steps", "40", "--device", "cpu", "--output", str(output),
        "--data-parallelism", "2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert sum(line["loss"] for line in lines[-5:]) / 5 < lines[0]["loss"] - 0.8
    assert 0 < lines[-1]["bytes_sent"] < lines[-1]["dense_bytes"] / 100
    assert "the model continues 'def '" in result.stdout
    assert {p.name for p in (output / "plots").iterdir()} >= {"loss.png", "loss_vs_bytes.png"}
    checkpoint = output / "checkpoints" / "step-000040"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert len(transformers.AutoTokenizer.from_pretrained(checkpoint)) == model.config.vocab_size
