"""The pictures of the documentation: drawn by our own code, named in the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tools import pictures

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-it-works.md"


def test_the_page_shows_the_pictures_that_are_drawn() -> None:
    named = re.findall(r"!\[[^]]+\]\(pictures/(\w+)\.svg\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(named) == sorted(pictures.NAMES)
    assert all((pictures.FOLDER / f"{name}.svg").is_file() for name in named)


def test_they_are_drawn_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Bytes have a test of their own, which takes its time.
    stored = json.loads((ROOT / "benchmarks" / "results" / "cpu-bytes.json").read_text())
    monkeypatch.setattr(pictures, "measure", lambda: stored["rows"])
    seen = pictures.train(steps=3)
    assert seen.momenta[0][pictures.WATCHED].abs().sum() > 0
    # What a message says are the momentum's own coefficients, the largest ones.
    coefficients = pictures._transformed(seen.momenta[0][pictures.WATCHED])
    sent = seen.sent[0].view_as(coefficients)
    assert sent.count_nonzero() == pictures.K * len(seen.sent[0])
    assert (sent - coefficients)[sent != 0].abs().max() < 1e-6
    assert not torch.equal(*(momenta[pictures.WATCHED] for momenta in seen.momenta))
    pictures.draw(tmp_path, seen)
    assert {file.stem for file in tmp_path.iterdir()} == set(pictures.NAMES)
    assert all(file.read_text().startswith("<?xml") for file in tmp_path.iterdir())
