"""`--checkpoint-to URL` and `--resume URL`: checkpoints in buckets, or behind any fsspec."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
from fsspec.implementations.local import LocalFileSystem

from psyche_fast.core.checkpoints import step_of
from psyche_fast.core.uploads import Uploads
from psyche_fast.data.remote import retried
from psyche_fast.rank import state
from psyche_fast.rank.checkpoint import atomic_folder

log = logging.getLogger("psyche_fast.core")

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_MARK = f"{state.FOLDER}/{state.MANIFEST}"
"""A checkpoint's last file to come and first to go: without it there is none."""


def is_url(name: str) -> bool:
    """Whether a name is a URL rather than a path."""
    return "://" in name


def open_remote(url: str, flag: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL's path there.

    Args:
        url: of a folder.
        flag: what it is of, for errors.

    Raises:
        ValueError: no such file system, one that cannot be written to, or its package is missing.
    """
    kind = url.partition("://")[0]
    if not is_url(url) or kind in ("http", "https"):
        raise ValueError(f"{flag} {url}: wanted a URL such as s3://, gs:// or hf://")
    if kind == "hf" and huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"{flag} {url}: the hub is not asked: HF_HUB_OFFLINE is set")
    try:
        files, path = fsspec.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(kind)
        how = str(error) if package is None else f"{package}: pip install 'psyche-fast[remote]'"
        raise ValueError(f"{flag} {url}: {kind}:// needs {how}") from error
    # File systems have errors of their own, of no common class.
    except Exception as error:
        raise ValueError(f"{flag} {url}: {' '.join(str(error).split())}") from error
    return files, path.rstrip("/")


class RemoteUploads(Uploads):
    """Uploads checkpoints, state and all, file by file; `state/manifest.json` comes last.

    Args:
        url: of a folder; each checkpoint becomes one in it.
        tell: takes lines for the user, from any thread.
    """

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        self._url = url.rstrip("/")
        self._files, self._root = open_remote(url, "--checkpoint-to")
        super().__init__("--checkpoint-to", self._url, tell)

    def upload(self, step: int, path: Path) -> None:
        """Uploads what a checkpoint has."""
        files, target = self._files, f"{self._root}/{path.name}"
        mark = f"{target}/{_MARK}"
        names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
        names.sort(key=lambda name: name == _MARK)

        def withdraw() -> None:
            files.invalidate_cache()
            if files.exists(mark):  # of an earlier part of the run
                files.rm_file(mark)

        retried(self._url, withdraw)
        for name in names:

            def put(name: str = name) -> None:
                if isinstance(files, LocalFileSystem):
                    files.makedirs(posixpath.dirname(f"{target}/{name}"), exist_ok=True)
                files.put_file(str(path / name), f"{target}/{name}")

            retried(f"{self._url}/{path.name}/{name}", put)

    def by_hand(self, path: Path) -> str:
        """In words, since every file system has tools of its own."""
        return f"copy {path.resolve()} to {self._url}/{path.name}, {_MARK} last"


def fetched(url: str, into: Path, flag: str) -> Iterator[Path]:
    """Downloads the checkpoints of a URL one after the other, the newest first.

    Args:
        url: a checkpoint's, or that of the folder which they are in.
        into: the local folder for them. One that is there whole already is not read again.
        flag: what the URL is of, for errors.

    Yields:
        each one's folder, when it is there; its content is not checked.

    Raises:
        ValueError: there are none.
        OSError: they cannot be read, however often that is tried.
    """
    files, root = open_remote(url, flag)

    def find() -> list[str]:
        files.invalidate_cache()
        if files.exists(f"{root}/{_MARK}"):
            return [root]
        if not files.exists(root):
            return []
        paths = [entry["name"].rstrip("/") for entry in files.ls(root, detail=True)]
        steps = {path: step_of(Path(path)) for path in paths}
        found = [path for path in paths if steps[path] and files.exists(f"{path}/{_MARK}")]
        return sorted(found, key=lambda path: steps[path] or 0, reverse=True)

    found = retried(url, find)
    if not found:
        raise ValueError(f"{flag} {url}: there is no complete checkpoint")
    for path in found:
        folder = into / posixpath.basename(path)
        mark = retried(url, partial(files.cat_file, f"{path}/{_MARK}"))
        if not _is_there(folder, mark):
            log.info("downloading %s to %s", path, folder)
            names = sorted(retried(url, partial(files.find, path)))
            with atomic_folder(folder) as temporary:
                for name in names:
                    own = temporary / posixpath.relpath(name.rstrip("/"), path)
                    if not own.resolve().is_relative_to(temporary.resolve()):
                        raise ValueError(f"{flag} {url}: {name} is not below {path}")
                    own.parent.mkdir(parents=True, exist_ok=True)
                    retried(name, partial(files.get_file, name, str(own)))
        yield folder


def _is_there(folder: Path, mark: bytes) -> bool:
    try:
        if (folder / _MARK).read_bytes() != mark:
            return False
        state.check_sums(folder, state.read_manifest(folder))
    except (OSError, ValueError):
        return False
    return True
