"""Text to token files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Literal, Self

import numpy as np
import transformers
from tokenizers import Tokenizer
from tqdm import tqdm

from psyche_fast.data.card import NAME, Card, TokenizerCard, tokenizer_hash, write_card
from psyche_fast.data.local import token_files
from psyche_fast.data.pack import PackedWriter
from psyche_fast.data.texts import Piece, find_files, iter_pieces

TOKENIZER_FOLDER = "tokenizer"
# A batch is encoded in parallel; some 40 bytes of memory to a character while it is.
_BATCH_CHARACTERS = 1 << 22
# A file is closed at the first document's end from this size on.
_FILE_TOKENS = 1 << 29


@dataclass(frozen=True, slots=True)
class TokenizeSummary:
    """What `tokenize_files` has written."""

    documents: int
    tokens: int
    """Tokens written, the one at the end of each document included."""
    files: tuple[Path, ...]
    """The token files, or those of packed rows, in order."""
    token_size: int
    """Bytes to a token, 2 or 4."""
    rows: int | None = None
    """Packed rows."""
    cut: int = 0
    """Documents that were longer than a packed row."""


def token_size_for(vocab_size: int, token_size: int | None = None) -> int:
    """Bytes to a token for a vocabulary: 2 where its ids fit, else 4.

    Args:
        vocab_size: highest token id plus one.
        token_size: the user's choice (`--token-size`, 2 or 4), or None.

    Raises:
        ValueError: if the choice is too small for the vocabulary.
    """
    needed = 2 if vocab_size <= 1 << 16 else 4
    if token_size is not None and token_size < needed:
        raise ValueError(
            f"a vocabulary of {vocab_size} does not fit in {token_size}-byte tokens (--token-size)"
        )
    return token_size or needed


def tokenize_files(
    inputs: Sequence[str | Path],
    tokenizer: transformers.PreTrainedTokenizerFast,
    output_dir: str | Path,
    *,
    token_size: int | None = None,
    text_key: str = "text",
    globs: Sequence[str] | None = None,
    errors: Literal["strict", "skip"] = "strict",
    pack: int | None = None,
    tokenizer_name: str | None = None,
    progress: bool = True,
) -> TokenizeSummary:
    """Write the documents of text files, JSON lines and Parquet files as token files.

    Every document is encoded without the tokenizer's own special tokens (text that spells one is
    plain text too) and followed by the end-of-text token; empty documents are left out. The
    output is `tokens-00000.bin` and so on, raw little-endian uint16 or uint32, which `LocalDataset`
    reads, and the tokenizer in the folder `tokenizer` beside them; or, with `pack`,
    `train-00000.parquet` and so on, which `ParquetDataset` reads. `card.json` says what is there.
    All appear under these names when everything is written and synced; after an error the directory
    is as it was.

    Args:
        inputs: files and folders, see `find_files`.
        tokenizer: the tokenizer, with an end-of-text token.
        output_dir: created where missing; it must not hold token files or a tokenizer already.
        token_size: 2 or 4 bytes; None takes 2 where the vocabulary fits.
        text_key: key (JSON lines) or column (Parquet) of the text.
        globs: patterns for files in folders, see `find_files`.
        errors: `strict` raises at text that is not UTF-8, `skip` leaves the text file or JSON line
            out with a warning.
        pack: tokens of a row into which whole documents are packed, see `data.pack`; None for token
            files, in which they follow one another.
        tokenizer_name: what the card calls the tokenizer; None for one trained on the inputs.
        progress: show a progress bar (input bytes) on stderr.

    Raises:
        FileNotFoundError: if an input does not exist.
        ValueError: for bad input (named with file and line), a tokenizer without end-of-text token,
            an unfit token size, an output directory that is in use, or no document at all.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer (--tokenizer) has no end-of-text (eos) token")
    token_size = token_size_for(max(tokenizer.get_vocab().values()) + 1, token_size)
    paths = find_files(inputs, globs)
    output = _prepare_output(Path(output_dir))
    encoder = _plain_encoder(tokenizer)

    bar = tqdm(
        total=sum(path.stat().st_size for path in paths),
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with bar, _Writer(output, token_size, tokenizer.eos_token_id, pack) as writer:
        batch: list[Piece] = []
        characters = 0

        def flush() -> None:
            pieces = [piece for piece in batch if piece.text]
            texts = [piece.text for piece in pieces]
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
            for piece, encoding in zip(pieces, encodings, strict=True):
                writer.add(encoding.ids, piece.ends_document)
            bar.update(sum(piece.read_bytes for piece in batch))
            batch.clear()

        for path in paths:
            for piece in iter_pieces(path, text_key=text_key, errors=errors):
                batch.append(piece)
                characters += len(piece.text)
                if characters >= _BATCH_CHARACTERS:
                    flush()
                    characters = 0
        flush()
        if writer.documents == 0:
            raise ValueError(f"no text in {', '.join(map(str, inputs))}")
        tokenizer.save_pretrained(writer.folder / TOKENIZER_FOLDER)
        sizes = writer.finish()
        packed = writer.packed
        card = Card(
            made=datetime.now().astimezone().isoformat(timespec="seconds"),
            sources=[str(path) for path in inputs],
            source_files=len(paths),
            source_bytes=bar.total,
            documents=writer.documents,
            tokens=writer.tokens,
            token_size=None if packed else token_size,
            packed=pack,
            rows=packed.rows if packed else None,
            tokenizer=TokenizerCard(
                name=tokenizer_name,
                vocabulary=max(tokenizer.get_vocab().values()) + 1,
                sha256=tokenizer_hash(writer.folder / TOKENIZER_FOLDER / "tokenizer.json"),
            ),
            files=sizes,
        )
        write_card(card, writer.folder / NAME)
        files = writer.publish()
    rows, cut = (packed.rows, packed.cut) if packed else (None, 0)
    return TokenizeSummary(writer.documents, writer.tokens, files, token_size, rows, cut)


def _prepare_output(output: Path) -> Path:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} (--output) is a file, expected a directory")
    output.mkdir(parents=True, exist_ok=True)
    present = [*token_files(output), *output.glob(TOKENIZER_FOLDER), *output.glob(NAME)]
    if present := [*present, *output.glob("train*.parquet")]:
        raise ValueError(
            f"{output} (--output) already holds {present[0].name}: choose a new directory"
        )
    return output


