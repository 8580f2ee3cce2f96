"""How sidecars of Psyche's core end: when told, when it is gone, and when it says what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.groups import in_process, running
from tests.processes import command, is_there, seconds_until_gone, wait_until
from tests.psyche.rank0 import Core
from tests.psyche.test_rank0 import adamw, distro, start
from tests.tiny import random_tokens, save_llama

pytestmark = pytest.mark.processes


def _refused(folder: Path, logs: Path, tp: int, text: str, hyperparameters: bool) -> list[Any]:
    core = start(folder, logs, 3 - tp, tp)
    core.load_files(sorted(folder.iterdir()))
    if hyperparameters:
        core.hyperparameters(adamw())
    core.store.set(str(core.number), text)
    dist.barrier()
    return [child.wait(60) for child in core.children]


TRAIN = {
    "operation": "train", "step": 1, "zero_optim": False, "batch_id": [0, 1],
    "batch_shape": [2, 8], "batch_has_labels": False, "batch_has_position_ids": False,
    "batch_sequence_lengths": None, "warmup_lr_between": None, "results_len": 0,
    "results_metadata": None,
}  # fmt: skip
HYPERPARAMETERS = {
    "operation": "hyperparameters", "optimizer": adamw(0.5), "micro_batch_size": 2,
    "lr_scheduler": {"Constant": {"base_lr": 0.1, "warmup_init_lr": 0.0, "warmup_steps": 0}},
    "grad_accum_in_fp32": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tp", "operation", "said"),
    [
        (1, {"operation": "dance"}, "operation 1: unknown operation 'dance'"),
        (1, {**TRAIN, "tempo": 3}, "unknown field `tempo`"),
        (1, '{"operation": "exit", "operation": "exit"}', "appears twice"),
        (1, {**HYPERPARAMETERS, "grad_accum_in_fp32": True}, "grad_accum_in_fp32: "),
        (2, HYPERPARAMETERS, "clip_grad_norm 0.5 with tensor parallelism"),
        (2, TRAIN, "'train' came before 'hyperparameters'"),
    ],
)
def test_what_cannot_be_ends_a_rank_with_one_line(
    tmp_path: Path, tp: int, operation: Any, said: str
) -> None:
    folder = save_llama(tmp_path / "model")
    text = operation if isinstance(operation, str) else json.dumps(operation)
    assert in_process(_refused, folder, tmp_path, tp, text, tp == 1) == [1]
    last = (tmp_path / "rank-1.log").read_text().splitlines()[-1]
    assert " ERROR " in last
    assert re.search(said, last), last


def _killed(folder: Path, logs: Path, when: str) -> None:
    core = start(folder, logs, 2, 1)
    (logs / "new").write_text(str(core.children[0].pid))
    if when != "loading":
        core.load_files(sorted(folder.iterdir()))
        core.hyperparameters(distro(0.5))
        core.train(1, random_tokens(8, 12))
    (logs / "new").rename(logs / "child")
    if when == "cancelled":
        core.train(2, random_tokens(8, 12), cancel_before=1)
    time.sleep(600)


@pytest.mark.parametrize("when", ["loading", "idle", "cancelled"])
def test_sidecars_wait_for_the_core_and_end_with_it(tmp_path: Path, when: str) -> None:
    """A core whose step is cancelled leaves its sidecars in a collective, and aborts in the end."""
    import psutil

    folder = save_llama(tmp_path / "model")
    with running(_killed, folder, tmp_path, when) as process:
        wait_until((tmp_path / "child").exists)
        child = psutil.Process(int((tmp_path / "child").read_text()))
        wait_until(lambda: child.num_threads() > 1)
        time.sleep(1.0)
        assert is_there(child)
        process.kill()
        assert seconds_until_gone(child) < 1


def _cold(folder: Path, logs: Path, path: str) -> list[Any]:
    core = Core(2, 1, logs, path)
    core.load_files(sorted(folder.iterdir()), "HfLlama")
    import psyche
    import psyche.models.causal_lm

    assert psyche.__file__.startswith(path)
    assert psyche.models.CausalLM is psyche.models.causal_lm.CausalLM
    with pytest.raises(ValueError, match="'Torchtitan': its model code"):
        psyche.make_causal_lm("Torchtitan", psyche.PretrainedSourceRepoFiles([]), "cpu", "sdpa")
    core.hyperparameters(adamw(None))
    core.train(1, random_tokens(4, 12))
    return core.exit()


def test_the_folder_that_the_command_prints(tmp_path: Path) -> None:
    """With nothing else on the path besides the package, and a sidecar that nobody has warmed."""
    path = subprocess.run(
        command("psyche-path"), capture_output=True, text=True, check=True
    ).stdout.strip()
    folder = save_llama(tmp_path / "model")
    assert in_process(_cold, folder, tmp_path, path) == [0]
