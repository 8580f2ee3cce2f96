"""What is looked at before a batch is sent."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.batch import IGNORE, Batch
from psyche_fast.core.feed import check
from psyche_fast.models.source import text_config, vocabulary_size

IDS = torch.tensor([[0, 1, 2], [3, 4, 9]])


def changed(value: int) -> torch.Tensor:
    other = IDS.clone()
    other[1, 1] = value
    return other


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch(changed(-1)), "step 5: input_ids: token id -1 in the data is outside the model's "
         "vocabulary of 10 (--data-path, --model)"),
        (Batch(changed(10)), "step 5: input_ids: token id 10 in"),
        (Batch(IDS, changed(-1)), "step 5: labels: token id -1 in the data is outside the model's "
         "vocabulary of 10 (--data-path, --model; labels that no loss is to count are -100)"),
        (Batch(IDS, changed(10)), "step 5: labels: token id 10 in"),
        (Batch(IDS, position_ids=changed(-2)), "step 5: position_ids: -2 is less than 0"),
        (Batch(IDS, sequence_lengths=[[3], [4]]), "step 5: sequence_lengths: row 1"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_know_is_named(batch: Batch, said: str) -> None:
    with pytest.raises(ValueError) as error:
        check(5, batch, 10)
    assert str(error.value).startswith(said)


def test_what_is_right_passes() -> None:
    check(1, Batch(IDS, torch.full_like(IDS, IGNORE)), 10)
    check(1, Batch(IDS, changed(IGNORE), changed(7), None), 10)
    check(1, Batch(changed(10**6)), None)
    with pytest.raises(ValueError, match="input_ids: token id -1"):
        check(1, Batch(changed(-1)), None)


def test_the_vocabulary_of_multimodal_models() -> None:
    text = {"vocab_size": 7, "num_attention_heads": 4}
    nested = {"model_type": "gemma3", "text_config": text, "vision_config": {"vocab_size": 3}}
    assert vocabulary_size(nested) == 7
    assert text_config(nested) is text
    assert vocabulary_size(text) == 7
    # Some say it outside only, some nowhere.
    assert vocabulary_size({"vocab_size": 5, "text_config": {}}) == 5
    assert vocabulary_size({"text_config": None}) is None
