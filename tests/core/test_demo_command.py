"""The demo in its short form: it has to learn, save bytes, and leave what it promises."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import transformers

from psyche_fast import cli
from psyche_fast.core import showcase
from tests.groups import Command


def with_few_modules(arguments: list[str]) -> None:
    """`psyche-fast` whose demo reads a tenth of the library, which takes most of its time."""
    files = showcase.standard_library()
    with mock.patch.object(showcase, "standard_library", return_value=files[::10]):
        cli.main(arguments)


@pytest.mark.processes
def test_forty_steps_of_the_demo_learn(tmp_path: Path) -> None:
    # In shards, as .ci/run's demo is not.
    output = tmp_path / "demo"
    demo = Command(
        "demo", "--max-steps", "40", "--device", "cpu", "--output", str(output),
        "--data-parallelism", "2", program=f"{__name__}:with_few_modules",
    )  # fmt: skip
    said, errors = demo.communicate()
    assert demo.returncode == 0, errors
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert sum(line["loss"] for line in lines[-5:]) / 5 < lines[0]["loss"] - 0.8
    assert 0 < lines[-1]["bytes_sent"] < lines[-1]["dense_bytes"] / 100
    assert "the model continues 'def '" in said
    assert f"page        {(output / 'report.html').resolve()} (open it" in said
    page = (output / "report.html").read_text()
    assert page.count('"Held-out bits per byte"') == page.count('"Time of a step by phase"') == 1
    assert "finished with step 40" in page
    assert {p.name for p in (output / "plots").iterdir()} >= {"loss.png", "loss_vs_bytes.png"}
    checkpoint = output / "checkpoints" / "step-000040"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert len(transformers.AutoTokenizer.from_pretrained(checkpoint)) == model.config.vocab_size
