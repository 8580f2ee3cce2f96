"""Mixtures: Psyche's order of draws and of the shuffle, and what a description may say."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from psyche_fast.config import RunConfig, read_toml
from psyche_fast.data import MixtureDataset, Sample, collate, open_dataset
from psyche_fast.data.order import reversed_order, shuffled_order
from psyche_fast.locations import shown

# Psyche's own tests shuffle with it.
TEST_SEED = bytes(
    [164, 143, 161, 123, 88, 50, 61, 10, 234, 184, 161, 204, 105, 1, 20, 184, 43, 140, 200, 117, 24,
     180, 247, 84, 141, 68, 110, 161, 228, 223, 32, 242]
)  # fmt: skip


class Numbers:
    """Data set `which` of so many samples; sample i is [which, i]."""

    sequence_length = 2

    def __init__(self, which, size):
        self.which, self.size = which, size

    def __len__(self):
        return self.size

    def get_ids(self, ids):
        tensors = [torch.tensor([self.which, i]) for i in ids]
        assert all(t[1] < self.size for t in tensors)
        return [Sample(t, t) for t in tensors]

    def get_samples(self, first, last):
        return self.get_ids(range(first, last + 1))

    def check_vocabulary(self, vocab_size):
        raise ValueError(f"{self.which} is not for {vocab_size}")


def mix(sizes, weights=None, seed=None):
    return MixtureDataset([Numbers(n, size) for n, size in enumerate(sizes)], weights, seed)


def draws(mixture, first=0, last=None):
    last = len(mixture) - 1 if last is None else last
    return [tuple(s.input_ids.tolist()) for s in mixture.get_samples(first, last)]


def oracle(sizes, weights):
    """The data set with the largest deficit, sample by sample."""
    shares = [weight / sum(weights) for weight in weights]
    drawn, found = [0] * len(sizes), []
    for number in range(sum(sizes)):
        behind = [s * max(number, 1) - d for s, d in zip(shares, drawn, strict=True)]
        which = max(range(len(sizes)), key=lambda i: (behind[i], -i))
        found.append((which, drawn[which] % sizes[which]))
        drawn[which] += 1
    return found


def test_a_small_data_set_of_half_the_weight_begins_anew():
    found = draws(mix([5, 20], [0.5, 0.5]))
    assert found[:6] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert Counter(which for which, _ in found) == {0: 13, 1: 12}
    assert [i for which, i in found if which == 0] == [i % 5 for i in range(13)]
    assert [i for which, i in found if which == 1] == list(range(12))


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ([7], [3.0]), ([3, 4], [1.0, 9.0]), ([10, 20, 30], [0.2, 0.3, 0.5]),
        ([4, 4, 4, 4], [1.0, 0.0, 2.0, 4.0]),
        ([60_000, 40_000], [1.0, 2.0]),  # more than is worked out at once
    ],
)  # fmt: skip
def test_the_data_set_that_is_furthest_behind_is_next(sizes, weights):
    mixture = mix(sizes, weights)
    expected = oracle(sizes, weights)
    last = len(mixture) - 1
    for at in {0, last // 2, max(last - 40, 0)}:  # the later part is asked for out of order too
        until = min(at + 40, last)
        assert draws(mixture, at, until) == expected[at : until + 1]


@pytest.mark.parametrize(
    ("sizes", "weights", "first", "second"),
    [
        ([100, 100], [0.5, 0.5], (40, 60), (40, 60)),
        ([100, 100], [0.75, 0.25], (65, 85), (15, 35)),
        ([100, 300], None, (15, 35), (65, 85)),
    ],
)
def test_shares_of_the_first_hundred_shuffled_samples(sizes, weights, first, second):
    mixture = mix(sizes, weights, TEST_SEED)
    assert len(mixture) == sum(sizes)
    counts = Counter(which for which, _ in draws(mixture, 0, 99))
    assert first[0] <= counts[0] <= first[1]
    assert second[0] <= counts[1] <= second[1]


def test_a_shuffled_epoch_is_the_unshuffled_one_in_another_order():
    plain, shuffled = draws(mix([30, 50], [2, 1])), draws(mix([30, 50], [2, 1], TEST_SEED))
    assert shuffled == [plain[i] for i in reversed_order(80, TEST_SEED)]
    assert shuffled != plain
    assert Counter(which for which, _ in draws(mix([5, 5], [1, 1], TEST_SEED))) == {0: 5, 1: 5}


def test_batches_share_no_sample_and_come_again_the_same():
    mixture = mix([100, 100], [0.5, 0.5], TEST_SEED)
    first, second = draws(mixture, 0, 9), draws(mixture, 10, 19)
    assert not {*first} & {*second}
    assert draws(mixture, 0, 9) == first == draws(mix([100, 100], [1, 1], TEST_SEED), 0, 9)


def test_a_range_past_the_end():
    with pytest.raises(ValueError, match="sample 7 is past the end of a mixture of 7 sequences"):
        mix([3, 4]).get_samples(6, 7)


def save(folder, *firsts, length=4):
    folder.mkdir()
    tokens = [[first] * length for first in firsts] + [[0]]
    np.concatenate([np.array(t, dtype="<u2") for t in tokens]).tofile(folder / "t.bin")


@pytest.fixture
def place(tmp_path):
    save(tmp_path / "a", 1, 2, 3, 4, 5, 6)
    save(tmp_path / "b", 11, 12)
    return tmp_path


def firsts(place, description, **options):
    suffix = ".toml" if isinstance(description, dict) and "data" in description else ".json"
    path = place / f"mix{suffix}"
    encode = msgspec.toml.encode if suffix == ".toml" else msgspec.json.encode
    path.write_bytes(encode(description))
    dataset = open_dataset(path, sequence_length=4, **options)
    return [int(s.input_ids[0]) for s in dataset.get_samples(0, len(dataset) - 1)]


def local(path, **changes):
    fields = {"location": {"Local": path}, "token_size_in_bytes": "TwoBytes"}
    return {**fields, "shuffle": "DontShuffle", **changes}


def test_descriptions_of_local_data(place):
    plain = [1, 11, 2, 12, 3, 11, 4, 12]
    parts = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}]
    assert firsts(place, {"data": parts}) == plain
    by_length = [1, 11, 2, 3, 4, 12, 5, 6]
    assert firsts(place, {"data": [{"path": str(place / "a")}, {"path": "b"}]}) == by_length
    shuffle = {"Seeded": list(TEST_SEED)}
    pairs = [[local("a"), 0.5], [local("b"), 0.5]]
    assert firsts(place, {"shuffle": "DontShuffle", "providers": pairs}) == plain
    order = reversed_order(8, TEST_SEED)
    shuffled = [plain[i] for i in order]
    assert firsts(place, {"shuffle": shuffle, "providers": pairs}) == shuffled
    alone = [local("a"), local("b")]
    assert firsts(place, {"shuffle": "DontShuffle", "providers": alone}) == by_length
    weighted = [{"location": {"Local": name}, "weight": 1} for name in "ab"]
    assert firsts(place, weighted) == plain
    # A seed of the run's goes over the description's.
    assert firsts(place, {"shuffle": "DontShuffle", "providers": pairs}, seed=TEST_SEED) == shuffled


def test_what_psyches_data_server_serves(place):
    (place / "config").mkdir()
    data = {"dir": "../a", "token_size": "TwoBytes", "seq_len": 4, "shuffle_seed": [*range(1, 33)]}
    path = place / "config" / "data.toml"
    path.write_bytes(msgspec.toml.encode(data))
    dataset = open_dataset(path, sequence_length=4)
    order = shuffled_order(6, bytes(range(1, 33)))
    found = [int(s.input_ids[0]) for s in dataset.get_samples(0, 5)]
    assert found == [i + 1 for i in order]
    with pytest.raises(ValueError, match="seq_len is 4, --sequence-length 5"):
        open_dataset(path, sequence_length=5)
    path.write_bytes(msgspec.toml.encode({**data, "shuffle_seed": [1]}))
    with pytest.raises(ValueError, match=r"shuffle_seed\.Seeded: wanted 32 numbers"):
        open_dataset(path, sequence_length=4)


def test_parts_have_token_sizes_and_seeds_of_their_own(place):
    np.array([70_000] * 4 + [0], dtype="<u4").tofile(place / "c.bin")
    parts = [{"path": "c.bin", "token_size": 4}, {"path": "a", "seed": 3}]
    found = firsts(place, {"data": parts, "seed": 1})
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 70_000]
    assert firsts(place, {"data": parts, "seed": 1}) == found


def test_token_files_and_parquet_together(place):
    (place / "p").mkdir()
    table = {
        "inputs": [[7, 7, 8, 8]], "labels": [[-100, 7, -100, 8]], "position_ids": [[0, 1, 0, 1]],
        "sequence_lengths": [[2, 2]],
    }  # fmt: skip
    pq.write_table(pa.table(table), place / "p" / "train-0.parquet")
    (place / "mix.json").write_text(
        json.dumps([{"location": {"Local": "a"}}, {"location": {"Preprocessed": "p"}}])
    )
    dataset = open_dataset(place / "mix.json", sequence_length=4)
    batch = collate(dataset.get_samples(0, 3))
    at = batch.input_ids[:, 0].tolist().index(7)
    assert batch.labels is not None
    assert batch.position_ids is not None
    assert batch.sequence_lengths is not None
    assert batch.labels[at].tolist() == [-100, 7, -100, 8]
    other = 1 - min(at, 1)
    assert batch.labels[other].tolist() == batch.input_ids[other].tolist()
    assert batch.position_ids[at].tolist() == [0, 1, 0, 1]
    assert batch.position_ids[other].tolist() == [0, 1, 2, 3]
    assert batch.sequence_lengths[at] == [2, 2]
    assert batch.sequence_lengths[other] == [4]
    with pytest.raises(ValueError, match="vocabulary of 3"):
        dataset.check_vocabulary(3)


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"data": []}, "a mixture of no data sets"),
        ({"data": [{"path": "a", "weight": 1.0}, {"path": "b"}]}, "weights of all data sets or no"),
        ({"data": [{"path": "a", "weight": -1.0}]}, "weights must be 0 or more"),
        ({"data": [{"path": "a", "weight": 0.0}]}, "and one over 0"),
        ({"data": [{"path": "a", "weight": math.nan}]}, "nan is not a finite number"),
        ({"data": [{"path": "a", "wieght": 1.0}]}, "unknown field `wieght`"),
        ({"data": [{"path": "mix.json"}]}, "mix.json is a mixture itself"),
        ({"data": [{"path": "nowhere"}]}, "nowhere"),
        ({"data": [{"path": "a"}, {"path": "dummy:"}]}, "dummy: has no end and cannot be mixed"),
        ({"providers": []}, "missing required field `shuffle`"),
        (
            {"shuffle": "Shuffle", "providers": [local("a")]},
            "shuffle: wanted an object with one of",
        ),
        (
            {"shuffle": "DontShuffle", "providers": [[local("a")]]},
            r"providers\[0\]: wanted a locat",
        ),
        (
            {"shuffle": "DontShuffle", "providers": [[local("a"), "1"]]},
            r"providers\[0\]: weight: Ex",
        ),
        ({"shuffle": "DontShuffle", "providers": [local("")]}, "location.Local must not be empty"),
        ([{"location": {"Server": "x"}}], "unknown form 'Server'"),
        ("text", "Expected `object`, got `str`"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(place, description, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        firsts(place, description)
    assert "\n" not in str(error.value)


def test_a_description_that_is_not_there(place):
    with pytest.raises(ValueError, match=re.escape(f"--data-path {place}/no.json: No such file")):
        open_dataset(place / "no.json", sequence_length=4)
    (place / "bad.json").write_text('{"data": 1, "data": 2}')
    with pytest.raises(ValueError, match="key 'data' appears twice"):
        open_dataset(place / "bad.json", sequence_length=4)


def test_data_sets_of_a_configuration_are_those_of_a_description(place, monkeypatch):
    monkeypatch.chdir(place)
    save(place / "c", *range(20, 30), length=300)  # longer than a file's name may be
    parts = [
        {"path": str(place / "a"), "weight": 1.0, "seed": 3},
        {"path": "b", "weight": 2, "token_size": 2},
        *({"path": f"c/../{'./' * n}c", "weight": 0.5} for n in range(20)),
    ]
    tables = {"data": {"data_path": parts}, "evaluation": {"eval_data": [{"path": "b"}]}}
    (place / "run.toml").write_bytes(msgspec.toml.encode(tables))
    config = RunConfig.of(**read_toml("run.toml"))
    path = config.data.data_path
    dataset = open_dataset(path, sequence_length=4, seed=7)
    found = [int(s.input_ids[0]) for s in dataset.get_samples(0, len(dataset) - 1)]
    assert found == firsts(place, {"data": parts}, seed=7)
    held = open_dataset(config.evaluation.eval_data, sequence_length=4)
    assert [int(s.input_ids[0]) for s in held.get_samples(0, 1)] == [11, 12]
    # The run's own file has them as they were written.
    (place / "config.toml").write_text(config.to_toml())
    assert "path = " in config.to_toml()
    assert RunConfig.of(**read_toml("config.toml")) == config
    assert shown(path).startswith(f"a mixture of {place / 'a'} 1, b 2, c/../c 0.5")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "data_path: a mixture of no data sets"),
        (["a", "b"], r"data_path: data\[0\]: Expected `object`|data_path.*got `str`"),
        ([{"path": "a", "weight": 1.0}, {"path": "b"}], "data_path: wanted weights of all data"),
        ([{"path": "a", "weight": math.inf}], "data_path.*inf is not a finite number"),
        ([{"path": "a", "wieght": 1.0}], "data_path.*unknown field `wieght`"),
        ([{"path": "mix.toml"}], "data_path: mix.toml is a mixture itself"),
    ],
)
def test_what_a_configuration_cannot_mix_is_one_line(place, parts, said):
    (place / "run.toml").write_bytes(msgspec.toml.encode({"data_path": parts}))
    with pytest.raises(ValueError, match=said) as error:
        read_toml(str(place / "run.toml"))
    assert "\n" not in str(error.value)
    assert "run.toml" in str(error.value)
