"""What `docs/reliability.md` and `docs/elastic.md` promise is held by tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tests_that_are_named_exist() -> None:
    pages = ("reliability.md", "elastic.md")
    text = "".join((ROOT / "docs" / page).read_text() for page in pages)
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 60
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
    for path in re.findall(r"`(benchmarks/\w+\.py)`", text):
        assert (ROOT / path).is_file()
