"""Compiles the Triton kernels ahead of time and reads what they cost. No GPU is needed.

Compilation happens in worker processes that never run Triton's interpreter, so that it works under
`TRITON_INTERPRET=1` too and this module imports no triton.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tools.kernel_guard import sass
from tools.kernel_guard.races import races

if TYPE_CHECKING:  # the package with the kernels needs triton, which need not be installed
    from tools.kernel_guard.case import Case

PROVIDER = "tools.kernel_guard.cases"
"""Module whose `compile_cases()` is compiled unless another is named."""

Job: TypeAlias = tuple[str, str]
"""Names of a case and of a target."""


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: architecture, what has it, and shared memory of one block in bytes."""

    name: str
    gpus: str
    shared: int

    @property
    def nvidia(self) -> bool:
        """Whether it is NVIDIA's; otherwise it is AMD's."""
        return self.name.startswith("sm_")


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", 163 * 1024),
        Target("sm_90", "H100, H200", 227 * 1024),
        Target("sm_100", "B200", 227 * 1024),
        Target("sm_120", "RTX 50, RTX PRO 6000", 99 * 1024),
        Target("gfx942", "MI300X", 64 * 1024),
    )
}


@dataclass(frozen=True)
class Measurement:
    """What one case costs on one target.

    Attributes:
        kernel: name of the kernel.
        variant: rest of the case's name.
        target: name of the target.
        refused: why it cannot run on the target; the numbers are then None.
        registers: 32-bit registers per thread (AMD: vector registers per lane).
        scalars: AMD: scalar registers per wave.
        spills: bytes of local memory per thread, on the stack: what registers did not hold.
        shared: shared memory of a block in bytes.
        mma: matrix instructions in the code.
        instructions: instructions executed per tile, counted by warp. NVIDIA only.
        round_barriers: barriers of the block within the loop "rounds", None without that loop.
        uncounted: why the instructions could not be counted.
        races: accesses that no barrier keeps apart.
        tags: the case's tags.
    """

    kernel: str
    variant: str
    target: str
    refused: str | None = None
    registers: int | None = None
    scalars: int | None = None
    spills: int | None = None
    shared: int | None = None
    mma: int | None = None
    instructions: float | None = None
    round_barriers: int | None = None
    uncounted: str | None = None
    races: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"{self.kernel} {self.variant}".rstrip()


def compile_case(case: Case, target: Target) -> Any:
    """Compiles a case; returns Triton's compiled kernel.

    Raises:
        ValueError: the case does not describe its kernel: an argument or an option is wrong.
        triton.errors.TritonError, RuntimeError: the compiler refuses it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.compiler import ASTSource

    names = case.fn.arg_names
    given = [*case.signature, *case.constexprs]
    if sorted(given) != sorted(names):
        wrong = ", ".join(sorted(set(given) ^ set(names))) or "one given twice"
        raise ValueError(f"{case.name}: arguments differ from the kernel's: {wrong}")
    unknown = set(case.options) - set(CUDAOptions.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{case.name}: no such option: {', '.join(sorted(unknown))}")
    aligned = case.aligned
    if aligned is None:
        aligned = tuple(name for name, kind in case.signature.items() if kind.startswith("*"))
    source = ASTSource(
        case.fn,
        {name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    if target.nvidia:
        gpu = GPUTarget("cuda", int(target.name.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target.name, 64)
    # Options that only NVIDIA's backend knows are left out by AMD's.
    return triton.compile(source, target=gpu, options=dict(case.options))


def measure(case: Case, target: Target) -> Measurement:
    """Compiles a case and reads registers, spills, shared memory and instructions.

    Raises:
        ValueError: the case does not describe its kernel.
    """
    from triton.errors import TritonError

    blank = Measurement(case.kernel, case.variant, target.name, tags=tuple(sorted(case.tags)))
    try:
        compiled = compile_case(case, target)
    except (TritonError, RuntimeError) as error:
        return replace(blank, refused=_reason(error))
    shared = int(compiled.metadata.shared)
    if shared > target.shared:
        reason = f"needs {shared} bytes of shared memory, a block has {target.shared}"
        return replace(blank, refused=reason)
    read = _read_nvidia(case, compiled) if target.nvidia else parse_amd(compiled.asm["amdgcn"])
    found = tuple(races(compiled.asm["ttgir"]))
    return replace(blank, shared=shared, races=found, **read)


def _reason(error: Exception) -> str:
    """What a compiler's message, often of many lines, says is wrong: its last line with "error"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"{type(error).__name__}: {telling[-1] if telling else 'no message'}"[:200]


