"""Settings that every test shares."""

from __future__ import annotations

import os

# No test may reach a model hub, and a test's forked children must not warn about tokenizers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run side by side, one on each core, and ranks of a test too: more threads would only get in
# each other's way, and numbers would depend on the machine. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU the Triton kernels are run by its interpreter. Has to be set before triton is
# imported, by whomever.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import groups


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that start processes run one after another, on one worker with one fork server."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if item.get_closest_marker("processes") is not None:
            item.add_marker(pytest.mark.xdist_group("processes"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests for another machine (`gpu`, `no_gpu`); only marked tests may start processes."""
    groups.allowed = item.get_closest_marker("processes") is not None
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("no_gpu") is not None and torch.cuda.is_available():
        pytest.skip("cannot hold where there is a CUDA GPU")


def pytest_runtest_teardown() -> None:
    """A test that fails leaves no process behind."""
    groups.end_all()
