"""`Distro`: DisTrO in the order of Psyche's train loop, results applied one step late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from psyche_fast import kernels
from psyche_fast.distro.codec import DistroResult, collect, to_results
from psyche_fast.distro.layout import Layout, ParameterLayout, warn_of_tiny_chunks
from psyche_fast.distro.placement import full_gradient, local_tensor, signed_update
from psyche_fast.kernels.plan import Entries


def check_compression(decay: float, topk: int, chunk: int, weight_decay: float) -> None:
    """Check the numbers that `Distro` and `DeMo` share.

    Raises:
        ValueError: naming the argument.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"compression_decay must be at least 0 and below 1, got {decay}")
    if topk <= 0:
        raise ValueError(f"compression_topk must be positive, got {topk}")
    if chunk <= 0:
        raise ValueError(f"compression_chunk must be positive, got {chunk}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")


class Distro:
    """DisTrO with delayed application, in the order of Psyche's train loop.

    One step, with `lr` the learning rate of this step and `prev_lr` that of the one before::

        distro.error_correction(prev_lr)          # parameters -= prev_lr * sign(delta): look-ahead
        ...                                       # forward, backward, clip: gradients in .grad
        own = distro.generate(prev_own, prev_lr, lr)
        distro.apply(all_peers_previous_results, lr)

    Between the return of `generate` or `apply` and the next `error_correction` the parameters are
    the plain ones. The look-ahead is undone exactly, from a master copy that is allocated by the
    first `error_correction`. The state, `delta`, is the momentum that has not been sent yet,
    float32 unless told otherwise (float64 for float64 parameters). Arithmetic is done in float32
    and rounded once to the parameter's dtype.

    DTensor parameters are taken: state and results then cover the whole parameter on every rank of
    its mesh, and `generate` is a collective over it.

    Args:
        named_parameters: (name, tensor) pairs or a dict. Those that require gradients are taken,
            sorted by name.
        compression_decay: decay of delta per step, `0 <= beta < 1`.
        compression_chunk: side of a chunk; a dimension is cut by its largest divisor that is not
            larger.
        compression_topk: coefficients sent per chunk.
        weight_decay: decoupled weight decay; parameters are multiplied by `1 - lr * weight_decay`
            in `generate`.
        delta_dtype: dtype of delta, torch.float32 or torch.bfloat16.
        backend: "auto" or "torch".

    Attributes:
        names: the parameters' names, in order.
        layout: how they are cut; what `validate_results` wants.

    Raises:
        ValueError: an argument out of range, a name twice, no parameter that requires gradients.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        *,
        compression_decay: float,
        compression_chunk: int,
        compression_topk: int,
        weight_decay: float = 0.0,
        delta_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        check_compression(compression_decay, compression_topk, compression_chunk, weight_decay)
        if delta_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"delta_dtype must be torch.float32 or torch.bfloat16, got {delta_dtype}"
            )
        self.backend = kernels.resolve_backend(backend)
        self.compression_decay = compression_decay
        self.weight_decay = weight_decay
        pairs = (
            named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
        )
        taken = sorted(((n, p) for n, p in pairs if p.requires_grad), key=lambda pair: pair[0])
        if not taken:
            raise ValueError("named_parameters holds no parameter that requires gradients")
        self.names = [name for name, _ in taken]
        for name, following in zip(self.names, self.names[1:], strict=False):
            if name == following:
                raise ValueError(f"named_parameters holds {name} twice")
        self._parameters = [p for _, p in taken]
        layouts = [
            ParameterLayout.of(
                name,
                p.shape,
                p.dtype,
                p.device,
                compression_chunk=compression_chunk,
                compression_topk=compression_topk,
            )
            for name, p in taken
        ]
        warn_of_tiny_chunks(layouts, compression_chunk)
        self.layout = Layout(layouts, delta_dtype=delta_dtype)
        self._delta = self.layout.zeros()
        self._master: list[Tensor] = []
        self._looking_ahead = False

    @property
    def looking_ahead(self) -> bool:
        """Whether the parameters hold the look-ahead, which nothing has undone yet."""
        return self._looking_ahead

    @torch.no_grad()
    def error_correction(self, prev_lr: float) -> None:
        """Keep the plain parameters aside, then `parameters -= prev_lr * sign(delta)`.

        Raises:
            RuntimeError: the parameters already hold the look-ahead.
        """
        if self._looking_ahead:
            raise RuntimeError(
                "error_correction was called twice without generate or undo_error_correction "
                "in between"
            )
        local = [local_tensor(p) for p in self._parameters]
        if not self._master:
            self._master = [torch.empty_like(t) for t in local]
        torch._foreach_copy_(self._master, local)
        self._looking_ahead = True
        for plan, delta in zip(self.layout.plans, self._delta, strict=True):
            step = partial(self._lookahead, plan, delta)
            signed_update([self._parameters[m.position] for m in plan.members], prev_lr, step)

    @torch.no_grad()
    def undo_error_correction(self) -> None:
        """Put the plain parameters back bit for bit, if they hold the look-ahead."""
        if self._looking_ahead:
            torch._foreach_copy_([local_tensor(p) for p in self._parameters], self._master)
            self._looking_ahead = False

    @torch.no_grad()
    def generate(
        self,
        prev_self_results: Sequence[DistroResult] | Sequence[Sequence[DistroResult]] | None,
        prev_lr: float,
        lr: float,
        *,
        grad_scale: float | Tensor = 1.0,
    ) -> list[DistroResult]:
        """Undo the look-ahead, decay the weights, take up the gradients and compress.

        Args:
            prev_self_results: own results of the previous step with their unquantised values, which
                are taken out of delta; None or empty where there are none. Several (a list of
                lists) count with their mean.
            prev_lr: learning rate of the look-ahead. Part of Psyche's call; the undo reads the
                master copy instead and so needs no rate. Without a look-ahead outstanding nothing
                is undone.
            lr: learning rate of this step.
            grad_scale: factor on the gradients (clipping), a number or a 0-d tensor on the
                parameters' device, which is not waited for. A gradient of None is zero.

        Returns:
            One result per parameter in name order, values in the parameter's dtype.

        Raises:
            ValueError: `prev_self_results` are quantised, do not fit the parameters or are not
                finite. Nothing has been changed then.
        """
        previous = self._previous(prev_self_results)
        self.undo_error_correction()
        if self.weight_decay != 0.0:
            local = [local_tensor(p) for p in self._parameters]
            torch._foreach_mul_(local, 1.0 - lr * self.weight_decay)
        entries = []
        for plan, delta, own in zip(self.layout.plans, self._delta, previous, strict=True):
            gradients = [full_gradient(self._parameters[m.position]) for m in plan.members]
            entries.append(
                kernels.encode(
                    plan,
                    delta,
                    gradients,
                    [lr] * len(gradients),
                    decay=self.compression_decay,
                    gradient_scale=grad_scale,
                    previous=own,
                    backend=self.backend,
                )
            )
        return to_results(self.layout, entries)

    @torch.no_grad()
    def apply(self, results: Sequence[Sequence[DistroResult]], lr: float) -> None:
        """`parameters -= lr * sign(decode(mean of the peers' results))`.

        The outcome is a function of the results and their order alone: peers that apply the same
        ones stay identical.

        Args:
            results: one list per peer, in an order that all peers share; quantised (bool) or not.
                Empty: no change.
            lr: learning rate.

        Raises:
            ValueError: a result does not fit, naming the peer's number and the parameter. Nothing
                has been changed.
            RuntimeError: the parameters hold the look-ahead.
        """
        if self._looking_ahead:
            raise RuntimeError("apply was called before generate had undone the look-ahead")
        if not results:
            return
        entries = collect(results, self.layout)
        for plan, e in zip(self.layout.plans, entries, strict=True):
            step = partial(self._apply, plan, e)
            signed_update([self._parameters[m.position] for m in plan.members], lr, step)

    def zero_optim(self) -> None:
        """Forget all momentum: delta becomes zero."""
        for delta in self._delta:
            delta.zero_()

    def deltas(self) -> dict[str, Tensor]:
        """The momentum by parameter name, in the encoded shape; views, not copies."""
        return dict(zip(self.names, self.layout.views(self._delta), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state on the CPU: `{"delta": {name: tensor in the encoded shape}}`.

        The encoded shape is `[..., R/h, C/w, h, w]`, `[N/w, w]` for a vector. Parameters are not
        part of it.
        """
        deltas = self.deltas().items()
        return {"delta": {name: delta.to("cpu", copy=True) for name, delta in deltas}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; deltas of another dtype are converted.

        Raises:
            ValueError: a parameter is missing, unknown or cut otherwise; nothing has been changed
                then.
        """
        if "delta" not in state_dict:
            raise ValueError(f"a Distro state has the key delta, got {sorted(state_dict)}")
        saved: Mapping[str, Tensor] = state_dict["delta"]
        for name in sorted(set(saved) ^ set(self.names)):
            where = "no such parameter here" if name in saved else "missing from the saved state"
            raise ValueError(f"delta of parameter {name}: {where}")
        for p in self.layout.parameters:
            check_delta_shape(p, saved[p.name])
        for p, delta in zip(self.layout.parameters, self.layout.views(self._delta), strict=True):
            delta.copy_(saved[p.name])

    def _previous(
        self, results: Sequence[DistroResult] | Sequence[Sequence[DistroResult]] | None
    ) -> Sequence[Entries | None]:
        if not results:
            return [None] * len(self.layout.plans)
        lists: list[Sequence[DistroResult]] = (
            [results] if isinstance(results[0], DistroResult) else list(results)  # type: ignore[list-item,arg-type]
        )
        for own in lists:
            for result, name in zip(own, self.names, strict=False):
                if result.sparse_val.dtype == torch.bool:
                    raise ValueError(
                        f"own result, parameter {name}: generate wants the unquantised values, "
                        "got torch.bool"
                    )
        return collect(lists, self.layout, sender="own result")

    def _lookahead(
        self, plan: Any, delta: Tensor, targets: Sequence[Tensor], rates: Sequence[float]
    ) -> None:
        kernels.lookahead(plan, targets, delta, rates, backend=self.backend)

    def _apply(
        self, plan: Any, entries: Entries, targets: Sequence[Tensor], rates: Sequence[float]
    ) -> None:
        kernels.apply(plan, targets, entries, rates, backend=self.backend)


def check_delta_shape(parameter: ParameterLayout, delta: Tensor) -> None:
    """Check that a saved delta has the encoded shape of its parameter.

    Raises:
        ValueError: it has not; the parameter is named.
    """
    if tuple(delta.shape) != parameter.xshape:
        raise ValueError(
            f"delta of parameter {parameter.name} is cut as {list(delta.shape)} "
            "in the saved state, but as "
            f"{list(parameter.xshape)} here (its shape or compression_chunk differs)"
        )
