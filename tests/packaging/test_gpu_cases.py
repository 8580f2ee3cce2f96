"""What the GPU suite measures, without a GPU, and the table that it ends with."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from benchmarks import (
    common,
    gpu_suite,
    llama_step,
    precompile,
    smoke,
    suite_report,
    sweeps,
)
from psyche_fast.bench import kernels, step_cases
from psyche_fast.bench.kernel_data import Data
from psyche_fast.bench.shapes import SETS
from tests import groups

CPU = torch.device("cpu")


def test_the_speed_of_a_kernel_goes_by_its_time_on_the_device(monkeypatch):
    """Three calls of two kernels, as the profiler tells them; the host's launches cost nothing."""
    cuda = torch.autograd.DeviceType.CUDA

    def event(name, us, device=cuda, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(
            name=name, device_type=device, is_user_annotation=annotation, time_range=span
        )

    events = [event("a", us) for us in (100.0, 120.0, 140.0)] + [event("b", 30.0)] * 6
    events += [event("a", 1e6, torch.autograd.DeviceType.CPU), event("step", 1e6, annotation=True)]
    times = common.summed(events)
    assert times["launches"] == 3
    assert times["device_ms"] == pytest.approx(0.18)
    assert times["kernels"]["a"] == pytest.approx({"launches": 1.0, "ms": 0.12})
    assert times["kernels"]["b"] == pytest.approx({"launches": 2.0, "ms": 0.06})
    assert common.summed([]) == {"launches": None, "device_ms": None, "kernels": None}
    monkeypatch.setattr(kernels, "device_times", lambda call, device: times)
    data = Data(SETS["tiny"], CPU, torch.float32)
    case = next(c for c in kernels.CASES if c.name == "lookahead")
    record = kernels.one(case, data, "torch", copy_gb_per_s=10.0, budget_ms=0.0)
    assert record["gb_per_s"] == pytest.approx(record["bytes"] / 0.18 / 1e6)
    assert record["us_per_million"] == pytest.approx(180e6 / record["elements"])
    assert record["ms"]["p50"] > 0


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: values that are taken to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        )  # fmt: skip
        return function(*args, **(kwargs or {}))


def test_steps_wait_for_nothing_as_the_trainer_does():
    cases = [c for c in step_cases.CASES if c.name == "Distro k=8"]
    assert len(cases) == 1
    for case in cases:
        stepper = step_cases.Stepper(case, SETS["tiny"], CPU, "torch", torch.bfloat16)
        with Waits() as waits:
            for _ in range(2):
                stepper.step()
        # The twins on a CPU read the clip factor, and where signs are in doubt, for each class.
        assert waits.count <= 2 * 2 * len(stepper.step.__self__.distro.layout.plans)


def test_what_the_train_step_applies_has_travelled_as_a_message(monkeypatch):
    config = llama_step.llama(llama_step.TINY, 16)
    side = llama_step.DisTrO(config, CPU, "torch")
    ids = torch.arange(16)[None]
    side.step(ids)
    sent = side._sent.clone()
    received = []
    unpack = side._format.unpack
    monkeypatch.setattr(
        side._format, "unpack", lambda messages: received.append(messages) or unpack(messages)
    )
    side.before()
    side.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with Waits() as waits:
        side.update()
    assert torch.equal(received[0], sent.expand(llama_step.PEERS, -1))
    # The twins on a CPU read the clip factor, and where signs are in doubt, for each class.
    assert waits.count <= 2 * len(side.distro.layout.plans)


def test_a_setting_that_cannot_run_is_refused_and_no_fault(monkeypatch):
    from triton.errors import TritonError

    def check(backend):
        raise TritonError("out of registers")

    sweep = sweeps.SWEEPS[0]
    work = SimpleNamespace(check=check)
    data = SimpleNamespace(device=CPU)
    record = sweeps.measure(sweep, "x", sweep.settings[0], lambda: work, "interpret", data, 0.0)
    assert record["refused"] == "out of registers"
    assert "fault" not in record
    assert sweeps.line(record).endswith("out of registers")


def test_names_of_cases_are_unique():
    data = SimpleNamespace(device=CPU)
    for names in (
        [name for name, _ in sweeps.cases(data, "interpret")],
        [f"{name}, {kind}" for name, kind, _ in smoke.CASES],
        [case.name for case in kernels.CASES],
        [case.name for case in step_cases.CASES],
    ):
        assert len(set(names)) == len(names) > 3
    # Stages change nothing where no load can be moved over a barrier.
    assert not any("num_stages" in s for sweep in sweeps.SWEEPS for s in sweep.settings)


