"""Text to token files and back: what is decoded must be what was written, to the byte."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from psyche_fast.data import (
    LocalDataset,
    find_files,
    iter_texts,
    load_tokenizer,
    open_dataset,
    tokenize_files,
    train_tokenizer,
)
from psyche_fast.data import texts as documents_module
from psyche_fast.data import tokenize as tokenize_module
from psyche_fast.data.texts import iter_pieces
from psyche_fast.data.tokenize import token_size_for

EOS = "<|endoftext|>"
TEXTS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "\ufeffwindows\r\nlines\rand\ttabs  \n\n\n",
    "Grüße, 世界! 👩\u200d👩\u200d👧 \x00\x7f  ",
    f"a text that spells {EOS} itself\n",
    " ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, "return add def a b " * 50], 280)


def read(summary):
    return np.concatenate([np.fromfile(f, f"<u{summary.token_size}") for f in summary.files])


def decode(tokenizer, summary):
    """Documents again: tokens split at the end-of-text id, each decoded on its own."""
    tokens = read(summary).tolist()
    assert tokens[-1] == tokenizer.eos_token_id
    documents, current = [], []
    for token in tokens:
        if token == tokenizer.eos_token_id:
            documents.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    return documents


def run(inputs, tokenizer, output, **options):
    return tokenize_files(inputs, tokenizer, output, progress=False, **options)


def write_text(path, text):
    path.write_bytes(text.encode())
    return path


# --- tokenizer ----------------------------------------------------------------------------------


def test_tokenizer_gives_every_text_back(tokenizer):
    for text in [*TEXTS, "\ud7ff\ue000", "never seen: ζ", "".join(map(chr, range(256)))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("return add")) <= 3
    assert len(tokenizer) == 280
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 0


def test_tokenizer_survives_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    # In a model's folder transformers picks the tokenizer class by the model's type: not here.
    transformers.LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token == EOS


def test_a_vocabulary_too_small_for_the_bytes():
    with pytest.raises(ValueError, match=r"--vocab-size.*at least 257.*got 256"):
        train_tokenizer(["x"], 256)
    assert len(train_tokenizer(["x"], 257)) == 257


def test_tokenizers_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load a tokenizer from .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))
    )
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no end-of-text \(eos\) token"):
        load_tokenizer(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no end-of-text \(eos\) token"):
        run([write_text(tmp_path / "a.txt", "a")], plain, tmp_path / "out")


# --- round trips --------------------------------------------------------------------------------


def test_text_files_one_document_each(tokenizer, tmp_path):
    paths = [write_text(tmp_path / f"{i}.txt", text) for i, text in enumerate(TEXTS)]
    write_text(tmp_path / "empty.txt", "")
    out = tmp_path / "out"
    summary = run([*paths, tmp_path / "empty.txt"], tokenizer, out)
    assert decode(tokenizer, summary) == TEXTS
    assert summary.documents == len(TEXTS)
    assert summary.tokens == len(read(summary)) == os.path.getsize(out / "tokens-00000.bin") // 2
    assert summary.files == (out / "tokens-00000.bin",)
    assert sorted(os.listdir(out)) == ["card.json", "tokenizer", "tokens-00000.bin"]


def test_jsonl(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": i, "text": t}) for i, t in enumerate([*TEXTS, ""])]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    summary = run([path], tokenizer, tmp_path / "out")
    assert decode(tokenizer, summary) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_parquet(tokenizer, tmp_path, kind):
    path = tmp_path / "a.parquet"
    table = pa.table({"body": pa.array(TEXTS * 3, kind), "n": range(len(TEXTS) * 3)})
    pq.write_table(table, path, row_group_size=4)
    summary = run([path], tokenizer, tmp_path / "out", text_key="body")
    assert decode(tokenizer, summary) == TEXTS * 3
    assert sum(p.read_bytes for p in iter_pieces(path, text_key="body")) == path.stat().st_size


def test_the_result_is_a_data_set_with_its_tokenizer(tokenizer, tmp_path):
    out = tmp_path / "out"
    summary = run([write_text(tmp_path / "a.txt", "word " * 500)], tokenizer, out)
    dataset = open_dataset(out, token_size=summary.token_size, sequence_length=16)
    assert isinstance(dataset, LocalDataset)
    dataset.check_vocabulary(280)
    tokens = read(summary)
    assert dataset.get_samples(1, 1)[0].input_ids.tolist() == tokens[16:32].tolist()
    assert load_tokenizer(out / "tokenizer").decode(tokens[:-1].tolist()) == "word " * 500


def test_long_documents_are_read_and_encoded_in_pieces_without_a_trace(
    tokenizer, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    words = ["def", " x", "\n", "\n\n", "    ", ";\n", "\r\n", " é", "世", "1", "\t"]
    text = "".join(rng.choice(words, 20_000))
    path = write_text(tmp_path / "a.txt", text)
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text(json.dumps({"text": text}))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 100)
    for i, source in enumerate((path, jsonl)):
        pieces = list(iter_pieces(source))
        assert len(pieces) > 200
        assert [p.ends_document for p in pieces] == [False] * (len(pieces) - 1) + [True]
        assert "".join(p.text for p in pieces) == text
        assert sum(p.read_bytes for p in pieces) == source.stat().st_size
        summary = run([source], tokenizer, tmp_path / f"out{i}")
        assert summary.documents == 1
        assert read(summary).tolist() == [*whole, tokenizer.eos_token_id]


def test_cuts_do_not_change_what_llama_3_style_splitting_gives(monkeypatch):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    rng = np.random.default_rng(1)
    text = "".join(rng.choice(["def", " x", "\n", "\n\n", "  ", ";\n", "\r\n", "1", "\t"], 5000))
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 50)
    pieces = list(documents_module._cut(text))
    assert len(pieces) > 100
    cut = [word for piece in pieces for word, _ in split.pre_tokenize_str(piece)]
    assert cut == [word for word, _ in split.pre_tokenize_str(text)]


def test_a_long_document_without_a_line_break_is_cut_all_the_same(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 10)
    text = "abcdefg" * 100
    path = write_text(tmp_path / "a.txt", text)
    assert max(len(p.text) for p in iter_pieces(path)) <= 16 * 10
    assert decode(tokenizer, run([path], tokenizer, tmp_path / "out")) == [text]


def test_several_output_files_are_cut_at_document_ends(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "_FILE_TOKENS", 50)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} " * 10}) for i in range(20)))
    summary = run([path], tokenizer, tmp_path / "out")
    assert len(summary.files) > 3
    for file in summary.files[:-1]:
        tokens = np.fromfile(file, "<u2")
        assert len(tokens) >= 50
        assert tokens[-1] == tokenizer.eos_token_id
    assert decode(tokenizer, summary) == [f"{i} " * 10 for i in range(20)]
    assert [f.name for f in summary.files] == sorted(f.name for f in summary.files)


def test_special_tokens_truncation_and_padding_of_the_tokenizer_stay_out(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    other = load_tokenizer(tmp_path / "tok")
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=64)
    path = write_text(tmp_path / "a.txt", TEXTS[0])
    assert decode(other, run([path], other, tmp_path / "out")) == [TEXTS[0]]
    assert other.backend_tokenizer.truncation["max_length"] == 4  # the caller's is left as it was


def test_token_size_follows_the_vocabulary(tokenizer, tmp_path):
    assert [token_size_for(v) for v in (257, 65536, 65537)] == [2, 2, 4]
    assert token_size_for(300, 4) == 4
    with pytest.raises(ValueError, match=r"65537 does not fit in 2-byte tokens \(--token-size\)"):
        token_size_for(65537, 2)
    path = write_text(tmp_path / "a.txt", TEXTS[0])
    summary = run([path], tokenizer, tmp_path / "out", token_size=4)
    assert summary.token_size == 4
    assert decode(tokenizer, summary) == [TEXTS[0]]


# --- inputs -------------------------------------------------------------------------------------


def test_folders_are_searched_sorted_and_hidden_files_left_out(tmp_path):
    for name in ("b.txt", "a/z.py", "a/y.md", "a/c.jsonl", ".git/x.txt", "a/.h.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [str(p.relative_to(tmp_path)) for p in find_files([tmp_path])]
    assert names == ["a/c.jsonl", "a/y.md", "a/z.py", "b.txt"]
    assert find_files([tmp_path / "image.png", tmp_path], ["*.md"]) == [
        tmp_path / "image.png",
        tmp_path / "a/y.md",
    ]
    with pytest.raises(ValueError, match=r"no file in .* matches \*\.rs \(--glob\)"):
        find_files([tmp_path], ["*.rs"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no input"):
        find_files([])


def test_iter_texts_gives_what_a_tokenizer_is_trained_on(tmp_path):
    write_text(tmp_path / "a.txt", "one\r\n")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    assert list(iter_texts([tmp_path])) == ["one\r\n", "two", "three"]


BAD_LINES = [
    ('{"text": "ok"}\n{"body": 1}', r"a\.jsonl, line 2 has no key 'text', only \['body'\]"),
    ('{"text": "ok"}\n\n{"text": ', r"a\.jsonl, line 3 is not JSON"),
    ('{"text": 5}', r"line 1: 'text' is a int, expected text"),
    ('["text"]', "line 1 is not a JSON object"),
    ('{"text": "\\ud800"}', "line 1 is not UTF-8 text"),
    (b'{"text": "\xff"}', "line 1 is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LINES)
def test_bad_jsonl_names_the_line_and_leaves_nothing_behind(tokenizer, tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message) as caught:
        run([write_text(tmp_path / "0.txt", "fine"), path], tokenizer, out)
    assert "\n" not in str(caught.value)
    assert os.listdir(out) == []


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": ["x"]}, r"no column 'text', only \['body'\] \(--text-key\)"),
        ({"text": [1]}, "column 'text' is int64, expected text"),
        ({"text": ["x", None]}, "row 1: 'text' has no value"),
    ],
)
def test_bad_parquet(tokenizer, tmp_path, column, message):
    pq.write_table(pa.table(column), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        run([tmp_path / "a.parquet"], tokenizer, tmp_path / "out")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet"):
        run([tmp_path / "a.parquet"], tokenizer, tmp_path / "out")


def test_text_that_is_not_utf8_is_an_error_or_left_out(tokenizer, tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    write_text(tmp_path / "b.txt", "café")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "tea"}\n')
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text .*--errors skip"):
        run([tmp_path], tokenizer, tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        summary = run(
            [tmp_path / n for n in ("a.txt", "b.txt", "c.jsonl")],
            tokenizer,
            tmp_path / "out",
            errors="skip",
        )
    assert decode(tokenizer, summary) == ["café", "tea"]
    assert ["a.txt" in caplog.messages[0], "c.jsonl, line 1" in caplog.messages[1]] == [True, True]


def test_no_text_at_all(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no text in .*a\.txt"):
        run([write_text(tmp_path / "a.txt", "")], tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_an_output_directory_in_use_is_refused_and_untouched(tokenizer, tmp_path):
    path = write_text(tmp_path / "a.txt", "one")
    out = tmp_path / "out"
    run([path], tokenizer, out)
    before = (out / "tokens-00000.bin").read_bytes()
    with pytest.raises(ValueError, match=r"\(--output\) already holds tokens-00000\.bin"):
        run([write_text(tmp_path / "a.txt", "two")], tokenizer, out)
    assert (out / "tokens-00000.bin").read_bytes() == before
    with pytest.raises(ValueError, match=r"\(--output\) is a file"):
        run([path], tokenizer, path)


def test_progress_goes_to_stderr(tokenizer, tmp_path, capsys):
    path = write_text(tmp_path / "a.txt", "x" * 2000)
    tokenize_files([path], tokenizer, tmp_path / "out", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2.00k/2.00k" in captured.err
    run([path], tokenizer, tmp_path / "out2")
    assert capsys.readouterr().err == ""


def _compress(path, suffix, content):
    kind = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[suffix]
    path = path.with_name(path.name + suffix)
    with pa.output_stream(path, compression=kind) as file:
        file.write(content)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_compressed_files(tmp_path, suffix):
    lines = [json.dumps({"text": f"line {i} ä"}) for i in range(3000)]
    _compress(tmp_path / "a.jsonl", suffix, "\n".join(lines).encode())
    _compress(tmp_path / "b.txt", suffix, b"one text\r\nof two lines")
    assert list(iter_texts([tmp_path])) == [
        *(f"line {i} ä" for i in range(3000)), "one text\r\nof two lines"
    ]  # fmt: skip
    for path in tmp_path.iterdir():
        read = sum(piece.read_bytes for piece in iter_pieces(path))
        assert read == path.stat().st_size


def test_damaged_compressed_files(tmp_path):
    path = _compress(tmp_path / "a.jsonl", ".gz", b'{"text": "x"}\n' * 9000)
    path.write_bytes(path.read_bytes()[:60] + b"damage" * 4)
    with pytest.raises(ValueError, match=r"cannot read .*a\.jsonl\.gz"):
        list(iter_texts([tmp_path]))


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view()], ids=str
)
def test_forms_of_text_columns(tmp_path, kind):
    texts = ["a text", "another", "a text"]
    table = pa.table({"text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(iter_texts([tmp_path])) == texts
