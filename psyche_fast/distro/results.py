"""Results as they travel between peers: their form, their quantisation, their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.distro.shards import Parts
from psyche_fast.kernels.plan import ChunkPlan, Entries
from psyche_fast.sharding import full_tensor


@dataclass(frozen=True, slots=True, eq=False)
class DistroResult:
    """One parameter's compressed update, laid out as Psyche's `DistroResult`.

    Attributes:
        sparse_idx: uint8. Flat indices within each chunk, `[..., k]` for up to 256 coefficients per
            chunk; wider indices (uint16 up to 65536, uint32 above) are viewed as bytes, `[..., 2k]`
            or `[..., 4k]`.
        sparse_val: `[..., k]` in the parameter's dtype, or bool after `quantize_1bit` (True =
            negative).
        xshape: encoded shape, `[..., R/h, C/w, h, w]`, or `[N/w, w]` for a vector.
        totalk: coefficients per chunk, `h * w` or `w`.
    """

    sparse_idx: Tensor
    sparse_val: Tensor
    xshape: tuple[int, ...]
    totalk: int


def quantize_1bit(results: Sequence[DistroResult]) -> list[DistroResult]:
    """Keep only the sign of each value: True is negative; zero counts as positive."""
    return [
        r if r.sparse_val.dtype == torch.bool else replace(r, sparse_val=r.sparse_val < 0)
        for r in results
    ]


def to_results(layout: Layout, entries: Sequence[Entries]) -> list[DistroResult]:
    """Results in parameter order, as views of the entries of every chunk class."""
    results: dict[int, DistroResult] = {}
    for plan, e in zip(layout.plans, entries, strict=True):
        index_bytes = e.indices.view(torch.uint8)
        for m in plan.members:
            p = layout.parameters[m.position]
            results[m.position] = DistroResult(
                sparse_idx=index_bytes[m.start : m.start + m.count].view(p.index_shape),
                sparse_val=e.values[m.start : m.start + m.count].view(p.value_shape),
                xshape=p.xshape,
                totalk=p.totalk,
            )
    return [results[i] for i in range(len(layout.parameters))]


def validate_results(results: Sequence[Sequence[DistroResult]], layout: Layout) -> None:
    """Check peers' results: count, shapes, dtypes, `totalk`, range of the indices, finite values.

    Args:
        results: one list of results per peer, in parameter order.
        layout: what is expected (`Distro.layout`).

    Raises:
        ValueError: naming the peer's number and the parameter.
    """
    collect(results, layout)


def collect(
    results: Sequence[Sequence[DistroResult]], layout: Layout, *, sender: str = "peer"
) -> list[Entries]:
    """Check results as `validate_results` does and join them, one `Entries` per chunk class.

    Results may live on any device. The values of all are checked with one wait for the device,
    before anything is done with them.

    Args:
        results: one list per peer, at least one peer.
        layout: what is expected.
        sender: what a peer is called in messages.

    Returns:
        For each plan, the peers' entries side by side in peer order.
    """
    for peer, own in enumerate(results):
        check_form(own, layout.parameters, f"{sender} {peer}")
    entries = [_gather(plan, results) for plan in layout.plans]
    flags: dict[torch.device, list[Tensor]] = {}
    for plan, e in zip(layout.plans, entries, strict=True):
        flags.setdefault(plan.device, []).append(_faulty(e.indices, e.values, plan.totalk))
    if any(bool(torch.stack(on_device).any()) for on_device in flags.values()):
        _name_faulty(results, layout, sender)
    return entries


def collect_own(
    results: Sequence[DistroResult] | Sequence[Sequence[DistroResult]] | None, layout: Layout
) -> list[Entries] | None:
    """Check and join own results with their unquantised values; None where there are none.

    Args:
        results: of one step, or several lists, which count with their mean.
        layout: what is expected.

    Raises:
        ValueError: they are quantised, or do not fit.
    """
    if not results:
        return None
    lists: list[Sequence[DistroResult]] = (
        [results] if isinstance(results[0], DistroResult) else list(results)  # type: ignore[list-item,arg-type]
    )
    for own in lists:
        for result, p in zip(own, layout.parameters, strict=False):
            if result.sparse_val.dtype == torch.bool:
                raise ValueError(
                    f"own result, parameter {p.name}: generate wants the unquantised values, "
                    "got torch.bool"
                )
    return collect(lists, layout, sender="own result")


def check_form(
    results: Sequence[DistroResult], parameters: Sequence[ParameterLayout], who: str
) -> None:
    """Check count, shapes, dtypes and `totalk` of one peer's results.

    Raises:
        ValueError: naming the peer and the parameter.
    """
    if len(results) != len(parameters):
        raise ValueError(
            f"{who} sent {len(results)} results, expected one for each of "
            f"{len(parameters)} parameters"
        )
    for r, p in zip(results, parameters, strict=True):
        expected = (
            ("xshape", tuple(r.xshape), p.xshape),
            ("totalk", r.totalk, p.totalk),
            ("dtype of sparse_idx", r.sparse_idx.dtype, torch.uint8),
            ("shape of sparse_idx", tuple(r.sparse_idx.shape), p.index_shape),
            ("shape of sparse_val", tuple(r.sparse_val.shape), p.value_shape),
        )
        for what, got, wanted in expected:
            if got != wanted:
                raise ValueError(f"{who}, parameter {p.name}: {what} is {got}, expected {wanted}")
        if r.sparse_val.dtype not in (p.dtype, torch.bool):
            raise ValueError(
                f"{who}, parameter {p.name}: dtype of sparse_val is {r.sparse_val.dtype}, "
                f"expected {p.dtype} or torch.bool"
            )


def whole_results(parts: Parts, results: Sequence[DistroResult]) -> list[DistroResult]:
    """Results over whole parameters from each rank's own; a collective."""
    return [
        replace(
            r,
            sparse_idx=full_tensor(parts.whole(i, r.sparse_idx)),
            sparse_val=full_tensor(parts.whole(i, r.sparse_val)),
            xshape=whole.xshape,
        )
        for i, (r, whole) in enumerate(zip(results, parts.wholes, strict=True))
    ]


