"""Sidecars driven by a core that is not ours: real processes over gloo, through every operation."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

from psyche_fast.start.spawn import Sidecars
from tests.foreign_core import ForeignCore
from tests.groups import in_process, running
from tests.processes import seconds_until_gone, wait_until
from tests.tiny import batch_loss, random_tokens, save_llama

pytestmark = pytest.mark.processes
ADAMW = {"AdamW": {"betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1e-8, "clip_grad_norm": 0.5}}
DISTRO = {
    "Distro": {
        "clip_grad_norm": 0.5, "weight_decay": None, "compression_decay": 0.9,
        "compression_topk": 4, "compression_chunk": 16, "quantize_1bit": True,
    }
}  # fmt: skip


def _start(folder: Path, world: int, log: Path) -> ForeignCore:
    core = ForeignCore(world, log)
    core.join()
    core.send_files(sorted(folder.iterdir()))
    core.parallelism(1, 1)
    return core


def _reference(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()


def _adamw(folder: Path, log: Path) -> tuple[list[float], list[float], list[int]]:
    core = _start(folder, 3, log)
    core.hyperparameters(ADAMW, lr=0.01, micro=2)
    model = _reference(folder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    losses, expected = [], []
    for step in range(1, 6):
        ids = random_tokens(4, 16, seed=step % 2)
        losses.append(core.train(step, ids))
        core.optimize(step)
        total = 0.0
        for part in ids.chunk(2):
            loss = batch_loss(model, part, model(part, use_cache=False).logits) / 2
            loss.backward()
            total += float(loss)
        expected.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses, expected, core.exit()


def test_adamw_over_files(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    losses, expected, codes = in_process(_adamw, folder, tmp_path / "log")
    assert codes == [0, 0]
    assert losses == pytest.approx(expected, abs=2e-2)  # bf16 parameters
    assert losses[4] < losses[0] - 0.5, "AdamW's steps reach the model"


def _distro(folder: Path, log: Path) -> tuple[list[float], list[float], list[int]]:
    from psyche_fast import Distro, quantize_1bit

    core = _start(folder, 3, log)
    core.hyperparameters(DISTRO, lr=0.004, micro=4)
    model = _reference(folder)
    distro = Distro(
        model.named_parameters(), compression_decay=0.9, compression_topk=4, compression_chunk=16
    )
    losses, expected = [], []
    own: list[list[Any]] = []
    for step in range(1, 9):
        ids = random_tokens(4, 16, seed=step % 2)
        losses.append(core.train(step, ids, results=own))
        distro.error_correction(0.004)
        loss = batch_loss(model, ids, model(ids, use_cache=False).logits)
        loss.backward()
        expected.append(float(loss))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        new = distro.generate(own, 0.004, 0.004)
        model.zero_grad()
        if step > 1:
            signs = [quantize_1bit(r) for r in own]
            core.optimize(step, signs)
            distro.apply(signs, 0.004)
        own = [new]
    return losses, expected, core.exit()


def test_distro_with_results_from_rank_0(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    losses, expected, codes = in_process(_distro, folder, tmp_path / "log")
    assert codes == [0, 0]
    assert losses == pytest.approx(expected, abs=2e-2)
    assert losses[7] < losses[0] - 0.3, "the results reach the model"


def _every_operation(
    folder: Path, log: Path
) -> tuple[dict[str, float], dict[str, float], list[int]]:
    core = ForeignCore(2, log)
    core.join()
    config = (folder / "config.json").read_text()
    reference = _reference(folder)
    tensors = {n: t.detach() for n, t in reference.state_dict().items()}
    core.send_tensors(config, tensors)
    core.parallelism(1, 1)
    core.forward(random_tokens(2, 6))  # wants a model, no trainer
    core.hyperparameters("Dummy")
    ids, labels = random_tokens(4, 12), random_tokens(4, 12, seed=1)
    labels[3] = -100  # as rank 0 pads
    got, expected = {}, {}
    # A row without any real token dilutes the loss; Psyche's rank 0 undoes that by 4 / 3.
    got["labels"] = core.train(0, ids, labels=labels) * 4 / 3
    expected["labels"] = float(batch_loss(reference, labels, reference(ids).logits))
    core.optimize(0)
    core.forward(ids, labels)
    core.operation(operation="extract")
    core.operation(operation="truncate_bf16")

    documents = random_tokens(2, 12, seed=2)
    packed = core.train(1, documents, sequence_lengths=[[5, 7], [12]])
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    got["packed"], got["positions"] = packed, core.train(2, documents, position_ids=positions)
    parts = [documents[0:1, :5], documents[0:1, 5:], documents[1:2]]
    total = sum(
        float(batch_loss(reference, d, reference(d).logits)) * (d.numel() - 1) for d in parts
    )
    expected["packed"] = expected["positions"] = total / sum(d.numel() - 1 for d in parts)
    core.train(3, documents, zero_optim=True)
    return got, expected, core.exit()


def test_every_operation_over_tensors(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    got, expected, codes = in_process(_every_operation, folder, tmp_path / "log")
    assert codes == [0]
    assert got == pytest.approx(expected, abs=2e-2)


def _refusal(folder: Path, log: Path, text: str, after_hyperparameters: bool) -> list[int]:
    core = _start(folder, 3, log)
    if after_hyperparameters:
        core.hyperparameters("Dummy")
    core.raw(text)
    return core.exit_codes()


TRAIN = {
    "operation": "train", "step": 1, "zero_optim": False, "batch_id": [0, 1],
    "batch_shape": [2, 8], "batch_has_labels": False, "batch_has_position_ids": False,
    "batch_sequence_lengths": None, "warmup_lr_between": None, "results_len": 0,
    "results_metadata": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        ({"operation": "dance"}, "unknown operation 'dance'"),
        ({**TRAIN, "tempo": 3}, "unknown field `tempo`"),
        ({**TRAIN, "step": "1"}, r"\$.step"),
        ('{"operation": "exit", "operation": "exit"}', "appears twice"),
    ],
)
def test_malformed_operations_end_every_rank(tmp_path: Path, operation: Any, named: str) -> None:
    folder = save_llama(tmp_path / "model")
    text = operation if isinstance(operation, str) else json.dumps(operation)
    codes = in_process(_refusal, folder, tmp_path / "log", text, True)
    assert codes == [1, 1]
    for rank in (1, 2):
        log = (tmp_path / f"rank-{rank}.log").read_text()
        last = log.splitlines()[-1]  # one clear line, after the trace
        assert " ERROR operation 1" in last, log
        assert re.search(named, last), log


def test_operation_before_hyperparameters(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    codes = in_process(_refusal, folder, tmp_path / "log", json.dumps(TRAIN), False)
    assert codes == [1, 1]
    assert "before 'hyperparameters'" in (tmp_path / "rank-2.log").read_text()


def _bad_results(folder: Path, log: Path) -> list[int]:
    from psyche_fast import Distro

    core = _start(folder, 2, log)
    core.hyperparameters(DISTRO)
    model = _reference(folder)
    distro = Distro(
        model.named_parameters(), compression_decay=0.9, compression_topk=4, compression_chunk=16
    )
    result = distro.generate([], 0.0, 0.0)
    result[3].sparse_idx.fill_(255)
    result[3].sparse_idx.view(torch.uint8)[..., 1::2] = 255
    ids = random_tokens(4, 16)
    core.train(1, ids)
    core.optimize(2, [result])
    return core.exit_codes()


def test_index_out_of_range_is_refused_before_it_is_scattered(tmp_path: Path) -> None:
    # 12 x 8 chunks of the model's odd sides leave indices above totalk representable
    folder = save_llama(tmp_path / "model", hidden_size=24, intermediate_size=40)
    assert in_process(_bad_results, folder, tmp_path / "log") == [1]
    log = (tmp_path / "rank-1.log").read_text()
    assert "peer 0" in log, log


def _foreign_parent(folder: Path) -> None:
    core = ForeignCore(2, folder / "log")
    core.join()
    _wait_to_be_killed(folder, core.children[0].pid)


def _own_parent(folder: Path) -> None:
    sidecars = Sidecars("gloo", "tcp://127.0.0.1:1", 2)
    sidecars.spawn(1, None, folder / "log")
    _wait_to_be_killed(folder, sidecars._children[0].process.pid)


def _wait_to_be_killed(folder: Path, child: int) -> None:
    (folder / "new").write_text(str(child))
    (folder / "new").rename(folder / "child")
    signal.pause()


@pytest.mark.parametrize("parent", [_foreign_parent, _own_parent])
def test_sidecar_dies_with_its_parent(tmp_path: Path, parent: Callable[[Path], None]) -> None:
    """With a foreign core once both have met; with our own at any moment, here during imports."""
    with running(parent, tmp_path) as process:
        wait_until((tmp_path / "child").exists)
        child = psutil.Process(int((tmp_path / "child").read_text()))
        wait_until(lambda: child.num_threads() > 1)  # it watches
        process.kill()
        assert seconds_until_gone(child) < 1
