"""CPU tensors that say they are on `cuda:0`, for finding faults of devices without a GPU.

A `CudaTensor` has its elements in the CPU's memory and is worked on in it, but its device is
`cuda:0`. As on a GPU,

- tensors of both devices in one operation are refused;
- `torch.device("cuda")`, without an index, is not equal to a tensor's device;
- a kernel takes no pointers of both devices (`interpret_launches`).

Within `no_waiting` whatever makes the host wait for the device is refused too: Python asking for a
tensor's value, a shape that depends on values, and a copy that is not asynchronous, or comes from
memory that is not pinned: CUDA waits for the stream before it begins such a copy.

`enter` turns torch's constructors and transfers for `device="cuda"` into this, until the process
ends. There is one stream, which is never captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_NAME = "CPU tensors that say they are on a GPU"
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_UPLOADS = (torch.tensor, torch.as_tensor, torch.asarray)
"""Constructors that copy from the host's memory."""


class WaitError(RuntimeError):
    """The host would wait for the device where it must not."""


_forbidden: list[str] = []


@contextlib.contextmanager
def no_waiting(name: str) -> Iterator[None]:
    """Refuse, within, what makes the host wait; `name` says in the message what must not."""
    _forbidden.append(name)
    try:
        yield
    finally:
        _forbidden.pop()


def _set_sync_debug_mode(mode: str) -> None:
    """As torch's, for "default" and "error"."""
    if mode == "error":
        _forbidden.append("what runs under set_sync_debug_mode")
    else:
        assert mode == "default"
        _forbidden.clear()


def _wait(what: str) -> None:
    if _forbidden:
        raise WaitError(f"{_forbidden[-1]} waits for the device: {what}")


def _mixed(what: Any, others: Sequence[Tensor]) -> NoReturn:
    shapes = ", ".join(str(list(x.shape)) for x in others)
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{DEVICE} and cpu! ({what}; on the CPU: {shapes})"
    )


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on `cuda:0`.

    Attributes:
        plain: the CPU tensor of the same memory, for what runs on it in truth.
    """

    plain: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl
    device = DEVICE
    is_cuda = True
    is_cpu = False

    @staticmethod
    def of(plain: Tensor) -> CudaTensor:
        """The tensor of a CPU tensor's memory."""
        assert not isinstance(plain, CudaTensor)
        with torch._C.DisableTorchFunction():
            result = torch.Tensor._make_subclass(CudaTensor, plain.detach())
            result.plain = plain.detach()
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Any,
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, checked, on the plain tensors."""
        options = options or {}
        ours: list[CudaTensor] = []
        others: list[Tensor] = []
        for x in tree_iter((arguments, options)):
            if isinstance(x, Tensor):
                if isinstance(x, CudaTensor):
                    ours.append(x)
                else:
                    others.append(x)
        if function is _aten.copy_.default:
            to, source = arguments[:2]
            asynchronous = len(arguments) > 2 and arguments[2]
            if type(to) is not type(source) and not asynchronous:
                _wait("copy_ between devices")
        elif function in _INDEXING:
            _check_index(function, arguments, others)
        elif any(x.dim() for x in others):
            _mixed(function, others)
        elif _WAITING & set(function.tags):
            _wait(str(function))
        known = {id(x.plain): x for x in ours}
        with torch._C.DisableTorchFunction():
            result = function(*tree_map(_plain, arguments), **tree_map(_plain, options))
        if function is _aten.copy_.default:
            return arguments[0]
        return tree_map(lambda x: known[id(x)] if id(x) in known else _wrapped(x), result)


def _plain(x: Any) -> Any:
    return x.plain if isinstance(x, CudaTensor) else x


def _wrapped(x: Any) -> Any:
    return CudaTensor.of(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x


def _check_index(function: Any, arguments: Sequence[Any], others: Sequence[Tensor]) -> None:
    target, indices, *rest = arguments
    given = [x for x in indices if x is not None]
    values = rest[0] if rest else None
    if not isinstance(target, CudaTensor) or (
        values is not None and values.dim() and not isinstance(values, CudaTensor)
    ):
        _mixed(function, others)
    if any(not isinstance(x, CudaTensor) for x in given):
        _wait(f"{function} with an index on the CPU")
    masks = any(x.dtype in (torch.bool, torch.uint8) for x in given)
    if masks and (values is None or values.numel() != 1):  # one value: masked_fill_ instead
        _wait(f"{function} with a mask")


class _Functions(TorchFunctionMode):
    """Constructors and transfers, which have to do with devices before anything is dispatched."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(options or {})
        ours = bool(arguments) and isinstance(arguments[0], CudaTensor)
        if function is Tensor.to:
            return _to(*arguments, **options)
        if function is Tensor.cpu:
            return _to(*arguments, device=_CPU, **options)
        if function is Tensor.cuda:
            return _to(arguments[0], DEVICE, *arguments[2:], **options)
        if function is Tensor.pin_memory:
            return _pinned(arguments[0].clone())
        if ours and function in (Tensor.numpy, Tensor.__array__):
            raise TypeError(
                f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        if ours and function is Tensor.tolist:
            _wait("Tensor.tolist")
            return arguments[0].plain.tolist()
        pinned = options.pop("pin_memory", False)
        device = options.get("device")
        if device is None or torch.device(device).type not in ("cpu", "cuda"):
            result = function(*arguments, **options)
            return _pinned(result) if pinned else result
        return _construct(function, arguments, options, torch.device(device))


def _construct(
    function: Any, arguments: Sequence[Any], options: dict[str, Any], device: torch.device
) -> Any:
    """A function with `device=`: on the CPU, whichever it names."""
    cuda = device.type == "cuda"
    generator = options.get("generator")
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(
            f"Expected a '{device.type}' device type for generator but found "
            f"'{generator.device.type}'"
        )
    if function in _UPLOADS and isinstance(arguments[0], CudaTensor) != cuda:
        _wait(f"torch.{function.__name__} copies from one device to the other")
    if cuda and device.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device})")
    requires_grad = options.pop("requires_grad", False)
    with torch._C.DisableTorchFunction():
        result = function(*tree_map(_plain, arguments), **{**options, "device": _CPU})
    return (_wrapped(result) if cuda else result).requires_grad_(requires_grad)


