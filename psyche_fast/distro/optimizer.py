"""`Distro`: DisTrO in the order of Psyche's train loop, results applied one step late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from psyche_fast import kernels
from psyche_fast.distro.checks import check_compression, check_delta_shape
from psyche_fast.distro.chunks import Layout, ParameterLayout, warn_of_tiny_chunks
from psyche_fast.distro.momentum import Momentum
from psyche_fast.distro.results import DistroResult, collect, collect_own, to_results
from psyche_fast.distro.shards import Parts
from psyche_fast.kernels.backends import backend_of
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates
from psyche_fast.sharding import full_tensor

MAX_OFFLOADED_ELEMENTS = 1 << 26
"""Elements of delta on the device at once where it is offloaded, or those of one parameter."""


class Distro:
    """DisTrO with delayed application, in the order of Psyche's train loop.

    One step, with `lr` the learning rate of this step and `prev_lr` that of the one before::

        distro.error_correction(prev_lr)          # parameters -= prev_lr * sign(delta): look-ahead
        ...                                       # forward, backward, clip: gradients in .grad
        own = distro.generate(prev_own, prev_lr, lr)
        distro.apply(all_peers_previous_results, lr)

    Between the return of `generate` or `apply` and the next `error_correction` the parameters are
    the plain ones. The look-ahead is undone exactly, from a master copy that is allocated by the
    first `error_correction`. With `fused`, parameters stay in the look-ahead instead: `apply` works
    on the master copy and writes the next look-ahead in the same pass, `error_correction` then
    finds it done, and `plain` puts the plain parameters back for whoever else wants to read them.

    The learning rates may be 0-d float32 tensors on the parameters' device. `generate` and `apply`
    check what they are given, which waits for the device; `compress` and `update`, the same without
    the checks, do not, and a CUDA graph can be captured of a step of these.

    All steps belong on one CUDA stream: the kernels share the optimiser's scratch memory, which two
    streams would write at once. Steps may move to another stream once the former one has done its
    work (`torch.cuda.synchronize()`); before, they are refused with a RuntimeError. A CUDA graph's
    replay is a step too, which nothing here sees.

    The state, `delta`, is the momentum that has not been sent yet, float32 unless told otherwise
    (float64 for float64 parameters). Arithmetic is done in float32 and rounded once to the
    parameter's dtype.

    DTensor parameters are taken (FSDP2, tensor parallelism): a rank's state and results are those
    of its own chunks, and the peers that it exchanges them with are the ranks with the same place
    in other replicas. Shards whose edges are edges of chunks are worked on where they lie. Chunks
    that are cut are divided among the ranks that share them, and the methods are collectives of
    these.

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
        offload_delta: keep delta in host memory, and on the device only what is being worked on.
        fused: keep the parameters in the look-ahead between steps.
        master_copy: undo the look-ahead from a copy. False saves the copy's memory and adds the
            look-ahead back instead, which rounding makes inexact for parameters in half precision:
            peers then drift apart (Psyche's way).
        backend: "auto", "triton", "torch" or "interpret".

    Attributes:
        names: the parameters' names, in order.
        backends: the backend of every chunk class.
        refused: 0-d int64, how many gradients were left out because `grad_scale` was a tensor that
            was not finite; on the device.
        layout: how this rank's part of them is cut; what `validate_results` wants.

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
        offload_delta: bool = False,
        fused: bool = False,
        master_copy: bool = True,
        backend: str = "auto",
    ) -> None:
        check_compression(compression_decay, compression_topk, compression_chunk, weight_decay)
        if delta_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"delta_dtype must be torch.float32 or torch.bfloat16, got {delta_dtype}"
            )
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
        wholes = [
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
        warn_of_tiny_chunks(wholes, compression_chunk)
        self._wholes = wholes
        self._parts = Parts(self._parameters, wholes)
        self.layout = Layout(
            self._parts.layouts,
            delta_dtype=delta_dtype,
            max_elements=MAX_OFFLOADED_ELEMENTS if offload_delta else None,
        )
        self.backends = tuple(backend_of(plan, backend)[0] for plan in self.layout.plans)
        self._delta = Momentum(self.layout, offload=offload_delta)
        self._fused = fused
        self._master_copy = master_copy
        self._master: list[Tensor] = []
        self._looking_ahead = False
        self._current = False  # whether delta is still the one that the look-ahead went by
        self._ahead_rate: float | Tensor = 0.0
        self._shrink: float | Tensor | None = None  # weight decay that is still to be done
        self.refused = torch.zeros((), dtype=torch.int64, device=self._parameters[0].device)

    @property
    def looking_ahead(self) -> bool:
        """Whether the parameters hold the look-ahead, which nothing has undone yet."""
        return self._looking_ahead

    @torch.no_grad()
    def error_correction(self, prev_lr: float | Tensor) -> None:
        """Keep the plain parameters aside, then `parameters -= prev_lr * sign(delta)`.

        With `fused` nothing is left to do where `apply` was called with the same learning rate.

        Raises:
            RuntimeError: the parameters already hold the look-ahead.
        """
        if self._looking_ahead:
            if not self._fused:
                raise RuntimeError(
                    "error_correction was called twice without generate or undo_error_correction "
                    "in between"
                )
            if self._current and _same(self._ahead_rate, prev_lr):
                return
            self.plain()
        self._parts.pull()
        if self._master_copy:
            own = self._parts.tensors()
            if not self._master:
                self._master = [torch.empty_like(t) for t in own]
            torch._foreach_copy_(self._master, own)
        self._signed(None, prev_lr)
        self._parts.push()
        self._looking_ahead, self._current, self._ahead_rate = True, True, prev_lr

    @torch.no_grad()
    def undo_error_correction(self) -> None:
        """Put the plain parameters back, if they hold the look-ahead.

        Bit for bit, from the master copy; without one by adding the look-ahead again.
        """
        if not self._looking_ahead:
            return
        if self._master_copy:
            torch._foreach_copy_(self._parts.tensors(), self._master)
        else:
            rate = self._ahead_rate
            self._signed(None, -rate)
        self._parts.push()
        self._looking_ahead = False

    def plain(self) -> None:
        """Make the parameters the plain ones, weight decay done, whatever the mode.

        For evaluation, export and checkpoints between steps. The next `error_correction` looks
        ahead anew.
        """
        self.undo_error_correction()
        self._finish_decay()

    @torch.no_grad()
    def generate(
        self,
        prev_self_results: Sequence[DistroResult] | Sequence[Sequence[DistroResult]] | None,
        prev_lr: float | Tensor,
        lr: float | Tensor,
        *,
        grad_scale: float | Tensor = 1.0,
    ) -> list[DistroResult]:
        """Undo the look-ahead, decay the weights, take up the gradients and compress.

        Args:
            prev_self_results: own results of the previous step with their unquantised values, which
                are taken out of delta; None or empty where there are none. Several (a list of
                lists) count with their mean.
            prev_lr: learning rate of the look-ahead. Part of Psyche's call; the undo reads the
                master copy, or goes by what `error_correction` was given. Without a look-ahead
                outstanding nothing is undone.
            lr: learning rate of this step.
            grad_scale: factor on the gradients (clipping), a number or a 0-d float32 tensor on the
                parameters' device, which is not waited for. Where it is not finite the gradients
                are left out whole and `refused` counts it. A gradient of None is zero.

        Returns:
            One result per parameter in name order, values in the parameter's dtype.

        Raises:
            ValueError: `prev_self_results` are quantised, do not fit the parameters or are not
                finite. Nothing has been changed then.
        """
        previous = collect_own(prev_self_results, self.layout)
        return to_results(self.layout, self.compress(previous, lr, grad_scale=grad_scale))

    @torch.no_grad()
    def compress(
        self,
        previous: Sequence[Entries] | None,
        lr: float | Tensor,
        *,
        grad_scale: float | Tensor = 1.0,
    ) -> list[Entries]:
        """`generate` for those who keep the entries of each chunk class: nothing is checked.

        Args:
            previous: what the last call returned; None for the first.
            lr: learning rate of this step.
            grad_scale: as `generate` has it.

        Returns:
            One `Entries` per plan of `layout`, the indices ascending.
        """
        if isinstance(grad_scale, Tensor):
            self.refused += ~grad_scale.isfinite()
        # Without a master copy the kernel that reads delta undoes the look-ahead in passing.
        in_place = self._looking_ahead and not self._master_copy
        shrink = None if self.weight_decay == 0.0 else 1.0 - lr * self.weight_decay
        if not in_place:
            if not self._fused:
                self.undo_error_correction()
            self._finish_decay()
            self._shrink = shrink
            if not self._fused:
                self._finish_decay()
        entries = []
        taken: Sequence[Entries | None] = previous or [None] * len(self.layout.plans)
        tensors, gradients = self._parts.tensors(), self._parts.gradients()
        for at, (plan, backend, own) in enumerate(
            zip(self.layout.plans, self.backends, taken, strict=True)
        ):
            delta = self._delta.fetch(at)
            members = [tensors[m.position] for m in plan.members]
            entries.append(
                kernels.encode(
                    plan,
                    delta,
                    [gradients[m.position] for m in plan.members],
                    _every(lr, plan),
                    decay=self.compression_decay,
                    gradient_scale=grad_scale,
                    previous=own,
                    parameters=members if in_place else None,
                    previous_rates=_every(self._ahead_rate, plan) if in_place else None,
                    shrinks=_every(shrink, plan) if in_place and shrink is not None else None,
                    backend=backend,
                )
            )
            self._delta.keep(at, delta)
        self._current = False
        if in_place:
            self._looking_ahead = False
            self._parts.push()
        return entries

    @torch.no_grad()
    def apply(self, results: Sequence[Sequence[DistroResult]], lr: float | Tensor) -> None:
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
        if self._looking_ahead and not self._fused:
            raise RuntimeError("apply was called before generate had undone the look-ahead")
        if results:
            self.update(collect(results, self.layout), lr)

    @torch.no_grad()
    def update(self, entries: Sequence[Entries], lr: float | Tensor) -> None:
        """`apply` for entries that have been checked, the peers' side by side in each plan's."""
        if not self._looking_ahead:
            self._parts.pull()
        if not self._fused:
            self._signed(entries, lr)
            self._parts.push()
            return
        # The plain parameters are the master copy where there is one and it is in use.
        tensors = self._parts.tensors()
        plain: Sequence[Tensor] = tensors
        if self._master_copy:
            if not self._master:
                self._master = [t.clone() for t in tensors]
            elif not self._looking_ahead:
                torch._foreach_copy_(self._master, tensors)
            plain = self._master
        for at, (plan, backend, e) in enumerate(
            zip(self.layout.plans, self.backends, entries, strict=True)
        ):
            kernels.apply(
                plan,
                [plain[m.position] for m in plan.members],
                e,
                _every(lr, plan),
                shrinks=None if self._shrink is None else _every(self._shrink, plan),
                ahead=[tensors[m.position] for m in plan.members],
                delta=self._delta.fetch(at),
                backend=backend,
            )
        self._parts.push()
        self._shrink = None
        self._looking_ahead, self._current, self._ahead_rate = True, True, lr

    def zero_optim(self) -> None:
        """Forget all momentum: delta becomes zero."""
        self.plain()  # what undoes a look-ahead without a master copy is delta
        self._delta.zero()

    def deltas(self) -> dict[str, Tensor]:
        """The momentum by parameter name, in the encoded shape; views where they can be.

        Of a sharded parameter a DTensor, or the whole where its chunks have been divided among
        ranks, which makes this a collective.
        """
        return {name: self._whole_delta(i) for i, name in enumerate(self.names)}

    def _whole_delta(self, position: int) -> Tensor:
        return self._parts.whole(position, self._delta.of_parameter(position))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A copy of the state on the CPU: `{"delta": {name: tensor in the encoded shape}}`.

        The encoded shape is `[..., R/h, C/w, h, w]`, `[N/w, w]` for a vector. Parameters are not
        part of it. That of a sharded parameter is whole on every rank; a collective then.
        """
        return {
            "delta": {
                name: full_tensor(self._whole_delta(i)).to("cpu", copy=True)
                for i, name in enumerate(self.names)
            }
        }

    @torch.no_grad()
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
        for p in self._wholes:
            check_delta_shape(p, saved[p.name])
        self.plain()
        for i, (name, parameter) in enumerate(zip(self.names, self._parameters, strict=True)):
            self._delta.set(i, self._parts.own(i, saved[name].to(parameter.device)))

    @torch.no_grad()
    def whole_results(self, results: Sequence[DistroResult]) -> list[DistroResult]:
        """Results over whole parameters, the same on every rank, from each rank's own.

        For exchanges that know nothing of shards. A collective over the ranks of a replica.
        """
        return self._parts.whole_results(results)

    def own_results(self, results: Sequence[DistroResult]) -> list[DistroResult]:
        """This rank's part of results over whole parameters.

        Raises:
            ValueError: they are not over these parameters.
        """
        return self._parts.own_results(results)

    def _finish_decay(self) -> None:
        """Do the weight decay that no `apply` has done in passing."""
        if self._shrink is None:
            return
        with torch.no_grad():
            in_master = self._looking_ahead and self._master_copy
            if not in_master:
                self._parts.pull()
            torch._foreach_mul_(self._master if in_master else self._parts.tensors(), self._shrink)
            if not in_master:
                self._parts.push()
        self._shrink = None

    def _signed(self, entries: Sequence[Entries] | None, rate: float | Tensor) -> None:
        """`parameters -= rate * sign` of the decoded mean of entries, or of delta."""
        tensors = self._parts.tensors()
        for at, (plan, backend) in enumerate(zip(self.layout.plans, self.backends, strict=True)):
            targets, rates = [tensors[m.position] for m in plan.members], _every(rate, plan)
            if entries is None:
                kernels.lookahead(plan, targets, self._delta.fetch(at), rates, backend=backend)
            else:
                kernels.apply(plan, targets, entries[at], rates, backend=backend)


def _every(rate: float | Tensor, plan: ChunkPlan) -> Rates:
    """One rate for all members of a class."""
    return rate if isinstance(rate, Tensor) else [rate] * len(plan.members)


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two rates are known to be equal, without looking at what is on a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b
