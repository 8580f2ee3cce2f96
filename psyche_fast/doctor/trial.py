"""What needs torch, in a process of its own: `python -m psyche_fast.doctor.trial`.

A torch that does not fit its driver may end its process or hang, and a kernel may spoil a device
for all that follows. So the doctor starts this, reads a line of JSON for each finding as it comes,
and knows from the last line what was tried when no more came.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from psyche_fast.doctor import gpus
from psyche_fast.doctor.finding import Check, Finding, described, isolated, problem
from psyche_fast.errors import describe_exit

SECONDS = 120.0
"""How long all of it may take; about twenty on two cores."""
COMMAND = (sys.executable, "-m", "psyche_fast.doctor.trial")


def read(command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> Iterator[Finding]:
    """Starts the process and gives its findings as they come.

    Args:
        command: how it is started.
        seconds: after which it is ended.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # what it has started goes with it
    )
    assert process.stdout is not None and process.stderr is not None
    deadline = time.monotonic() + seconds
    words, tried, whole = b"", "its start", False
    try:
        for line in _lines(process.stdout, process.stderr, deadline, said := bytearray()):
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:  # a library's own words
                continue
            if "try" in entry:
                tried = entry["try"]
            elif "end" in entry:
                whole = True
            else:
                yield Finding(**entry)
        words = bytes(said)
        late = time.monotonic() >= deadline
    finally:
        if process.poll() is None and not whole:
            _end(process)
        process.stdout.close()
        process.stderr.close()
    if whole:
        process.wait(10)
        return
    lines = [line for line in words.decode(errors="replace").splitlines() if line.strip()]
    last = f": {lines[-1].strip()}" if lines else ""
    if late:
        yield problem(
            "self-test",
            f"{tried} hangs: no end within {seconds:g} s{last}",
            "a device or a library does not answer; nvidia-smi, dmesg and py-spy say more",
        )
    else:
        how = describe_exit(process.wait())
        yield problem(
            "self-test",
            f"{how} during {tried}{last}",
            "install torch anew, for this "
            "machine's driver; if it comes again, report it with doctor --json",
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # ended just now
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(out: IO[bytes], err: IO[bytes], deadline: float, said: bytearray) -> Iterator[bytes]:
    """Lines of `out` until it ends or it is too late; the last words of `err` go to `said`."""
    left = b""
    open_ones = {out.fileno(), err.fileno()}
    while out.fileno() in open_ones:
        wait = deadline - time.monotonic()
        if wait <= 0:
            return
        for one in select.select(list(open_ones), [], [], wait)[0]:
            part = os.read(one, 1 << 16)
            if not part:
                open_ones.discard(one)
            elif one == err.fileno():
                said += part
                del said[:-8192]
            else:
                *whole, left = (left + part).split(b"\n")
                yield from whole


def libraries() -> Iterator[Finding]:
    """Torch, what it was built for, and what else has to load."""
    try:
        import torch
    except Exception as error:  # of its own libraries any
        yield problem(
            "torch",
            f"cannot be imported: {described(error)}",
            "install it for this machine: pip install --force-reinstall torch",
        )
        return

    from psyche_fast.doctor.devices import builds, processor

    yield from builds(torch, gpus.ask())
    yield from processor(torch)


def flash() -> Iterator[Finding]:
    """Flash attention."""
    from psyche_fast.doctor.devices import flash_attention

    yield from flash_attention()


def groups() -> Iterator[Finding]:
    """The store, gloo and NCCL, each with one rank."""
    from psyche_fast.doctor.devices import communication

    yield from communication()


def hot_paths() -> Iterator[Finding]:
    """Every hot path against plain float64."""
    from psyche_fast.doctor.paths import compare

    yield from compare(lambda what: _say({"try": what}))


CHECKS: dict[str, Check] = {
    "import torch": libraries,
    "flash attention": flash,
    "process groups": groups,
    "hot paths": hot_paths,
}


def _say(entry: dict[str, Any]) -> None:
    print(json.dumps(entry), flush=True)


def main() -> None:
    """Carries out the checks; a line for each finding."""
    for name, check in CHECKS.items():
        _say({"try": name})
        for finding in isolated(name, check):
            _say(asdict(finding))
        if "torch" not in sys.modules:
            break  # all that follows needs it
    _say({"end": True})


if __name__ == "__main__":
    main()
