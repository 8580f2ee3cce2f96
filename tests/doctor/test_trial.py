"""The self-test: what it says of wrong numbers, and of a process that ends or hangs."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
import time

import pytest
import torch
from click.testing import CliRunner

from psyche_fast.cli import cli
from psyche_fast.doctor import paths, trial
from psyche_fast.doctor.finding import ok, problem, warning
from tests.doctor.support import worst

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def test_every_path_agrees_with_float64():
    tried = []
    found = list(paths.compare(tried.append))
    assert {one.status for one in found} == {"ok"}, found
    assert [one.name for one in found] == tried
    on_cpu = {name.removesuffix(" on cpu") for name in tried}
    assert on_cpu >= {"encode and top-k", "apply", "pack", "accumulate", "loss", "attention"}


def spoil(name):
    """A fault of an operation, such that its results are wrong."""
    real = {
        "encode": paths.encode, "apply": paths.apply, "attend": paths.attend,
        "loss": paths.chunked_cross_entropy, "accumulate": paths.sums.accumulate,
        "pack": paths.wire.pack, "unpack": paths.wire.unpack,
    }[name]  # fmt: skip

    def wrong(*args, **options):
        if name == "encode":
            found = real(*args, **options)
            found.indices[0, -1] = found.indices[0, -2] + 1  # not one of the largest, as a rule
            return found
        if name == "apply":
            args[1][0].neg_()
            return real(*args, **options)
        if name == "accumulate":
            args[1][2][-1] += 1  # of 4096 elements one
            return real(*args, **options)
        if name == "unpack":
            found = real(*args, **options)
            return dataclasses.replace(found, indices=found.indices.flip(1))
        found = real(*args, **options)
        if name == "pack":
            return found ^ 1
        if name == "loss":
            return found * 1.1
        return found[0].roll(1, 1), None

    return wrong


@pytest.mark.parametrize(
    ("operation", "holder", "path"),
    [
        ("encode", "encode", "encode and top-k"),
        ("apply", "apply", "apply"),
        ("pack", "wire.pack", "pack"),
        ("unpack", "wire.unpack", "pack"),
        ("accumulate", "sums.accumulate", "accumulate"),
        ("loss", "chunked_cross_entropy", "loss"),
        ("attend", "attend", "attention"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_path_that_is_wrong_is_found_in_each_dtype(monkeypatch, operation, holder, path, dtype):
    monkeypatch.setattr(paths, "DTYPES", (DTYPES[dtype],))
    monkeypatch.setattr(f"psyche_fast.doctor.paths.{holder}", spoil(operation))
    found = worst(paths.compare())
    assert found[f"{path} on cpu"].status == "problem"
    others = {one.status for name, one in found.items() if name != f"{path} on cpu"}
    assert others == {"ok"}


def test_a_backend_that_cannot_run_here(monkeypatch):
    monkeypatch.setenv("PSYCHE_FAST_KERNELS", "triton")
    found = worst(paths.compare())["kernels on cpu"]
    assert (found.status, "unset PSYCHE_FAST_KERNELS" in found.remedy) == ("problem", True)


def process(text):
    """The trial's process, as a script that says something else."""
    head = "import json, os, sys, time\nsay = lambda **e: print(json.dumps(e), flush=True)\n"
    return [sys.executable, "-S", "-c", head + textwrap.dedent(text)]


FOUND = 'say(name="torch", status="ok", text="2.13", remedy="")\n'


def test_findings_come_as_they_are_said_between_libraries_own_words():
    script = FOUND + 'print("a library: {}")\nsay(end=True)'
    assert list(trial.read(process(script))) == [ok("torch", "2.13")]


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("print('illegal instruction', file=sys.stderr)\nos.abort()",
         "killed by SIGABRT during loss on cuda:0: illegal instruction"),
        ("sys.exit(3)", "exit status 3 during loss on cuda:0"),
        ("raise SystemError('x')", "during loss on cuda:0: SystemError: x"),
    ],
)  # fmt: skip
def test_a_process_that_ends_says_during_what(ending, said):
    first, last = trial.read(process(FOUND + 'say(**{"try": "loss on cuda:0"})\n' + ending))
    assert first == ok("torch", "2.13")
    assert (last.name, last.status) == ("self-test", "problem")
    assert said in last.text


def test_a_process_that_hangs_is_ended():
    began = time.monotonic()
    script = FOUND + 'say(**{"try": "NCCL"})\ntime.sleep(60)'
    *_, last = trial.read(process(script), seconds=0.5)
    assert time.monotonic() - began < 10
    assert "NCCL hangs: no end within 0.5 s" in last.text


def test_a_torch_that_cannot_be_imported_ends_the_trial(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    (first,) = trial.libraries()
    assert (first.status, "cannot be imported" in first.text) == ("problem", True)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(trial, "CHECKS", {"one": lambda: [first], "two": lambda: [ok("a", "b")]})
    trial.main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry for entry in said if "status" in entry] == [dataclasses.asdict(first)]
    assert said[-1] == {"end": True}


@pytest.fixture
def found(monkeypatch):
    """What all checks of `doctor` find."""
    listed = [("software", ok("Python", "3.11"))]
    monkeypatch.setattr("psyche_fast.doctor.command.look", lambda *_, **__: iter(listed))
    return listed


@pytest.mark.parametrize(
    ("more", "status"),
    [([], 0), ([warning("clock", "late", "set it")], 0), ([problem("disk", "full", "free it")], 1)],
)
def test_only_problems_fail(found, more, status):
    found += [("machine", one) for one in more]
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == status
    assert "ok       Python: 3.11" in done.output
    for one in more:
        assert f"{one.status:<7}  {one.name}: {one.text}\n           -> {one.remedy}" in done.output
    assert f"{status} problem" in done.output


def test_json_is_one_object_with_all_findings(found):
    found.append(("machine", problem("disk", "full", "free it")))
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    said = json.loads(done.output)
    assert (done.exit_code, said["problem"], said["warning"], said["ok"]) == (1, 1, 0, 1)
    assert said["findings"][1] == {
        "group": "machine", "name": "disk", "status": "problem", "text": "full",
        "remedy": "free it",
    }  # fmt: skip
    assert said["version"][0].startswith("psyche-fast ")


def test_a_link_that_is_no_host_is_a_mistake_of_the_users(found):
    done = CliRunner().invoke(cli, ["doctor", "--link", "node1:x"])
    assert isinstance(done.exception, ValueError)


def test_this_machine_is_looked_at_without_torch(tmp_path):
    done = CliRunner().invoke(
        cli, ["doctor", "--no-self-test", "--json", "--output", str(tmp_path)]
    )
    said = json.loads(done.output)
    assert {one["group"] for one in said["findings"]} == {"software", "machine", "GPUs", "network"}
    failed = [one for one in said["findings"] if "the check failed" in one["text"]]
    assert failed == []
