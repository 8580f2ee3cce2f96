"""The pages of the site: all are in the navigation, links lead somewhere, commands are real."""

from __future__ import annotations

import re
from pathlib import Path

from psyche_fast.cli import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_every_page_of_the_navigation_is_there() -> None:
    named = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named)) >= 9
    assert [page for page in named if not (DOCS / page).is_file()] == []


def test_links_between_pages_lead_somewhere() -> None:
    wrong = []
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                wrong.append((page.name, link))
    assert wrong == []


def test_the_tutorial_s_commands_and_flags_are_real() -> None:
    text = "".join((DOCS / page).read_text() for page in ("tutorial.md", "faq.md"))
    used = re.findall(r"psyche-fast ([a-z-]+)((?:[^\n`]|\\\n)*)", text)
    assert len(used) > 6
    for name, rest in used:
        known = {option for p in cli.commands[name].params for option in p.opts}
        flags = set(re.findall(r"(--[a-z-]+)", rest))
        assert flags <= known, (name, flags - known)
