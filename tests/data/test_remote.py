"""Data behind URLs: what is read is what is there, whatever servers and links do."""

from __future__ import annotations

import io
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from psyche_fast.data import BlockCache, open_dataset, remote, shuffled_order
from tests.data.server import serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    with serving() as files:
        yield files


@pytest.fixture
def open_url(tmp_path):
    """Opens data sets with a cache of their own."""

    def opened(url, length, **options):
        options.setdefault("cache", BlockCache(tmp_path / "cache"))
        return open_dataset(url, sequence_length=length, **options)

    return opened


def inputs(dataset, first=0, last=None):
    last = len(dataset) - 1 if last is None else last
    return [sample.input_ids.tolist() for sample in dataset.get_samples(first, last)]


def save(server, path, tokens, dtype="<u2"):
    server.files[path] = np.asarray(tokens, dtype=dtype).tobytes()


def test_psyches_numbered_files(server, open_url):
    server.files["/000.ds"] = bytes(range(16))
    server.files["/001.ds"] = bytes(range(16, 32))
    dataset = open_url(f"{server.url}/{{000..001}}.ds", 3)
    assert inputs(dataset)[:2] == [[0x0100, 0x0302, 0x0504], [0x0706, 0x0908, 0x0B0A]]
    assert inputs(dataset)[2] == [0x1110, 0x1312, 0x1514]
    assert len(dataset) == 4


@pytest.mark.parametrize(("tokens", "sequences"), [(8, 1), (9, 1), (10, 2), (13, 2), (14, 3)])
def test_one_token_more_than_a_local_file_has_to_have(server, open_url, tokens, sequences):
    save(server, "/a.bin", range(tokens))
    dataset = open_url(f"{server.url}/a.bin", 4)
    assert inputs(dataset) == [list(range(4 * i, 4 * i + 4)) for i in range(sequences)]


def test_seeds_token_sizes_and_numpys_header(server, open_url):
    save(server, "/a.ds", range(70_000, 70_101), "<u4")
    order = shuffled_order(49, 5).tolist()
    dataset = open_url(f"{server.url}/a.ds?download=true", 2, token_size=4, seed=5)
    assert [a - 70_000 for a, _ in inputs(dataset)] == [2 * i for i in order]
    array = io.BytesIO()
    np.save(array, np.arange(500, dtype=np.uint16))
    server.files["/b.npy"] = array.getvalue()
    assert inputs(open_url(f"{server.url}/b.npy", 7))[3] == list(range(21, 28))
    server.files["/c.npy"] = array.getvalue()[:-2]
    with pytest.raises(ValueError, match=r"/c\.npy is damaged, or no \.npy file"):
        open_url(f"{server.url}/c.npy", 7)
    with pytest.raises(ValueError, match=r"/b\.npy holds uint16 .* 4-byte tokens \(--token-size\)"):
        open_url(f"{server.url}/b.npy", 7, token_size=4)


def parquet(rows):
    table = pa.table({"inputs": rows, "sequence_lengths": [[1, len(rows[0]) - 1]] * len(rows)})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=3)
    return file.getvalue()


def test_parquet(server, open_url):
    rows = [[10 * i + j for j in range(6)] for i in range(8)]
    server.files["/data/any.parquet"] = parquet(rows)
    dataset = open_url(f"{server.url}/data/any.parquet", 6)
    assert inputs(dataset) == rows
    assert dataset.get_samples(3, 3)[0].sequence_lengths == (1, 5)
    server.files["/no.parquet"] = b"PAR1 but no more"
    with pytest.raises(ValueError, match=r"/no\.parquet is not a readable Parquet file"):
        open_url(f"{server.url}/no.parquet", 6)


# Larger than a block, so that a sequence lies across two.
LONG = 70_000


def test_blocks_are_read_once_and_kept_for_the_next_run(server, open_url):
    save(server, "/a.bin", np.arange(3 * LONG) % 60_000)
    wanted = inputs(open_url(f"{server.url}/a.bin", LONG, seed=1), 0, 1)
    asked = server.asked["/a.bin"]
    again = open_url(f"{server.url}/a.bin", LONG, seed=1)
    assert inputs(again, 0, 1) == wanted
    assert server.asked["/a.bin"] == asked + 1  # its size alone
    server.etags["/a.bin"] = '"2"'
    save(server, "/a.bin", np.arange(3 * LONG) % 50_000)
    assert inputs(open_url(f"{server.url}/a.bin", LONG, seed=1), 0, 1) != wanted


