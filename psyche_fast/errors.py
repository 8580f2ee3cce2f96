"""What a user is told of a run that failed: the words, and the command's exit status.

`ValueError`, `TypeError` and `FileNotFoundError` are the user's mistakes (status 2); `RuntimeError`
and `OSError` are the run's (status 1); anything else is a bug of ours and shows its trace.
"""

from __future__ import annotations

import os
import resource
import signal

_LOST = ("Connection closed by peer", "Connection reset by peer", "monitoredBarrier")
"""What gloo's plain RuntimeErrors say where another rank is gone."""

LOST_ANOTHER_RANK = "lost another rank"
"""How the line of a rank begins that is not the first to fail."""


class SidecarFailed(RuntimeError):
    """A sidecar ended before its time; the message names rank, exit and last words."""


def explain(error: BaseException) -> str:
    """One line for a user, whatever ended a rank."""
    import torch.distributed as dist

    if is_out_of_memory(error):
        where = "".join(f", {note}" for note in getattr(error, "__notes__", []))
        return (
            f"out of memory{where}, at most {_peak() / 2**30:.1f} GiB before: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]} Lower --micro-batch or "
            "--sequence-length, or use --activation-checkpointing or more --data-parallelism."
        )
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "timeout caused" in text or "timed out" in text.lower():
        return (
            "another rank did not answer within --timeout (PSYCHE_FAST_TIMEOUT of a sidecar): "
            + text
        )
    if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST):
        return f"{LOST_ANOTHER_RANK}: {text}"
    if isinstance(error, ValueError) or text.startswith(LOST_ANOTHER_RANK):
        return str(error)
    return f"{type(error).__name__}: {error}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no more memory to give."""
    import torch

    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _peak() -> int:
    """Bytes that this process has held at most: the device's where it has one."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def check_name(name: str) -> None:
    """Checks that a name is text, as logs, configurations and libraries take it.

    Raises:
        ValueError: the system gave bytes that are not UTF-8.
    """
    if any("\udc80" <= character <= "\udcff" for character in name):
        raise ValueError(f"{os.fsencode(name)!r} is not UTF-8: rename the file or folder")


def exit_status(error: BaseException) -> int | None:
    """Status of the command after an error whose message says it all; None for a bug of ours."""
    if isinstance(error, ValueError | TypeError | FileNotFoundError):
        return 2
    if isinstance(error, RuntimeError | OSError):
        return 1
    return None


def describe_exit(code: int) -> str:
    """How a process ended: `exit status 1` or `killed by SIGKILL`."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
