"""Limits, disks and control groups that are too small, each made so."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import pytest

from psyche_fast.doctor import machine
from psyche_fast.doctor.finding import carry_out, isolated, ok, problem
from tests.doctor.support import worst


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty `/proc`, `/sys` and `/dev`; writes files of theirs."""
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def limit(monkeypatch):
    """Has the process believe in a limit: a real one, lowered, could not be raised again."""
    real = resource.getrlimit

    def lower(name, soft, hard=resource.RLIM_INFINITY):
        number = getattr(resource, name)
        monkeypatch.setattr(
            resource, "getrlimit", lambda n: (soft, hard) if n == number else real(n)
        )

    return lower


@pytest.mark.parametrize(
    ("name", "soft", "status", "letter"),
    [
        ("RLIMIT_NOFILE", 256, "warning", "n"),
        ("RLIMIT_NOFILE", 64, "problem", "n"),
        ("RLIMIT_NPROC", 100, "warning", "u"),
        ("RLIMIT_AS", 8 << 30, "warning", "v"),
        ("RLIMIT_AS", 1 << 30, "problem", "v"),
        ("RLIMIT_DATA", 1 << 30, "problem", "d"),
        ("RLIMIT_STACK", 64 << 10, "problem", "s"),
        ("RLIMIT_FSIZE", 1 << 30, "warning", "f"),
        ("RLIMIT_CPU", 3600, "warning", "t"),
    ],
)
def test_a_small_limit_is_found_with_the_command_that_raises_it(limit, name, soft, status, letter):
    limit(name, soft)
    found = worst(machine.limits())["limits"]
    assert found.status == status
    assert f"ulimit -{letter} is " in found.text
    assert found.remedy.startswith(f"ulimit -{letter} ")
    assert "root" not in found.remedy
    limit(name, soft, hard=soft)
    assert "root has to allow" in worst(machine.limits())["limits"].remedy


def test_locked_memory_matters_where_there_is_something_to_lock_it_for(root, limit):
    limit("RLIMIT_MEMLOCK", 64 << 10)
    root({})
    assert worst(machine.limits())["limits"].status == "ok"
    root({"sys/class/infiniband/mlx5_0": ""})
    found = worst(machine.limits())["limits"]
    assert (found.status, "memlock" in found.remedy) == ("warning", True)
    limit("RLIMIT_MEMLOCK", resource.RLIM_INFINITY)
    assert worst(machine.limits())["limits"].status == "ok"


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/cpu.max": "50000 100000"},
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["second version", "first version"],
)
def test_a_quota_of_half_a_core(root, files):
    root(files)
    found = worst(machine.cores())["cores"]
    assert found.status == "warning"
    assert "the control group allows 0.5" in found.text
    assert "--threads 1" in found.remedy


@pytest.mark.parametrize("text", ["max 100000", "", "-1"])
def test_no_quota(root, text):
    root({"sys/fs/cgroup/cpu.max": text})
    assert worst(machine.cores())["cores"].status == "ok"


@pytest.mark.parametrize("text", ["4096", "0", "many", "-2", "4096,2"])
def test_a_number_of_threads_that_is_none_or_too_many(monkeypatch, text):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    found = worst(machine.cores())["OMP_NUM_THREADS"]
    assert found.status == "warning"
    assert text in found.text
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert worst(machine.cores())["OMP_NUM_THREADS"].status == "ok"


@pytest.mark.parametrize(
    ("limit", "used", "status"),
    [(700 << 20, 100 << 20, "problem"), (3 << 30, 1 << 29, "warning"), (1 << 62, 0, "ok")],
)
@pytest.mark.parametrize(
    ("most", "now"),
    [("memory.max", "memory.current"),
     ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)  # fmt: skip
def test_the_control_groups_memory(root, monkeypatch, limit, used, status, most, now):
    class Plenty:
        available = 64 << 30

    monkeypatch.setattr(machine.psutil, "virtual_memory", Plenty)
    root({f"sys/fs/cgroup/{most}": str(limit), f"sys/fs/cgroup/{now}": str(used)})
    found = worst(machine.memory())["memory"]
    assert found.status == status
    assert ("control group" in found.text) == (status != "ok")


def test_files_that_the_system_keeps_in_memory_are_not_counted_as_used(root, monkeypatch):
    root(
        {
            "sys/fs/cgroup/memory.max": str(8 << 30),
            "sys/fs/cgroup/memory.current": str(8 << 30),
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {7 << 30}\n",
        }
    )
    assert worst(machine.memory())["memory"].status != "problem"


def test_few_processes_are_allowed(root):
    root({"sys/fs/cgroup/pids.max": "100"})
    assert worst(machine.memory())["processes"].status == "warning"
    root({"sys/fs/cgroup/pids.max": "max"})
    assert "processes" not in worst(machine.memory())


def with_free(monkeypatch, folder, *, free, inodes=10**6):
    """`statvfs` of one file system with so many free bytes; of others as it is."""
    real = os.statvfs

    def statvfs(path):
        state = real(path)
        if Path(path) != folder:
            return state
        fields = list(state)
        fields[1], fields[3], fields[4], fields[5], fields[7] = 1, free, free, 10**7, inodes
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)