def test_the_smoke_finds_what_is_wrong():
    """Of every kind of result one element; what is right within rounding passes."""
    wanted = {
        "state 0": torch.tensor([1.0, 2.0]), "parameter 0": torch.zeros(8),
        "entries 0": torch.tensor([[0.0, 3.0, -1.0]]), "bytes 0": torch.tensor([1, 2]),
    }  # fmt: skip
    assert smoke.compare(wanted, wanted)["ok"]
    rounded = {**wanted, "state 0": torch.tensor([1.0 + 1e-6, 2.0])}
    found = smoke.compare(rounded, wanted)
    assert (found["ok"], found["differ"], found["of"]) == (True, 1, 15)
    wrong = {
        "state 0": torch.tensor([1.001, 2.0]), "parameter 0": torch.eye(8)[0] * 8e-4,
        "entries 0": torch.tensor([[3.0, 0.0, -1.0]]), "bytes 0": torch.tensor([1, 3]),
    }  # fmt: skip
    for name, value in wrong.items():
        assert not smoke.compare({**wanted, name: value}, wanted)["ok"]
        if value.is_floating_point():
            nan = torch.full_like(value, math.nan)
            assert not smoke.compare({**wanted, name: nan}, wanted)["ok"]


def job(numbers):
    """What `precompile` does in its processes here."""
    kind, number, *_ = numbers
    if kind == "dies":
        os._exit(9)
    if kind == "hangs":
        time.sleep(60)
    return f"fault {number}" if kind == "fails" else None


@pytest.mark.processes
def test_a_job_that_dies_costs_the_compiling_no_other(monkeypatch):
    server = groups.context()
    monkeypatch.setattr(precompile.multiprocessing, "get_context", lambda kind: server)
    todo = [(kind, i, 0, 0) for i, kind in enumerate(("good", "fails", "dies", "good", "fails"))]
    begun = time.monotonic()
    faults = precompile.run(todo, lambda: 60 - (time.monotonic() - begun), job)
    assert sorted(faults) == [
        "('dies', 2, 0, 0): its process ended with status 9",
        "('fails', 1, 0, 0): fault 1",
        "('fails', 4, 0, 0): fault 4",
    ]


def test_compiling_ends_in_time():
    todo = [("hangs", 0, 0, 0), ("good", 1, 0, 0)]
    begun = time.monotonic()
    faults = precompile.run(todo, lambda: 1 - (time.monotonic() - begun), job)
    assert time.monotonic() - begun < 30
    assert "('hangs', 0, 0, 0): not done in time" in faults


def test_table_shows_figures_beside_their_aims():
    def step(name, p50):
        return {"name": name, "ms": {"p50": p50}, "floor_ms": 1.0}

    steps = [
        step("AdamW fused, fp32", 8.0),
        step("AdamW fused, bf16", 4.0),
        step("Distro k=8", 6.0),
        step("DeMo k=8", 5.0),
        step("plain DeMo k=8", 150.0),
    ]
    kernel = {
        "kernel": "encode", "variant": "k=8", "implementation": "triton", "ms": {"p50": 3.0},
        "target_us_per_million": 2.9, "us_per_million": 2.427, "copy_fraction": 0.81,
    }  # fmt: skip
    sections = {name: {"status": "skipped", "reason": "not asked"} for name in gpu_suite.SECTIONS}
    sections["steps"] = {"status": "ok", "records": steps}
    sections["kernels"] = {"status": "ok", "records": [kernel]}
    text = suite_report.table({"tiny": False, "sections": sections})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "encode k=8 2.43 us/M 2.9 us/M; 81 % of the copy" in lines
    assert "Distro k=8 / AdamW fused, fp32 0.75 <= 1" in lines
    assert "Distro k=8 / AdamW fused, bf16 1.50 <= 1.3" in lines
    assert "plain DeMo k=8 / DeMo k=8 30.00 >= 25" in lines
    assert "correctness skipped: not asked" in lines


def test_the_table_names_cases_that_have_failed():
    sections = {name: {"status": "skipped", "reason": "not asked"} for name in gpu_suite.SECTIONS}
    fault = [{"name": f"case {number}", "fault": f"no\n{number}"} for number in range(9)]
    wrong = {"name": "off", "check": {"ok": False, "state": 0.5}}
    sections["kernels"] = {"status": "faults", "seconds": 3.0, "records": fault}
    sections["smoke"] = {"status": "wrong", "records": [wrong]}
    lines = [line.strip() for line in suite_report.table(
        {"tiny": False, "sections": sections}).splitlines()]  # fmt: skip
    assert "kernels  faults, 3 s, 9 faults" in lines
    assert "kernels  case 0: no" in lines
    assert "kernels  and 1 more" in lines
    assert "smoke  off: WRONG {'ok': False, 'state': 0.5}" in lines


def model_shapes(config):
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return Counter(tuple(p.shape) for p in model.parameters())


def test_layers_are_those_of_the_models():
    import transformers

    llama = llama_step.llama(llama_step.LLAMA_1B, 2048)
    assert Counter(SETS["1.2B"]) == model_shapes(llama)
    assert Counter(SETS["125M"]) == model_shapes(transformers.GPT2Config())
    eight = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    assert Counter(SETS["8B"]) == model_shapes(eight)
