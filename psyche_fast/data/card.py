"""The data card: what tokens were made of, by which tokenizer, and how many there have to be.

`tokenize` writes `card.json` beside the tokens; `train` compares it with the model's tokenizer and
with the files that are there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from psyche_fast import strict
from psyche_fast.data.tokenizer import load_tokenizer

NAME = "card.json"
_VERSION = 1


class TokenizerCard(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenizer.

    Attributes:
        name: as `--tokenizer` was given; None for one that was trained on the texts.
        vocabulary: highest id plus one.
        sha256: of what makes ids of text, see `tokenizer_hash`.
    """

    name: str | None
    vocabulary: int
    sha256: str


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in a folder of tokens.

    Attributes:
        version: of this form.
        made: when, as ISO 8601.
        sources: files and folders as they were given.
        source_files: how many files were read.
        source_bytes: their sizes together.
        documents: how many were written.
        tokens: of them, the ones at documents' ends included.
        token_size: bytes per token; None of packed rows.
        packed: tokens of a packed row; None of token files.
        rows: packed rows.
        tokenizer: which.
        files: bytes of each file that holds tokens.
    """

    version: int = _VERSION
    made: str
    sources: list[str]
    source_files: int
    source_bytes: int
    documents: int
    tokens: int
    token_size: int | None
    packed: int | None = None
    rows: int | None = None
    tokenizer: TokenizerCard
    files: dict[str, int]


def tokenizer_hash(file: Path) -> str:
    """SHA-256 of what a `tokenizer.json` makes of text.

    That is its model, how it normalises and splits text, and its added tokens; not how sequences
    are cut, filled up or framed, nor what it decodes by.

    Raises:
        ValueError: the file cannot be read, or is none of that kind.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        parts = [table["model"], table.get("normalizer"), table.get("pre_tokenizer")]
        added = sorted((one["id"], one["content"]) for one in table.get("added_tokens") or ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    text = json.dumps([parts, added], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_card(card: Card, file: Path) -> None:
    """Writes a card, indented for people."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")


def read_card(folder: Path) -> Card | None:
    """The card of a folder; None where it has none.

    Raises:
        ValueError: it is not as `tokenize` writes it.
    """
    file = folder / NAME
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror} (--data-path)") from error
    table: Any = strict.loads(data, str(file))
    try:
        card = msgspec.convert(table, Card)
    except msgspec.ValidationError as error:
        raise ValueError(f"{file}: {error}; psyche-fast tokenize writes it") from error
    if card.version > _VERSION:
        raise ValueError(f"{file} is of version {card.version}; this one reads {_VERSION}")
    return card


def check_card(
    folder: Path, *, token_size: int, sequence_length: int, tokenizer: Path | None, model: str
) -> str | None:
    """Compares a folder's card with what is to be done with its tokens.

    Args:
        folder: of tokens.
        token_size: `--token-size`.
        sequence_length: `--sequence-length`.
        tokenizer: the model's `tokenizer.json`, if it has one.
        model: its name.

    Returns:
        A line for the user; None where there is no card.

    Raises:
        ValueError: other tokenizers, files that are not whole, rows or tokens of another size.
    """
    card = read_card(folder)
    if card is None:
        return None
    said = f"{folder / NAME} says"
    for name, size in card.files.items():
        try:
            there = (folder / name).stat().st_size
        except OSError:
            raise ValueError(f"{said} that there is {name}, which is not (--data-path)") from None
        if there != size:
            raise ValueError(
                f"{said} that {name} has {size} bytes, and it has {there}: it was not copied "
                "whole, or is another (--data-path)"
            )
    if card.token_size not in (None, token_size):
        raise ValueError(f"{said} tokens of {card.token_size} bytes: --token-size {token_size}")
    if card.packed not in (None, sequence_length):
        raise ValueError(
            f"{said} rows of {card.packed} tokens: --sequence-length {sequence_length} wants them "
            "packed anew (tokenize --pack)"
        )
    if tokenizer is None:
        return (
            f"tokens   {card.documents:,} documents; {model} has no tokenizer to compare with "
            "theirs"
        )
    if not _is_the_same(tokenizer, card.tokenizer.sha256):
        theirs = card.tokenizer.name or f"one of {card.tokenizer.vocabulary} trained on them"
        raise ValueError(
            f"{said} that its tokens are of another tokenizer ({theirs}) than {model} has: "
            f"tokenize the text with --tokenizer {model}, or give the model that tokenizer"
        )
    return f"tokens   {card.documents:,} documents, by the model's own tokenizer"


def _is_the_same(file: Path, sha256: str) -> bool:
    """Whether a model's tokenizer is the one of a hash, as it stands or as it is loaded.

    What loads a tokenizer may bring an old file into today's form, which is what a card has.
    """
    if tokenizer_hash(file) == sha256:
        return True
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(file.parent).save_pretrained(folder)
        return tokenizer_hash(Path(folder, file.name)) == sha256
