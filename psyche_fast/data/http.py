"""Files of HTTP servers and of public Google buckets, read in ranges with the standard library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html import unescape
from http.client import HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urljoin, urlsplit
from urllib.request import Request, urlopen

SECONDS = 30.0
"""How long a server may say nothing."""
_DATA = (".bin", ".ds", ".npy", ".parquet")
_LONGEST_PAGE = 1 << 26
_PASSING = (408, 425, 429)
"""Statuses below 500 that another attempt may not have."""


class NoRangesError(Exception):
    """The server sends whole files only."""


class HttpFiles:
    """What `RemoteFile` needs of a file system, for `http://` and `https://`.

    Attributes:
        known: size and version of the files that have been looked at, by URL. Another size, or
            another version where both are strong, is an error.
    """

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, str]] = {}

    def info(self, url: str) -> dict[str, Any]:
        """Size and version of a file, from the head of its first byte's answer.

        What the server answers with a list of is a `directory`.

        Raises:
            FileNotFoundError: there is none.
            PermissionError: it is not for everybody.
            ValueError: the server refuses the request, does not say the length, or answers with
                a page for people.
            OSError: the server cannot be reached or has failed.
        """
        try:
            with _get(url, "bytes=0-0") as response:
                if response.headers.get_content_type() == "text/html":
                    if urlsplit(response.url).path.endswith("/"):
                        return {"type": "directory"}
                    raise ValueError(f"{url} is a web page, not a file of data")
                found, size = _range(response)
                if found is None and response.status == 200:
                    size = response.length
        except _EmptyError:
            return {"size": 0, "version": ""}
        if size is None:
            raise ValueError(f"{url}: the server does not say how long the file is")
        self.known[url] = size, _version(response)
        return {"size": size, "version": _version(response)}

    def find(self, url: str) -> dict[str, dict[str, Any]]:
        """Size and version of the data files that a server's list of a folder links to.

        Raises:
            ValueError: the list is too long, or what `info` raises.
            OSError: what `info` raises.
        """
        with _get(url, None) as response:
            if (response.length or 0) > _LONGEST_PAGE:
                raise ValueError(f"{url}: a list of {response.length} bytes")
            page = response.read(_LONGEST_PAGE).decode("utf-8", "replace")
            base = response.url
        links = {urljoin(base, unescape(link)) for link in re.findall(r'href="([^"#?]+)"', page)}
        below = sorted(one for one in links if one.startswith(base) and one.endswith(_DATA))
        return {one: self.info(one) for one in below}

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, exclusive.

        Raises:
            NoRangesError: the server sends whole files only.
            ValueError: the file has changed.
            OSError: other bytes came, or what `info` raises.
        """
        try:
            with _get(url, f"bytes={start}-{end - 1}") as response:
                if response.status == 200:
                    raise NoRangesError(url)
                found, size = _range(response)
                self._check(url, size, _version(response))
                if found != (start, end - 1):
                    raise OSError(f"wanted bytes {start} to {end - 1}, the server sent {found}")
                return response.read(end - start + 1)
        except _EmptyError as error:
            raise ValueError(f"{url} has changed since it was opened: it is empty now") from error

    def _check(self, url: str, size: int | None, version: str) -> None:
        known_size, known_version = self.known.get(url, (size, version))
        weak = not (version and known_version) or "W/" in (version[:2], known_version[:2])
        if size not in (None, known_size) or not (weak or version == known_version):
            raise ValueError(f"{url} has changed since it was opened")

    def stream(self, url: str, piece: int) -> Iterator[bytes]:
        """The whole file in pieces of so many bytes; the last may be shorter.

        Raises:
            OSError: what `info` raises.
        """
        with _get(url, None) as response:
            self._check(url, response.length, _version(response))
            while data := response.read(piece):
                yield data


class PublicBucket:
    """Google's buckets without credentials, as Psyche lists and reads them.

    `STORAGE_EMULATOR_HOST` names another server than Google's, as for Google's own libraries.
    """

    def __init__(self) -> None:
        host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
        self._host = (host if "://" in host else f"http://{host}").rstrip("/")

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """The objects whose names begin with a path's after the bucket: size, version and link.

        Raises:
            ValueError: the answer is not understood.
            OSError: what `HttpFiles.info` raises.
        """
        bucket, _, prefix = path.partition("/")
        found: dict[str, dict[str, Any]] = {}
        token: str | None = None
        while True:
            query = {"prefix": prefix} if prefix else {}
            if token:
                query["pageToken"] = token
            url = f"{self._host}/storage/v1/b/{quote(bucket, safe='')}/o?{urlencode(query)}"
            try:
                with _get(url, None) as response:
                    page = json.loads(response.read())
                for item in page.get("items", ()):
                    link = item.get("mediaLink") or self._link(bucket, item["name"])
                    size, version = int(item["size"]), str(item.get("generation", ""))
                    found[f"{bucket}/{item['name']}"] = {
                        "size": size, "version": version, "type": "file", "mediaLink": link,
                    }  # fmt: skip
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{url}: no list of objects ({error!r})") from error
            token = page.get("nextPageToken")
            if not token:
                return found

    def info(self, path: str) -> dict[str, Any]:
        """Of one object, or a `directory` where there is none of that name."""
        return self.find(path).get(path, {"type": "directory"})

    def _link(self, bucket: str, name: str) -> str:
        return (
            f"{self._host}/download/storage/v1/b/{quote(bucket, safe='')}/o/"
            f"{quote(name, safe='')}?alt=media"
        )


class _EmptyError(Exception):
    """The file has no byte that could be asked for."""


def _get(url: str, range_: str | None) -> HTTPResponse:
    headers = {"Accept-Encoding": "identity", "User-Agent": "psyche-fast"}
    if range_ is not None:
        headers["Range"] = range_
    url = quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # what is not ASCII, and spaces
    try:
        response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=SECONDS)
    except HTTPError as error:
        with error:
            if error.code == 416 and (error.headers.get("Content-Range") or "").endswith("*/0"):
                raise _EmptyError from error
            raise _refusal(url, error) from error
    except URLError as error:
        if isinstance(error.reason, OSError):
            raise error.reason from error
        raise ValueError(f"{url}: {error.reason}") from error
    if response.status not in (200, 206):
        with response:
            raise OSError(f"{url}: status {response.status}")
    return response


def _refusal(url: str, error: HTTPError) -> Exception:
    said = f"{url}: {error.code} {error.reason}".splitlines()[0]
    if error.code in (404, 410):
        return FileNotFoundError(said)
    if error.code in (401, 403):
        return PermissionError(said)
    if error.code < 500 and error.code not in _PASSING:
        return ValueError(said)
    return OSError(said)


def _range(response: HTTPResponse) -> tuple[tuple[int, int] | None, int | None]:
    """First and last byte of an answer, and the file's size, where it says so."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range") or "")
    if found is None:
        return None, None
    return (int(found[1]), int(found[2])), None if found[3] == "*" else int(found[3])


def _version(response: HTTPResponse) -> str:
    headers = response.headers
    return headers.get("ETag") or headers.get("Last-Modified") or ""
