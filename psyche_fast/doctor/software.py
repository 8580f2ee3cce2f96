"""What is installed and what the environment says. Nothing here imports torch or what needs it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from psyche_fast.doctor.finding import Finding, ok, problem, warning
from psyche_fast.start.cluster import launched
from psyche_fast.version import version_lines

NEWEST_PYTHON = (3, 13)
"""The newest that is tested."""
_KNOWN = {
    "PSYCHE_FAST_ARCHITECTURES",
    "PSYCHE_FAST_KERNELS",
    "PSYCHE_FAST_TIMEOUT",
    "PSYCHE_FAST_TRACE",
    "PSYCHE_FAST_TUNING",
}
"""Variables of ours that users set; tests have some of their own."""
_FOR_TESTS = ("PSYCHE_FAST_CHAOS_", "PSYCHE_FAST_SWEEP", "PSYCHE_FAST_TEST_")

_ALONE = "unset TORCHELASTIC_RUN_ID and SLURM_STEP_NUM_TASKS"

# Variables that cost speed where somebody has left them set, the values that do, and what they do.
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": ("1", "each kernel is waited for"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of one machine speak through the host's memory"),
    "NCCL_SHM_DISABLE": ("1", "GPUs of one machine speak through sockets"),
    "NCCL_IB_DISABLE": ("1", "InfiniBand is not used"),
    "NCCL_DEBUG": ("TRACE", "NCCL writes about every call"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "each tensor is allocated anew by the driver"),
    "PYTORCH_JIT": ("0", "scripted functions run in Python"),
    "TORCH_COMPILE_DISABLE": ("1", "--compile does nothing"),
    "TORCHDYNAMO_DISABLE": ("1", "--compile does nothing"),
    "PYTHONPROFILEIMPORTTIME": ("1", "imports write to the log"),
    "PYTHONDEVMODE": ("1", "Python checks itself at run time"),
    "MALLOC_CHECK_": ("3", "the allocator checks itself"),
    "PSYCHE_FAST_KERNELS": ("interpret", "kernels run in Triton's interpreter, on the CPU"),
    "TRITON_INTERPRET": ("1", "kernels run in Triton's interpreter"),
}


def python() -> Iterator[Finding]:
    """Python and psyche_fast."""
    this = sys.version_info[:2]
    said = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    if this < (3, 11):
        yield problem("Python", said, "make an environment with Python 3.11, 3.12 or 3.13")
    elif this > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        yield warning("Python", said, f"use Python 3.11 to {newest}: newer ones are not tested")
    else:
        yield ok("Python", said)
    if sys.flags.optimize:
        yield warning(
            "Python",
            "asserts are off (-O or PYTHONOPTIMIZE)",
            "leave them on: they find faults of ours before results are wrong",
        )
    if (
        not sys.flags.no_user_site
        and sys.prefix == sys.base_prefix
        and os.environ.get("PYTHONPATH")
    ):
        yield warning(
            "Python",
            f"PYTHONPATH={os.environ['PYTHONPATH']} outside an environment",
            "make one: python -m venv .venv; what lies there hides installed packages",
        )
    hiding = _hiding(Path.cwd())
    if hiding:
        yield problem(
            "Python",
            f"{', '.join(hiding)} in {Path.cwd()} stands before the module of that name",
            "rename it, or start in another folder: ranks are started by python -m, which looks "
            "there first",
        )
    yield ok("psyche-fast", "; ".join(version_lines()))


def _hiding(folder: Path) -> list[str]:
    """Files and packages of a folder that are taken for a library, or for one of Python's own."""
    libraries = {"torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "psyche"}
    names = libraries | sys.stdlib_module_names
    found = [path.name for path in folder.glob("*.py") if path.stem in names]
    found += [
        path.parent.name for path in folder.glob("*/__init__.py") if path.parent.name in names
    ]
    return sorted(found)


def packages() -> Iterator[Finding]:
    """Whether what psyche_fast needs is installed, in versions that it takes."""
    try:
        wanted = metadata.requires("psyche-fast") or []
    except metadata.PackageNotFoundError:
        yield warning(
            "packages",
            "psyche_fast is in a folder and not installed: its requirements are not known",
            "pip install -e . in its repository",
        )
        return
    yield from requirements(wanted)


def requirements(wanted: Sequence[str]) -> Iterator[Finding]:
    """Whether requirements are met.

    Args:
        wanted: as in a package's metadata.
    """
    wrong = 0
    extras: dict[str, list[Requirement]] = {}
    for text in wanted:
        one = Requirement(text)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            for extra in re.findall(r"extra == ['\"]([\w-]+)['\"]", str(one.marker)):
                extras.setdefault(extra, []).append(one)
            continue
        wrong_one = _unmet(one)
        if wrong_one is None:
            continue
        wrong += 1
        yield problem("packages", wrong_one, f"pip install '{one.name}{one.specifier}'")
    for extra, members in extras.items():
        # Of an extra that is there, whatever is too old; what is not there is not wanted.
        for one in members:
            found = _unmet(one)
            if found is not None and _version(one.name) is not None:
                yield warning(
                    "packages",
                    f"{found}, of the extra {extra}",
                    f"pip install 'psyche-fast[{extra}]'",
                )
    if not wrong:
        yield ok("packages", "all that are needed are there, in versions that are taken")
    yield from _pair()


def _pair() -> Iterator[Finding]:
    """Whether triton is the one that the installed torch was built with."""
    try:
        asked = [Requirement(text) for text in metadata.requires("torch") or []]
    except (metadata.PackageNotFoundError, InvalidRequirement):
        return
    for one in asked:
        if one.name.startswith(("triton", "pytorch-triton")):
            if one.marker is not None and not one.marker.evaluate({"extra": ""}):
                continue
            found = _unmet(one)
            if found is not None:
                yield problem(
                    "torch and triton",
                    f"{found} by torch {_version('torch')}, which was built with it",
                    f"pip install '{one.name}{one.specifier}', or torch anew",
                )


def _unmet(one: Requirement) -> str | None:
    version = _version(one.name)
    if version is None:
        return f"{one.name} is not installed, {one.specifier or 'any version'} is wanted"
    try:
        met = one.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return f"{one.name} {version} is no version, {one.specifier} is wanted"
    return None if met else f"{one.name} {version} is installed, {one.specifier} is wanted"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compiler(has_gpu: bool) -> Iterator[Finding]:
    """What Triton needs to build a kernel's launcher: a C compiler, Python's headers, a folder.

    Args:
        has_gpu: without one Triton builds nothing, and all of this matters to `--compile` alone.
    """
    worse = problem if has_gpu else warning
    why = "Triton builds each kernel's launcher with it" if has_gpu else "--compile needs it"
    named = os.environ.get("CC")
    found = (
        shutil.which(named.split()[0]) if named else shutil.which("gcc") or shutil.which("clang")
    )
    if found is None:
        text = f"CC={named} is no program" if named else "no C compiler"
        yield worse("compiler", text, f"apt-get install gcc (dnf install gcc): {why}")
    else:
        yield ok("compiler", found)
    headers = [Path(sysconfig.get_paths()[name], "Python.h") for name in ("include", "platinclude")]
    if not any(path.is_file() for path in headers):
        this = ".".join(map(str, sys.version_info[:2]))
        yield worse(
            "compiler",
            f"no {headers[0]}",
            f"apt-get install python{this}-dev (dnf install python{this}-devel): {why}",
        )
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    refused = _takes_libraries(folder)
    if refused is None:
        yield ok("kernels' cache", str(folder))
    else:
        yield worse(
            "kernels' cache",
            f"{folder}: {refused}",
            "set TRITON_CACHE_DIR to a folder of a local disk that takes programs",
        )


def _takes_libraries(folder: Path) -> str | None:
    """Why shared libraries cannot be written there and loaded; None where they can."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".psyche-fast-doctor-"):
            pass
    except OSError as error:
        return error.strerror or str(error)
    if os.statvfs(there).f_flag & getattr(os, "ST_NOEXEC", 0):
        return "mounted with noexec: compiled kernels cannot be loaded from there"
    return None


def environment(has_gpu: bool) -> Iterator[Finding]:
    """Variables that change what a run does, left over or mistyped.

    Args:
        has_gpu: whether those that slow a GPU down matter.
    """
    noted = False
    for name, (value, effect) in _SLOW.items():
        is_set = os.environ.get(name, "").upper() == value.upper()
        if not is_set or (name in ("PSYCHE_FAST_KERNELS", "TRITON_INTERPRET") and not has_gpu):
            continue
        noted = True
        yield warning("environment", f"{name}={os.environ[name]}: {effect}", f"unset {name}")
    for name in sorted(os.environ):
        known = name in _KNOWN or name.startswith(_FOR_TESTS)
        if name.startswith("PSYCHE_FAST_") and not known:
            noted = True
            yield warning(
                "environment",
                f"nothing reads {name}",
                f"unset it, or spell it as one of {', '.join(sorted(_KNOWN))}",
            )
    text = os.environ.get("PSYCHE_FAST_TIMEOUT")
    if text is not None and not (text.isdecimal() and int(text)):
        noted = True
        yield problem(
            "environment", f"PSYCHE_FAST_TIMEOUT={text!r}", "a number of seconds, or none"
        )
    tuning = os.environ.get("PSYCHE_FAST_TUNING")
    if tuning is not None and not Path(tuning).is_file():
        noted = True
        yield problem(
            "environment",
            f"PSYCHE_FAST_TUNING={tuning}: no such file",
            "unset it, or write the file: psyche-fast kernels --autotune --out FILE",
        )
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") not in ("", "0"):
        noted = True
        yield warning(
            "environment",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set: under torchrun rank 0 has to open "
            "MASTER_PORT itself, and other machines to reach it",
            "unset it, unless something else asks for it",
        )
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        place = os.environ.get(name)
        if place and not Path(place).exists():
            noted = True
            yield warning(
                "environment",
                f"{name}={place}: there is no such thing, so that every download by https fails",
                f"unset {name}, or put the certificates there",
            )
    try:
        launch = launched()
    except ValueError as error:
        noted = True
        yield problem("launcher", str(error), f"start by torchrun or srun, or {_ALONE}")
    else:
        if launch is not None:
            noted = True
            yield warning(
                "launcher",
                f"the environment says rank {launch.rank} of {launch.world_size}, of torchrun or "
                "srun: train here waits for the others",
                f"right in a job; in a shell {_ALONE}",
            )
    if not noted:
        yield ok("environment", "no variable that slows down or misleads")


def hub() -> Iterator[Finding]:
    """How models and data come from the hub, and the proxies between."""
    offline = [
        n
        for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        if os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")
    ]
    if offline:
        yield warning(
            "hub",
            f"{offline[0]} is set: hub ids are found where they were downloaded "
            "before, and nowhere else",
            f"unset {offline[0]}, or name folders",
        )
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    where = urlsplit(endpoint)
    if where.scheme not in ("http", "https") or not where.hostname:
        yield problem("hub", f"HF_ENDPOINT={endpoint!r}", "wanted a URL such as https://HOST")
        return
    proxied = _proxies()
    for name, url in proxied.items():
        yield from _proxy(name, url)
    if offline:
        return
    scheme = f"{where.scheme}_proxy"
    if any(name.lower() in (scheme, "all_proxy") for name in proxied):
        yield ok("hub", f"{where.hostname}, through a proxy")
        return
    port = where.port or (443 if where.scheme == "https" else 80)
    refused = reaches(where.hostname, port)
    if refused is None:
        yield ok("hub", f"{where.hostname} answers")
    else:
        yield warning(
            "hub",
            f"{where.hostname}: {refused}",
            "models and data by hub id are not to "
            "be had: use folders, set HTTPS_PROXY or HF_ENDPOINT, or HF_HUB_OFFLINE=1 "
            "for what is downloaded",
        )


def _proxies() -> dict[str, str]:
    wanted = {"http_proxy", "https_proxy", "all_proxy"}
    return {name: url for name, url in os.environ.items() if name.lower() in wanted and url}


def _proxy(name: str, url: str) -> Iterator[Finding]:
    """Never says a proxy's user or password: findings are pasted into reports."""
    try:
        where = urlsplit(url if "//" in url else f"//{url}")
        host, port = where.hostname, where.port or 8080
    except ValueError:
        host = None
    if host is None:
        yield warning("proxy", f"{name} is no URL", f"unset {name}, or write http://HOST:PORT")
        return
    refused = reaches(host, port)
    if refused is not None:
        yield warning(
            "proxy",
            f"{name}, {host}:{port}: {refused}",
            f"unset {name}, or start the proxy: downloads wait for it",
        )
    else:
        yield ok("proxy", f"{host}:{port}; ranks speak to each other without it")


def reaches(host: str, port: int, seconds: float = 3.0) -> str | None:
    """Why a port cannot be connected to; None where it can."""
    try:
        socket.create_connection((host, port), seconds).close()
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return None


def running() -> Iterator[Finding]:
    """Runs of ours that are going on here, which share cores and GPUs with the next."""
    mine = os.getpid()
    running = 0
    for process in psutil.process_iter(["cmdline", "pid"]):
        words = process.info["cmdline"] or []
        ours = any(
            word.endswith(("psyche-fast", "psyche_fast", "psyche_fast.sidecar"))
            for word in words[:4]
        )
        if ours and process.info["pid"] != mine and "doctor" not in words:
            running += 1
    if running:
        yield warning(
            "other runs",
            f"{running} processes of psyche-fast run here",
            "they share cores, memory and GPUs with the next run: wait for them, or end them",
        )
    else:
        yield ok("other runs", "none here")
