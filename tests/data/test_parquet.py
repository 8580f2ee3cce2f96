"""Parquet: split rules, columns, wrapping, bounded memory, damage."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from psyche_fast.data import LocalDataset, ParquetDataset, open_dataset, shuffled_order
from psyche_fast.data.parquet import train_files


def write(path, columns, types=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    types = types or {}
    table = pa.table({k: pa.array(v, types.get(k)) for k, v in columns.items()})
    pq.write_table(table, path, **options)


def rows(start, stop, length=4):
    return [[100 * r + c for c in range(length)] for r in range(start, stop)]


def inputs(dataset, first, last):
    return [s.input_ids.tolist() for s in dataset.get_samples(first, last)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/b", "train/a", "test/a", "train_extra"], ["train/a", "train/b"]),
        (["x/train-v1/a", "x/validation/train", "y/train/0"], ["x/train-v1/a", "y/train/0"]),
        (["data/train-00001", "data/train-00000", "data/test-0"],
         ["data/train-00000", "data/train-00001"]),
        (["train", "training_set", "other"], ["train", "training_set"]),
        (["trainer/a", "test"], []),
    ],
)  # fmt: skip
def test_train_split(tmp_path, names, expected):
    for name in names:
        write(tmp_path / f"{name}.parquet", {"inputs": rows(0, 1)})
    assert train_files(tmp_path) == [tmp_path / f"{name}.parquet" for name in expected]


def test_the_path_may_be_the_split_folder_or_a_file(tmp_path):
    write(tmp_path / "train" / "part.parquet", {"inputs": rows(0, 2)})
    assert len(ParquetDataset(tmp_path / "train", 4)) == 2
    assert len(ParquetDataset(tmp_path / "train" / "part.parquet", 4)) == 2


LIST_TYPES = [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 4)]


@pytest.mark.parametrize("kind", LIST_TYPES, ids=str)
def test_all_columns(tmp_path, kind):
    columns = {
        "inputs": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "labels": [[1, 9, 3, 4], [5, 6, 7, 0]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 2, 3]],
        "sequence_lengths": [[2, 2], []],
        "source": ["a", "b"],
    }
    types = {"inputs": kind, "labels": kind, "position_ids": kind}
    write(tmp_path / "train.parquet", columns, types)
    first, second = ParquetDataset(tmp_path, 4).get_samples(0, 1)
    assert [t.dtype for t in (first.input_ids, first.labels, first.position_ids)] == [
        torch.int64
    ] * 3
    assert first.input_ids.tolist() == [1, 2, 3, 4]
    assert first.labels.tolist() == [1, 9, 3, 4]
    assert first.position_ids.tolist() == [0, 1, 0, 1]
    assert first.sequence_lengths == (2, 2)
    assert second.input_ids.tolist() == [5, 6, 7, 8]
    assert second.sequence_lengths == ()


def test_labels_of_minus_100_stay(tmp_path):
    write(tmp_path / "train.parquet", {"inputs": [[1, 2]], "labels": [[-100, 2]]})
    assert ParquetDataset(tmp_path, 2).get_samples(0, 0)[0].labels.tolist() == [-100, 2]


def test_without_labels_the_inputs_are_the_labels(tmp_path):
    write(tmp_path / "train.parquet", {"inputs": rows(0, 1)})
    [sample] = ParquetDataset(tmp_path, 4).get_samples(0, 0)
    assert sample.labels is sample.input_ids
    assert sample.position_ids is None
    assert sample.sequence_lengths is None


def test_ids_run_over_files_and_row_groups_and_wrap(tmp_path):
    write(tmp_path / "train" / "b.parquet", {"inputs": rows(5, 7)})
    write(tmp_path / "train" / "a.parquet", {"inputs": rows(0, 5)}, row_group_size=2)
    dataset = ParquetDataset(tmp_path, 4)
    assert len(dataset) == 7
    assert inputs(dataset, 0, 6) == rows(0, 7)
    assert inputs(dataset, 5, 16) == (rows(0, 7) * 3)[5:17]


def test_seed_shuffles_rows(tmp_path):
    write(tmp_path / "train.parquet", {"inputs": rows(0, 12)}, row_group_size=5)
    dataset = ParquetDataset(tmp_path, 4, seed=1)
    expected = [100 * i for i in shuffled_order(12, 1).tolist()]
    assert [ids[0] for ids in inputs(dataset, 0, 23)] == expected * 2


def test_row_groups_are_decoded_once_a_batch_and_memory_stays_bounded(tmp_path, monkeypatch):
    types = {"inputs": pa.list_(pa.int64())}
    write(tmp_path / "train.parquet", {"inputs": rows(0, 100)}, types, row_group_size=10)
    group_bytes = 10 * 4 * 8
    read = []
    real = pq.ParquetFile.read_row_group

    def read_row_group(self, index, **options):
        read.append(index)
        return real(self, index, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    dataset = ParquetDataset(tmp_path, 4, seed=3, cache_bytes=3 * group_bytes)
    assert read == [0]  # opening decodes one row group only
    dataset.get_samples(0, 49)
    assert len(read) <= 11
    assert dataset._cached_bytes() == 3 * group_bytes
    roomy = ParquetDataset(tmp_path, 4, seed=3)
    read.clear()
    for first in range(0, 300, 30):
        roomy.get_samples(first, first + 29)
    assert sorted(read) == list(range(1, 10))


def test_rows_of_a_wrong_length_are_named(tmp_path):
    bad = rows(0, 7)
    bad[5] = [1, 2, 3]
    write(tmp_path / "train.parquet", {"inputs": bad}, row_group_size=4)
    dataset = ParquetDataset(tmp_path, 4)
    assert inputs(dataset, 0, 3) == rows(0, 4)
    with pytest.raises(ValueError, match=r"train\.parquet, row 5, column 'inputs': 3 .*expected 4"):
        dataset.get_samples(4, 4)


def test_a_wrong_sequence_length_shows_when_opening(tmp_path):
    write(tmp_path / "train.parquet", {"inputs": rows(0, 2)})
    with pytest.raises(ValueError, match=r"row 0.* 4 integers, expected 8 \(--sequence-length\)"):
        ParquetDataset(tmp_path, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], None], "row 1, column 'labels': no value"),
        ([[1, 2], [3, None]], "row 1, column 'labels': a missing integer"),
    ],
)
def test_missing_values(tmp_path, values, message):
    write(tmp_path / "train.parquet", {"inputs": [[1, 2], [3, 4]], "labels": values})
    with pytest.raises(ValueError, match=message):
        ParquetDataset(tmp_path, 2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": [[1, 2]]}, r"no column 'inputs' \(or 'input_ids'\), only \['tokens'\]"),
        ({"inputs": ["text"]}, "column 'inputs' is string, expected lists of integers"),
        ({"inputs": [[1.0, 2.0]]}, "column 'inputs' is list<.*double.*expected lists of integers"),
    ],
)
def test_wrong_columns(tmp_path, columns, message):
    write(tmp_path / "train.parquet", columns)
    with pytest.raises(ValueError, match=message):
        ParquetDataset(tmp_path, 2)


def test_files_that_disagree_or_are_damaged_or_empty(tmp_path):
    a, b = tmp_path / "train-a.parquet", tmp_path / "train-b.parquet"
    write(a, {"inputs": rows(0, 2)})
    write(b, {"inputs": rows(0, 2), "labels": rows(0, 2)})
    with pytest.raises(ValueError, match=r"train-b\.parquet has columns .*labels.*train-a"):
        ParquetDataset(tmp_path, 4)
    b.write_bytes(a.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-b\.parquet is not a readable Parquet file"):
        ParquetDataset(tmp_path, 4)
    write(b, {"inputs": []}, {"inputs": pa.list_(pa.int32())})
    assert len(ParquetDataset(tmp_path, 4)) == 2
    a.unlink()
    with pytest.raises(ValueError, match="no rows in the train split"):
        ParquetDataset(tmp_path, 4)


def test_data_that_rot_on_disk_is_an_error(tmp_path):
    path = tmp_path / "train.parquet"
    write(path, {"inputs": rows(0, 64)}, row_group_size=32, compression="zstd")
    dataset = ParquetDataset(tmp_path, 4)
    metadata = pq.read_metadata(path).row_group(1).column(0)
    start = metadata.dictionary_page_offset or metadata.data_page_offset
    raw = bytearray(path.read_bytes())
    raw[start : start + metadata.total_compressed_size] = bytes(metadata.total_compressed_size)
    path.write_bytes(raw)
    assert inputs(dataset, 0, 31) == rows(0, 32)
    with pytest.raises(ValueError, match=r"cannot read .*train\.parquet"):
        dataset.get_samples(32, 32)


def test_vocabulary_check(tmp_path):
    write(tmp_path / "train.parquet", {"inputs": [[1, 7], [2, -1]]}, row_group_size=1)
    dataset = ParquetDataset(tmp_path, 2)
    dataset.check_vocabulary(8)
    with pytest.raises(ValueError, match=r"token id 7 .*vocabulary of 7"):
        dataset.check_vocabulary(7)


def test_open_dataset_takes_token_files_first(tmp_path):
    write(tmp_path / "train.parquet", {"inputs": rows(0, 3)})
    assert isinstance(open_dataset(tmp_path, sequence_length=4), ParquetDataset)
    (tmp_path / "a.bin").write_bytes(bytes(18))
    dataset = open_dataset(tmp_path, token_size=2, sequence_length=4, seed=1)
    assert isinstance(dataset, LocalDataset)
    assert len(dataset) == 2


def test_open_dataset_with_nothing_to_open(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no training data in .*--data-path.*\*\.bin.*Parquet"):
        open_dataset(tmp_path, sequence_length=4)
    with pytest.raises(FileNotFoundError, match="--data-path"):
        open_dataset(tmp_path / "nowhere", sequence_length=4)


@pytest.mark.parametrize(
    "kind", [pa.list_view(pa.int32()), pa.large_list_view(pa.uint16())], ids=str
)
def test_others_name_and_form_of_the_inputs(tmp_path, kind):
    values = rows(0, 3)
    write(tmp_path / "train.parquet", {"input_ids": values}, {"input_ids": kind})
    assert inputs(ParquetDataset(tmp_path, 4), 0, 2) == values


def test_where_both_names_are_there_psyches_is_read(tmp_path):
    write(tmp_path / "train.parquet", {"input_ids": rows(5, 6), "inputs": rows(0, 1)})
    assert inputs(ParquetDataset(tmp_path, 4), 0, 0) == rows(0, 1)


def test_hidden_parquet_files_are_left_alone(tmp_path):
    write(tmp_path / "train" / "a.parquet", {"inputs": rows(0, 1)})
    (tmp_path / "train" / "._a.parquet").write_bytes(b"\0")
    assert len(ParquetDataset(tmp_path, 4)) == 1
