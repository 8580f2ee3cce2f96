"""Accesses of a block to the same global memory by different threads, with no barrier between them.

A program reads as if it did one operation after the other; its threads do not wait for one another.
Where a tensor of places is loaded in one layout and stored to in another, a thread may store before
another one has loaded: only a barrier, or the need of what was loaded, keeps them in order. This
finds such pairs in TTGIR, in which layouts are chosen and barriers written. Neither the interpreter
nor a compiler does.

Two addresses are taken for the same memory where they come from one argument and differ by no
constant; what depends on a loop's variable is elsewhere in each iteration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_ACCESSES = {"tt.load": "load", "tt.store": "store", "tt.atomic_rmw": "atomic"}
_SAME_PLACE = {
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape", "ttg.convert_layout",
}  # fmt: skip
_RESULTS = re.compile(r"(%\w+)(?::\d+)?((?:, %\w+)*) = \"?([\w.]+)")
_LAYOUT = re.compile(r"tensor<[\dx]+x!tt\.ptr<[^>]*>, (#\w+)")

Node = tuple[int, str, list[Any]]


@dataclass
class _Access:
    kind: str
    root: str
    layout: str
    line: int
    needs: frozenset[int]
    moves: frozenset[str]
    past: set[str] = field(default_factory=set)


def races(ttgir: str) -> list[str]:
    """Pairs of accesses that no barrier keeps apart, each in words.

    Args:
        ttgir: a kernel's, as `asm["ttgir"]` of a compiled one has it.
    """
    scan = _Scan()
    scan.walk(_tree(ttgir))
    return list(scan.found.values())


def _tree(text: str) -> list[Node]:
    """Lines with their numbers and blocks."""
    blocks: list[list[Node]] = [[]]
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r" loc\(.*$", "", line).strip()
        if line.startswith("}"):
            if len(blocks) > 1:
                body = blocks.pop()
                blocks[-1][-1][2].append(body)
        else:
            blocks[-1].append((number, line, []))
        if line.endswith("{"):
            blocks.append([])
    return blocks[0]


class _Scan:
    def __init__(self) -> None:
        self.found: dict[tuple[int, int], str] = {}
        self._roots: dict[str, frozenset[str]] = {}
        self._needs: dict[str, frozenset[int]] = {}
        self._moves: dict[str, frozenset[str]] = {}
        self._open: list[_Access] = []

    def walk(self, nodes: list[Node]) -> None:
        for number, line, bodies in nodes:
            self._operation(number, line)
            loop = re.search(r"scf\.for (%\w+) =", line)
            if loop is not None:
                variable = loop.group(1)
                self._moves[variable] = frozenset([variable])
                before = list(self._open)
                for _ in range(2):  # an iteration, and what it meets of the one before
                    for body in bodies:
                        self.walk(body)
                    for access in self._open:
                        if not any(access is one for one in before):
                            access.past.add(variable)
            elif len(bodies) == 1:
                self.walk(bodies[0])
            elif bodies:  # one of them
                before, after = list(self._open), []
                for body in bodies:
                    self._open = list(before)
                    self.walk(body)
                    after += self._open
                self._open = after

    def _operation(self, number: int, line: str) -> None:
        results = _RESULTS.match(line)
        operation = results.group(3) if results else line.split(" ")[0].strip('"')
        if "barrier" in operation:
            self._open = []
            return
        operands = re.findall(r"%\w+", line.split(" = ", 1)[1] if results else line)
        needs = frozenset(n for v in operands for n in self._needs.get(v, ()))
        if operation in _ACCESSES:
            layout = _LAYOUT.search(line)
            for root in self._root(operands[0]):
                access = _Access(
                    _ACCESSES[operation], root, layout.group(1) if layout else "of one element",
                    number, needs, self._moves.get(operands[0], frozenset()),
                )  # fmt: skip
                self._meet(access)
                self._open.append(access)
            needs |= {number}
        if results is None:
            return
        moves = frozenset(m for v in operands for m in self._moves.get(v, ()))
        for name in re.findall(r"%\w+", results.group(1) + results.group(2)):
            self._needs[name], self._moves[name] = needs, moves
            if operation == "tt.addptr" and re.match(r"%c\d", operands[1]):
                offset = operands[1].rpartition("_")[0]
                self._roots[name] = frozenset(f"{r} + {offset}" for r in self._root(operands[0]))
            elif operation == "tt.addptr" or operation in _SAME_PLACE:
                self._roots[name] = self._root(operands[0])
            elif operation == "arith.select":
                self._roots[name] = self._root(operands[1]) | self._root(operands[2])

    def _root(self, value: str) -> frozenset[str]:
        return self._roots.get(value, frozenset([value]))

    def _meet(self, now: _Access) -> None:
        for then in self._open:
            kinds = {then.kind, now.kind}
            if then.root != now.root or kinds in ({"load"}, {"atomic"}):
                continue
            if then.layout == now.layout and "atomic" not in kinds:
                continue
            if then.kind == "load" and then.line in now.needs:
                continue
            if then.past & then.moves & now.moves:
                continue
            self.found[then.line, now.line] = (
                f"{then.kind} (line {then.line} of TTGIR, layout {then.layout}) and {now.kind} "
                f"(line {now.line}, {now.layout}) of {now.root[1:]} have no barrier between them"
            )
