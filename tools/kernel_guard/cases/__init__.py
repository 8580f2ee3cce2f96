"""All cases of the compile guard: a module per kernel module, each with `compile_cases()`."""

from __future__ import annotations

from itertools import chain

from tools.kernel_guard.case import Case


def compile_cases() -> list[Case]:
    """The cases of every module of this package."""
    from tools.kernel_guard.cases import accumulate, apply, cross_entropy, encode, pack, plain, rows

    modules = (accumulate, apply, cross_entropy, encode, pack, plain, rows)
    return list(chain.from_iterable(module.compile_cases() for module in modules))
