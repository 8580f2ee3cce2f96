"""Counts what a kernel executes, from NVIDIA's machine code (SASS) and the trips of its loops.

The code is cut into basic blocks, loops are found as strongly connected parts of the graph of
blocks, and these are held against the loops that the author names (`Case.loops`). An instruction
then counts as often as the loops around it run. Of branches that exclude each other the dearest
way is taken, so that the count is an upper bound; a loop that waits for asynchronous hardware
counts once.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import networkx as nx  # type: ignore[import-untyped]

if TYPE_CHECKING:  # the package with the kernels needs triton, which need not be installed
    from tools.kernel_guard.case import Loop

# Behind the operands some versions write what the scheduler is told, with "&" and "?".
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;&?\n]*)[^;\n]*;",
    re.MULTILINE,
)
_ADDRESS = re.compile(r"(?:^|\s)0x([0-9a-f]+)\s*$")
_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_WAITING = ("SYNCS", "NANOSLEEP", "UTCATOMSWS")
_LONGEST_WAIT = 12
"""Instructions in a loop that only waits: a try, a branch, seldom a pause between them."""


class CountError(ValueError):
    """The code is not of the form that its case describes."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: byte address, predicate ("" for none), opcode with modifiers, operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Address in the last operand."""
        match = _ADDRESS.search(self.operands)
        return int(match[1], 16) if match else None


@dataclass(frozen=True)
class ActualLoop:
    """A loop in the code: address of its first block, its blocks, its instructions, its loops."""

    header: int
    blocks: frozenset[int]
    code: tuple[Instruction, ...]
    inner: tuple[ActualLoop, ...]

    @property
    def waits(self) -> bool:
        """Whether it does nothing but wait for a barrier in memory."""
        return len(self.code) <= _LONGEST_WAIT and any(i.kind in _WAITING for i in self.code)


def describe(loops: Iterable[ActualLoop], markers: Sequence[str] = ()) -> str:
    """Loops on one line: address and instructions of each, those inside in braces.

    Args:
        loops: what has been found. Loops that wait are left out.
        markers: parts of opcodes that are counted too.
    """

    def one(loop: ActualLoop) -> str:
        counts = {text: sum(text in i.opcode for i in loop.code) for text in markers}
        marks = "".join(f", {n} {text}" for text, n in counts.items())
        busy = describe(loop.inner, markers)
        inner = f" {{ {busy} }}" if busy != "none" else ""
        return f"{loop.header:#x}: {len(loop.code)} instructions{marks}{inner}"

    return "; ".join(one(loop) for loop in loops if not loop.waits) or "none"


def parse(listing: str) -> list[Instruction]:
    """Instructions of a listing by `cuobjdump -sass`, in order of address, without NOPs."""
    return [
        Instruction(int(address, 16), guard, opcode, operands)
        for address, guard, opcode, operands in _INSTRUCTION.findall(listing)
        if opcode != "NOP"
    ]


def source_lines(listing: str) -> dict[int, tuple[str, int]]:
    """File and line behind the instruction at each address, from `nvdisasm -g`.

    Of a call that was inlined it is the line in the function called.
    """
    lines: dict[int, tuple[str, int]] = {}
    current: tuple[str, int] | None = None
    for text in listing.splitlines():
        if (match := _LINE.match(text)) is not None:
            current = (match[1], int(match[2]))
        elif (instruction := _INSTRUCTION.match(text)) is not None and current is not None:
            lines[int(instruction[1], 16)] = current
    return lines


def mma_count(code: Iterable[Instruction]) -> int:
    """Matrix instructions in the code (HMMA, HGMMA, UTCHMMA...), each once."""
    return sum(instruction.kind.endswith("MMA") for instruction in code)


def _successors(code: Sequence[Instruction]) -> tuple[list[list[int]], set[int]]:
    """Positions that may follow each instruction within its function, and those of calls.

    On sm_80 ptxas leaves loops by CALLs that never return: those are jumps, not calls.
    """
    addresses = [instruction.address for instruction in code]

    def at(address: int) -> int | None:
        """Position of the instruction at an address, or behind it if that is a NOP."""
        position = bisect_left(addresses, address)
        return position if position < len(code) else None

    rendezvous: dict[str, int | None] = {}
    after: list[list[int]] = []
    jumps: dict[int, int] = {}  # by CALL
    for i, instruction in enumerate(code):
        kind = instruction.kind
        operands = instruction.operands.strip()
        conditional = bool(instruction.guard)
        onward: int | None = None
        if kind == "BSSY":
            rendezvous[operands.split(",")[0]] = instruction.target
        if kind in ("EXIT", "RET"):
            pass
        elif kind in ("BRA", "CALL") and instruction.target is not None:
            onward = at(instruction.target)
            conditional = conditional or "," in operands
            if kind == "CALL" and onward is not None:
                jumps[i] = onward
        elif kind == "BSYNC" and rendezvous.get(operands) is not None:
            onward = at(rendezvous[operands] or 0)
        elif kind in ("BRX", "JMX", "BRXU"):
            raise CountError(f"indirect branch at {instruction.address:#x}")
        else:
            conditional = True
        steps = [] if onward is None else [onward]
        if conditional and i + 1 < len(code):
            steps.append(i + 1)
        after.append(steps)
    direct = nx.DiGraph([(i, j) for i, steps in enumerate(after) if i not in jumps for j in steps])
    calls = set()
    for i, callee in jumps.items():
        reached = {callee} | (nx.descendants(direct, callee) if callee in direct else set())
        if any(code[j].kind == "RET" for j in reached):
            calls.add(i)
            after[i] = [i + 1]
    return after, calls


