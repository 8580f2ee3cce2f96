"""pytest plug-in: every kernel that the tests launch, as they launch it, compiles for sm_90.

The interpreter runs Python; it does not know what Triton's compiler refuses. So launches are
recorded while the tests run, and the distinct ones are compiled when they have ended::

    python -m pytest -p tools.kernel_guard.compile_launches tests/kernels
"""

from __future__ import annotations

import os
import pickle
import time
from typing import Any

import pytest

from tools.kernel_guard.specialisations import (
    STAGES,
    Outcome,
    Specialisation,
    compile_all,
    specialisation,
)

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, by whomever

_launched: dict[Specialisation, str] = {}
"""The test that launched it first."""
_SENT = "kernel_guard_launches"
_outcome: tuple[Outcome, float] | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    """How far to compile."""
    parser.addoption(
        "--compile-until",
        choices=STAGES,
        default="llir",
        help="last stage of Triton's compiler that launches go through (default: llir)",
    )


def pytest_configure() -> None:
    """Records launches from here on.

    Raises:
        UsageError: there is a GPU, on which a launch compiles by itself.
    """
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    if torch.cuda.is_available():
        raise pytest.UsageError("compile_launches is for machines without a GPU")
    run = InterpretedFunction.run

    def recorded(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        test = os.environ.get("PYTEST_CURRENT_TEST", "no test")
        _launched.setdefault(specialisation(self, arguments, options), test)
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    InterpretedFunction.run = recorded


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over what one of pytest-xdist's processes has recorded."""
    sent = getattr(node, "workeroutput", {}).get(_SENT)
    if sent is not None:  # a process that died fails the run by itself
        _launched.update(pickle.loads(sent))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compiles; what does not compile fails the run."""
    global _outcome
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # one of pytest-xdist's processes, which only record
        output[_SENT] = pickle.dumps(_launched)
        return
    if session.config.option.collectonly:
        return
    start = time.monotonic()
    outcome = compile_all(_launched, session.config.option.compile_until)
    _outcome = outcome, time.monotonic() - start
    if session.exitstatus == pytest.ExitCode.OK and (outcome.faults or not _launched):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says what came of it."""
    if _outcome is None:
        return
    outcome, seconds = _outcome
    terminalreporter.section("launches compiled")
    for one, fault in outcome.faults.items():
        terminalreporter.line(f"{one}\n    launched by {_launched[one]}\n    {fault}", red=True)
    terminalreporter.line(
        f"{len(_launched)} specialisations of kernels were launched; {outcome.compiled} compile "
        f"for sm_90 up to {config.option.compile_until} ({outcome.known} were known), "
        f"{len(outcome.faults)} do not; {seconds:.0f} s"
    )
    if not _launched:
        terminalreporter.line("no kernel was launched, so nothing is proved", red=True)