_PINNED: set[int] = set()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pinned(tensor: Tensor) -> Tensor:
    _PINNED.add(_address(tensor))
    return tensor


def _to(source: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """`Tensor.to`, without its `copy` by position."""
    copy = options.pop("copy", False)
    if arguments and isinstance(arguments[0], Tensor):
        other = arguments[0]
        arguments = (other.device, other.dtype, *arguments[1:])
    with torch._C.DisableTorchFunction():
        device, dtype, asynchronous, layout = torch._C._nn._parse_to(*arguments, **options)
        changes = {"dtype": dtype or source.dtype, "copy": copy}
        if layout is not None:
            changes["memory_format"] = layout
        if device is None or device.type == source.device.type:
            return source.to(**changes)
        if device.type not in ("cpu", "cuda"):
            return _plain(source).to(device, **changes)
        if not asynchronous:
            _wait(f"a copy from {source.device} to {device}")
        elif device.type == "cuda" and _address(source) not in _PINNED:
            _wait("a copy from memory that is not pinned")
        changes["copy"] = True
        result = _plain(source.detach()).to(**changes)
        return CudaTensor.of(result) if device.type == "cuda" else result


def interpret_launches() -> None:
    """Let Triton's interpreter, which is in use, run kernels on `CudaTensor`s.

    Those on CPU tensors alone, of the backend "interpret", run as before.
    """
    from triton.runtime import interpreter

    run = interpreter.InterpretedFunction.run

    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        pointers = {
            name: value
            for name, value in [*zip(self.arg_names, arguments, strict=False), *options.items()]
            if isinstance(value, Tensor)
        }
        others = [name for name, x in pointers.items() if not isinstance(x, CudaTensor)]
        if others and len(others) < len(pointers):
            raise ValueError(
                f"Pointer argument {', '.join(others)} of {self.__name__} cannot be accessed from "
                "Triton (cpu tensor?)"
            )
        with torch._C.DisableTorchFunction():
            plain = {name: _plain(value) for name, value in options.items()}
            return run(self, *map(_plain, arguments), **plain)

    interpreter.InterpretedFunction.run = checked


class _Stream:
    """The one stream, whose work is always done, and its events."""

    def query(self) -> bool:
        return True

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        _wait("synchronize of a stream or an event")


_STREAM = _Stream()


def enter() -> None:
    """Pretend, from now on, that there is one GPU."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.synchronize = lambda device=None: _wait("torch.cuda.synchronize")
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_name = lambda device=None: _NAME
    cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=1)
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.current_stream = lambda device=None: _STREAM
    cuda.set_sync_debug_mode = _set_sync_debug_mode
    _Functions().__enter__()
