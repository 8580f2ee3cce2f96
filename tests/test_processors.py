"""Which processors may work together, and what they are."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from psyche_fast.start.devices import Processor, check_processors, processor

CPU = Processor("cpu", "CPU", "AVX512")
H100 = Processor("cuda", "NVIDIA H100 80GB HBM3", "sm_90")
H200 = Processor("cuda", "NVIDIA H200", "sm_90")
A100 = Processor("cuda", "NVIDIA A100-SXM4-80GB", "sm_80")


@pytest.mark.parametrize(
    ("processors", "ranks_per_replica"),
    [
        ([H100], 1),
        ([H100, H200, H100], 1),
        ([H100, A100, H200, A100], 2),  # each has its like in the other replica
        ([A100, H100], 2),  # one replica exchanges nothing
        ([CPU, CPU], 1),
    ],
)
def test_what_comes_to_the_same_bits_is_taken(
    processors: list[Processor], ranks_per_replica: int
) -> None:
    check_processors(processors, ranks_per_replica, mixed=False)


@pytest.mark.parametrize(
    ("processors", "ranks_per_replica", "named"),
    [
        ([H100, H200, A100, A100], 1, f"rank 0 computes on {H100}, rank 2 on {A100}"),
        ([H100, A100, H100, H100], 2, f"rank 1 computes on {A100}, rank 3 on {H100}"),
        ([CPU, Processor("cpu", "CPU", "AVX2")], 1, "CPU (AVX512), rank 1 on CPU (AVX2)"),
    ],
)
def test_replicas_of_several_generations_are_refused_by_name(
    processors: list[Processor], ranks_per_replica: int, named: str
) -> None:
    with pytest.raises(ValueError, match="do not come to the same bits") as refused:
        check_processors(processors, ranks_per_replica, mixed=False)
    assert named in str(refused.value)
    assert "--mixed-gpus" in str(refused.value)
    assert "\n" not in str(refused.value)
    check_processors(processors, ranks_per_replica, mixed=True)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("ranks_per_replica", [1, 2])
def test_cpus_beside_gpus_are_refused_in_any_case(ranks_per_replica: int, mixed: bool) -> None:
    with pytest.raises(ValueError, match=r"rank 0 .* NVIDIA H200 .*, rank 1 on CPU"):
        check_processors([H200, CPU], ranks_per_replica, mixed=mixed)


def test_the_name_and_generation_of_a_device() -> None:
    here = torch.backends.cpu.get_cpu_capability()
    assert processor(torch.device("cpu")) == Processor("cpu", "CPU", here)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)) as capability,
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA H200") as name,
    ):
        assert processor(torch.device("cuda", 3)) == H200
    for asked in (capability, name):
        asked.assert_called_once_with(torch.device("cuda", 3))
