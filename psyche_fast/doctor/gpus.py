"""GPUs as the driver sees them, by `nvidia-smi`: whether torch sees them is `trial.py`'s affair."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from psyche_fast.doctor.finding import Finding, ok, problem, warning

_SECONDS = 30
_REASONS = {
    "hw_thermal_slowdown": ("too hot: clocks are lowered", "look at fans, air flow and dust"),
    "sw_thermal_slowdown": ("hot: clocks are lowered", "look at fans, air flow and dust"),
    "hw_power_brake_slowdown": ("the power supply asks for less", "look at the power supply"),
    "hw_slowdown": ("hardware lowers the clocks", "look at temperature and power supply"),
}
"""Why clocks are low, as the driver names it; idling and a set power limit are no faults."""


@dataclass(frozen=True)
class Driver:
    """What `nvidia-smi` says.

    Attributes:
        version: the driver's; None where there is none.
        cuda: the newest CUDA that it can run, as `(12, 4)`; None where it does not say.
        gpus: an XML element each.
        failure: what the command said where it failed, or why there is no answer.
    """

    version: str | None
    cuda: tuple[int, int] | None
    gpus: tuple[ElementTree.Element, ...]
    failure: str | None = None


def ask() -> Driver:
    """Runs `nvidia-smi -q -x`."""
    if shutil.which("nvidia-smi") is None:
        return Driver(None, None, (), "there is no nvidia-smi")
    try:
        done = subprocess.run(
            ["nvidia-smi", "-q", "-x"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Driver(None, None, (), f"nvidia-smi has not answered within {_SECONDS} s")
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        return Driver(None, None, (), said[0] if said else f"nvidia-smi: status {done.returncode}")
    try:
        log = ElementTree.fromstring(done.stdout)
    except ElementTree.ParseError as error:
        return Driver(None, None, (), f"nvidia-smi -q -x is no XML: {error}")
    return Driver(
        log.findtext("driver_version"),
        numbers(log.findtext("cuda_version")),
        tuple(log.findall("gpu")),
    )


def numbers(version: str | None) -> tuple[int, int] | None:
    """The first two numbers of a version; None of none."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return None if found is None else (int(found[1]), int(found[2]))


