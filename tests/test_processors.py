"""Which processors may work together, and what they are."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from psyche_fast.integers import definition_hash
from psyche_fast.start.devices import Processor, check_processors, processor

HERE = definition_hash()
CPU = Processor("cpu", "CPU", "AVX512", HERE)
OLDER = Processor("cpu", "CPU", "AVX2", HERE)
H100 = Processor("cuda", "NVIDIA H100 80GB HBM3", "sm_90", HERE)
H200 = Processor("cuda", "NVIDIA H200", "sm_90", HERE)
A100 = Processor("cuda", "NVIDIA A100-SXM4-80GB", "sm_80", HERE)


@pytest.mark.parametrize("processors", [[H100], [H100, A100, H200], [CPU, CPU, OLDER]])
def test_processors_of_any_generation_are_taken(processors: list[Processor]) -> None:
    check_processors(processors)


def test_cpus_beside_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 0 .* NVIDIA H200 .*, rank 1 on CPU"):
        check_processors([H200, CPU])


@pytest.mark.parametrize("other", [0, 0xABC])
def test_another_definition_is_refused_in_one_line(other: int) -> None:
    with pytest.raises(ValueError, match=f"rank 1 decides .* definition {other:016x}") as refused:
        check_processors([H100, replace(H100, definition=other)])
    assert "install the same version" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_name_and_generation_of_a_device() -> None:
    here = torch.backends.cpu.get_cpu_capability()
    assert processor(torch.device("cpu")) == Processor("cpu", "CPU", here, HERE)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)) as capability,
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA H200") as name,
    ):
        assert processor(torch.device("cuda", 3)) == H200
    for asked in (capability, name):
        asked.assert_called_once_with(torch.device("cuda", 3))
