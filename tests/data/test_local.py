"""Token files: layout, order, and every way in which they can be wrong."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from psyche_fast.data import LocalDataset, shuffled_order


def write(path, tokens, dtype="<u2"):
    np.asarray(tokens, dtype=dtype).tofile(path)


def inputs(dataset):
    return [s.input_ids.tolist() for s in dataset.get_samples(0, len(dataset) - 1)]


@pytest.mark.parametrize(
    ("tokens", "sequences"),
    # L = 4: one that ends exactly at the end of the file is not used.
    [(5, 1), (7, 1), (8, 1), (9, 2), (12, 2), (13, 3)],
)
def test_sequence_starts(tmp_path, tokens, sequences):
    write(tmp_path / "a.bin", range(tokens))
    dataset = LocalDataset(tmp_path, sequence_length=4)
    expected = [list(range(4 * i, 4 * i + 4)) for i in range(sequences)]
    assert inputs(dataset) == expected
    assert len(dataset) == sequences


def test_files_follow_in_name_order_and_others_are_left_alone(tmp_path):
    write(tmp_path / "b.ds", [20, 21, 22, 23, 24])
    write(tmp_path / "c.bin", [30, 31, 32])
    write(tmp_path / "a.npy", [10, 11, 12])  # raw: no NumPy header
    (tmp_path / "0.txt").write_bytes(b"odd")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "z.bin").mkdir()
    dataset = LocalDataset(str(tmp_path), sequence_length=2)
    assert inputs(dataset) == [[10, 11], [20, 21], [22, 23], [30, 31]]


def test_one_file_as_the_path(tmp_path):
    write(tmp_path / "a.bin", [1, 2, 3])
    write(tmp_path / "b.bin", [4, 5, 6])
    assert inputs(LocalDataset(tmp_path / "b.bin", sequence_length=2)) == [[4, 5]]


def test_four_byte_tokens_and_the_sample(tmp_path):
    write(tmp_path / "a.bin", [70_000, 1, 2, 128_255, 9], "<u4")
    [sample, _] = LocalDataset(tmp_path, 4, 2).get_samples(0, 1)
    assert sample.input_ids.dtype == torch.int64
    assert sample.input_ids.tolist() == [70_000, 1]
    assert sample.labels is sample.input_ids
    assert sample.position_ids is None
    assert sample.sequence_lengths is None


@pytest.mark.parametrize(("token_size", "dtype"), [(2, np.uint16), (4, np.uint32)])
def test_npy_is_read_behind_its_header(tmp_path, token_size, dtype):
    np.save(tmp_path / "a.npy", np.arange(9, dtype=dtype).reshape(3, 3))
    dataset = LocalDataset(tmp_path, token_size, 4)
    assert inputs(dataset) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_seeded_order_is_over_all_files(tmp_path):
    for name, start in (("a", 0), ("b", 12), ("c", 16)):
        write(tmp_path / f"{name}.bin", range(start, start + {0: 13, 12: 5, 16: 9}[start]))
    dataset = LocalDataset(tmp_path, sequence_length=2, seed=1)
    # 6 + 2 + 4 sequences; sequence k begins with token 2k.
    starts = [ids[0] // 2 for ids in inputs(dataset)]
    assert starts == [4, 8, 7, 6, 2, 10, 5, 3, 11, 0, 1, 9]
    assert [s.input_ids[0] // 2 for s in dataset.get_samples(5, 7)] == [10, 5, 3]


def test_seeded_order_of_many_sequences(tmp_path):
    write(tmp_path / "a.bin", np.arange(2001) % 256)
    dataset = LocalDataset(tmp_path, sequence_length=2, seed=42)
    order = shuffled_order(1000, 42)
    assert [ids[0] for ids in inputs(dataset)] == [2 * int(i) % 256 for i in order]


def test_short_files_are_skipped_with_a_warning(tmp_path, caplog):
    write(tmp_path / "a.bin", [1, 2, 3, 4])
    write(tmp_path / "b.bin", range(9))
    (tmp_path / "c.bin").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        dataset = LocalDataset(tmp_path, sequence_length=4)
    assert inputs(dataset) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [("a.bin" in m, "c.bin" in m) for m in caplog.messages] == [(True, False), (False, True)]
    assert "--sequence-length" in caplog.text


def test_a_sequence_length_no_file_fills(tmp_path):
    write(tmp_path / "a.bin", range(64))
    with pytest.raises(ValueError, match=r"fills a sequence of 64 .* 64 .*--sequence-length"):
        LocalDataset(tmp_path, sequence_length=64)
    assert len(LocalDataset(tmp_path, sequence_length=63)) == 1


def test_missing_path_and_empty_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere \(--data-path\)"):
        LocalDataset(tmp_path / "nowhere", sequence_length=4)
    with pytest.raises(ValueError, match=r"no token files \(\*\.bin, .*--data-path"):
        LocalDataset(tmp_path, sequence_length=4)


@pytest.mark.parametrize("token_size", [0, 1, 3, 8])
def test_token_sizes_there_are_not(tmp_path, token_size):
    with pytest.raises(ValueError, match=f"--token-size.* 2 or 4, got {token_size}"):
        LocalDataset(tmp_path, token_size, 4)


def test_sequence_length_below_one(tmp_path):
    with pytest.raises(ValueError, match=r"--sequence-length.*at least 1, got 0"):
        LocalDataset(tmp_path, sequence_length=0)


@pytest.mark.parametrize(("size", "token_size"), [(101, 2), (102, 4)])
def test_a_size_that_is_no_multiple_of_the_token_size(tmp_path, size, token_size):
    (tmp_path / "a.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"a\.bin holds {size} bytes.*of {token_size}.*--token-s"):
        LocalDataset(tmp_path, token_size, 4)


@pytest.mark.parametrize("vocab", [5_000, 120_000])
def test_four_byte_tokens_read_as_two(tmp_path, vocab):
    write(tmp_path / "a.bin", np.random.default_rng(0).integers(0, vocab, 1000), "<u4")
    with pytest.raises(ValueError, match=r"looks like 4-byte tokens, not 2-byte.*--token-size"):
        LocalDataset(tmp_path, 2, 16)
    assert len(LocalDataset(tmp_path, 4, 16)) == 62


@pytest.mark.parametrize("vocab", [1000, 65536])
def test_two_byte_tokens_read_as_four(tmp_path, vocab):
    write(tmp_path / "a.bin", np.random.default_rng(0).integers(0, vocab, 1000))
    with pytest.raises(ValueError, match=r"looks like 2-byte tokens, not 4-byte.*--token-size"):
        LocalDataset(tmp_path, 4, 16)
    assert len(LocalDataset(tmp_path, 2, 16)) == 62


@pytest.mark.parametrize("vocab", [2, 256])
def test_byte_vocabularies_are_not_taken_for_the_wrong_size(tmp_path, vocab):
    write(tmp_path / "a.bin", np.random.default_rng(0).integers(0, vocab, 1000))
    assert len(LocalDataset(tmp_path, 2, 16)) == 62


@pytest.mark.parametrize("dtype", [np.uint32, np.int16, np.int64, np.float32, ">u2"])
def test_npy_of_another_type(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.zeros(100, dtype=dtype))
    with pytest.raises(ValueError, match=r"a\.npy holds .*expected uint16 \(<u2\).*--token-size"):
        LocalDataset(tmp_path, 2, 4)


def test_npy_that_is_cut_short_garbled_or_in_columns(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(100, dtype=np.uint16))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"a\.npy is damaged.*cannot hold uint16 of shape"):
        LocalDataset(tmp_path, 2, 4)
    path.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"a\.npy is damaged"):
        LocalDataset(tmp_path, 2, 4)
    path.write_bytes(whole[:6] + b"\x09" + whole[7:])
    with pytest.raises(ValueError, match=r"a\.npy is damaged.*version"):
        LocalDataset(tmp_path, 2, 4)
    np.save(path, np.asfortranarray(np.zeros((10, 10), dtype=np.uint16)))
    with pytest.raises(ValueError, match="Fortran order"):
        LocalDataset(tmp_path, 2, 4)


def test_ids_past_the_end_and_empty_ranges(tmp_path):
    write(tmp_path / "a.bin", range(9))
    dataset = LocalDataset(tmp_path, sequence_length=4)
    with pytest.raises(ValueError, match=r"sample 2 is past the end .* 2 sequences of 4"):
        dataset.get_samples(1, 2)
    for first, last in ((-1, 0), (1, 0)):
        with pytest.raises(ValueError, match=f"got {first} to {last}"):
            dataset.get_samples(first, last)


def test_a_file_truncated_while_in_use_is_an_error(tmp_path):
    write(tmp_path / "a.bin", range(100))
    dataset = LocalDataset(tmp_path, sequence_length=4)
    write(tmp_path / "a.bin", range(6))
    assert dataset.get_samples(0, 0)[0].input_ids.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"a\.bin has become shorter"):
        dataset.get_samples(1, 1)


def test_vocabulary_check(tmp_path):
    write(tmp_path / "a.bin", [1, 2, 3, 4, 5])
    write(tmp_path / "b.bin", [1, 2, 500, 4, 999])
    dataset = LocalDataset(tmp_path, sequence_length=4)
    dataset.check_vocabulary(501)
    with pytest.raises(ValueError, match=r"token id 500 in .*b\.bin .*vocabulary of 500.*--model"):
        dataset.check_vocabulary(500)


@pytest.mark.parametrize("largest", [2, 40, 200, 255])
def test_small_ids_of_the_other_size_are_noticed(tmp_path, largest):
    ids = np.arange(400) % largest + 1
    write(tmp_path / "wide.bin", ids, "<u4")
    with pytest.raises(ValueError, match="looks like 4-byte tokens"):
        LocalDataset(tmp_path / "wide.bin", 2, 4)
    write(tmp_path / "narrow.bin", ids)
    LocalDataset(tmp_path / "narrow.bin", 2, 4)
    LocalDataset(tmp_path / "wide.bin", 4, 4)
    if largest > 64:
        with pytest.raises(ValueError, match="looks like 2-byte tokens"):
            LocalDataset(tmp_path / "narrow.bin", 4, 4)


def test_files_that_are_all_zero_are_of_either_size(tmp_path):
    write(tmp_path / "a.bin", np.zeros(400))
    for size in (2, 4):
        assert len(LocalDataset(tmp_path, size, 4)) == (400 * 2 // size - 1) // 4


def test_hidden_files_are_left_alone(tmp_path):
    write(tmp_path / "name.bin", [1, 2, 3])
    (tmp_path / "._name.bin").write_bytes(b"\0\5\x16")  # as macOS leaves on other file systems
    assert inputs(LocalDataset(tmp_path, sequence_length=2)) == [[1, 2]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b/2", "a/1", "a/c/3"], [1, 3, 2]),
        (["top", "sub/1"], ["top"]),
        (["train/1", "val/2", "train-2/3"], [1, 3]),
        ([".cache/1", "a/2"], [2]),
    ],
)
def test_files_of_sub_folders(tmp_path, names, expected):
    for name in names:
        path = tmp_path / f"{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = 9 if name == "top" else int(name[-1])
        write(path, [mark] * 3)
    marks = [9 if e == "top" else e for e in expected]
    assert [row[0] for row in inputs(LocalDataset(tmp_path, sequence_length=2))] == marks


def test_names_that_are_not_utf8(tmp_path):
    write(tmp_path / "a\udcff.bin", [1, 2, 3])
    with pytest.raises(ValueError, match=r"a\\xff\.bin' is not UTF-8: rename"):
        LocalDataset(tmp_path, sequence_length=2)
