"""What CI looks for in a wheel; CI itself builds and runs one, which takes too long for a test."""

from __future__ import annotations

import runpy
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACKED = {"psyche_fast/__init__.py", "psyche_fast/py.typed"}
COMMIT = "0123456789ab"
faults = runpy.run_path(str(ROOT / ".ci" / "wheel_content.py"))["faults"]


def write(folder: Path, *, leave=(), more=(), commit=COMMIT, name="p-0.1.0-py3-none-any.whl"):
    """A wheel with these faults."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        for one in sorted({*TRACKED, *more} - {*leave}):
            archive.writestr(one, "")
        archive.writestr("p-0.1.0.dist-info/METADATA", "")
        if commit is not None:
            archive.writestr("psyche_fast/commit.txt", f"{commit}\n")
    return folder / name


@pytest.mark.parametrize(
    ("wheel", "said"),
    [
        ({}, []),
        ({"leave": ["psyche_fast/py.typed"]}, ["psyche_fast/py.typed is missing"]),
        ({"more": ["tests/tiny.py"]}, ["tests/tiny.py does not belong there"]),
        ({"commit": None}, [f"wanted commit {COMMIT}, got none"]),
        ({"commit": "ba9876543210"}, [f"wanted commit {COMMIT}, got ba9876543210"]),
        ({"commit": f"{COMMIT}-modified"}, []),
        (
            {"name": "p-0.1.0-cp311-cp311-linux_x86_64.whl"},
            ["p-0.1.0-cp311-cp311-linux_x86_64.whl is not for all platforms"],
        ),
    ],
)
def test_a_wheel_with_a_fault(tmp_path, wheel, said):
    assert faults(write(tmp_path, **wheel), TRACKED, COMMIT) == said


def test_the_package_says_that_it_has_types():
    assert (ROOT / "psyche_fast" / "py.typed").is_file()
    assert not (ROOT / "psyche_fast" / "commit.txt").exists(), "a wheel's alone"