def _disassemble(compiled: Any, tool: str, *options: str) -> str:
    """Runs one of the CUDA tools that Triton ships on the kernel's binary."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        path = getattr(knobs.nvidia, tool).path
        run = subprocess.run([path, *options, str(cubin)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{path} failed: {run.stderr.strip()}")
    return run.stdout


def _trips(
    case: Case, program: sass.Program
) -> tuple[dict[int, tuple[Any, int]], dict[int, float]]:
    """The loops of the code by header, and how often each is run through."""
    matched = sass.match_loops(case.loops, program.loops)
    return matched, {at: loop.trips / factor for at, (loop, factor) in matched.items()}


def _warp_instructions(case: Case, program: sass.Program, compiled: Any) -> dict[int, float]:
    """How often each instruction is executed per tile, counted by warp."""
    times = program.executions(_trips(case, program)[1])
    warps = compiled.metadata.num_warps
    return {address: n * warps / case.tiles for address, n in times.items()}


def _read_nvidia(case: Case, compiled: Any) -> dict[str, Any]:
    usage = _disassemble(compiled, "cuobjdump", "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump names no registers: {usage!r}")
    registers, stack, local = map(int, match.groups())
    program = sass.Program(_disassemble(compiled, "cuobjdump", "-sass"))
    read: dict[str, Any] = {
        "registers": registers,
        "spills": stack + local,
        "mma": sass.mma_count(program.code),
    }
    try:
        matched, _ = _trips(case, program)
        read["instructions"] = round(sum(_warp_instructions(case, program, compiled).values()), 1)
        read["round_barriers"] = sass.barriers_in("rounds", program, case.loops, matched)
    except sass.CountError as error:
        read["uncounted"] = str(error)
    return read


def parse_amd(assembly: str) -> dict[str, int]:
    """Registers, spills and matrix instructions from AMD's assembly and the metadata at its end.

    Raises:
        RuntimeError: the metadata are missing.
    """
    fields = {
        "registers": "vgpr_count",
        "scalars": "sgpr_count",
        "spills": "private_segment_fixed_size",
    }
    read = {}
    for name, key in fields.items():
        match = re.search(rf"^\s*-?\s*\.{key}:\s*(\d+)\s*$", assembly, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"no .{key} in the assembly's metadata")
        read[name] = int(match[1])
    read["mma"] = len(re.findall(r"^\s*v_s?mfma_", assembly, re.MULTILINE))
    return read


@dataclass(frozen=True)
class SourceLine:
    """A line of a kernel's source and the instructions executed for it per tile, by opcode."""

    file: str
    line: int
    opcodes: dict[str, float]

    @property
    def instructions(self) -> float:
        """All of them, counted by warp."""
        return sum(self.opcodes.values())


def attribute(case: Case, target: Target) -> list[SourceLine]:
    """Instructions executed per tile by line of source, most first.

    Raises:
        ValueError: not an NVIDIA target, or the loops do not fit the case.
    """
    if not target.nvidia:
        raise ValueError(
            f"instructions are attributed for NVIDIA's targets only, not {target.name}"
        )
    from triton import knobs

    with knobs.compilation.scope():
        # What Triton's cache holds names the file where it was compiled first, maybe another one.
        knobs.compilation.always_compile = True
        compiled = compile_case(case, target)
    lines = sass.source_lines(_disassemble(compiled, "nvdisasm", "-g", "-c"))
    program = sass.Program(_disassemble(compiled, "cuobjdump", "-sass"))
    times = _warp_instructions(case, program, compiled)
    opcodes: defaultdict[tuple[str, int], defaultdict[str, float]]
    opcodes = defaultdict(lambda: defaultdict(float))
    for instruction in program.code:
        if n := times.get(instruction.address):
            location = lines.get(instruction.address, ("?", 0))
            opcodes[location][instruction.kind] += n
    lines_of_code = [SourceLine(file, line, dict(mix)) for (file, line), mix in opcodes.items()]
    return sorted(lines_of_code, key=lambda line: -line.instructions)


