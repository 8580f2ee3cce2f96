"""What a launch has Triton compile, and compiling that for sm_90 without a GPU.

A specialisation is a kernel with what Triton compiles anew for: types of arguments, whether they
are divisible by 16, constants (an integer of 1 is one), and launch options. It is derived from a
launch by the code that Triton itself uses on a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tools.kernel_guard.races import races

STAGES = ("ttir", "ttgir", "llir", "ptx", "cubin")
"""The steps of Triton's compiler. Shared memory is known after "llir", registers after "cubin"."""
CAPABILITY = 90
SHARED = 227 * 1024
"""Shared memory of a block in bytes."""

_WORTH_A_PROCESS = 20
"""Specialisations that take as long as a process takes to start."""


@dataclass(frozen=True)
class Specialisation:
    """A kernel as one kind of launch has it compiled.

    Attributes:
        module: where the kernel is defined.
        kernel: its name in the module.
        signature: (argument, type as Triton writes it) of every argument.
        constants: (position of an argument, value) of those that are constants.
        attributes: (position of an argument, what Triton knows of it) of the others.
        options: (name, value) of the launch options given.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """Kernel, then its arguments in order, then the options."""
        values, known = dict(self.constants), dict(self.attributes)
        shown = []
        for at, (name, kind) in enumerate(self.signature):
            if kind == "constexpr":
                shown.append(f"{name}={values[(at,)]}")
            else:
                shown.append(f"{name}: {kind}" + "/16" * bool(known.get((at,))))
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.kernel}({', '.join(shown)}) with {options or 'no options'}"


def specialisation(
    kernel: Any, arguments: Sequence[Any], options: dict[str, Any]
) -> Specialisation:
    """The specialisation of a launch.

    Args:
        kernel: an interpreted function of Triton's.
        arguments: of the launch, by position.
        options: arguments and launch options by name.
    """
    unspecialised = kernel.kwargs.get("do_not_specialize") or ()
    jit, backend, bind = _binder(kernel.fn, tuple(unspecialised))
    bound, kinds, rest = bind(*arguments, **options)
    _, signature, constants, attributes = jit._pack_args(backend, options, bound, kinds, rest)
    return Specialisation(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((at, tuple(map(tuple, known))) for at, known in attributes.items() if known),
        tuple(sorted(rest.items())),
    )


@cache
def _backend() -> tuple[Any, Any]:
    """Target and Triton's compiler for it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", CAPABILITY, 32)
    return target, make_backend(target)


@cache
def _binder(function: Any, unspecialised: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """A kernel as Triton has it on a GPU, and what tells the kinds of a launch's arguments."""
    from triton.runtime.jit import JITFunction, create_function_from_signature

    jit = JITFunction(function, do_not_specialize=list(unspecialised))
    _, backend = _backend()
    return jit, backend, create_function_from_signature(jit.signature, jit.params, backend)


def lower(wanted: Specialisation, until: str) -> bool:
    """Compile a specialisation up to a stage; what has been compiled before is known.

    That is kept beside Triton's own cache, by all that decides the outcome: sources, Triton's and
    its compilers' versions, environment. This process must not run Triton's interpreter.

    Returns:
        Whether it was known.

    Raises:
        Exception: whatever the compiler raises.
        RuntimeError: too much shared memory is needed.
    """
    from triton import knobs
    from triton._C.libtriton import get_cache_invalidating_env_vars, ir
    from triton.backends.compiler import Language
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_key

    target, backend = _backend()
    kernel = getattr(importlib.import_module(wanted.module), wanted.kernel)
    attributes = {at: [list(fact) for fact in facts] for at, facts in wanted.attributes}
    source = ASTSource(kernel, dict(wanted.signature), dict(wanted.constants), attributes)
    options = backend.parse_options(dict(wanted.options))
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    mark = Path(knobs.cache.dir) / "kernel_guard" / hashlib.sha256(key.encode()).hexdigest()
    mark = mark.with_suffix(f".{until}.in-order")
    if mark.exists():
        return True
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, Language.TRITON)
    generation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, generation, modules, context)
    facts: dict[str, Any] = {**options.__dict__, "target": target}
    for stage in STAGES[: STAGES.index(until) + 1]:
        module = stages[stage](module, facts)
        if stage == "ttgir" and (found := races(str(module))):
            raise RuntimeError("; ".join(found))
    if facts.get("shared", 0) > SHARED:
        raise RuntimeError(f"needs {facts['shared']} bytes of shared memory, there are {SHARED}")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return False


@dataclass
class Outcome:
    """What came of compiling.

    Attributes:
        compiled: how many compiled.
        known: how many of these had been compiled before.
        faults: why the others do not.
    """

    compiled: int
    known: int
    faults: dict[Specialisation, str]


def compile_all(
    wanted: Iterable[Specialisation], until: str, *, workers: int | None = None
) -> Outcome:
    """Compile specialisations in worker processes.

    Args:
        wanted: distinct ones.
        until: the last of `STAGES` that is gone through.
        workers: processes; None for one per CPU.
    """
    left = sorted(wanted, key=str)  # one order, so that a compiler's crash is met at one point
    cpus = len(os.sched_getaffinity(0))  # Linux, as all that Triton runs on
    workers = workers or min(cpus, 1 + len(left) // _WORTH_A_PROCESS)
    outcome = Outcome(0, 0, {})

    def keep(one: Specialisation, result: bool | str) -> None:
        left.remove(one)
        if isinstance(result, str):
            outcome.faults[one] = result
        else:
            outcome.compiled += 1
            outcome.known += result

    while left:
        with contextlib.suppress(BrokenProcessPool), _pool(workers, until) as pool:
            running = {pool.submit(_try, one, until): one for one in left}
            for future in as_completed(running):
                keep(running[future], future.result())
        # The compiler has ended its process over one of those that were under way.
        for one in left[: workers + 1]:
            keep(one, _try_alone(one, until))
    return outcome


def _try(one: Specialisation, until: str) -> bool | str:
    try:
        return lower(one, until)
    except Exception as error:
        return _told(error)


def _told(error: BaseException) -> str:
    """What a chain of errors says, outermost first: of a message in source code its last line."""
    said = []
    while True:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        said.append(f"{type(error).__name__}: {lines[-1] if lines else 'no message'}")
        if error.__cause__ is None:
            return ", from ".join(said)
        error = error.__cause__


def _try_alone(one: Specialisation, until: str) -> bool | str:
    with _pool(1, until) as pool:
        future: Future[bool | str] = pool.submit(_try, one, until)
        try:
            return future.result()
        except BrokenProcessPool:
            return "the compiler crashed"


def _pool(workers: int, until: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_compile_only,
        initargs=(until,),
    )


def _compile_only(until: str) -> None:
    """Prepares a worker: kernels are compiled in it, whatever this process does with them."""
    os.environ.pop("TRITON_INTERPRET", None)
    if until == "llir":
        os.environ["DISABLE_LLVM_OPT"] = "1"  # a sixth of the time, and nothing comes after it
