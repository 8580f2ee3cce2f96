"""What Triton's compiler cannot take and its interpreter does not mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import psyche_fast.kernels
from tests import kernels

pytest.importorskip("triton")

from psyche_fast.kernels.triton.pack import unpack_planes

FOLDERS = [Path(package.__path__[0]) for package in (psyche_fast.kernels, kernels)]


def jit_functions(source: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            yield node


def early_returns(source: str) -> list[str]:
    """Returns that are not the last statement of their jit function.

    What follows a `return` inside an `if` is compiled all the same, constant condition or not, and
    need not fit the types of that case.
    """
    return [
        f"{function.name}, line {node.lineno}"
        for function in jit_functions(source)
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and node is not function.body[-1]
    ]


def test_jit_functions_return_at_their_end():
    files = [file for folder in FOLDERS for file in folder.rglob("*.py")]
    sources = {str(file): file.read_text(encoding="utf-8") for file in files}
    assert sum(len(list(jit_functions(source))) for source in sources.values()) > 30
    early = {file: early_returns(source) for file, source in sources.items()}
    assert {file: where for file, where in early.items() if where} == {}


def test_an_early_return_is_found():
    kernel = """
@triton.jit{options}
def kernel(x, EXACT: tl.constexpr):
    if EXACT:
        {first}
    else:
        y = x + 1
    return y
"""
    for options in ("", "(do_not_specialize=['x'])"):
        assert early_returns(kernel.format(options=options, first="y = x")) == []
        assert early_returns(kernel.format(options=options, first="return x")) == ["kernel, line 5"]
    plain = kernel.format(options="", first="return x").replace("@triton.jit", "@functools.cache")
    assert early_returns(plain) == []


def unguarded(source: str) -> list[str]:
    """Addresses that a loop reads and then writes without a barrier in between.

    Where a tile has fewer elements than its program has threads, several threads hold one element,
    and one may write it before another has read it. The interpreter has one thread.
    """
    found = []
    for function in jit_functions(source):
        for loop in (node for node in ast.walk(function) if isinstance(node, ast.For)):
            read: set[str] = set()
            for statement in loop.body:
                calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
                named = [(ast.unparse(call.func), call) for call in calls]
                if any(name == "tl.debug_barrier" for name, _ in named):
                    read.clear()
                for name, call in named:
                    address = ast.unparse(call.args[0]) if call.args else ""
                    if name == "tl.load":
                        read.add(address)
                    elif name == "tl.store" and address in read:
                        found.append(f"{function.name}: {address}")
    return found


def test_entries_of_messages_are_read_by_all_threads_before_one_writes_them():
    """Tiles of the other kernels have an element for each thread, whatever their options."""
    source = Path(unpack_planes.fn.__code__.co_filename).read_text(encoding="utf-8")
    assert unguarded(source) == []
    barrier = "            tl.debug_barrier()\n            tl.store(indices"
    assert source.count(barrier) == 1
    without = source.replace(barrier, "            tl.store(indices")
    assert unguarded(without) == ["unpack_planes: indices + target + entry"]
