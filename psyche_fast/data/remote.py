"""Files behind URLs: read in blocks, which are kept on disk, and read again where that fails."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import fsspec
import huggingface_hub

from psyche_fast.data.http import HttpFiles, NoRangesError, PublicBucket
from psyche_fast.locations import numbered, scheme

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each further wait is twice as long."""
FEW_BYTES, MANY_BYTES = 1 << 16, 1 << 20
"""Sizes of blocks: of what is read here and there, and of what is read from end to end."""
_CONNECTIONS = 16
_KEPT = 0.9
"""How full the cache is after blocks were dropped, so that not every new one drops others."""
_RECENT = 60.0
"""Seconds for which a block counts as used without being marked anew."""
_FINAL = (FileNotFoundError, PermissionError, ValueError, NoRangesError, NotImplementedError)
"""Errors that another attempt would meet again."""
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}


class BlockCache:
    """Blocks of remote files in a folder, the least recently used dropped first.

    Runs may share the folder. A block is one file, which appears whole; one of another length than
    it has to have is read anew.

    Args:
        folder: created where missing; None for `psyche_fast/data` in the user's cache
            (`XDG_CACHE_HOME`, else `~/.cache`).
        most_bytes: how much is kept.
    """

    def __init__(self, folder: str | Path | None = None, most_bytes: int = 32 << 30) -> None:
        if folder is None:
            home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
            folder = home.expanduser() / "psyche_fast" / "data"
        self.folder = Path(folder)
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._bytes: int | None = None
        self.fails = False
        """Whether a block could not be kept."""

    @cached_property
    def pool(self) -> ThreadPool:
        """Threads that read several blocks at once."""
        return ThreadPool(_CONNECTIONS)

    def get(self, key: str, block: int, length: int, part: slice = slice(None)) -> bytes | None:
        """A part of a block of so many bytes, or None where it is not there whole."""
        path = self._path(key, block)
        start, stop, _ = part.indices(length)
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size != length:
                    return None
                file.seek(start)
                data = file.read(stop - start)
            if time.time() - status.st_mtime > _RECENT:
                os.utime(path)
        except OSError:
            return None
        return data if len(data) == stop - start else None

    def has(self, key: str, block: int, length: int) -> bool:
        """Whether a block of so many bytes is there."""
        return self.get(key, block, length, slice(0, 0)) is not None

    def put(self, key: str, block: int, data: bytes) -> None:
        """Keeps a block.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        path = self._path(key, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        with self._lock:
            if self._bytes is None:
                self._bytes = sum(size for _, size, _ in self._blocks())
            else:
                self._bytes += len(data)
            if self._bytes > self.most_bytes:
                self._drop()

    def _path(self, key: str, block: int) -> Path:
        return self.folder / key / str(block)

    def _blocks(self) -> list[tuple[float, int, Path]]:
        """When each block was used last, its size and its file."""
        found = []
        for path in self.folder.glob("*/*"):
            with suppress(OSError):  # another run may have dropped it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _drop(self) -> None:
        """Makes room."""
        blocks = sorted(self._blocks())
        self._bytes = sum(size for _, size, _ in blocks)
        for _, size, path in blocks:
            if self._bytes <= self.most_bytes * _KEPT:
                break
            path.unlink(missing_ok=True)
            self._bytes -= size


@dataclass(eq=False)
class RemoteFile:
    """One file behind a URL.

    Attributes:
        url: as errors name it.
        path: what its file system calls it.
        size: in bytes.
        version: changes with the content, where the server says so.
        files: its file system: an fsspec one, or one of `http`.
        cache: where its blocks are kept.
        name: its name below the URL that was asked for.
        block_bytes: how much of it is read at once.
        options: further ones of `files.cat_file`.
    """

    url: str
    path: str
    size: int
    version: str
    files: Any
    cache: BlockCache
    name: PurePosixPath
    block_bytes: int
    options: dict[str, Any]
    _whole: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return self.url

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return self.name.suffix

    @cached_property
    def key(self) -> str:
        """The name of its folder in the cache."""
        # A file that may have changed by the next run is not kept for that.
        version = self.version or f"{os.getpid()} at {time.time_ns()}"
        whole = f"{self.url}\n{self.size}\n{version}\n{self.block_bytes}"
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on.

        Raises:
            ValueError: the file has changed, or the server refuses it.
            OSError: it cannot be read, however often it is tried.
        """
        assert 0 <= offset <= offset + length <= self.size
        blocks = self._blocks(offset, length)
        if len(blocks) > 1:
            fetch([(self, offset, length)])
        size, end = self.block_bytes, offset + length
        return b"".join(
            self._block(block, slice(max(offset - block * size, 0), min(end - block * size, size)))
            for block in blocks
        )

    def open(self) -> io.BufferedReader:
        """The file as a seekable one, for what reads files."""
        return io.BufferedReader(_Stream(self), 1 << 16)

    def _blocks(self, offset: int, length: int) -> Sequence[int]:
        size = self.block_bytes
        return range(offset // size, -(-(offset + length) // size) if length else offset // size)

    def _length(self, block: int) -> int:
        return min(self.block_bytes, self.size - block * self.block_bytes)

    def _block(self, block: int, part: slice = slice(None)) -> bytes:
        length = self._length(block)
        data = self.cache.get(self.key, block, length, part)
        return self._fetched(block)[part] if data is None else data

    def _fetched(self, block: int) -> bytes:
        """A block that is not in the cache, where it then is."""
        length = self._length(block)
        start = block * self.block_bytes

        def read() -> bytes:
            data = self.files.cat_file(self.path, start, start + length, **self.options)
            if len(data) != length:
                raise OSError(f"{len(data)} bytes came instead of {length}")
            return bytes(data)

        try:
            data = retried(self.url, read)
        except NoRangesError:
            return self._read_whole(block)
        except FileNotFoundError as error:
            raise ValueError(f"{self.url} is gone since it was opened: {error}") from error
        try:
            self.cache.put(self.key, block, data)
        except OSError as error:  # a full disk is no reason to lose the run
            if not self.cache.fails:
                logger.warning("blocks are not kept: %s", error)
            self.cache.fails = True
        return data

    def _read_whole(self, block: int) -> bytes:
        """Keeps all blocks of a file whose server knows no ranges; returns one of them."""
        if self.size > self.cache.most_bytes * _KEPT:
            raise ValueError(
                f"{self.url}: its server sends whole files only, and it has {self.size} bytes, "
                f"more than the cache of {self.cache.most_bytes} (--data-cache-gb)"
            )
        with self._whole:  # the first of several threads reads it for all
            data = self.cache.get(self.key, block, self._length(block))
            if data is not None:
                return data
            logger.warning("%s: its server sends whole files only; it is read whole", self.url)
            return retried(self.url, lambda: self._keep_whole(block))

    def _keep_whole(self, block: int) -> bytes:
        wanted, read, number = b"", 0, 0
        pending = b""
        for piece in self.files.stream(self.path, self.block_bytes):
            read += len(piece)
            pending += piece
            while read <= self.size and len(pending) >= self._length(number) > 0:
                data, pending = pending[: self._length(number)], pending[self._length(number) :]
                self.cache.put(self.key, number, data)
                wanted = data if number == block else wanted
                number += 1
        if read != self.size:
            raise OSError(f"{read} bytes came instead of {self.size}")
        return wanted


class _Stream(io.RawIOBase):
    """A remote file as Python's readers want it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        )
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._file.size - self._at))
        buffer[:length] = self._file.read(self._at, length)
        self._at += length
        return length


def fetch(wanted: Iterable[tuple[RemoteFile, int, int]]) -> None:
    """Brings ranges into the cache, several at once.

    Args:
        wanted: a file each, with the range's first byte and its length.

    Raises:
        ValueError: what `RemoteFile.read` raises.
        OSError: likewise.
    """
    blocks = dict.fromkeys((f, b) for f, at, length in wanted for b in f._blocks(at, length))
    missing = [(f, b) for f, b in blocks if not f.cache.has(f.key, b, f._length(b))]
    if missing:
        missing[0][0].cache.pool.starmap(RemoteFile._fetched, missing, chunksize=1)


def find(url: str, cache: BlockCache, block_bytes: int) -> list[RemoteFile]:
    """The files of a URL: one, numbered ones (`{000..019}`), or those below a folder of a bucket.

    A folder's are in the order of their links, as Psyche sorts them; names that begin with a dot
    are left out.

    Args:
        url: `http(s)://`, `s3://`, `gs://` or `hf://`.
        cache: where their blocks are kept.
        block_bytes: size of a block.

    Raises:
        ValueError: there are none, the server refuses them, or a package is missing.
        OSError: the server cannot be reached.
    """
    kind = scheme(url)
    assert kind is not None
    files = _file_system(url, kind)
    # The hub's would read some megabytes ahead of every block.
    options = {"cache_type": "none"} if kind == "hf" else {}
    found: list[RemoteFile] = []

    def make(one: str, path: str, info: dict[str, Any], name: PurePosixPath) -> RemoteFile:
        size, version, system = info["size"], _version(info), files
        if isinstance(files, PublicBucket):
            system, path = HttpFiles(), info["mediaLink"]
            system.known[path] = size, ""
        return RemoteFile(one, path, size, version, system, cache, name, block_bytes, options)

    def look(one: str) -> list[RemoteFile]:
        path = one if kind in ("http", "https") else one.split("://", 1)[1].rstrip("/")
        info = retried(one, lambda: files.info(path))
        if info.get("type") == "directory":
            return _folder(one, kind, path, files, make)
        return [make(one, path, info, PurePosixPath(urlsplit(one).path))]

    try:
        for some in cache.pool.map(look, numbered(url), chunksize=1):
            found += some
    except (FileNotFoundError, PermissionError) as error:
        hint = ""
        if isinstance(error, PermissionError) and isinstance(files, PublicBucket):
            hint = "; buckets that are not public need gcsfs: pip install 'psyche-fast[remote]'"
        said = _line(error)
        where = f"--data-path {said}" if url in said else f"--data-path {url}: {said}"
        raise ValueError(where + hint) from error
    if not found:
        raise ValueError(f"--data-path {url}: there are no files")
    return found


def _folder(
    url: str, kind: str, path: str, files: Any, make: Callable[..., RemoteFile]
) -> list[RemoteFile]:
    own = isinstance(files, HttpFiles | PublicBucket)
    options = {} if own else {"detail": True}
    listed = retried(url, lambda: files.find(path, **options))
    found = []
    for name, info in listed.items():
        name = name.lstrip("/")
        below = PurePosixPath(unquote(name.removeprefix(path).lstrip("/")))
        if not any(part.startswith(".") for part in below.parts):
            link = info.get("mediaLink") or quote(name, safe="")
            full = name if kind in ("http", "https") else f"{kind}://{name}"
            found.append((link, make(full, name, info, below)))
    return [file for _, file in sorted(found, key=lambda pair: pair[0])]


def _version(info: dict[str, Any]) -> str:
    keys = ("version", "ETag", "etag", "generation", "blob_id")
    return next((str(info[key]) for key in keys if info.get(key)), "")


def _file_system(url: str, kind: str) -> Any:
    if kind in ("http", "https"):
        return HttpFiles()
    if kind == "hf" and huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"--data-path {url}: the hub is not asked for it: HF_HUB_OFFLINE is set")
    try:
        return fsspec.filesystem(kind)
    except ImportError as error:
        if kind == "gs":  # public ones need no package
            return PublicBucket()
        raise ValueError(
            f"--data-path {url}: {kind}:// needs {_PACKAGES.get(kind, kind)}: "
            "pip install 'psyche-fast[remote]'"
        ) from error


def retried(what: str, operation: Callable[[], T]) -> T:
    """What an operation returns that is tried again, after longer and longer waits, where it fails.

    Args:
        what: how to call it in an error.
        operation: raises one of `_FINAL` where another attempt is of no use.

    Raises:
        OSError: it has failed every time.
    """
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except _FINAL:
            raise
        # File systems have errors of their own, of no common class.
        except Exception as error:
            line = _line(error)
            said = line if what in line else f"{what}: {line}"
            if attempt + 1 == ATTEMPTS:
                raise OSError(f"{said}; tried {ATTEMPTS} times") from error
            wait = FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0)
            logger.warning("%s; trying again in %.1f s", said, wait)
            time.sleep(wait)
    raise AssertionError("every attempt returns or raises")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
