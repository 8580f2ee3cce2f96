"""Where kernel tests run: on a GPU when there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.devices import indexed


@pytest.fixture(scope="session")
def device() -> torch.device:
    return indexed("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def backend(device: torch.device) -> str:
    pytest.importorskip("triton")
    return "triton" if device.type == "cuda" else "interpret"