@pytest.mark.parametrize(
    ("free", "status"), [(1 << 20, "problem"), (64 << 20, "warning"), (4 << 30, "ok")]
)
def test_shared_memory_of_a_container(root, monkeypatch, free, status):
    folder = root({"dev/shm/.keep": ""}) / "dev" / "shm"
    with_free(monkeypatch, folder, free=free)
    found = worst(machine.shared_memory())["shared memory"]
    assert found.status == status
    assert status == "ok" or "--shm-size" in found.remedy


def test_no_shared_memory(root):
    root({})
    assert worst(machine.shared_memory())["shared memory"].status == "problem"


@pytest.mark.parametrize(
    ("free", "inodes", "status"),
    [(0, 10**6, "problem"), (1 << 30, 10**6, "warning"), (1 << 40, 3, "problem"),
     (1 << 40, 10**6, "ok")],
)  # fmt: skip
def test_a_full_disk_for_the_output(monkeypatch, tmp_path, free, inodes, status):
    with_free(monkeypatch, tmp_path, free=free, inodes=inodes)
    found = worst(machine.disks(tmp_path / "runs" / "one"))["output"]
    assert found.status == status
    assert status == "ok" or "--output" in found.remedy


def read_only(monkeypatch, folder):
    """A folder that takes no file, for root too."""
    real = tempfile.NamedTemporaryFile

    def refuse(*args, **options):
        if Path(options.get("dir") or "/") == folder:
            raise OSError(30, "Read-only file system")
        return real(*args, **options)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)


@pytest.mark.parametrize(
    ("variable", "name", "flag", "status"),
    [
        (None, "output", "--output", "problem"),
        ("HOME", "cache of models", "HF_HOME", "warning"),
        ("HF_HOME", "cache of models", "HF_HOME", "warning"),
        ("HF_HUB_CACHE", "cache of models", "HF_HOME", "warning"),
        ("XDG_CACHE_HOME", "cache of data", "XDG_CACHE_HOME", "warning"),
        ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR", "warning"),
    ],
)
def test_a_read_only_folder_is_named_with_what_chooses_another(
    monkeypatch, tmp_path, variable, name, flag, status
):
    for other in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(other, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path))
    read_only(monkeypatch, tmp_path)
    output = tmp_path if variable is None else Path.cwd() / "runs"
    found = worst(machine.disks(output))[name]
    assert (found.status, "Read-only" in found.text) == (status, True)
    assert flag in found.remedy


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert worst(machine.disks(tmp_path / "file"))["output"].status == "problem"


def test_a_folder_for_temporary_files_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)  # looked for anew
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    found = worst(machine.disks(tmp_path))["temporary files"]
    assert (found.status, "TMPDIR" in found.text) == ("warning", True)


def test_a_clock_before_the_installation(monkeypatch):
    assert "clock" in worst(machine.clock())
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert worst(machine.clock())["clock"].status == "problem"


def test_a_clock_that_nobody_keeps(monkeypatch):
    monkeypatch.setattr(machine, "_synchronised", lambda: False)
    assert worst(machine.clock())["clock"].status == "warning"
    monkeypatch.setattr(machine, "_synchronised", lambda: True)
    assert worst(machine.clock())["clock"].status == "ok"


def test_a_number_that_no_user_has(monkeypatch, tmp_path):
    assert worst(machine.user())["user"].status == "ok"

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(machine.pwd, "getpwuid", nobody)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "me")
    assert worst(machine.user())["user"].status == "ok"
    for name in ("USER", "HOME"):
        monkeypatch.delenv(name)
        found = worst(machine.user())["user"]
        assert (found.status, name in found.text) == ("problem", True)
    disks = worst(machine.disks(tmp_path))
    assert disks["output"].status == "ok", "what does not depend on it is looked at all the same"


@pytest.mark.parametrize(("encoding", "status"), [("ascii", "warning"), ("utf-8", None)])
def test_names_that_are_not_utf_8(monkeypatch, encoding, status):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    found = worst(machine.system())
    assert (found["encoding"].status if "encoding" in found else None) == status


def test_a_check_that_raises_is_a_problem_with_its_line_and_keeps_what_it_found():
    def check():
        yield ok("one", "found before")
        raise KeyError("gone\nmore")

    for found in (carry_out("a check", check), list(isolated("a check", check))):
        assert found[0] == ok("one", "found before")
        assert found[1].status == "problem"
        assert "KeyError: 'gone\\nmore' (test_machine.py:" in found[1].text
        assert "\n" not in found[1].text
        assert "--json" in found[1].remedy


def test_a_check_that_hangs_is_a_problem():
    def check():
        yield ok("one", "found before")
        time.sleep(3)
        yield problem("late", "never seen", "none")

    began = time.monotonic()
    first, late = carry_out("hanging", check, 0.1)
    assert time.monotonic() - began < 2
    assert first.status == "ok"
    assert (late.name, late.status) == ("hanging", "problem")
    assert "within 0.1 s" in late.text
