"""All cases of the compile guard."""

from __future__ import annotations

import importlib
import pkgutil
from itertools import chain

from psyche_fast.kernels import triton as package
from psyche_fast.kernels.triton.case import Case


def compile_cases() -> list[Case]:
    """The cases of every module here that has a function of this name."""
    names = (
        f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)
    )
    modules = [importlib.import_module(name) for name in names if name != __name__]
    return list(chain(*(m.compile_cases() for m in modules if hasattr(m, "compile_cases"))))
