"""A sidecar of our own core ends with it; `tests/psyche` has those of Psyche's."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from psyche_fast.start.spawn import Sidecars
from tests.groups import running
from tests.processes import seconds_until_gone, wait_until

pytestmark = pytest.mark.processes


def _parent(folder: Path) -> None:
    sidecars = Sidecars("gloo", "tcp://127.0.0.1:1", 2)
    sidecars.spawn(1, None, folder / "log")
    (folder / "new").write_text(str(sidecars._children[0].process.pid))
    (folder / "new").rename(folder / "child")
    signal.pause()


def test_sidecar_dies_with_its_parent(tmp_path: Path) -> None:
    """At any moment, here during imports, and while it cannot look for it: the kernel does it."""
    with running(_parent, tmp_path) as process:
        wait_until((tmp_path / "child").exists)
        child = psutil.Process(int((tmp_path / "child").read_text()))
        wait_until(lambda: child.num_threads() > 1)  # it watches
        child.suspend()
        process.kill()
        assert seconds_until_gone(child) < 1
