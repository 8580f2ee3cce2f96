"""What docstrings say of arguments and errors is what the code has; ruff holds them to be there."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "psyche_fast"
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
SHAPE = re.compile(r"`\[|\b0-d\b|\bshape|\blike\b|\bas `")


def _public(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions and methods that others call, but not click's, whose docstrings are their help."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for node in (node for owner in (tree, *classes) for node in owner.body):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not any("command" in ast.unparse(d) for d in node.decorator_list):
            yield node


def _sections(docstring: str) -> dict[str, str]:
    parts = re.split(r"^(Args|Returns|Yields|Raises|Attributes):\n", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _items(section: str) -> dict[str, str]:
    """Text by name of a section's items; several names may share one."""
    found = re.findall(r"^    (\*{0,2}\w[\w., *]*?): ?((?:.|\n(?!    \S))*)", section, re.MULTILINE)
    return {n.strip(" *"): text for names, text in found for n in names.split(",")}


def _arguments(node: ast.FunctionDef) -> dict[str, str]:
    """Annotation by name."""
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    own = [x for x in every if x.arg not in ("self", "cls")]
    return {x.arg: ast.unparse(x.annotation) if x.annotation else "" for x in own}


def _raised(node: ast.FunctionDef) -> set[str]:
    """Errors that a function's own lines raise, not those of functions within it."""
    found, waiting = set(), list(node.body)
    while waiting:
        inner: ast.AST = waiting.pop()
        if isinstance(inner, ast.FunctionDef | ast.Lambda):
            continue
        made = inner.exc if isinstance(inner, ast.Raise) else None
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Name):
            found.add(made.func.id)
        waiting += ast.iter_child_nodes(inner)
    return found - {"NotImplementedError", "AssertionError"}


def _is_said(error: str, said: set[str], docstring: str) -> bool:
    """By its name, a base's, or in the docstring's own sentences."""
    bases = [b.__name__ for b in getattr(builtins, error, type).__mro__[:-3]]
    return bool(said & {error, *bases}) or f"Raise {error}" in docstring


def _faults(node: ast.FunctionDef, *, shapes: bool) -> list[str]:
    docstring = ast.get_docstring(node) or ""
    sections, arguments = _sections(docstring), _arguments(node)
    faults = []
    if "Args" in sections:
        items = _items(sections["Args"])
        faults += [f"does not say what {name} is" for name in arguments.keys() - items.keys()]
        faults += [f"has no argument {name}" for name in items.keys() - arguments.keys()]
        for name, text in items.items():
            if shapes and arguments.get(name) == "Tensor" and not SHAPE.search(text):
                faults.append(f"does not say which shape {name} has")
    said = {name.split(".")[-1] for name in _items(sections.get("Raises", ""))}
    faults += [f"may raise {e}" for e in sorted(_raised(node)) if not _is_said(e, said, docstring)]
    return faults


def test_docstrings_say_what_functions_take_and_raise() -> None:
    wrong = []
    for file in FILES:
        if file.parts[:2] == ("kernels", "triton"):
            continue  # a kernel's constants explain themselves, as in ruff's settings
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        for node in _public(tree):
            # Of kernels' public faces each tensor's shape; elsewhere most are of any.
            shapes = len(file.parts) == 2 and file.parts[0] == "kernels"
            faults = _faults(node, shapes=shapes)
            wrong += [f"{file}:{node.lineno} {node.name} {fault}" for fault in faults]
    assert wrong == []


@pytest.mark.parametrize(
    ("docstring", "fault"),
    [
        ("Does it.\n\nArgs:\n    a: `[n]`.\n    c: one.", "has no argument c"),
        ("Does it.\n\nArgs:\n    c: one.", "does not say what a is"),
        ("Does it.\n\nArgs:\n    a: some.", "does not say which shape a has"),
        ("Does it.\n\nRaises:\n    TypeError: no.", "may raise ValueError"),
    ],
)
def test_it_finds_what_is_wrong(docstring: str, fault: str) -> None:
    body = f'def f(a: Tensor):\n    """{docstring}"""\n    raise ValueError("no")\n'
    node = ast.parse(body).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert fault in _faults(node, shapes=True)
