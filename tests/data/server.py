"""A file server that can be told to fail, as servers and links do."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class FileServer:
    """Serves `files` by path with ranges, and counts the requests for each.

    Attributes:
        files: contents by path, which begins with a slash.
        faults: for a path, what goes wrong with its next requests, in turn: `cut` (the connection
            is closed in the body), `reset`, `short` (a shorter body, with its own length), `other`
            (bytes of another range), a status, or `fine`.
        always: for a path, what goes wrong with every request.
        etags: versions by path; none are sent where it is None.
        moved: where files have gone, by path.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Any]] = {}
        self.always: dict[str, Any] = {}
        self.etags: dict[str, str] | None = {}
        self.moved: dict[str, str] = {}
        self.ranges = True
        self.lengths = True
        self.asked: Counter[str] = Counter()
        self.url = ""

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.asked[path] += 1
        if path.startswith("/storage/v1/b/") and path not in self.always:
            return self._list(handler)
        if path.startswith("/download/storage/v1/b/"):
            bucket, _, name = path.removeprefix("/download/storage/v1/b/").partition("/o/")
            path = f"/{bucket}/{name}"
        if path in self.moved:
            handler.send_response(302)
            handler.send_header("Location", self.moved[path])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return None
        faults = self.faults.get(path)
        fault = faults.pop(0) if faults else self.always.get(path, "fine")
        if path not in self.files or isinstance(fault, int):
            handler.send_error(fault if isinstance(fault, int) else 404)
            return None
        data, status, headers = self.files[path], 200, {}
        wanted = handler.headers.get("Range")
        if wanted and self.ranges:
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            if first >= len(data):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(data)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return None
            last = min(last, len(data) - 1)
            if fault == "other":
                first, last = first + 1, last + 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if fault == "short":
            data = data[: len(data) // 2]
        handler.send_response(status)
        if path.endswith(("/", ".html")):
            headers["Content-Type"] = "text/html; charset=utf-8"
        if self.lengths:
            headers["Content-Length"] = str(len(data))
        if self.etags is not None:
            headers["ETag"] = self.etags.get(path, '"1"')
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
        else:
            handler.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        return None

    def _list(self, handler: BaseHTTPRequestHandler) -> None:
        """Google's list of a bucket, two objects a page."""
        bucket = unquote(urlsplit(handler.path).path).split("/")[4]
        query = parse_qs(urlsplit(handler.path).query)
        prefix = query.get("prefix", [""])[0]
        names = [n.removeprefix(f"/{bucket}/") for n in self.files if n.startswith(f"/{bucket}/")]
        names = [name for name in names if name.startswith(prefix)]
        at = int(query.get("pageToken", ["0"])[0])
        page: dict[str, Any] = {
            "items": [
                {"name": name, "size": str(len(self.files[f"/{bucket}/{name}"])), "generation": "1",
                 "mediaLink": f"{self.url}/{bucket}/{name}"}
                for name in names[at : at + 2]
            ]
        }  # fmt: skip
        if at + 2 < len(names):
            page["nextPageToken"] = str(at + 2)
        body = json.dumps(page).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


@contextmanager
def serving() -> Iterator[FileServer]:
    """A server on a free port of this machine."""
    files = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.respond(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
