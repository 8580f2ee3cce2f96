"""Hostile bytes are a clear error in bounded time and memory, whichever parser reads them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.fuzz.harness import Found, fuzz
from tests.fuzz.parsers import PARSERS
from tests.groups import in_process

pytestmark = [pytest.mark.processes]


def _fuzz(name: str, folder: str) -> Found:
    tempfile.tempdir = folder
    os.environ.pop("PSYCHE_FAST_TUNING", None)
    return fuzz(*PARSERS[name]())


@pytest.mark.parametrize("name", PARSERS)
def test_hostile_bytes_are_clear_errors(name: str, tmp_path: Path) -> None:
    found = in_process(_fuzz, name, str(tmp_path))
    assert found.wrong is None, "\n".join(map(str, found.wrong))
    assert found.accepted > 0
    assert found.refused > 0
