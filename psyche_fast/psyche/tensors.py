"""Tensors on the wire between rank 0 and the others: models, batches and DisTrO results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from psyche_fast import strict
from psyche_fast.batch import Batch
from psyche_fast.distro import DistroResult
from psyche_fast.psyche.messages import Forward, ResultsMetadata, Train

# c10/core/ScalarType.h
SCALAR_TYPES: dict[int, torch.dtype] = {
    0: torch.uint8,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
_NUMBERS = {dtype: number for number, dtype in SCALAR_TYPES.items()}

_TENSOR_DTYPES: dict[str, torch.dtype] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Int": torch.int32,
    "Int64": torch.int64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
}
_TENSOR_DTYPE_NAMES = {dtype: name for name, dtype in _TENSOR_DTYPES.items()}


def send_tensors(
    store: dist.Store,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    meet: Callable[[], None],
) -> None:
    """Rank 0's half of source ``config_and_tensors``, beginning with the first barrier.

    Raises:
        ValueError: a tensor's dtype has no name in the protocol.
    """
    meet()
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _TENSOR_DTYPE_NAMES:
            raise ValueError(f"tensor {name}: dtype {tensor.dtype} cannot be sent")
        store.set(f"tensor_shape_{name}", json.dumps(list(tensor.shape)))
        store.set(f"tensor_dtype_{name}", _TENSOR_DTYPE_NAMES[tensor.dtype])
        dist.broadcast(tensor.to(device).contiguous(), 0)
        meet()


def receive_tensors(
    get: Callable[[str], str], names: Sequence[str], device: torch.device, meet: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """The other half, after the first barrier: CPU tensors by name.

    Raises:
        ValueError: an unknown dtype or a malformed shape (Psyche reads unknown ones as float32).
    """
    tensors = {}
    for name in names:
        what = f"tensor_shape_{name}"
        shape = strict.convert(strict.loads(get(what), what), list[int], what)
        dtype = get(f"tensor_dtype_{name}")
        if dtype not in _TENSOR_DTYPES:
            raise ValueError(
                f"tensor_dtype_{name}: unknown dtype {dtype!r}, known: {', '.join(_TENSOR_DTYPES)}"
            )
        tensor = torch.empty(shape, dtype=_TENSOR_DTYPES[dtype], device=device)
        dist.broadcast(tensor, 0)
        meet()
        tensors[name] = tensor.cpu()
    return tensors


def receive_batch(operation: Train | Forward, device: torch.device) -> Batch:
    """Receives the batch that ``operation`` announces, as Psyche's core broadcasts it."""

    def receive(there: bool) -> torch.Tensor | None:
        if not there:
            return None
        tensor = torch.empty(operation.batch_shape, dtype=torch.int64, device=device)
        dist.broadcast(tensor, 0)
        return tensor

    input_ids = receive(True)
    assert input_ids is not None
    return Batch(
        input_ids,
        receive(operation.batch_has_labels),
        receive(operation.batch_has_position_ids),
        operation.batch_sequence_lengths,
    )


def pack_batch(batch: Batch) -> bytes:
    """A CPU batch's tensors for the store: int32, ``[tensors, rows, length]``."""
    tensors = [t for t in (batch.input_ids, batch.labels, batch.position_ids) if t is not None]
    return torch.stack(tensors).to(torch.int32).numpy().tobytes()


def unpack_batch(operation: Train | Forward, packed: bytes, device: torch.device) -> Batch:
    """The batch that came with ``operation``.

    Raises:
        ValueError: ``packed`` is not of the announced size.
    """
    shape = (
        1 + operation.batch_has_labels + operation.batch_has_position_ids,
        *operation.batch_shape,
    )
    if len(packed) != 4 * math.prod(shape):
        raise ValueError(
            f"{operation.name}: wanted a batch of {4 * math.prod(shape)} bytes, got {len(packed)}"
        )
    tensors = torch.frombuffer(bytearray(packed), dtype=torch.int32).view(shape)
    parts = iter(tensors.to(device).long())
    return Batch(
        next(parts),
        next(parts) if operation.batch_has_labels else None,
        next(parts) if operation.batch_has_position_ids else None,
        operation.batch_sequence_lengths,
    )


def results_metadata(results: Sequence[Sequence[DistroResult]]) -> ResultsMetadata | None:
    """Describes results of one or more peers, all of one shape; None where there are none."""
    if not results or not results[0]:
        return None
    first = results[0]
    return ResultsMetadata(
        sparse_idx_size=[list(r.sparse_idx.shape) for r in first],
        sparse_idx_dtype=_NUMBERS[first[0].sparse_idx.dtype],
        sparse_val_size=[list(r.sparse_val.shape) for r in first],
        sparse_val_dtype=_NUMBERS[first[0].sparse_val.dtype],
        xshape=[list(r.xshape) for r in first],
        totalk=[r.totalk for r in first],
    )


def send_results(results: Sequence[Sequence[DistroResult]], device: torch.device) -> None:
    """Broadcasts results from rank 0, two tensors per parameter, as Psyche does."""
    for entries in zip(*results, strict=True):
        dist.broadcast(torch.stack([r.sparse_idx for r in entries]).to(device), 0)
        dist.broadcast(torch.stack([r.sparse_val for r in entries]).to(device), 0)


def receive_results(
    results_len: int, metadata: ResultsMetadata | None, device: torch.device
) -> list[list[DistroResult]]:
    """Receives ``results_len`` peers' results, each a list over parameters in name order.

    Every broadcast takes place even where a later check will refuse the content, so that all
    ranks refuse it at the same point.

    Raises:
        ValueError: an unknown dtype number, or a negative size.
    """
    if results_len == 0 or metadata is None:
        return []
    fields = (metadata.sparse_idx_size, metadata.sparse_val_size, metadata.xshape, metadata.totalk)
    idx_sizes, val_sizes, xshapes, totalks = fields
    assert idx_sizes is not None and val_sizes is not None, "checked on arrival"
    assert xshapes is not None and totalks is not None, "checked on arrival"
    dtypes = []
    for field in ("sparse_idx_dtype", "sparse_val_dtype"):
        number = getattr(metadata, field)
        if number not in SCALAR_TYPES:
            raise ValueError(f"results_metadata.{field}: unknown scalar type {number}")
        dtypes.append(SCALAR_TYPES[number])
    results: list[list[DistroResult]] = [[] for _ in range(results_len)]
    for idx_size, val_size, xshape, totalk in zip(
        idx_sizes, val_sizes, xshapes, totalks, strict=True
    ):
        if min([0, *idx_size, *val_size]) < 0:
            raise ValueError(f"results_metadata: negative size {idx_size} or {val_size}")
        # One allocation per tensor; ``unbind`` gives each peer's view of it.
        idx = torch.empty([results_len, *idx_size], dtype=dtypes[0], device=device)
        val = torch.empty([results_len, *val_size], dtype=dtypes[1], device=device)
        dist.broadcast(idx, 0)
        dist.broadcast(val, 0)
        for peer, result in enumerate(results):
            result.append(DistroResult(idx[peer], val[peer], tuple(xshape), totalk))
    return results
