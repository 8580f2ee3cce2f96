"""Documents of text files, JSON lines and Parquet files, read in pieces of bounded size."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from psyche_fast.data.samples import visible_files

logger = logging.getLogger(__name__)

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_GLOBS = (
    "*.txt", "*.text", "*.md", "*.markdown", "*.rst", "*.tex", "*.html", "*.py", "*.pyi",
    "*.c", "*.h", "*.cc", "*.cpp", "*.hpp", "*.cu", "*.rs", "*.go", "*.java", "*.js", "*.ts",
    "*.sh", "*.toml", "*.yaml", "*.yml",
)  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffixes behind those of text and JSON lines."""

DEFAULT_GLOBS = (
    *TEXT_GLOBS,
    *(f"*{s}" for s in JSON_LINES_SUFFIXES),
    *(f"*{s}{c}" for s in (".txt", *JSON_LINES_SUFFIXES) for c in COMPRESSIONS),
    "*.parquet",
)

# A longer document is given out in pieces: a tokenizer needs 100 to 200 bytes of memory a token.
PIECE_CHARACTERS = 1 << 18
_HARD_LIMIT = 16
# A line break between two visible characters. The pre-tokenizers of GPT-2 and its successors never
# join what stands before it and what stands after it, so cutting here leaves the tokens unchanged.
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    ends_document: bool
    read_bytes: int
    """Bytes of the input file that were read for it, for the progress bar."""


def find_files(inputs: Sequence[str | Path], globs: Sequence[str] | None = None) -> list[Path]:
    """Input files: those named, and below folders those that match a pattern.

    Args:
        inputs: files and folders. A file that is named is read whatever its suffix.
        globs: patterns for the names of files in folders, all levels down; None for the usual
            suffixes of text and source code, `.jsonl`, `.ndjson` and `.parquet`, the first ones
            compressed too (`.gz`, `.zst`, `.bz2`). Names that begin with a dot are left out.

    Returns:
        The files in the order of `inputs`, those of a folder sorted by path.

    Raises:
        FileNotFoundError: if an input does not exist.
        ValueError: if there are no inputs, or a folder holds no matching file.
    """
    if not inputs:
        raise ValueError("no input to tokenize: name at least one file or folder")
    patterns = DEFAULT_GLOBS if globs is None else tuple(globs)
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            visible = visible_files(path)
            matching = [p for p in visible if any(p.match(pattern) for pattern in patterns)]
            if not matching:
                raise ValueError(f"no file in {path} matches {' '.join(patterns)} (--glob)")
            files += matching
        else:
            raise FileNotFoundError(f"no such file or directory: {path}")
    return files


def iter_pieces(
    path: Path, *, text_key: str = "text", errors: Literal["strict", "skip"] = "strict"
) -> Iterator[Piece]:
    """Documents of one file, by its suffix: JSON lines, Parquet, else one document of UTF-8 text.

    Line ends and a byte order mark are kept as they are. A document longer than `PIECE_CHARACTERS`
    comes in several pieces, cut at line breaks.

    Args:
        path: the file.
        text_key: key (JSON lines) or column (Parquet) of the text.
        errors: what to do with text that is not UTF-8: raise, or leave the text file or the JSON
            line out with a warning.

    Raises:
        ValueError: with the file and the line or row, for text that is not UTF-8 (`strict`), lines
            that are not JSON objects, a missing key or column, or text that is not a string.
    """
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if name.suffix in JSON_LINES_SUFFIXES:
        return _json_lines(path, text_key, errors)
    if path.suffix == ".parquet":
        return _parquet(path, text_key)
    return _text_file(path, errors)


def iter_texts(
    inputs: Sequence[str | Path],
    *,
    text_key: str = "text",
    globs: Sequence[str] | None = None,
    errors: Literal["strict", "skip"] = "strict",
) -> Iterator[str]:
    """The text of all inputs in pieces, as `train_tokenizer` takes it."""
    for path in find_files(inputs, globs):
        for piece in iter_pieces(path, text_key=text_key, errors=errors):
            yield piece.text


