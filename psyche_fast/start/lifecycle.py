"""How processes of a run start and end together. Nothing here imports torch.

A sidecar must never outlive its core. Three mechanisms, each measured: the kernel's death signal
and the end of a pipe act at once, where our own core is the parent; the poll of ``--parent-pid``
takes up to 0.2 s and serves any parent. The death signal also fires when the *thread* that
spawned the child ends, so it is used only where our core, which spawns from its main thread, asks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time

import psutil

PARENT_PIPE = "PSYCHE_FAST_PARENT_PIPE"
"""Environment variable: the number of an inherited descriptor that ends when the core does."""

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def quiet_torch() -> None:
    """Keeps c10d's stack traces off the user's terminal; set before torch is imported.

    Whoever wants them sets ``TORCH_CPP_LOG_LEVEL`` (and ``TORCH_DISTRIBUTED_DEBUG``).
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def use_interface(host: str) -> None:
    """Keeps gloo and NCCL on the interface through which ``host`` is reached.

    gloo would take the one that this machine's name resolves to, which on machines with several
    networks, or none by that name, is another one. What the user has set stays.

    Args:
        host: rank 0's address; one of this machine's own there. All addresses (``0.0.0.0``) say
            nothing.
    """
    name = _interface(host)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if name not in ("lo", "lo0"):  # inside one machine NCCL needs none
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _interface(host: str) -> str | None:
    if host in ("0.0.0.0", "::", ""):
        return None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel only chooses the way
            own = probe.getsockname()[0]
    except OSError:
        return None  # whoever connects in earnest says so
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    return None


def die_with_parent(parent_pid: int) -> None:
    """Ends this process, whatever it is doing, soon after the process ``parent_pid`` is gone."""
    pipe = os.environ.pop(PARENT_PIPE, None)
    if pipe is not None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _start(_until_end_of_pipe, int(pipe))
    if not _alive(parent_pid):
        os._exit(1)
    _start(_until_gone, parent_pid)


def _start(target: object, argument: int) -> None:
    threading.Thread(target=target, args=(argument,), daemon=True, name="parent-watch").start()  # type: ignore[arg-type]


def _until_end_of_pipe(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)


def _until_gone(parent_pid: int) -> None:
    while _alive(parent_pid):
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _alive(pid: int) -> bool:
    if os.getppid() == pid:
        return True
    try:
        # A killed parent that nobody has waited for stays as a zombie.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def describe_exit(code: int) -> str:
    """How a process ended: ``exit status 1`` or ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