class Program:
    """The code of one kernel as a graph of basic blocks, each named by its first address."""

    def __init__(self, listing: str) -> None:
        self.code = parse(listing)
        if not self.code:
            raise CountError("no instructions in the listing")
        after, calls = _successors(self.code)
        self.calls = {self.code[i].address for i in calls}
        starts = {0} | {j for i, steps in enumerate(after) for j in steps if steps != [i + 1]}
        starts |= {i + 1 for i, steps in enumerate(after) if steps != [i + 1]}
        self.blocks: dict[int, tuple[Instruction, ...]] = {}
        self.graph = nx.DiGraph()
        cuts = sorted(start for start in starts if start < len(self.code))
        for start, end in zip(cuts, [*cuts[1:], len(self.code)], strict=True):
            name = self.code[start].address
            self.blocks[name] = tuple(self.code[start:end])
            self.graph.add_node(name)
            for step in after[end - 1]:
                self.graph.add_edge(name, self.code[step].address)
        self.entry = -1  # before the first instruction, which may be in a loop
        self.blocks[self.entry] = ()
        self.graph.add_edge(self.entry, self.code[0].address)
        reachable = {self.entry} | nx.descendants(self.graph, self.entry)
        self.graph = self.graph.subgraph(reachable).copy()

    @cached_property
    def loops(self) -> tuple[ActualLoop, ...]:
        """The outermost loops in order of address."""
        return self._loops(frozenset(self.graph), self.entry)

    def _region(self, blocks: frozenset[int], entry: int) -> nx.DiGraph:
        """The blocks of a loop body (or of all) without the way back to its start."""
        region = self.graph.subgraph(blocks).copy()
        region.remove_edges_from(list(region.in_edges(entry)))
        return region

    def _loops(self, blocks: frozenset[int], entry: int) -> tuple[ActualLoop, ...]:
        region = self._region(blocks, entry)
        loops = []
        for members in nx.strongly_connected_components(region):
            first = min(members)
            if len(members) == 1 and not region.has_edge(first, first):
                continue
            headers = {to for _, to in nx.edge_boundary(region, set(region) - members, members)}
            if len(headers) != 1:
                raise CountError(f"a loop at {first:#x} is entered at {len(headers)} places")
            header = headers.pop()
            inside = frozenset(members)
            code = tuple(i for block in sorted(inside) for i in self.blocks[block])
            loops.append(ActualLoop(header, inside, code, self._loops(inside, header)))
        return tuple(sorted(loops, key=lambda loop: loop.header))

    def executions(self, trips: dict[int, float]) -> dict[int, float]:
        """How often the instruction at each address runs in one program, by warp.

        Args:
            trips: iterations of a loop, by the address of its header; 1 where missing.

        Raises:
            CountError: a loop calls a subroutine, whose instructions would be missing.
        """
        by_block = self._executions(frozenset(self.graph), self.entry, self.loops, trips)
        times = {i.address: n for block, n in by_block.items() for i in self.blocks[block]}
        for address in sorted(self.calls):
            if times.get(address, 0) > 1:
                raise CountError(f"a loop calls a subroutine at {address:#x} (a wide division?)")
        return times

    def _executions(
        self,
        blocks: frozenset[int],
        entry: int,
        loops: Sequence[ActualLoop],
        trips: dict[int, float],
    ) -> dict[int, float]:
        """How often each block on the dearest way through a body runs."""
        region = self._region(blocks, entry)
        loop_of = {block: loop for loop in loops for block in loop.blocks}
        parts = nx.condensation(region)
        best: dict[int, tuple[float, dict[int, float]]] = {}
        for part in nx.topological_sort(parts):
            block = next(iter(parts.nodes[part]["members"]))
            times: dict[int, float] = {block: 1}
            if (loop := loop_of.get(block)) is not None:
                once = self._executions(loop.blocks, loop.header, loop.inner, trips)
                times = {b: n * trips.get(loop.header, 1) for b, n in once.items()}
            cost = sum(len(self.blocks[b]) * n for b, n in times.items())
            before = [best[p] for p in parts.predecessors(part)]
            if before:
                ahead, way = max(before, key=lambda entry: entry[0])
                cost, times = cost + ahead, way | times
            best[part] = (cost, times)
        return max(best.values(), key=lambda entry: entry[0])[1]


