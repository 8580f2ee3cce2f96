"""pytest plug-in: tests of kernels run on CPU tensors that say they are on `cuda:0`.

They take the paths of a GPU: other names of devices, tables that are uploaded, the launchers' own
checks, grids of a GPU. What must not wait for the device is refused whatever would wait::

    python -m pytest -p tools.kernel_guard.on_cuda_tensors tests/kernels/test_launch.py

Of the tests marked `gpu` those of waiting run too; `torch.cuda.set_sync_debug_mode("error")` means
the same to them as on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import pytest

# Before torch and triton are imported, by whomever.
os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

from tools.kernel_guard import cuda_tensors

NEVER_WAIT = (
    "psyche_fast.kernels.encode:encode",
    "psyche_fast.kernels.apply:apply",
    "psyche_fast.kernels.apply:lookahead",
    "psyche_fast.kernels.apply:subtract",
    "psyche_fast.kernels.accumulate:accumulate",
    "psyche_fast.kernels.accumulate:squared_norms",
    "psyche_fast.kernels.pack:pack",
    "psyche_fast.kernels.pack:unpack",
    "psyche_fast.kernels.pack:unpack_checked",
    "psyche_fast.distro.optimizer:DistroStep.look_ahead",
    "psyche_fast.distro.optimizer:DistroStep.compress",
    "psyche_fast.distro.optimizer:DistroStep.update",
    "psyche_fast.distro.demo:DeMo.step",
    "psyche_fast.distro.message:MessageFormat.pack",
    "psyche_fast.distro.message:MessageFormat.begin_unpack",
)
"""What a step calls between the gradient and the updated parameter. In the order of imports: a
module is imported before those that import its functions by name."""


def pytest_configure() -> None:
    """Pretends that there is a GPU."""
    from psyche_fast.kernels.interpreter import repair

    repair()
    cuda_tensors.interpret_launches()
    for name in NEVER_WAIT:
        _refuse_waiting(name)
    cuda_tensors.enter()


def _refuse_waiting(name: str) -> None:
    module, path = name.split(":")
    *owners, attribute = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        with cuda_tensors.no_waiting(path):
            return function(*arguments, **options)

    setattr(owner, attribute, guarded)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a GPU in truth."""
    needs = [i for i in items if i.get_closest_marker("gpu") and "_not_wait_" not in i.name]
    config.hook.pytest_deselected(items=needs)
    items[:] = [item for item in items if item not in needs]