def test_files_of_no_version_are_not_kept(server, open_url):
    server.etags = None
    for last in (5, 6):
        save(server, "/a.bin", [1, 2, 3, 4, last, 0, 0])
        assert inputs(open_url(f"{server.url}/a.bin", 5)) == [[1, 2, 3, 4, last]]


def test_a_file_that_has_moved(server, open_url):
    save(server, "/new/a.bin", range(100))
    server.moved["/a.bin"] = "/new/a.bin"
    assert inputs(open_url(f"{server.url}/a.bin", 9), 3, 3) == [list(range(27, 36))]
    server.moved["/a.bin"] = "/a.bin"
    with pytest.raises(ValueError, match=r"/a\.bin: 302 .*infinite loop.$"):
        open_url(f"{server.url}/a.bin", 9)


def test_a_damaged_block_is_read_anew(server, open_url, tmp_path):
    save(server, "/a.bin", range(100))
    wanted = inputs(open_url(f"{server.url}/a.bin", 9))
    for block in (tmp_path / "cache").glob("*/*"):
        block.write_bytes(block.read_bytes()[:-3])
    assert inputs(open_url(f"{server.url}/a.bin", 9)) == wanted


def test_the_cache_keeps_what_was_used_last(server, open_url, tmp_path):
    tokens = np.arange(20 * 32768) % 60_000  # 20 small blocks
    save(server, "/a.bin", tokens)
    cache = BlockCache(tmp_path / "cache", most_bytes=5 << 16)
    dataset = open_url(f"{server.url}/a.bin", 8192, seed=3, cache=cache)
    order = shuffled_order(len(dataset), 3)
    for sample, ids in enumerate(inputs(dataset)):
        start = int(order[sample]) * 8192
        assert ids == tokens[start : start + 8192].tolist()
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*"))
    assert 0 < kept <= 5 << 16


def test_a_cache_that_cannot_be_written_is_done_without(server, open_url, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    save(server, "/a.bin", range(100))
    cache = BlockCache(tmp_path / "file" / "below")
    dataset = open_url(f"{server.url}/a.bin", 9, cache=cache)
    assert inputs(dataset, 1, 2) == [list(range(9, 18)), list(range(18, 27))]
    assert caplog.text.count("blocks are not kept: ") == 1


@pytest.mark.parametrize(
    "faults", [["cut"], ["reset"], ["short"], ["other"], [500], [503, "cut", 429, "short", 408]]
)
def test_what_passes_is_tried_again(server, open_url, faults):
    save(server, "/a.bin", range(100))
    server.faults["/a.bin"] = ["fine", *faults]  # from the first block on
    dataset = open_url(f"{server.url}/a.bin", 9)
    assert inputs(dataset, 2, 3) == [list(range(18, 27)), list(range(27, 36))]
    assert server.faults["/a.bin"] == []


def test_a_server_that_fails_at_first_when_it_is_asked_for_the_size(server, open_url):
    save(server, "/a.bin", range(100))
    server.faults["/a.bin"] = [502, "reset", 500]
    assert len(open_url(f"{server.url}/a.bin", 9)) == 10


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (500, "500 Internal Server Error; tried 6 times"),
        ("cut", r"\d+ bytes came instead of 200; tried 6 times|IncompleteRead"),
        ("short", "100 bytes came instead of 200; tried 6 times"),
        ("other", r"wanted bytes 0 to 199, the server sent \(1, 200\); tried 6 times"),
    ],
)
def test_what_does_not_pass_is_one_line(server, open_url, fault, said):
    save(server, "/a.bin", range(100))
    server.faults["/a.bin"] = ["fine"] + [fault] * 6
    with pytest.raises(OSError, match=f"/a.bin: .*{said}") as error:
        open_url(f"{server.url}/a.bin", 9).get_samples(0, 0)
    assert "\n" not in str(error.value)
    assert str(error.value).count("/a.bin") == 1
    # The next run finds nothing of it in the cache.
    assert inputs(open_url(f"{server.url}/a.bin", 9), 0, 0) == [list(range(9))]


@pytest.mark.parametrize(
    ("fault", "said"),
    [(404, "404 Not Found"), (403, "403 Forbidden"), (410, "410 Gone"), (400, "400 Bad Request")],
)
def test_what_a_server_refuses_is_not_asked_again(server, open_url, fault, said):
    save(server, "/a.bin", range(100))
    server.always["/a.bin"] = fault
    with pytest.raises(ValueError, match=rf"{server.url}/a\.bin: {said}"):
        open_url(f"{server.url}/a.bin", 9)
    assert server.asked["/a.bin"] == 1


