"""Settings that every test shares."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files whose tests start processes go to one worker with one fork server; others, each whole.

    Those of models, methods, optimisers and the GPU's suite, which measure no time, may go to
    another. So no two tests that do run at once, and a module's fixtures are set up once. xdist's
    own groups do that by the mark, but xdist 3.8 writes them where pytest 9.2 does not look.
    """
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def scope(file: str) -> str:
        text = (config.rootpath / file).read_text(encoding="utf-8")
        return _group(file) if "mark.processes" in text else file

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid.split("::")[0])

    return ByFile(config, log)


def _group(file: str) -> str:
    apart = ("tests/distro/", "tests/methods/", "tests/models/", "tests/packaging/test_gpu_")
    return "processes-without-clocks" if any(part in file for part in apart) else "processes"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests for another machine (`gpu`, `no_gpu`); only marked tests may start processes."""
    groups.allowed = item.get_closest_marker("processes") is not None
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("no_gpu") is not None and torch.cuda.is_available():
        pytest.skip("cannot hold where there is a CUDA GPU")


@pytest.fixture(autouse=True)
def _one_at_a_time(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Has a test with processes fail where one of its group runs on another worker."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if alone or request.node.get_closest_marker("processes") is None:
        yield
        return
    group = _group(request.node.path.as_posix())
    with open(tmp_path_factory.getbasetemp().parent / group, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def pytest_runtest_teardown() -> None:
    """A test that fails leaves no process behind."""
    groups.end_all()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and data, for modules whose tests train on them."""
    from tests.tiny import save_llama, save_tokens

    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model")
    save_tokens(folder / "data")
    return folder
