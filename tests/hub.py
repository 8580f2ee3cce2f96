"""A stand-in for the Hugging Face hub's HTTP endpoint, as far as models go up and down."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_FILE = "/{repo_id}/resolve/{revision}/{filename}"
SETTINGS = (
    "ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_CACHE",
    "HF_HUB_DISABLE_XET",
)  # fmt: skip
"""What `Hub.use` changes of `huggingface_hub.constants`."""


@dataclass
class Hub:
    """What it holds and what happens to it.

    Attributes:
        url: where it listens.
        repos: files by name, by repository.
        commits: messages and the files of each, in turn.
        requests: method, path and `Range` of each request.
        cut: how many downloads of a file break off in the middle, by name.
        reset: whether they do so by a reset of the connection instead of its end.
        refuse: requests to answer with a status: by a part of their path.
        hold: commits wait until it is set.
        holding: whether one waits.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    reset: bool = False
    refuse: dict[str, int] = field(default_factory=dict)
    hold: threading.Event = field(default_factory=threading.Event)
    holding: threading.Event = field(default_factory=threading.Event)

    def use(self, cache: Path) -> None:
        """Has this process's hub client speak to it; it reads its environment on import."""
        from huggingface_hub import constants

        constants.ENDPOINT = self.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = self.url + _FILE
        constants.HF_HUB_OFFLINE = False
        constants.HF_HUB_CACHE = str(cache)
        constants.HF_HUB_DISABLE_XET = True  # a protocol of its own


def commit_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()


@contextmanager
def serving(**repos: dict[str, bytes]) -> Iterator[Hub]:
    """Serves repositories until the block ends; `owner__name` is `owner/name`."""
    hub = Hub(repos={name.replace("__", "/"): files for name, files in repos.items()})
    hub.hold.set()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that are gone
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _seen(self) -> bool:
        """Whether the request is answered already."""
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        status = next((s for part, s in self.hub.refuse.items() if part in self.path), None)
        if status is None:
            return False
        self._json({"error": "the stand-in refuses"}, status)
        return True

    def do_HEAD(self) -> None:
        if not self._seen():
            self._file()

    def do_GET(self) -> None:
        if self._seen():
            return
        path = self.path.split("?")[0]
        if (
            match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        ) is None:
            self._file()
            return
        files = self.hub.repos.get(match[1])
        if files is None:
            self._json({"error": "Repository not found"}, 404)
        elif match[2] == "tree":
            self._json([
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ])  # fmt: skip
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": match[1], "sha": commit_of(files), "siblings": siblings})

    def _file(self) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.split("?")[0])
        files = self.hub.repos.get(match[1], {}) if match else {}
        content = files.get(match[3]) if match else None
        if content is None:
            self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        assert match is not None
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit_of(files),
            "Accept-Ranges": "bytes",
        }
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        if self.command == "GET" and self.hub.cut.get(match[3], 0) > 0:
            self.hub.cut[match[3]] -= 1
            self.send_response(206 if asked else 200)
            for name, value in {"Content-Length": str(len(part)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            if self.hub.reset:
                time.sleep(0.05)  # what was sent is to come first
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.rfile.close()
                self.wfile.close()
                self.connection.close()
            return
        self._answer(part, 206 if asked else 200, headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._seen():
            return
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            status = 409 if name in self.hub.repos else 200
            self.hub.repos.setdefault(name, {})
            self._json({"url": f"{self.hub.url}/{name}", "name": name}, status)
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self._json({"files": modes})
        elif (match := re.fullmatch(r"/api/models/(.+)/commit/main", path)) is not None:
            self._commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        else:
            self._json({"error": f"the stand-in does not know {path}"}, 404)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        self.hub.holding.set()
        self.hub.hold.wait(60)
        self.hub.holding.clear()
        message, written = "", []
        repo = self.hub.repos[name]
        for line in lines:
            if line["key"] == "header":
                message = line["value"]["summary"]
            elif line["key"] == "file":
                repo[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                written.append(line["value"]["path"])
        self.hub.commits.append((message, sorted(written)))
        oid = commit_of(repo)
        self._json({"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})