def test_one_of_several_files_that_is_missing_is_named(server, open_url):
    save(server, "/1.bin", range(100))
    with pytest.raises(ValueError, match=r"/2\.bin: 404 Not Found"):
        open_url(f"{server.url}/{{1..2}}.bin", 9)


def test_a_file_that_changes_while_it_is_read(server, open_url):
    tokens = np.arange(2 * LONG) % 60_000
    for name in "abc":
        save(server, f"/{name}.bin", tokens)
    sets = [open_url(f"{server.url}/{name}.bin", 9, seed=1) for name in "abc"]
    save(server, "/a.bin", tokens[:-1])
    server.etags["/b.bin"] = '"another"'
    del server.files["/c.bin"]
    for dataset, said in zip(sets, ("has changed", "has changed", "is gone"), strict=True):
        with pytest.raises(ValueError, match=f"{said} since it was opened"):
            dataset.get_samples(0, 99)


def test_a_server_without_ranges_is_read_whole_once(server, open_url, tmp_path):
    server.ranges = False
    tokens = np.arange(3 * LONG) % 60_000
    save(server, "/a.bin", tokens)
    dataset = open_url(f"{server.url}/a.bin", 100, seed=1)
    order = shuffled_order(len(dataset), 1)
    server.faults["/a.bin"] = ["fine", "cut", "short"]  # the answer that shows it, then the rest
    for first in (0, 500):
        starts = [int(order[i]) * 100 for i in range(first, first + 20)]
        wanted = [tokens[at : at + 100].tolist() for at in starts]
        assert inputs(dataset, first, first + 19) == wanted
    assert server.asked["/a.bin"] < 30  # each of the first step's blocks, not one more
    small = BlockCache(tmp_path / "small", most_bytes=LONG)
    with pytest.raises(ValueError, match=r"whole files only, .* the cache .*--data-cache-gb"):
        open_url(f"{server.url}/a.bin", 100, cache=small).get_samples(0, 0)
    server.lengths = False
    with pytest.raises(ValueError, match="does not say how long the file is"):
        open_url(f"{server.url}/a.bin", 100)


def test_an_empty_file_is_too_short(server, open_url):
    server.files["/a.bin"] = b""
    with pytest.raises(ValueError, match=r"no file in .* fills a sequence of 9 tokens"):
        open_url(f"{server.url}/a.bin", 9)