def _cut(text: str) -> Iterator[str]:
    """Pieces of a text; the last is never empty unless the text is."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut_position(text, start)
        if end is None:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _pieces(text: str, read_bytes: int) -> Iterator[Piece]:
    """A whole document in pieces; the bytes read count with the last."""
    *parts, last = _cut(text)
    for part in parts:
        yield Piece(part, ends_document=False, read_bytes=0)
    yield Piece(last, ends_document=True, read_bytes=read_bytes)


def _cut_position(text: str, start: int) -> int | None:
    """Where to cut `text` after `start`: a safe position, at last any, None if not yet."""
    safe = _SAFE_CUT.search(text, start + PIECE_CHARACTERS // 2)
    if safe is not None and safe.end() - start <= _HARD_LIMIT * PIECE_CHARACTERS:
        return safe.end()
    if len(text) - start > _HARD_LIMIT * PIECE_CHARACTERS:
        return start + _HARD_LIMIT * PIECE_CHARACTERS
    return None


def _text_file(path: Path, errors: str) -> Iterator[Piece]:
    rest, counted = "", 0
    try:
        if errors == "skip":
            for _ in _read(path):  # the whole file, before any of it is given out
                pass
        for text, position in _read(path):
            *whole, rest = _cut(rest + text)
            for part in whole:
                yield Piece(part, ends_document=False, read_bytes=position - counted)
                counted = position
    except UnicodeDecodeError as error:
        if errors == "skip":
            logger.warning("%s is left out: it is not UTF-8 text", path)
            return
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason}): convert it or leave such files out "
            "(--errors skip)"
        ) from None
    if rest:
        yield Piece(rest, ends_document=True, read_bytes=path.stat().st_size - counted)


def _read(path: Path) -> Iterator[tuple[str, int]]:
    """A file's text in parts, and how many of its bytes were read by then."""
    with _open(path) as (file, raw):
        # newline="" keeps \r\n and \r as they are.
        decoder = io.TextIOWrapper(file, encoding="utf-8", newline="")
        while text := decoder.read(PIECE_CHARACTERS):
            yield text, raw.tell()


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file's content, decompressed where its suffix says so, and the file.

    Raises:
        ValueError: what is compressed is damaged.
    """
    with path.open("rb") as raw:
        if path.suffix not in COMPRESSIONS:
            yield raw, raw
            return
        stream = pa.CompressedInputStream(raw, COMPRESSIONS[path.suffix])
        try:
            yield io.BufferedReader(stream, 1 << 20), raw
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"cannot read {path}: {error}") from None


def _json_lines(path: Path, text_key: str, errors: str) -> Iterator[Piece]:
    counted = 0
    with _open(path) as (file, raw):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                text = record[text_key] if isinstance(record, dict) else None
                if isinstance(text, str):
                    text.encode("utf-8")  # JSON's \ud800 escapes can spell what UTF-8 cannot
            except UnicodeError:
                if errors == "skip":
                    logger.warning("%s, line %d is left out: it is not UTF-8 text", path, number)
                    continue
                raise ValueError(
                    f"{path}, line {number} is not UTF-8 text: convert it or leave such lines out "
                    "(--errors skip)"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            except KeyError:
                raise ValueError(
                    f"{path}, line {number} has no key {text_key!r}, only {sorted(record)} "
                    "(--text-key)"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object")
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, line {number}: {text_key!r} is a {type(text).__name__}, expected text"
                )
            position = raw.tell()
            yield from _pieces(text, position - counted)
            counted = position


def _parquet(path: Path, text_key: str) -> Iterator[Piece]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                raise ValueError(
                    f"{path} has no column {text_key!r}, only {schema.names} (--text-key)"
                )
            kind = schema.field(text_key).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
            if not any(is_text(kind) for is_text in texts):
                raise ValueError(f"{path}: column {text_key!r} is {kind}, expected text")
            size, rows = path.stat().st_size, file.metadata.num_rows
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise ValueError(f"{path}, row {row}: {text_key!r} has no value")
                    row += 1
                    # The file's size in equal parts, with no rounding left over at the end.
                    yield from _pieces(text, size * row // rows - size * (row - 1) // rows)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
