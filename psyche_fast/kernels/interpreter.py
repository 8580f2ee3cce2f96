"""Repairs of Triton's interpreter, without which kernels that use bfloat16 give wrong results.

In Triton 3.6 to 3.9 the interpreter keeps bfloat16 as raw 16-bit integers, and

- `tl.dot` multiplies those integers instead of the numbers that they stand for;
- a conversion from float32 to bfloat16 truncates instead of rounding to nearest, ties to even.

In Triton 3.6 a scalar is no index either under NumPy 2.5, which no longer converts arrays of one
element.

`tests/kernels/test_interpreter.py` shows the first two, and fails once Triton has mended them: this
file can go then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
_cast = _builder.cast_impl


def repair() -> None:
    """Replace the faulty operations; once is enough, more do no harm."""
    _builder.create_dot = _dot
    _builder.cast_impl = _cast_bfloat16
    interpreter.GridExecutor.__call__ = _run_grid
    interpreter.InterpretedFunction.__call__ = _call_function
    interpreter._patch_lang_tensor = _patch_tensor
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        # The class's own aliases are lambdas that look `cast_impl` up on the instance already, but
        # that is not promised.
        setattr(_builder, f"create_{name}", lambda self, x, dtype: self.cast_impl(x, dtype))


_patched: set[int] = set()
_grid = interpreter.GridExecutor.__call__
_patch = interpreter._patch_lang_tensor


def _run_grid(self: Any, *arguments: Any, **options: Any) -> None:
    _patched.clear()
    _grid(self, *arguments, **options)


def _call_function(self: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function within a kernel; Triton patches its language at every call, we at the first.

    What is patched stays so until the kernel ends. A kernel takes a third less time like this.
    """
    module = id(self.fn.__globals__)
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    try:
        return self.rewrite()(*arguments, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _widen(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _operand(x: Any) -> np.ndarray:
    return _widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: Any) -> Any:
    # Row by row: in a product of whole matrices some processors' sums hang on where a row stands.
    rows = _operand(a)[..., None, :]
    product = np.matmul(rows, _operand(b)[..., None, :, :], dtype=d.data.dtype)[..., 0, :]
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _cast_bfloat16(self: Any, x: Any, dtype: Any) -> Any:
    source, target = x.dtype.scalar, dtype.scalar
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded)
        return interpreter.TensorHandle(rounded.reshape(x.data.shape), target)
    if source == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle(_widen(x.data), target)
    return _cast(self, x, dtype)
