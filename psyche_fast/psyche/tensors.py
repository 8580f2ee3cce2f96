"""Tensors that Psyche's rank 0 broadcasts: models, batches and DisTrO results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

_TENSOR_DTYPES: dict[str, torch.dtype] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Int": torch.int32,
    "Int64": torch.int64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
}


def receive_tensors(
    get: Callable[[str], str], names: Sequence[str], device: torch.device, meet: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """A model from rank 0, after the first barrier: CPU tensors by name.

    Raises:
        ValueError: an unknown dtype or a malformed shape (Psyche reads unknown ones as float32).
    """
    tensors = {}
    for name in names:
        what = f"tensor_shape_{name}"
        shape = strict.read(get(what), list[int], what)
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
    """Receives the batch that `operation` announces, as Psyche's core broadcasts it."""

    def receive() -> torch.Tensor:
        tensor = torch.empty(operation.batch_shape, dtype=torch.int64, device=device)
        dist.broadcast(tensor, 0)
        return tensor

    return Batch(
        receive(),
        receive() if operation.batch_has_labels else None,
        receive() if operation.batch_has_position_ids else None,
        operation.batch_sequence_lengths,
    )


def receive_results(
    results_len: int, metadata: ResultsMetadata | None, device: torch.device
) -> list[list[DistroResult]]:
    """Receives `results_len` peers' results, each a list over parameters in name order.

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
        # One allocation per tensor; `unbind` gives each peer's view of it.
        idx = torch.empty([results_len, *idx_size], dtype=dtypes[0], device=device)
        val = torch.empty([results_len, *val_size], dtype=dtypes[1], device=device)
        dist.broadcast(idx, 0)
        dist.broadcast(val, 0)
        for peer, result in enumerate(results):
            result.append(DistroResult(idx[peer], val[peer], tuple(xshape), totalk))
    return results
