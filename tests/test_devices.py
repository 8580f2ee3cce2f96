"""A device has one name."""

from __future__ import annotations

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from psyche_fast import compat
from psyche_fast.devices import indexed, multiplies_bf16, working_dtype


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_device_is_named_as_its_tensors_name_it(name: str) -> None:
    assert indexed(name) == indexed(torch.device(name)) == torch.zeros(1, device=name).device
    assert indexed(name).index is None


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_an_index(name: str, index: int) -> None:
    with FakeTensorMode():  # no GPU is needed for it
        assert indexed(name) == torch.device("cuda", index)


@pytest.mark.parametrize("fast", [True, False])
def test_the_parameters_type_hangs_on_what_a_device_multiplies(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "cpu_multiplies_bf16", lambda: fast)
    assert working_dtype("auto", "float32", "cpu") == ("bfloat16" if fast else "float32")
    assert working_dtype("auto", "bfloat16", "cpu") == "bfloat16"
    for asked in ("bfloat16", "float32"):
        assert working_dtype(asked, "float32", "cpu") == asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if fast else (7, 5))
    assert working_dtype("auto", "float32", "cuda") == ("bfloat16" if fast else "float32")


def test_what_is_estimated_for_a_gpu_elsewhere_is_for_one_with_bfloat16() -> None:
    assert torch.cuda.is_available() or multiplies_bf16("cuda")


def test_cpus_that_emulate_bfloat16_are_known() -> None:
    """Products are timed, since torch's word on it is not documented."""
    side, times = 192, {}
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.ones(side, side, dtype=dtype)
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            one @ one
            taken.append(time.perf_counter() - began)
        times[dtype] = min(taken)
    assert compat.cpu_multiplies_bf16() == (times[torch.bfloat16] < 8 * times[torch.float32])
