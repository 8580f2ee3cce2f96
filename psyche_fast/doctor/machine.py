"""The machine itself: cores, memory, limits, disks, the clock. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from psyche_fast.doctor.finding import Finding, ok, problem, warning
from psyche_fast.metrics.formatting import format_bytes

ROOT = Path("/")
"""Where `/proc`, `/sys` and `/dev` are; tests put others in their place."""
_GIB = 1 << 30
_UNLIMITED = resource.RLIM_INFINITY
_TIME_ERROR = 5


def system() -> Iterator[Finding]:
    """Which system this is."""
    said = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if sys.platform != "linux":
        yield warning("system", said, "only Linux has been tried; on it all promises are tested")
    elif sys.maxsize < 1 << 32:
        yield problem("system", f"{said}, a 32-bit Python", "install a 64-bit Python")
    else:
        yield ok("system", said)
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") != "utf8":
        yield warning(
            "encoding",
            f"file names are {encoding}",
            "set LANG=C.UTF-8, or PYTHONUTF8=1: texts and names of models may be UTF-8",
        )


def user() -> Iterator[Finding]:
    """Who runs this: containers are often told a number that nobody has."""
    number = os.getuid()
    try:
        yield ok("user", pwd.getpwuid(number).pw_name)
    except KeyError:
        missing = [name for name in ("HOME", "USER") if not os.environ.get(name)]
        if missing:
            yield problem(
                "user",
                f"{number} is not in /etc/passwd, and {' and '.join(missing)} not set",
                "docker run -e HOME=/tmp -e USER=me: caches are looked for by them",
            )
        else:
            yield ok("user", f"{number}, of no name but USER")


def cores() -> Iterator[Finding]:
    """Cores that may be used, and how many threads are asked for."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    usable = usable or 1
    quota = _quota()
    if quota is not None and quota < usable:
        yield warning(
            "cores",
            f"{usable} cores are seen, but the control group allows {quota:g}",
            f"give --threads {max(1, int(quota))} divided by the ranks here: more threads than "
            "that are stopped again and again",
        )
        usable = max(1, int(quota))
    else:
        yield ok("cores", f"{usable} of {os.cpu_count()} usable")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        text = os.environ.get(name)
        if text is None:
            continue
        first = text.split(",")[0].strip()
        if not first.isdecimal() or int(first) < 1:
            yield warning(name, f"{name}={text!r} is no number of threads", f"unset {name}")
        elif int(first) > usable:
            yield warning(
                name,
                f"{name}={text}, on {usable} cores",
                f"unset {name}, or set it to the cores divided by the ranks of this machine",
            )
        else:
            yield ok(name, f"{name}={text}")


def memory() -> Iterator[Finding]:
    """Memory that is left, by the machine and by the control group."""
    state = psutil.virtual_memory()
    left, whose = state.available, "the machine"
    limit, used = _memory_limit()
    if limit is not None and limit - used < left:
        left, whose = max(limit - used, 0), f"the control group's limit of {format_bytes(limit)}"
    said = f"{format_bytes(left)} left, by {whose}"
    if left < _GIB:
        yield problem(
            "memory",
            said,
            "a rank needs 1 GB before any model: end other programs, or "
            "raise the container's limit (docker run --memory)",
        )
    elif left < 4 * _GIB:
        yield warning(
            "memory",
            said,
            "enough for small models alone; psyche-fast estimate says "
            "what a run needs of each rank",
        )
    else:
        yield ok("memory", said)
    most = _first_line("sys/fs/cgroup/pids.max") or _first_line("sys/fs/cgroup/pids/pids.max")
    if most is not None and most.isdecimal() and int(most) < 512:
        yield warning(
            "processes",
            f"the control group allows {most} processes and threads",
            "raise it (docker run --pids-limit 4096): each rank has some dozens of threads",
        )


