"""The command line of Psyche's Python documentation, word for word after the program's name."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.groups import Command
from tests.processes import wait_until
from tests.tiny import save_llama

SEED = """
  --model emozilla/llama2-20m-init \
  --data-path ./data/fineweb-10bt/ \
  --total-batch 2 \
  --micro-batch 1 \
  --python
"""


@pytest.mark.processes
def test_the_seeds_command_line_runs(tmp_path: Path) -> None:
    # The model's and the data's names are folders here; all other flags have their defaults.
    save_llama(tmp_path / "emozilla" / "llama2-20m-init")
    data = tmp_path / "data" / "fineweb-10bt"
    data.mkdir(parents=True)
    np.random.default_rng(0).integers(0, 96, 9 * 2048, dtype=np.uint16).tofile(data / "0.ds")
    run = Command("train", *shlex.split(SEED), folder=tmp_path)

    def has_trained() -> bool:
        return any(file.stat().st_size for file in tmp_path.glob("runs/*/metrics.jsonl"))

    wait_until(lambda: run.poll() is not None or has_trained(), 90)
    assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT, err
    assert "step     1/25000" in err
    assert "8 sequences of 2048 tokens, 50.0k needed, read 6250.0 times" in err
    (checkpoint,) = tmp_path.glob("runs/*/checkpoints/step-*")
    assert str(checkpoint.relative_to(tmp_path)) in out
