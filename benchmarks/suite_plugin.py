"""A plugin of pytest's for the suite's tests: what hangs or breaks the GPU ends the process.

`suite_tests.py` then goes on at the next test in a new one.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.suite_process import UNUSABLE
from benchmarks.suite_tests import LIMIT

# pytest captures file descriptor 2 later on.
_stderr = os.fdopen(os.dup(2), "w")
_failed: set[str] = set()


def unusable() -> bool:
    """Whether this process cannot use the GPU any more."""
    from benchmarks import common  # torch with it, which most tests of the suite's own do without

    return common.unusable(common.device_here())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Ends a process whose test hangs, and shows where."""
    faulthandler.dump_traceback_later(float(os.environ[LIMIT]), exit=True, file=_stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes what has failed."""
    if report.failed:
        _failed.add(report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """After a failure, which has been told by then, ends a process that cannot use the GPU."""
    if nodeid in _failed and unusable():
        sys.stdout.flush()
        os._exit(UNUSABLE)
