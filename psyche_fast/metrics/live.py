"""`psyche-fast watch`: the page about runs, told anew while they go on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from psyche_fast.metrics.report import page, plotly_js, report, to_json
from psyche_fast.metrics.runs import read_run

_OWN = {"127.0.0.1", "localhost", "[::1]"}


class PageServer(ThreadingHTTPServer):
    """Serves the page on loopback, to whoever asks for it by that name.

    Args:
        folders: run directories.
        port: 0 for a free one.
        refresh: seconds after which the page asks again.

    Raises:
        ValueError: there is nothing of a run in a folder, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int, refresh: float) -> None:
        for folder in folders:
            read_run(folder)
        self._folders, self._lock = list(folders), threading.Lock()
        self._contents = {
            "/": ("text/html", page(None, refresh=refresh).encode()),
            "/plotly.min.js": ("text/javascript", plotly_js().encode()),
        }
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ValueError(f"--port {port}: {error.strerror}") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def content(self, path: str) -> tuple[str, bytes] | None:
        """Kind and bytes of what is at a path; None where nothing is.

        Raises:
            ValueError: a run directory is gone.
        """
        if path != "/report.json":
            return self._contents.get(path)
        with self._lock:  # one at a time: a long run takes a second to read
            told = report([read_run(folder) for folder in self._folders])
        return "application/json", to_json(told).encode()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """Answers."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in _OWN:  # another site's page, by a name of its own for this machine
            return self._answer(403, "text/plain", b"only by the name of this machine itself")
        try:
            found = self.server.content(self.path.partition("?")[0])
        except (ValueError, OSError) as error:
            return self._answer(500, "text/plain", str(error).encode())
        if found is None:
            return self._answer(404, "text/plain", b"there is nothing here")
        return self._answer(200, *found)

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the terminal is the user's."""
