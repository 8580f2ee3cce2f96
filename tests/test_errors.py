"""What a user is told of a run that failed."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.errors import explain


def host_allocation() -> None:
    torch.empty(1 << 60)


def python_allocation() -> None:
    bytearray(1 << 62)


def device_allocation() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


@pytest.mark.parametrize("allocate", [host_allocation, python_allocation, device_allocation])
def test_out_of_memory_says_where_how_much_and_what_to_lower(allocate) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    raised.value.add_note("in phase train of step 7")
    said = explain(raised.value)
    assert said.startswith("out of memory, in phase train of step 7, at most ")
    assert "GiB before: " in said
    assert "Lower --micro-batch or --sequence-length" in said
    assert "\n" not in said
