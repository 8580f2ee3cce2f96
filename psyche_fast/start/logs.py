"""Logs of a rank: its own lines, and those of the C++ libraries below it (c10d, NCCL, CUDA).

The libraries write to the process's standard streams, traces of many lines among it. A terminal is
kept free of them, a log file gets all. This module imports no torch.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

log = logging.getLogger("psyche_fast")

_STREAMS = (("stdout", 1), ("stderr", 2))


def quiet_terminal() -> None:
    """Keeps c10d's traces off standard error where that is a terminal; before torch is imported.

    Whoever wants them sets `TORCH_CPP_LOG_LEVEL` (and `TORCH_DISTRIBUTED_DEBUG`).
    """
    if sys.stderr.isatty():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def let_libraries_speak(environment: MutableMapping[str, str]) -> None:
    """Has NCCL say what is wrong, in a process whose output goes to a file; c10d does already."""
    environment.setdefault("NCCL_DEBUG", "WARN")


@contextmanager
def rank_log(path: Path, rank: int, level: str = "info") -> Iterator[None]:
    """Writes this process's log to a file too, appended to that of an earlier part of the run.

    What libraries write to the standard streams goes to the file alone; `sys.stdout` and
    `sys.stderr` stay what they are. An error that passes through leaves its trace in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    form = f"%(asctime)s rank {rank} %(levelname)s %(message)s"
    # With the zone: machines of one run may be in several.
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S%z"))
    log.addHandler(handler)
    before = log.level
    log.setLevel(level.upper())
    let_libraries_speak(os.environ)
    try:
        with path.open("ab", buffering=0) as file, _native_output_to(file.fileno()):
            try:
                yield
            except BaseException as error:
                if not isinstance(error, SystemExit | GeneratorExit):
                    log.info("where it happened:", exc_info=True)
                raise
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
        handler.close()


def link(path: Path, target: str) -> None:
    """Has a symbolic link lead to the newest of several, where the file system knows links."""
    temporary = path.with_name(f".{path.name}.tmp")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)


def keep_rank_log(path: Path, rank: int, level: str = "info") -> None:
    """`rank_log` until the process ends, unless its standard error is that file already."""
    try:
        log.setLevel(level.upper())
        if not (path.exists() and os.path.samestat(os.fstat(2), path.stat())):
            kept = ExitStack()
            kept.enter_context(rank_log(path, rank, level))
            atexit.register(kept.close)
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler):  # where it is shown from now on
                    handler.setStream(sys.stderr)
    except OSError as error:  # the run does without; standard error has the lines as well
        log.warning("no log file: %s", error)


@contextmanager
def _native_output_to(descriptor: int) -> Iterator[None]:
    with ExitStack() as stack:
        for name, number in _STREAMS:
            shown: TextIO = getattr(sys, name)
            _flush(shown)
            before = os.dup(number)
            stack.callback(os.close, before)
            if _descriptor(shown) == number:  # not where a test or a notebook has put its own
                copy = open(  # noqa: SIM115  # its descriptor is closed above
                    before, "w", buffering=1, encoding=shown.encoding, errors=shown.errors,
                    closefd=False,
                )  # fmt: skip
                stack.callback(_flush, copy)
                setattr(sys, name, copy)
                stack.callback(setattr, sys, name, shown)
            os.dup2(descriptor, number)
            stack.callback(os.dup2, before, number)
        if not faulthandler.is_enabled():
            # A library that aborts the process says why in the log; the terminal learns that.
            faulthandler.enable(before, all_threads=False)
            stack.callback(faulthandler.disable)
        yield


def _flush(stream: TextIO) -> None:
    with suppress(OSError):  # a terminal that has been closed
        stream.flush()


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
