"""Results decoded with the operations of Psyche's core, in their order and in its types.

Parameters that every tensor-parallel rank holds whole are updated by each rank on its own, so that
other roundings would let them drift apart. DisTrO's own kernels decode with a basis in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from psyche_fast.distro import DistroResult

_BYTES, _SHORTS, _WORDS = 1 << 8, 1 << 16, 1 << 32


def decode(results: Sequence[DistroResult], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mean of several peers' results of one parameter, as a dense tensor.

    Args:
        results: one from each peer, at least one.
        dtype: the parameter's.
        device: where to.
    """
    first = results[0]
    indices = torch.cat([r.sparse_idx for r in results], -1).to(device)
    values = torch.cat([_numbers(r.sparse_val.to(device), dtype) for r in results], -1).to(dtype)
    coefficients = torch.zeros(tuple(first.xshape), dtype=dtype, device=device)
    rows = coefficients.flatten(-2) if coefficients.dim() > 2 else coefficients
    rows.scatter_reduce_(
        -1, _wide(indices, first.totalk), values, reduce="mean", include_self=False
    )
    if coefficients.dim() == 2:
        basis = _inverse_basis(coefficients.shape[1], dtype, device)
        return _einsum("...ij, jb -> ...ib", coefficients, basis).reshape(-1)
    high, wide = (_inverse_basis(side, dtype, device) for side in coefficients.shape[-2:])
    whole = _einsum("...ijkl, kb, ld -> ...ibjd", coefficients, high, wide)
    *batch, down, h, across, w = whole.shape
    return whole.reshape(*batch, down * h, across * w)


def _einsum(equation: str, *tensors: Tensor) -> Tensor:
    """From left to right, as C++ does; `torch.einsum` may choose another order."""
    product: Tensor = torch.ops.aten.einsum(equation, list(tensors))
    return product


def _numbers(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) * -2 + 1 if values.dtype == torch.bool else values


def _wide(indices: Tensor, totalk: int) -> Tensor:
    if totalk > _BYTES:
        assert totalk <= _WORDS, "no chunk is as large"
        indices = indices.view(torch.uint16 if totalk <= _SHORTS else torch.uint32)
    return indices.to(torch.int64)


@cache
def _inverse_basis(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal inverse DCT of each unit vector, by a real FFT in fp32 (Makhoul 1980)."""
    unit = torch.eye(side, device=device) / 2.0
    unit[:, 0] *= math.sqrt(side) * 2.0
    unit[:, 1:] *= math.sqrt(side / 2.0) * 2.0
    angles = torch.arange(side, dtype=torch.float32, device=device)[None] * (math.pi / (2.0 * side))
    cosine, sine = angles.cos(), angles.sin()
    turned = torch.cat([unit[:, :1] * 0.0, -unit.flip(1)[:, : side - 1]], 1)
    spectrum = torch.complex(unit * cosine - turned * sine, unit * sine + turned * cosine)
    folded = torch.fft.irfft(spectrum, side, dim=1)
    basis = torch.empty_like(unit)
    basis[:, 0::2] = folded[:, : side - side // 2]
    basis[:, 1::2] = folded.flip(1)[:, : side // 2]
    return basis.to(dtype)
