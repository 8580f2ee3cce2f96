from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from psyche_fast.psyche import messages

TRAIN: dict[str, Any] = {
    "operation": "train", "step": 3, "zero_optim": False, "batch_id": [0, 7],
    "batch_shape": [8, 16], "batch_has_labels": True, "batch_has_position_ids": False,
    "batch_sequence_lengths": None, "warmup_lr_between": [0, 10], "results_len": 0,
    "results_metadata": None,
}  # fmt: skip
METADATA = {
    "sparse_idx_size": [[1, 1, 8]], "sparse_idx_dtype": 0, "sparse_val_size": [[1, 1, 4]],
    "sparse_val_dtype": 15, "xshape": [[1, 1, 64, 64]], "totalk": [4096],
}  # fmt: skip
HYPERPARAMETERS: dict[str, Any] = {
    "operation": "hyperparameters",
    "lr_scheduler": {"Constant": {"base_lr": 1e-3, "warmup_init_lr": 0.0, "warmup_steps": 0}},
    "optimizer": "Dummy", "micro_batch_size": 4, "grad_accum_in_fp32": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        TRAIN,
        {**TRAIN, "results_len": 2, "results_metadata": METADATA},
        {**TRAIN, "batch_sequence_lengths": [[16]] * 8},
        HYPERPARAMETERS,
        {"operation": "optimize", "step": 1, "warmup_lr_between": None, "results_len": 1,
         "results_metadata": METADATA},
        {"operation": "forward", "batch_shape": [1, 2], "batch_has_labels": False,
         "batch_has_position_ids": True, "batch_sequence_lengths": None,
         "num_logits_to_keep": 1, "loss_scale": 2.0},
        # what Psyche's core writes for an empty list of results
        {**TRAIN, "results_metadata": dict.fromkeys(METADATA)},
        {"operation": "extract"}, {"operation": "truncate_bf16"}, {"operation": "exit"},
    ],
)  # fmt: skip
def test_every_operation_reads_and_writes_the_same_json(fields: dict[str, Any]) -> None:
    operation = messages.decode(json.dumps(fields), 0)
    assert json.loads(msgspec.json.encode(operation)) == fields


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"operation": "dance"}, "operation 5: unknown operation 'dance'"),
        ({"step": 1}, "the field 'operation'"),
        ({**TRAIN, "extra": 1}, r"operation 5 \(train\): .*unknown field `extra`"),
        ({k: v for k, v in TRAIN.items() if k != "step"}, "missing required field `step`"),
        ({**TRAIN, "optimize": True}, "unknown field `optimize`"),  # our own core's, once
        ({**TRAIN, "step": 1.5}, r"Expected `int`.*\$.step"),
        ({**TRAIN, "step": True}, r"\$.step"),
        ({**TRAIN, "step": "3"}, r"Expected `int`, got `str` - at `\$.step"),
        ({**TRAIN, "zero_optim": "false"}, r"Expected `bool`, got `str`"),
        ({**TRAIN, "step": -1}, r"`int` >= 0 - at `\$.step`"),
        ({**TRAIN, "batch_shape": [8]}, "batch_shape"),
        ({**TRAIN, "batch_shape": [0, 16]}, r"`int` >= 1 - at `\$.batch_shape"),
        ({**TRAIN, "batch_sequence_lengths": [[16]]}, "has 1 rows, batch_shape 8"),
        ({**TRAIN, "results_len": 1}, "results_metadata is null"),
        ({**TRAIN, "results_len": 1, "results_metadata": {**METADATA, "totalk": []}},
         "different lengths"),
        ({**TRAIN, "results_len": 1, "results_metadata": {**METADATA, "xshape": None}},
         "xshape must not be null"),
        ({**HYPERPARAMETERS, "optimizer": {"Adam": {}}}, "unknown form 'Adam'"),
        ({**HYPERPARAMETERS, "optimizer": "Adam"}, "optimizer: wanted"),
        ({**HYPERPARAMETERS, "optimizer": {"AdamW": {"betas": [0.9]}}}, "AdamW"),
        ({**HYPERPARAMETERS, "lr_scheduler": {"Step": {}}}, "unknown form 'Step'"),
        ({**HYPERPARAMETERS, "micro_batch_size": 0}, "micro_batch_size"),
    ],
)  # fmt: skip
def test_malformed_operations_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        messages.decode(json.dumps(fields), 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "wanted an object"),
        ('{"operation": "exit", "operation": "train"}', "'operation' appears twice"),
        (json.dumps({**TRAIN, "step": float("nan")}), "NaN is not a JSON number"),
        ('{"operation": "forward", "batch_shape": [1, 2], "loss_scale": 1e999}', "finite"),
    ],
)
def test_what_json_loads_would_take(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        messages.decode(text, 0)


DISTRO = {
    "clip_grad_norm": None, "weight_decay": None, "compression_decay": 0.999,
    "compression_topk": 4, "compression_chunk": 64, "quantize_1bit": True,
}  # fmt: skip
ADAMW = {"betas": [0.8, 0.9], "weight_decay": 0.2, "eps": 1e-6, "clip_grad_norm": 0.5}


@pytest.mark.parametrize("clip", [None, 0.0, -1.0, 0.5])
def test_optimizers_are_read_with_any_limit(clip: float | None) -> None:
    assert messages.read_optimizer("Dummy") is None
    adamw = messages.read_optimizer({"AdamW": {**ADAMW, "clip_grad_norm": clip}})
    assert adamw == messages.AdamW(
        betas=(0.8, 0.9), weight_decay=0.2, eps=1e-6, clip_grad_norm=clip
    )
    distro = messages.read_optimizer({"Distro": {**DISTRO, "clip_grad_norm": clip}})
    assert isinstance(distro, messages.Distro)
    assert (distro.clip_grad_norm, distro.weight_decay) == (clip, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compression_topk": 0}, "compression_topk"),
        ({"compression_decay": 1.5}, "compression_decay"),
    ],
)
def test_optimizers_out_of_range_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        messages.read_optimizer({"Distro": {**DISTRO, **changes}})