def is_there() -> bool:
    """Whether this machine has an NVIDIA GPU, whatever works of it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def driver(state: Driver) -> Iterator[Finding]:
    """The driver, and each GPU's health."""
    if state.failure is not None:
        devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
        if shutil.which("nvidia-smi") is None and not devices:
            yield ok("GPUs", "none by NVIDIA here: runs take the CPU")
        else:
            yield problem("GPUs", state.failure, _remedy(state.failure))
        return
    yield ok(
        "driver",
        f"{state.version}, for CUDA up to "
        + (".".join(map(str, state.cuda)) if state.cuda else "what it does not say"),
    )
    if not state.gpus:
        yield problem(
            "GPUs",
            "the driver sees none",
            "lspci | grep -i nvidia and dmesg | grep -i "
            "xid say whether the card is there; in a container: docker run --gpus all",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        yield from _visible(visible, len(state.gpus))
    for number, gpu in enumerate(state.gpus):
        yield from _health(number, gpu)


def _remedy(said: str) -> str:
    """What to do about the words of an `nvidia-smi` that fails."""
    text = said.lower()
    if "version mismatch" in text:
        return "the driver was updated while it ran: restart the machine (or reload its modules)"
    if "couldn't communicate" in text:
        return "load the driver (modprobe nvidia), or install it for this kernel"
    if "unknown error" in text or "failed to initialize nvml" in text:
        return "in a container: start it anew with --gpus all; elsewhere: restart the machine"
    if "not answered" in text:
        return "a GPU hangs: dmesg | grep -i xid, then restart the machine"
    if "no nvidia-smi" in text:
        return "install the driver's tools (nvidia-utils); docker: NVIDIA_DRIVER_CAPABILITIES=all"
    return "dmesg | grep -iE 'nvidia|xid' says more; restarting the machine often helps"


def _visible(text: str, count: int) -> Iterator[Finding]:
    names = [name.strip() for name in text.split(",")]
    if text.strip() in ("", "-1", "NoDevFiles"):
        yield warning(
            "CUDA_VISIBLE_DEVICES",
            f"CUDA_VISIBLE_DEVICES={text!r} hides all GPUs",
            "unset it: runs take the CPU otherwise",
        )
        return
    lost = [name for name in names if name.isdecimal() and int(name) >= count]
    if lost:
        yield problem(
            "CUDA_VISIBLE_DEVICES",
            f"CUDA_VISIBLE_DEVICES={text}: there is no GPU "
            f"{lost[0]}, and what follows it is hidden",
            f"name GPUs 0 to {count - 1}",
        )
    else:
        yield ok("CUDA_VISIBLE_DEVICES", text)


def _health(number: int, gpu: ElementTree.Element) -> Iterator[Finding]:
    name = f"GPU {number}"
    said = gpu.findtext("product_name") or "unknown"
    total, used = (_mib(gpu, f"fb_memory_usage/{what}") for what in ("total", "used"))
    if total is not None:
        said += f", {total / 1024:.0f} GiB"
    faults = list(_faults(name, gpu))
    if not faults:
        yield ok(name, said)
    yield from faults
    users = [
        p.findtext("process_name") or "?"
        for p in gpu.iterfind("processes/process_info")
        if (p.findtext("type") or "C").startswith("C")
    ]
    if users or (used is not None and total and used > 0.05 * total):
        # Another container's processes are not listed; their memory is.
        whose = ", ".join(sorted(set(users))[:3]) or "processes that are not seen from here"
        amount = "" if used is None else f", {used / 1024:.1f} GiB"
        yield warning(
            name,
            f"in use by {whose}{amount}",
            "end them, or leave this GPU out by --device or CUDA_VISIBLE_DEVICES",
        )


def _faults(name: str, gpu: ElementTree.Element) -> Iterator[Finding]:
    for path, what in (
        ("ecc_errors/volatile/dram_uncorrectable", "uncorrectable errors of its memory"),
        ("ecc_errors/volatile/sram_uncorrectable", "uncorrectable errors of its caches"),
        ("ecc_errors/volatile/sram_uncorrectable_parity", "uncorrectable errors of its caches"),
        ("ecc_errors/volatile/sram_uncorrectable_secded", "uncorrectable errors of its caches"),
        ("ecc_errors/volatile/double_bit/total", "uncorrectable errors of its memory"),
    ):
        count = gpu.findtext(path, "0")
        if count.isdecimal() and int(count):
            yield problem(
                name,
                f"{count} {what} since the driver was loaded (ECC)",
                "restart the machine; if they come again, the card is broken: leave it out",
            )
    if gpu.findtext("remapped_rows/remapped_row_failure", "No") == "Yes":
        yield problem(name, "rows of its memory could not be replaced", "have the card changed")
    if gpu.findtext("remapped_rows/remapped_row_pending", "No") == "Yes":
        yield warning(name, "rows of its memory wait to be replaced", "restart the machine")
    if gpu.findtext("mig_mode/current_mig", "Disabled") == "Enabled":
        yield warning(
            name,
            "MIG is on: a process sees one part of the card, and NCCL does not work between parts",
            "a run of one rank for each part, or nvidia-smi -mig 0",
        )
    mode = gpu.findtext("compute_mode", "Default")
    if mode == "Prohibited":
        yield problem(name, "its compute mode is Prohibited", "nvidia-smi -c DEFAULT, by root")
    elif mode.startswith("Exclusive"):
        yield warning(
            name,
            f"its compute mode is {mode}: one process a time",
            "nvidia-smi -c DEFAULT, by root",
        )
    fabric = gpu.findtext("fabric/state", "N/A")
    if fabric not in ("N/A", "Completed"):
        yield problem(
            name,
            f"its NVLink fabric is not ready ({fabric})",
            "start the fabric manager: systemctl start nvidia-fabricmanager",
        )
    width, widest = (
        gpu.findtext(f"pci/pci_gpu_link_info/link_widths/{which}_link_width", "").rstrip("x")
        for which in ("current", "max")
    )
    if width.isdecimal() and widest.isdecimal() and int(width) < int(widest):
        yield warning(
            name,
            f"its PCIe link is {width} lanes wide of {widest}",
            "seat the card anew, or move it to a full slot: the host's copies are slower",
        )
    for reason, (effect, remedy) in _REASONS.items():
        for group, prefix in (
            ("clocks_event_reasons", "clocks_event_reason"),
            ("clocks_throttle_reasons", "clocks_throttle_reason"),
        ):
            if gpu.findtext(f"{group}/{prefix}_{reason}") == "Active":
                yield warning(name, effect, remedy)


def _mib(gpu: ElementTree.Element, path: str) -> float | None:
    found = re.match(r"(\d+)", gpu.findtext(path, ""))
    return None if found is None else float(found[1])


def links(state: Driver) -> Iterator[Finding]:
    """How GPUs of this machine reach each other."""
    if len(state.gpus) < 2:
        return
    done = subprocess.run(
        ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    kinds = pairs(done.stdout)
    if done.returncode != 0 or not kinds:
        yield warning("links", "nvidia-smi topo -m says nothing", "update the driver's tools")
        return
    said = ", ".join(f"{count} pairs by {kind}" for kind, count in sorted(kinds.items()))
    slow = kinds.keys() & {"SYS", "NODE"}
    if slow and not any(kind.startswith("NV") for kind in kinds):
        yield warning(
            "links",
            f"{said}: no NVLink, and between processors (SYS, NODE)",
            "keep a replica (--data-parallelism, --tensor-parallelism) on GPUs of one processor",
        )
    else:
        yield ok("links", said)


def pairs(matrix: str) -> Counter[str]:
    """Kinds of links between GPUs and how many pairs have them, of `nvidia-smi topo -m`."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in matrix.splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0])]
    heads = [row for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[1])]
    table = [row[1:] for row in rows if row not in heads]
    count = len(table)
    return Counter(
        table[a][b] for a in range(count) for b in range(a + 1, min(count, len(table[a])))
    )
