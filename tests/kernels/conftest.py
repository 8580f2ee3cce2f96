"""Where kernel tests run: on a GPU when there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from psyche_fast.devices import indexed


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    """Right also for kernels that a test launches by itself."""
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        from psyche_fast.kernels.interpreter import repair

        repair()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return indexed("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def backend(device: torch.device) -> str:
    pytest.importorskip("triton")
    return "triton" if device.type == "cuda" else "interpret"
