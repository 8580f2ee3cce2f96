"""Background batches: which samples a step gets, wrapping, errors, and closing without hanging."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from psyche_fast.data import BatchPrefetcher, LocalDataset, Sample, collate, prefetch


class Numbers:
    """Sample i is [i, i]. Records what is asked for; raises or waits where told to."""

    sequence_length = 2

    def __init__(self, n, fail_at=None, gate=None):
        self.n, self.fail_at, self.gate, self.asked = n, fail_at, gate, []
        self.taken, self.most_ahead = 0, 0

    def __len__(self):
        return self.n

    def get_samples(self, first, last):
        if self.gate is not None:
            self.gate.wait(30)
        assert 0 <= first <= last < self.n
        self.asked.append((first, last))
        self.most_ahead = max(self.most_ahead, len(self.asked) - self.taken)
        if self.fail_at is not None and first <= self.fail_at <= last:
            raise OSError(f"disk gone at {self.fail_at}")
        ids = [torch.full((2,), i, dtype=torch.int64) for i in range(first, last + 1)]
        return [Sample(t, t) for t in ids]

    def check_vocabulary(self, vocab_size):
        raise NotImplementedError


def drain(prefetcher):
    return {step: batch.input_ids[:, 0].tolist() for step, batch in prefetcher}


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_step_t_takes_samples_from_t_minus_1_times_b():
    with BatchPrefetcher(Numbers(100), 8, 3, 5) as prefetcher:
        batches = drain(prefetcher)
    assert batches == {t: list(range((t - 1) * 8, t * 8)) for t in (3, 4, 5)}
    assert list(batches) == [3, 4, 5]


@pytest.mark.parametrize(("n", "batch"), [(5, 3), (5, 5), (3, 8), (1, 4)])
def test_ids_wrap_round(n, batch):
    with BatchPrefetcher(Numbers(n), batch, 1, 4) as prefetcher:
        batches = drain(prefetcher)
    flat = [i for ids in batches.values() for i in ids]
    assert flat == [i % n for i in range(4 * batch)]


def test_real_files(tmp_path):
    np.arange(41, dtype="<u2").tofile(tmp_path / "a.bin")
    dataset = LocalDataset(tmp_path, sequence_length=4)
    with BatchPrefetcher(dataset, 4, 1, 3) as prefetcher:
        batches = dict(prefetcher)
    assert batches[3].input_ids.tolist() == [
        [4 * k + j for j in range(4)] for k in (8, 9, 0, 1)
    ]  # 10 sequences
    assert batches[3].labels is None


def test_no_steps():
    with BatchPrefetcher(Numbers(5), 2, 4, 3) as prefetcher:
        assert list(prefetcher) == []


def test_reads_a_few_batches_ahead_and_no_further():
    data = Numbers(100)
    with BatchPrefetcher(data, 1, 1, 50) as prefetcher:
        for step in range(1, 21):
            wait_until(lambda step=step: len(data.asked) == step + 1)
            data.taken = step  # before it is, so that nothing counts as ahead that is not
            next(prefetcher)
    assert data.most_ahead == 2


def test_an_error_comes_where_its_batch_would_have_and_stays():
    with BatchPrefetcher(Numbers(100, fail_at=5), 2, 1, 10) as prefetcher:
        assert next(prefetcher)[0] == 1
        assert next(prefetcher)[0] == 2
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone at 5"):
                next(prefetcher)


def test_a_real_error_of_a_data_set_comes_through(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    dataset = LocalDataset(tmp_path, sequence_length=4)
    (tmp_path / "a.bin").unlink()
    with (
        BatchPrefetcher(dataset, 2, 1, 10) as prefetcher,
        pytest.raises(FileNotFoundError, match=r"a\.bin"),
    ):
        next(prefetcher)


def test_close_ends_the_thread_when_the_queue_is_full():
    data = Numbers(100)
    prefetcher = BatchPrefetcher(data, 1, 1, 50)
    wait_until(lambda: len(data.asked) == 2)
    prefetcher.close()
    assert not prefetcher._thread.is_alive()
    assert list(prefetcher) == []
    prefetcher.close()


def test_close_does_not_wait_for_a_read_that_hangs(monkeypatch):
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.1)
    gate = threading.Event()
    prefetcher = BatchPrefetcher(Numbers(100, gate=gate), 1, 1, 50)
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 5
    gate.set()
    prefetcher._thread.join(10)
    assert not prefetcher._thread.is_alive()


def test_close_frees_a_consumer_that_waits(monkeypatch):
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.1)
    gate = threading.Event()
    prefetcher = BatchPrefetcher(Numbers(100, gate=gate), 1, 1, 50)
    got = []
    consumer = threading.Thread(target=lambda: got.extend(prefetcher))
    consumer.start()
    prefetcher.close()
    consumer.join(5)
    gate.set()
    assert not consumer.is_alive()
    assert got == []


# --- collate ------------------------------------------------------------------------------------


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_collate_stacks_every_field():
    batch = collate(
        [
            Sample(ids(1, 2), ids(3, 4), ids(0, 1), (2,)),
            Sample(ids(5, 6), ids(7, 8), ids(0, 0), (1, 1)),
        ]
    )
    assert batch.input_ids.tolist() == [[1, 2], [5, 6]]
    assert batch.labels.tolist() == [[3, 4], [7, 8]]
    assert batch.position_ids.tolist() == [[0, 1], [0, 0]]
    assert batch.sequence_lengths == [[2], [1, 1]]


def test_collate_leaves_out_labels_that_are_the_inputs():
    same = ids(1, 2)
    batch = collate([Sample(same, same)])
    assert batch.labels is None
    assert batch.position_ids is None
    assert batch.sequence_lengths is None


def test_collate_refuses_what_does_not_fit_together():
    same = ids(1, 2)
    plain = Sample(same, same)
    for other in (
        Sample(ids(1, 2), ids(1, 2)),
        Sample(same, same, ids(0, 1)),
        Sample(same, same, None, (2,)),
    ):
        with pytest.raises(AssertionError, match="some samples only"):
            collate([plain, other])
