"""Where kernel tests run: on a GPU when there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def backend(device: torch.device) -> str:
    pytest.importorskip("triton")
    return "triton" if device.type == "cuda" else "interpret"