# ------------------------------------------------------------------------------ worker processes


def _compile_only() -> None:
    """Prepares a worker: kernels are compiled in it, whatever this process does with them."""
    os.environ.pop("TRITON_INTERPRET", None)


@cache
def _cases(provider: str) -> dict[str, Case]:
    cases = importlib.import_module(provider).compile_cases()
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), "two cases have one name"
    return named


def _names(provider: str) -> dict[str, tuple[str, str]]:
    """Kernel and variant of every case, by its name."""
    return {name: (case.kernel, case.variant) for name, case in _cases(provider).items()}


def _measure(provider: str, name: str, target: str) -> Measurement:
    return measure(_cases(provider)[name], TARGETS[target])


def _attribute(provider: str, name: str, target: str) -> list[SourceLine]:
    return attribute(_cases(provider)[name], TARGETS[target])


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_compile_only
    )


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"--target must be one of {', '.join(TARGETS)}; got {name!r}")
    return TARGETS[name]


def _select(names: Iterable[str], wanted: Sequence[str], option: str) -> list[str]:
    """The names that contain one of the wanted texts; all where none is wanted."""
    names = list(names)
    for text in wanted:
        if not any(text in name for name in names):
            raise ValueError(f"{option} {text!r}: no such kernel; there are: {'; '.join(names)}")
    return [name for name in names if not wanted or any(text in name for text in wanted)]


def measure_all(
    *,
    targets: Sequence[str] = tuple(TARGETS),
    kernels: Sequence[str] = (),
    provider: str = PROVIDER,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Measures all cases on all targets, in worker processes.

    Args:
        targets: names of targets.
        kernels: texts of which a case's name contains one; none for all cases.
        provider: module with `compile_cases()`.
        workers: processes; None for one per CPU.
        progress: told how many are done, and of how many.

    Returns:
        In the order of the cases, then of the targets.

    Raises:
        ValueError: an unknown target or kernel, or a case that does not describe its kernel.
    """
    targets = [_target(name).name for name in targets]
    workers = workers or len(os.sched_getaffinity(0))  # Linux, as all that Triton runs on
    done: dict[Job, Measurement] = {}

    def keep(job: Job, one: Measurement) -> None:
        done[job] = one
        if progress is not None:
            progress(len(done), len(jobs))

    with _pool(workers) as pool:
        names = pool.submit(_names, provider).result()
        wanted = _select(names, kernels, "--kernel")
        jobs = [(name, target) for name in wanted for target in targets]
        _measure_in(pool, provider, jobs, keep)
    while left := [job for job in jobs if job not in done]:
        # LLVM has ended a process over one of those that were under way: the first of those left.
        for name, target in left[: workers + 1]:
            with _pool(1) as pool:
                try:
                    one = pool.submit(_measure, provider, name, target).result()
                except BrokenProcessPool:
                    one = Measurement(*names[name], target, refused="the compiler crashed")
            keep((name, target), one)
        with _pool(workers) as pool:
            _measure_in(pool, provider, left[workers + 1 :], keep)
    return [done[job] for job in jobs]


def _measure_in(
    pool: ProcessPoolExecutor,
    provider: str,
    jobs: Sequence[Job],
    keep: Callable[[Job, Measurement], None],
) -> None:
    """Measures in order, until a worker dies."""
    with contextlib.suppress(BrokenProcessPool):
        running = {pool.submit(_measure, provider, *job): job for job in jobs}
        for future in as_completed(running):
            keep(running[future], future.result())


def attribute_one(kernel: str, target: str, provider: str = PROVIDER) -> list[SourceLine]:
    """`attribute` for the one case whose name contains a text, in a worker process.

    Raises:
        ValueError: none or several contain it, an unknown target, or as `attribute`.
    """
    target = _target(target).name
    with _pool(1) as pool:
        names = pool.submit(_names, provider).result()
        matching = [kernel] if kernel in names else _select(names, [kernel], "--lines")
        if len(matching) > 1:
            raise ValueError(f"--lines {kernel!r} names several kernels: {'; '.join(matching)}")
        return pool.submit(_attribute, provider, matching[0], target).result()
