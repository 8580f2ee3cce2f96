"""A device has one name."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from psyche_fast.devices import indexed


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_device_is_named_as_its_tensors_name_it(name: str) -> None:
    assert indexed(name) == indexed(torch.device(name)) == torch.zeros(1, device=name).device
    assert indexed(name).index is None


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_an_index(name: str, index: int) -> None:
    with FakeTensorMode():  # no GPU is needed for it
        assert indexed(name) == torch.device("cuda", index)
