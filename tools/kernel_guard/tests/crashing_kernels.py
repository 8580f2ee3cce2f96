"""A kernel over which the compiler ends the process, as LLVM does where it is at a loss."""

from __future__ import annotations

import os

from tools.kernel_guard.case import Case
from tools.kernel_guard.tests import small_kernels


class Deadly:
    """In place of a `triton.jit` function."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(1)


def compile_cases() -> list[Case]:
    add = next(case for case in small_kernels.compile_cases() if case.kernel == "add")
    return [Case("deadly", "", Deadly(), {}), add]