def _factor(loop: Loop, actual: ActualLoop) -> int | None:
    """Iterations that one trip of the loop in the code does; None if it is another loop."""
    if loop.marker is None:
        return 1
    seen = _marks(loop, actual)
    each = loop.marker[1]
    return seen // each if seen and seen % each == 0 else None


def _marks(loop: Loop, actual: ActualLoop) -> int:
    """How often a loop's marker stands in an actual loop, not counting the loops inside."""
    assert loop.marker is not None
    inside = {instruction.address for inner in actual.inner for instruction in inner.code}
    return sum(loop.marker[0] in i.opcode for i in actual.code if i.address not in inside)


def _assignments(
    expected: tuple[Loop, ...], actual: tuple[ActualLoop, ...]
) -> Iterator[dict[int, tuple[Loop, int]]]:
    """All ways in which the actual loops can be those expected, with factors of unrolling."""
    if not expected:
        if not actual:
            yield {}
        return
    loop, rest = expected[0], expected[1:]
    if actual and (factor := _factor(loop, actual[0])) is not None:
        inner = tuple(inside for inside in actual[0].inner if not inside.waits)
        for inside in _assignments(loop.inner, inner):
            for beside in _assignments(rest, actual[1:]):
                yield {actual[0].header: (loop, factor), **inside, **beside}
    if not loop.inner or loop.trips == 1:  # unrolled whole
        yield from _assignments(loop.inner + rest, actual)


def match_loops(
    expected: tuple[Loop, ...], actual: tuple[ActualLoop, ...]
) -> dict[int, tuple[Loop, int]]:
    """Finds the author's loops in the code.

    Args:
        expected: the outermost loops of the source.
        actual: the outermost loops of the code.

    Returns:
        By address of a loop's header: which loop it is, and how many of its iterations one trip in
        the code does.

    Raises:
        CountError: the loops do not fit, or fit in more than one way.
    """
    fits = list(_assignments(expected, tuple(loop for loop in actual if not loop.waits)))
    # A loop of one iteration is hardly ever left as a loop.
    single = [sum(loop.trips == 1 for loop, _ in fit.values()) for fit in fits]
    fits = [fit for fit, n in zip(fits, single, strict=True) if n == min(single)]
    if len(fits) == 1:
        return fits[0]

    markers = {loop.marker[0] for loop in _all(expected) if loop.marker is not None}
    fault = "do not fit" if not fits else f"fit in {len(fits)} ways (give markers)"
    raise CountError(
        f"loops {fault}: expected {_names(expected)}; found {describe(actual, sorted(markers))}"
    )


def _names(loops: Sequence[Loop]) -> str:
    """Expected loops on one line, in the form of `describe`."""

    def name(loop: Loop) -> str:
        marker = f" with {loop.marker[1]} {loop.marker[0]}" if loop.marker is not None else ""
        return loop.name + marker + (f" {{ {_names(loop.inner)} }}" if loop.inner else "")

    return "; ".join(map(name, loops)) or "none"


def _all(loops: Iterable[Loop]) -> Iterator[Loop]:
    for loop in loops:
        yield loop
        yield from _all(loop.inner)


def barriers_in(
    name: str, program: Program, expected: tuple[Loop, ...], matched: dict[int, tuple[Loop, int]]
) -> int | None:
    """Barriers of the whole block inside a named loop; None where the case has no such loop.

    Where the compiler has unrolled it whole, it reaches from its first marker to its last in the
    body around it.

    Raises:
        CountError: it is unrolled and has no marker.
    """
    path = _path(name, expected)
    if path is None:
        return None
    actual: dict[int, ActualLoop] = {}

    def walk(loops: Iterable[ActualLoop]) -> None:
        for loop in loops:
            if loop.header in matched:
                actual[id(matched[loop.header][0])] = loop
            walk(loop.inner)

    walk(program.loops)
    if (whole := actual.get(id(path[-1]))) is not None:
        code = whole.code
    else:
        if (marker := path[-1].marker) is None:
            raise CountError(f"the loop {name!r} is unrolled and has no marker")
        around = next((actual[id(loop)] for loop in path[::-1] if id(loop) in actual), None)
        body = program.code if around is None else around.code
        inner = program.loops if around is None else around.inner
        elsewhere = {instruction.address for loop in inner for instruction in loop.code}
        code = tuple(one for one in body if one.address not in elsewhere)
        marks = [i for i, one in enumerate(code) if marker[0] in one.opcode]
        if not marks:
            raise CountError(f"the loop {name!r} is unrolled and its marker {marker[0]} is nowhere")
        code = code[marks[0] : marks[-1]]
    return sum(instruction.kind == "BAR" for instruction in code)


def _path(name: str, loops: tuple[Loop, ...]) -> tuple[Loop, ...] | None:
    """The loop of a name, with those around it before it."""
    for loop in loops:
        if loop.name == name:
            return (loop,)
        if (inside := _path(name, loop.inner)) is not None:
            return (loop, *inside)
    return None