# What is limited, its letter of `ulimit`, the least that is enough, the least that works, and why.
_LIMITS = (
    ("RLIMIT_NOFILE", "n", 1024, 128, "open files: connections, data files, shards of a model"),
    ("RLIMIT_NPROC", "u", 512, 64, "processes and threads: dozens a rank"),
    ("RLIMIT_AS", "v", 64 * _GIB, 2 * _GIB, "address space, of which CUDA reserves much"),
    ("RLIMIT_DATA", "d", 64 * _GIB, 2 * _GIB, "memory of a process"),
    ("RLIMIT_STACK", "s", 1 << 20, 1 << 17, "stack of a thread"),
    ("RLIMIT_FSIZE", "f", 64 * _GIB, _GIB // 64, "size of a file: a larger checkpoint is cut off"),
    ("RLIMIT_CPU", "t", 30 * 86400, 60, "seconds of a core, after which a run is killed"),
)


def limits() -> Iterator[Finding]:
    """`ulimit`."""
    tight = False
    for name, letter, enough, works, why in _LIMITS:
        soft, hard = resource.getrlimit(getattr(resource, name))
        if soft == _UNLIMITED or soft >= enough:
            continue
        tight = True
        unit = 1024 if letter in "vdsf" else 1
        hard_enough = hard == _UNLIMITED or hard >= enough
        remedy = f"ulimit -{letter} {enough // unit if hard_enough else 'unlimited'}"
        if not hard_enough:
            remedy += ", which root has to allow first (/etc/security/limits.conf, docker --ulimit)"
        found = f"ulimit -{letter} is {soft // unit}: {why}"
        yield (problem if soft < works else warning)("limits", found, remedy)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    pinning = [name for name in ("infiniband", "nvidia") if _pins(name)]
    if pinning and locked != _UNLIMITED and locked < 64 << 20:
        tight = True
        yield warning(
            "limits",
            f"ulimit -l is {locked >> 10} KiB of locked memory, on a machine with "
            f"{' and '.join(pinning)}",
            "ulimit -l unlimited (docker run --ulimit memlock=-1): NCCL over InfiniBand locks it",
        )
    if not tight:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield ok("limits", f"ulimit -n {'unlimited' if files == _UNLIMITED else files}")


def shared_memory() -> Iterator[Finding]:
    """`/dev/shm`, through which NCCL's ranks of one machine speak, and worker processes."""
    folder = ROOT / "dev" / "shm"
    remedy = "docker run --shm-size 1g (or --ipc host); elsewhere mount a tmpfs on /dev/shm"
    if not folder.is_dir():
        yield problem("shared memory", f"there is no {folder}", remedy)
        return
    refused = _refusal(folder)
    if refused is not None:
        yield problem("shared memory", f"{folder}: {refused}", remedy)
        return
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < 32 << 20:
        yield problem("shared memory", f"{format_bytes(free)} free in {folder}", remedy)
    elif free < 512 << 20:
        yield warning(
            "shared memory",
            f"{format_bytes(free)} free in {folder}: 64 MB suffice for two GPUs at most",
            remedy,
        )
    else:
        yield ok("shared memory", f"{format_bytes(free)} free")


def disks(output: Path) -> Iterator[Finding]:
    """Whether what is written can be: run directories, caches, temporary files.

    Args:
        output: where runs are to write.
    """
    home = Path(os.path.expanduser("~"))  # as it is where nobody knows
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or hub / "hub")
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        temporary: Path | None = Path(tempfile.gettempdir())
    except OSError:  # none of those that Python tries takes a file
        temporary = None
        yield problem(
            "temporary files",
            f"none of TMPDIR ({os.environ.get('TMPDIR', 'not set')}), /tmp and the working "
            "directory takes a file",
            "set TMPDIR to a folder that can be written to",
        )
    if "TMPDIR" in os.environ and temporary not in (None, Path(os.environ["TMPDIR"])):
        yield warning(
            "temporary files",
            f"TMPDIR={os.environ['TMPDIR']} takes no file, so that they go to {temporary}",
            "unset TMPDIR, or make the folder",
        )
    # A folder, what it is for, how much is to be free in it, whether no run goes without it.
    folders: list[tuple[str, Path, int, bool]] = [
        ("output", output, 5 * _GIB, True),
        ("cache of data", cache / "psyche_fast", _GIB, False),
        ("cache of models", hub, 5 * _GIB, False),
    ]
    if temporary is not None:
        folders.append(("temporary files", temporary, _GIB, True))
    if inductor is not None:
        folders.append(("TORCHINDUCTOR_CACHE_DIR", Path(inductor), _GIB // 8, False))
    for name, folder, wanted, needed in folders:
        yield _disk(name, folder, wanted, needed=needed)


def _disk(name: str, folder: Path, wanted: int, *, needed: bool) -> Finding:
    worse = problem if needed else warning
    flags = {
        "output": "--output",
        "cache of data": "--data-cache or XDG_CACHE_HOME",
        "cache of models": "HF_HOME",
        "temporary files": "TMPDIR",
    }
    elsewhere = f"free some, or name another folder by {flags.get(name, name)}"
    # What is not there yet is made by the run, in the nearest folder that is.
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return worse(name, f"{there} is no folder", f"name another one by {flags.get(name, name)}")
    refused = _refusal(there)
    if refused is not None:
        return worse(name, f"{folder}: {refused}", elsewhere)
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    said = f"{folder}: {format_bytes(free)} free"
    if space.f_files and space.f_favail < 1000:
        return worse(name, f"{said}, but room for {space.f_favail} files (inodes)", elsewhere)
    if free < wanted:
        status = worse if free < wanted // 20 else warning
        return status(name, said, f"{elsewhere}; checkpoints take 6 to 16 bytes per parameter")
    return ok(name, said)


def _refusal(folder: Path) -> str | None:
    """Why a folder takes no file; None where it does."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".psyche-fast-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def clock() -> Iterator[Finding]:
    """Whether the clock can be right: certificates and signed requests to buckets depend on it."""
    now = time.time()
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < Path(__file__).stat().st_mtime - 86400:
        yield problem(
            "clock",
            f"{said}, before this program was installed",
            "set the clock (timedatectl set-ntp true): certificates are refused otherwise",
        )
    elif not _synchronised():
        yield warning(
            "clock",
            f"{said}; the kernel knows of no server that the clock is kept by",
            "timedatectl set-ntp true, or chrony: buckets refuse requests that are minutes off",
        )
    else:
        yield ok("clock", said)


def _synchronised() -> bool:
    """What `adjtimex` says; True where it says nothing."""
    if sys.platform != "linux":
        return True
    # A struct timex, whose first field, modes, is 0: nothing is set.
    state: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    return state != _TIME_ERROR


def _quota() -> float | None:
    """Cores that the control group allows, of either version; None without a limit."""
    both = _first_line("sys/fs/cgroup/cpu.max")
    if both is not None:
        quota, _, period = both.partition(" ")
    else:
        quota = _first_line("sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1"
        period = _first_line("sys/fs/cgroup/cpu/cpu.cfs_period_us") or "100000"
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _memory_limit() -> tuple[int | None, int]:
    """The control group's limit and what is used of it, of either version; bytes."""
    for most, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, now = _first_line(most), _first_line(used)
        if limit is not None and limit.isdecimal() and int(limit) < 1 << 60:
            # Files that the system keeps in memory count as used, and go when memory is wanted.
            kept = _file_pages(Path(most).parent / "memory.stat")
            used_bytes = int(now) - kept if now is not None and now.isdecimal() else 0
            return int(limit), max(used_bytes, 0)
    return None, 0


def _file_pages(path: Path) -> int:
    try:
        lines = (ROOT / path).read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(fields.get("inactive_file", fields.get("total_inactive_file", "0")))


def _first_line(path: str) -> str | None:
    try:
        return (ROOT / path).read_text().strip()
    except OSError:
        return None


def _pins(kind: str) -> bool:
    if kind == "infiniband":
        folder = ROOT / "sys" / "class" / "infiniband"
        return folder.is_dir() and any(folder.iterdir())
    return any((ROOT / "dev").glob("nvidia[0-9]*"))
