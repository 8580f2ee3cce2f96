"""Packed rows and data cards: documents come back whole, and what does not fit together is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

from psyche_fast.config import RunConfig
from psyche_fast.core.plan import make_plan
from psyche_fast.data import folders_of, open_dataset, tokenize_files, train_tokenizer
from psyche_fast.data.card import check_card, read_card, tokenizer_hash
from psyche_fast.data.pack import best_fit
from psyche_fast.data.samples import Sample
from tests.tiny import llama_config

TEXTS = [f"def f{n}(x):\n" + "    x += 1\n" * (n * 7 % 40) + "    return x\n" for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    (folder / "texts").mkdir()
    for n, text in enumerate(TEXTS):
        (folder / "texts" / f"{n:03d}.txt").write_text(text)
    texts = [folder / "texts"]
    tokenize_files(texts, tokenizer, folder / "rows", pack=64, progress=False)
    tokenize_files(texts, tokenizer, folder / "tokens", progress=False)
    model = transformers.LlamaForCausalLM(llama_config(vocab_size=320))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_every_piece_is_in_one_row_and_rows_are_full(size: int) -> None:
    lengths = np.random.default_rng(size).integers(1, size + 1, 500).tolist()
    rows = best_fit(lengths, size)
    assert sorted(piece for row in rows for piece in row) == list(range(500))
    full = [sum(lengths[piece] for piece in row) for row in rows]
    assert max(full) <= size
    assert len(rows) <= 1.1 * sum(lengths) / size + 1
    # No piece of a later row would have gone into the room of an earlier one: they came later.
    rooms = [size - n for n in full]
    for row, pieces in enumerate(rows):
        assert all(lengths[piece] > min(rooms[:row], default=0) for piece in pieces[:1])


def documents_of(samples: list[Sample]) -> list[list[int]]:
    found = []
    for sample in samples:
        assert sample.position_ids is not None
        assert sample.sequence_lengths is not None
        at = 0
        for length in sample.sequence_lengths:
            found.append(sample.input_ids[at : at + length].tolist())
            positions = sample.position_ids[at : at + length]
            assert positions.tolist() == list(range(length))
            assert (sample.labels[at : at + length] == sample.input_ids[at : at + length]).all()
            at += length
        assert (sample.labels[at:] == -100).all()
    return found


def test_documents_come_back_from_packed_rows(place: Path, tokenizer) -> None:
    dataset = open_dataset(place / "rows", sequence_length=64)
    found = documents_of(dataset.get_samples(0, len(dataset) - 1))
    wanted = []
    for text in TEXTS:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        wanted += [ids[at : at + 64] for at in range(0, len(ids), 64)]
    assert sorted(found) == sorted(wanted)
    card = read_card(place / "rows")
    assert card is not None
    assert (card.packed, card.rows, card.documents) == (64, len(dataset), 60)
    assert card.tokens == sum(map(len, wanted))
    assert card.tokens / card.rows / 64 > 0.9
    # The same again, to the byte.
    again = place / "again"
    tokenize_files([place / "texts"], tokenizer, again, pack=64, progress=False)
    rows = "train-00000.parquet"
    assert (again / rows).read_bytes() == (place / "rows" / rows).read_bytes()
    with pytest.raises(ValueError, match=r"already holds"):
        tokenize_files([place / "texts"], tokenizer, again, pack=64, progress=False)
    shutil.rmtree(again)


def plan(place: Path, data: str, **flags: object) -> str:
    config = RunConfig.of(
        model=str(place / "model"), data_path=str(place / data), sequence_length=64, device="cpu",
        total_steps=1, total_batch=4, output=str(place / "out"), **flags,
    )  # fmt: skip
    return "\n".join(make_plan(config).summary)


def test_the_card_is_compared_at_the_start(place: Path, tokenizer) -> None:
    for data in ("rows", "tokens"):
        assert "60 documents, by the model's own tokenizer" in plan(place, data)
    other = train_tokenizer([*TEXTS, "while True: pass\n" * 50], 300)
    tokenize_files([place / "texts"], other, place / "other", progress=False)
    with pytest.raises(ValueError, match="are of another tokenizer \\(one of 286 trained on them"):
        plan(place, "other")
    mixture = place / "mix.toml"
    mixture.write_text('[[data]]\npath = "tokens"\n[[data]]\npath = "other"\n')
    with pytest.raises(ValueError, match=r"other/card.json says that its tokens are of another"):
        plan(place, "mix.toml")
    dataset = open_dataset(mixture, sequence_length=64)
    assert folders_of(dataset) == [place / "tokens", place / "other"]
    assert folders_of(open_dataset("dummy:", sequence_length=64)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card["files"].update({"tokens-00000.bin": 7}), "has 7 bytes, and it has "),
        (lambda card: card["files"].update({"tokens-1.bin": 7}), "there is tokens-1.bin, which is"),
        (lambda card: card.update(token_size=4), "says tokens of 4 bytes: --token-size 2"),
        (lambda card: card.update(packed=32), "rows of 32 tokens: --sequence-length 64 wants them"),
        (lambda card: card.update(version=9), "is of version 9; this one reads 1"),
        (lambda card: card.pop("tokens"), "missing required field `tokens`"),
        (lambda card: card.clear(), "missing required field"),
    ],
)  # fmt: skip
def test_cards_that_do_not_go_with_what_is_there(place: Path, change, said: str) -> None:
    folder = place / "changed"
    shutil.copytree(place / "tokens", folder)
    try:
        card = json.loads((folder / "card.json").read_text())
        change(card)
        (folder / "card.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match=said):
            plan(place, "changed")
        (folder / "card.json").write_text("{")
        with pytest.raises(ValueError, match=r"card.json is not valid JSON"):
            plan(place, "changed")
        (folder / "card.json").unlink()
        assert "tokenizer" not in plan(place, "changed")
    finally:
        shutil.rmtree(folder)


def test_tokenizers_are_compared_by_what_they_make_of_text(place: Path, tmp_path: Path) -> None:
    file = place / "model" / "tokenizer.json"
    table = json.loads(file.read_text())
    framed = tmp_path / "tokenizer.json"
    framed.write_text(json.dumps({**table, "truncation": None, "post_processor": None}))
    assert tokenizer_hash(framed) == tokenizer_hash(file)
    table["model"]["vocab"] = {k: v for k, v in table["model"]["vocab"].items() if v != 260}
    framed.write_text(json.dumps(table))
    assert tokenizer_hash(framed) != tokenizer_hash(file)
    with pytest.raises(ValueError, match="is no tokenizer"):
        tokenizer_hash(place / "model" / "config.json")
    line = check_card(
        place / "tokens", token_size=2, sequence_length=8, tokenizer=None, model="the-model"
    )
    assert line is not None
    assert "the-model has no tokenizer to compare with" in line