def own_results(parts: Parts, results: Sequence[DistroResult]) -> list[DistroResult]:
    """This rank's part of results over whole parameters.

    Raises:
        ValueError: they are not over these parameters.
    """
    if not any(isinstance(p, DTensor) for p in parts.parameters):
        return list(results)
    check_form(results, parts.wholes, "whole results")
    return [
        replace(
            r,
            sparse_idx=parts.own(i, r.sparse_idx).view(layout.index_shape),
            sparse_val=parts.own(i, r.sparse_val).view(layout.value_shape),
            xshape=layout.xshape,
        )
        for i, (r, layout) in enumerate(zip(results, parts.layouts, strict=True))
    ]


def _gather(plan: ChunkPlan, results: Sequence[Sequence[DistroResult]]) -> Entries:
    """The entries of all peers for one chunk class, `[chunks, peers * k]`."""
    indices, values = [], []
    for own in results:
        members = [own[m.position] for m in plan.members]
        size = plan.k * plan.index_dtype.itemsize
        # A concatenation is aligned as the wider dtypes want it, whatever buffer the bytes came in.
        index_bytes = torch.cat([r.sparse_idx.reshape(-1, size) for r in members])
        indices.append(index_bytes.to(plan.device).view(plan.index_dtype))
        parts = [r.sparse_val.reshape(-1, plan.k) for r in members]
        if len({part.dtype for part in parts}) > 1:
            parts = [_as_numbers(part, plan.dtype) for part in parts]
        values.append(torch.cat(parts).to(plan.device))
    if len(values) == 1:
        return Entries(indices[0], values[0])
    if len({v.dtype for v in values}) > 1:
        values = [_as_numbers(v, plan.dtype) for v in values]
    return Entries(torch.cat(indices, dim=1), torch.cat(values, dim=1))


def _as_numbers(values: Tensor, dtype: torch.dtype) -> Tensor:
    return 1 - 2 * values.to(dtype) if values.dtype == torch.bool else values


def _faulty(indices: Tensor, values: Tensor, totalk: int) -> Tensor:
    """0-d bool on the device: an index out of range or a value that is not finite."""
    bad = torch.zeros((), dtype=torch.bool, device=values.device)
    if totalk < 1 << (8 * indices.dtype.itemsize):
        bad = bad | (indices.to(torch.int64) >= totalk).any()
    if values.dtype != torch.bool:
        bad = bad | ~values.isfinite().all()
    return bad


def _name_faulty(results: Sequence[Sequence[DistroResult]], layout: Layout, sender: str) -> None:
    """Find the first faulty result and raise."""
    for peer, own in enumerate(results):
        for plan in layout.plans:
            for m in plan.members:
                r = own[m.position]
                indices = r.sparse_idx.reshape(-1).clone().view(plan.index_dtype)
                where = f"{sender} {peer}, parameter {layout.parameters[m.position].name}"
                if bool((indices.to(torch.int64) >= plan.totalk).any()):
                    raise ValueError(f"{where}: an index is not below totalk {plan.totalk}")
                if r.sparse_val.dtype != torch.bool and not bool(r.sparse_val.isfinite().all()):
                    raise ValueError(f"{where}: a value is not finite")
    raise AssertionError("a faulty result was flagged but none was found")