def _plain_encoder(tokenizer: transformers.PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that takes text for text, whole: no special tokens, truncation or padding."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


class _Writer:
    """Token files in a hidden folder of the output directory, moved out of it when complete."""

    def __init__(self, output: Path, token_size: int, end_of_text: int, pack: int | None) -> None:
        self._output = output
        self._dtype = np.dtype(f"<u{token_size}")
        self._end_of_text = end_of_text
        self._file: BinaryIO | None = None
        self._in_file = 0
        self._names: list[str] = []
        self.folder = Path(tempfile.mkdtemp(prefix=".tokenize-", dir=output))
        self.documents = self.tokens = 0
        self.packed = None if pack is None else PackedWriter(self.folder, pack, end_of_text)
        self._document: list[np.ndarray] = []

    def add(self, ids: list[int], ends_document: bool) -> None:
        """Append the tokens of a piece, and the end-of-text token if it ends its document."""
        tokens = np.array([*ids, self._end_of_text] if ends_document else ids, dtype=self._dtype)
        self.tokens += len(tokens)
        self.documents += ends_document
        if self.packed is not None:
            self._document.append(tokens)
            if ends_document:
                self.packed.add(np.concatenate(self._document))
                self._document = []
            return
        if self._file is None:
            self._names.append(f"tokens-{len(self._names):05d}.bin")
            self._file = (self.folder / self._names[-1]).open("wb")
            self._in_file = 0
        self._file.write(tokens.tobytes())
        self._in_file += len(tokens)
        if ends_document and self._in_file >= _FILE_TOKENS:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> dict[str, int]:
        """Write what is left; the files' sizes by name."""
        self._finish_file()
        if self.packed is not None:
            self.packed.flush()
            self.packed.close()
            self._names = self.packed.names
        return {name: (self.folder / name).stat().st_size for name in self._names}

    def publish(self) -> tuple[Path, ...]:
        """Sync everything and move it into the output directory, what training reads last."""
        for path in self.folder.rglob("*"):
            _sync(path)
        for name in (TOKENIZER_FOLDER, NAME, *self._names):
            os.rename(self.folder / name, self._output / name)
        _sync(self._output)
        return tuple(self._output / name for name in self._names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self.packed is not None:
            self.packed.close()
        shutil.rmtree(self.folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