def test_nobody_there(open_url, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    with pytest.raises(OSError, match=r"9/a\.bin: \[Errno 111\] Connection refused; tried 6"):
        open_url("http://127.0.0.1:9/a.bin", 9)
    with pytest.raises(ValueError, match="http://: no host given"):
        open_url("http://", 9)


def test_a_public_bucket_in_the_order_of_its_links(server, open_url, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setattr(remote.fsspec, "filesystem", missing)
    for number, name in enumerate(["b.ds", "a.bin", "a/c.npy", "a.txt", "B.ds"]):
        save(server, f"/bucket/some/{name}", [number] * 7)
    save(server, "/bucket/other.ds", [9] * 7)
    firsts = [ids[0] for ids in inputs(open_url("gs://bucket/some", 5))]
    assert firsts == [4, 1, 2, 0]  # B.ds, a.bin, a/c.npy, b.ds
    assert inputs(open_url("gs://bucket/some/b.ds", 5)) == [[0] * 5]
    with pytest.raises(ValueError, match="gs://bucket/nothing: there are no files"):
        open_url("gs://bucket/nothing", 5)
    server.always["/storage/v1/b/private/o"] = 401
    with pytest.raises(ValueError, match=r"401 Unauthorized; .* not public need gcsfs"):
        open_url("gs://private/some", 5)


def test_a_folder_that_a_server_lists(server, open_url):
    for name in ("b.bin", "a b.bin", "train-0.parquet", "other.txt"):
        save(server, f"/data/{name}", [ord(name[0])] * 7)
    links = [
        "b.bin",
        "../up.bin",
        "a%20b.bin",
        "?C=N",
        "/data/train-0.parquet",
        "other.txt",
        "sub/",
    ]
    page = "".join(f'<a href="{link}">{link}</a>' for link in links)
    server.files["/data/"] = server.files["/data/page.html"] = page.encode()
    assert inputs(open_url(f"{server.url}/data/", 5)) == [[97] * 5, [98] * 5]
    with pytest.raises(ValueError, match=r"/page\.html is a web page, not a file of data"):
        open_url(f"{server.url}/data/page.html", 5)
    server.files["/none/"] = b"<html>"
    with pytest.raises(ValueError, match="/none/: there are no files"):
        open_url(f"{server.url}/none/", 5)


def missing(protocol):
    raise ImportError(f"install something for {protocol}")


def test_a_missing_package_is_named(open_url, monkeypatch):
    monkeypatch.setattr(remote.fsspec, "filesystem", missing)
    with pytest.raises(
        ValueError, match=r"s3://b/f: s3:// needs s3fs: pip install 'psyche-fast\[remote\]'"
    ):
        open_url("s3://b/f", 9)
    with pytest.raises(ValueError, match="a URL of http, https, s3, gs, hf, not ftp"):
        open_url("ftp://b/f", 9)


class Flaky(MemoryFileSystem):
    """A bucket whose reads fail now and then, with an error of its own."""

    store: dict[str, object] = {}  # noqa: RUF012 - as its base has it
    pseudo_dirs = [""]  # noqa: RUF012
    failures = 0
    options = None

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.options = kwargs
        if Flaky.failures:
            Flaky.failures -= 1
            raise RuntimeError("SlowDown")
        return super().cat_file(path, start, end)


@pytest.mark.parametrize("kind", ["s3", "gs", "hf"])
def test_file_systems_of_fsspec(open_url, monkeypatch, kind):
    monkeypatch.setattr(remote.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(Flaky, "failures", 3)
    files = Flaky()
    monkeypatch.setattr(remote.fsspec, "filesystem", lambda protocol: files)
    rows = [[10 * i + j for j in range(6)] for i in range(8)]
    files.pipe("/b/data/train-0.parquet", parquet(rows[:5]))
    files.pipe("/b/data/train-1.parquet", parquet(rows[5:]))
    files.pipe("/b/data/test-0.parquet", parquet(rows[:1]))
    assert inputs(open_url(f"{kind}://b/data", 6)) == rows
    for name in ("b", "a"):
        files.pipe(f"/b/tokens/{name}.bin", np.array([ord(name)] * 7, "<u2").tobytes())
    files.pipe("/b/tokens/.hidden/x.bin", bytes(14))
    assert inputs(open_url(f"{kind}://b/tokens/", 5)) == [[97] * 5, [98] * 5]
    assert Flaky.options == ({"cache_type": "none"} if kind == "hf" else {})
    with pytest.raises(ValueError, match=f"{kind}://b/nowhere"):
        open_url(f"{kind}://b/nowhere", 5)


def test_the_hubs_file_system_is_there(open_url, monkeypatch):
    monkeypatch.setattr(remote.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hf://datasets/a/b: the hub is not asked for it"):
        open_url("hf://datasets/a/b", 5)
    assert type(fsspec.filesystem("hf")).__name__ == "HfFileSystem"


def test_a_mixture_behind_a_url(server, open_url):
    """Psyche's own test: two providers of two files with two sequences each."""
    for provider in range(2):
        for number in range(2):
            fill = 2 * provider + number + 1
            server.files[f"/provider_{provider}/00{number}.ds"] = bytes([fill]) * 16
    numbered = [
        {"location": {"NumberedFiles": {
            "url_template": f"{server.url}/provider_{n}/{{}}.ds", "start_index": 0,
            "n_left_pad_zeros": 3, "num_files": 2}},
         "token_size_in_bytes": "TwoBytes", "shuffle": "DontShuffle"}
        for n in range(2)
    ]  # fmt: skip
    described = {"shuffle": "DontShuffle", "providers": [[one, 1.0] for one in numbered]}
    server.files["/mix.json"] = json.dumps(described).encode()
    dataset = open_url(f"{server.url}/mix.json", 3)
    assert [ids[0] // 257 for ids in inputs(dataset)] == [1, 3, 1, 3, 2, 4, 2, 4]
    assert len(dataset) == 8
    server.files["/mix.json"] = b"{"
    server.etags["/mix.json"] = '"2"'
    with pytest.raises(ValueError, match=r"--data-path .*/mix\.json is not valid JSON"):
        open_url(f"{server.url}/mix.json", 3)
