from __future__ import annotations

import pytest
import torch

from psyche_fast.batch import IGNORE, Batch


def make(rows: int, length: int = 4) -> Batch:
    ids = torch.arange(rows * length).view(rows, length)
    return Batch(ids, sequence_lengths=[[length]] * rows)


@pytest.mark.parametrize(("rows", "count"), [(7, 2), (6, 3), (2, 5), (1, 1)])
def test_shares_drop_nothing_and_differ_by_one_row_at_most(rows: int, count: int) -> None:
    batch = make(rows)
    shares = [batch.share(i, count) for i in range(count)]
    assert torch.equal(torch.cat([s.input_ids for s in shares]), batch.input_ids)
    sizes = [s.rows for s in shares]
    assert max(sizes) - min(sizes) <= 1
    assert [len(s.sequence_lengths or []) for s in shares] == sizes


@pytest.mark.parametrize(("rows", "size"), [(7, 2), (8, 3), (9, 4), (10, 4), (3, 8), (5, 5)])
def test_micro_batches_are_torch_chunks(rows: int, size: int) -> None:
    batch = make(rows)
    expected = batch.input_ids.chunk(-(-rows // size))
    found = [m.input_ids for m in batch.micro_batches(size)]
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_padding_rows_count_for_nothing() -> None:
    batch = Batch(torch.ones(3, 4, dtype=torch.long), position_ids=torch.arange(4).expand(3, 4))
    padded = batch.pad_rows(4)
    assert padded.rows == 4
    assert padded.labels is not None
    assert padded.labels[3].tolist() == [IGNORE] * 4
    assert padded.real_tokens() == [3, 3, 3, 0]
    assert padded.position_ids is not None
    assert padded.position_ids[3].tolist() == [0, 1, 2, 3]
    assert batch.pad_rows(3) is batch


def test_real_tokens_are_the_predicted_ones() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    labels = torch.tensor([[9, 1, IGNORE, 1, 1], [IGNORE] * 5])
    assert Batch(ids).real_tokens() == [4, 4]
    assert Batch(ids, labels).real_tokens() == [3, 0]
