"""Packed documents: boundaries from position ids or lengths, and nothing crosses them."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.batch import Batch
from psyche_fast.models import load_model
from psyche_fast.models.packing import document_lengths, flash_arguments, prepare
from psyche_fast.models.source import resolve_model

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def _positions(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([[i for n in lengths for i in range(n)] for lengths in rows])


def test_lengths_become_positions_and_masked_labels() -> None:
    # Row 0: 5 + 4 and a tail of 3; row 1: zeros are skipped, one document.
    batch = prepare(Batch(IDS, sequence_lengths=[[5, 0, 4], [12, 0]]))
    torch.testing.assert_close(batch.position_ids, _positions([5, 4, 3], [12]))
    expected = IDS.clone()
    expected[0, [0, 5, 9]] = -100
    expected[1, 0] = -100
    torch.testing.assert_close(batch.labels, expected)
    assert batch.sequence_lengths is None
    assert batch.real_tokens() == [12 - 3, 12 - 1]


def test_positions_alone_say_where_documents_start() -> None:
    positions = _positions([5, 7], [1, 1, 10])
    labels = IDS.clone()
    labels[0, 7] = -100
    batch = prepare(Batch(IDS, labels, positions))
    masked = (batch.labels == -100).nonzero().tolist()
    assert masked == [[0, 0], [0, 5], [0, 7], [1, 0], [1, 1], [1, 2]]
    assert labels[0, 5] != -100, "the caller's labels are not written to"
    again = prepare(batch)
    torch.testing.assert_close(again.labels, batch.labels)
    torch.testing.assert_close(again.position_ids, batch.position_ids)


@pytest.mark.parametrize("lengths", [[[12], []], [[0, 0], [0]], [[12], [12]]])
def test_rows_of_one_document_stay_on_the_fast_path(lengths: list[list[int]]) -> None:
    batch = prepare(Batch(IDS, sequence_lengths=lengths))
    assert batch.position_ids is None
    assert batch.labels is None
    batch = prepare(Batch(IDS, position_ids=torch.arange(12).expand(2, -1)))
    assert batch.position_ids is None


def test_padding_rows_may_have_any_positions() -> None:
    positions = torch.cat([_positions([5, 7]), torch.zeros(1, 12, dtype=torch.int64)])
    batch = prepare(Batch(IDS, None, positions, [[5, 7], []]))
    assert (batch.labels[1] == -100).all()


def test_a_row_that_goes_on_from_an_earlier_one_keeps_its_positions() -> None:
    positions = torch.arange(12, 24).expand(2, -1)
    torch.testing.assert_close(prepare(Batch(IDS, position_ids=positions)).position_ids, positions)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (Batch(IDS, sequence_lengths=[[12]]), "wanted a list for each of 2 rows, got 1"),
        (Batch(IDS, sequence_lengths=[[12], [7, 6]]), "row 1 adds up to 13, more than the 12"),
        (Batch(IDS, sequence_lengths=[[5, -1], []]), "row 0 has the negative length -1"),
        (
            Batch(IDS, None, torch.arange(12).expand(2, -1), [[5, 7], [12]]),
            "starts at token 5 of row 0, where the position goes on with 5",
        ),
        (Batch(IDS, position_ids=torch.zeros(2, 11, dtype=torch.int64)), r"got \[2, 11\]"),
        (Batch(IDS, labels=IDS[:1]), r"labels: wanted the shape \[2, 12\]"),
    ],
)
def test_contradictions_are_refused(batch: Batch, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prepare(batch)


def test_flash_attention_is_given_the_boundaries() -> None:
    batch = prepare(Batch(IDS, sequence_lengths=[[5, 4, 3], [12]]))
    assert batch.documents == [[5, 4, 3], None]
    arguments = flash_arguments(document_lengths(batch), IDS.device)
    assert arguments["cu_seq_lens_q"].tolist() == [0, 5, 9, 12, 24]
    assert arguments["cu_seq_lens_k"].dtype == torch.int32
    assert (arguments["max_length_q"], arguments["max_length_k"]) == (12, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("given", ["position_ids", "sequence_lengths", "both"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_packed_logits_and_losses_are_those_of_separate_documents(
    save_model, model_type: str, given: str, attention: str
) -> None:
    config = {"sliding_window": 4} if model_type == "mistral" else {}
    model = load_model(
        resolve_model(str(save_model(model_type, **config))),
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        attn_implementation=attention,
    )
    model.eval()
    lengths = [[5, 4, 3], [12]]
    packed = Batch(
        IDS,
        position_ids=None if given == "sequence_lengths" else _positions(*lengths),
        sequence_lengths=None if given == "position_ids" else lengths,
    )
    logits, none = model.forward(packed)
    assert none is None
    total = count = 0.0
    for row, row_lengths in enumerate(lengths):
        end = 0
        for n in row_lengths:
            ids = IDS[row : row + 1, end : end + n]
            alone, _ = model.forward(Batch(ids))
            torch.testing.assert_close(logits[row : row + 1, end : end + n], alone)
            # In float64, by the definition: each token from the ones before it.
            shifted = alone[0, :-1].double().log_softmax(-1)
            total -= shifted.gather(1, ids[0, 1:, None]).sum().item()
            count += n - 1
            end += n
    assert model.loss(packed).item() == pytest.approx(total / count, abs=1e-6)


def test_documents_without_boundaries_do_see_one_another(save_model) -> None:
    """The control of the test above: attention does carry over where nothing is packed."""
    model = load_model(
        resolve_model(str(save_model())), device=torch.device("cpu"), param_dtype=torch.float32
    )
    whole, _ = model.forward(Batch(IDS))
    alone, _ = model.forward(Batch(IDS[:, 5:]))
    assert (whole[:, 5:] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["mamba", "bloom"])
def test_architectures_that_cannot_keep_documents_apart_say_so(save_model, model_type) -> None:
    extra = {"state_size": 4} if model_type == "mamba" else {"n_head": 4}
    model = load_model(
        resolve_model(str(save_model(model_type, **extra))),
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        attn_implementation="eager",
    )
    with pytest.raises(ValueError, match="lets packed documents see one another"):
        model.loss(Batch(IDS, sequence_lengths=[[5, 7], [12]]))
    assert model.loss(Batch(IDS)).isfinite()
