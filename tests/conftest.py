"""Settings that every test shares."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest

# No test may reach a model hub, and a test's forked children must not warn about tokenizers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ranks that disagree about a collective's shape or type fail at once instead of reading each
# other's bytes. Has to be set before torch is imported; an older one has no checks of what tensor
# parallelism does.
if tuple(map(int, version("torch").split(".")[:2])) >= (2, 13):
    os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")

import torch

# Without a GPU the Triton kernels are run by its interpreter. Has to be set before triton is
# imported, by whomever.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where there is none, and those marked `no_gpu` where one is."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("no_gpu") is not None and torch.cuda.is_available():
        pytest.skip("cannot hold where there is a CUDA GPU")
