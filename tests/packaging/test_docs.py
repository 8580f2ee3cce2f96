"""The pages of the site: all are in the navigation, links lead somewhere, commands are real."""

from __future__ import annotations

import re
from pathlib import Path

from psyche_fast.cli import cli
from tools import reference

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_every_page_of_the_navigation_is_there() -> None:
    named = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_reference_is_what_the_code_has() -> None:
    assert reference.main(check=True) == 0, "python -m tools.reference"


def test_links_between_pages_lead_somewhere() -> None:
    wrong = []
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                wrong.append((page.name, link))
    assert wrong == []


def test_the_tutorial_s_commands_and_flags_are_real() -> None:
    pages = ("tutorial.md", "faq.md", "two-regions.md", "extending.md")
    text = "".join((DOCS / page).read_text() for page in pages)
    used = re.findall(r"psyche-fast ([a-z-]+)((?:[^\n`]|\\\n)*)", text)
    assert len(used) > 6
    for name, rest in used:
        known = {option for p in cli.commands[name].params for option in p.opts}
        flags = set(re.findall(r"(--[a-z-]+)", re.split(r"(?<!\\)\n|#", rest)[0]))
        assert flags <= known, (name, flags - known)
