"""`DistroStep`: what DisTrO does in a step to parameters and momentum, results applied late."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from psyche_fast.distro.chunks import (
    Layout,
    Momentum,
    ParameterLayout,
    check_compression,
    check_delta_shape,
    warn_of_tiny_chunks,
)
from psyche_fast.distro.guard import GradientGuard, check_dense
from psyche_fast.distro.shards import Parts
from psyche_fast.kernels.apply import apply, lookahead
from psyche_fast.kernels.backends import checked_backend
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import ChunkPlan, Entries, Rates, chunk_view, single
from psyche_fast.sharding import full_tensor

MAX_OFFLOADED_ELEMENTS = 1 << 26
"""Elements of delta on the device at once where it is offloaded, or those of one parameter."""


class DistroStep:
    """DisTrO with delayed application, on the entries of chunk classes.

    One step, with `lr` the learning rate of this step and `prev_lr` that of the one before::

        step.look_ahead(prev_lr)          # parameters -= prev_lr * sign(delta)
        ...                               # forward, backward: gradients in .grad
        own = step.compress(own, lr)      # what to send
        step.update(entries_of_all_peers_previous_step, lr)

    Parameters stay in the look-ahead between steps: `update` works on a master copy of the plain
    ones and writes the next look-ahead in the same pass, which `look_ahead` then finds done.
    `plain` puts the plain parameters back, bit for bit, for whoever else wants to read them. The
    master copy is allocated by the first `look_ahead`.

    The learning rates may be 0-d float32 tensors on the parameters' device; nothing waits for the
    device then.

    All steps belong on one CUDA stream: the kernels share the optimiser's scratch memory, which two
    streams would write at once. Steps may move to another stream once the former one has done its
    work (`torch.cuda.synchronize()`); before, they are refused with a RuntimeError.

    The state, `delta`, is the momentum that has not been sent yet, float32 unless told otherwise
    (float64 for float64 parameters). Arithmetic is done in float32 and rounded once to the
    parameter's dtype.

    DTensor parameters work too (FSDP2, tensor parallelism): a rank's state and entries are those
    of its own chunks, and the peers that it exchanges them with are the ranks with the same
    coordinates in other replicas. Shards whose edges are edges of chunks are worked on where they
    lie. Chunks that are cut are divided among the ranks that share them, and the methods are
    collectives of these.

    Args:
        named_parameters: (name, tensor) pairs or a dict. Those that require gradients are trained,
            sorted by name.
        compression_decay: decay of delta per step, `0 <= beta < 1`.
        compression_chunk: side of a chunk; a dimension is cut by its largest divisor that is not
            larger.
        compression_topk: coefficients sent per chunk.
        weight_decay: decoupled weight decay; parameters are multiplied by `1 - lr * weight_decay`
            once per step.
        undecayed: names of parameters without weight decay.
        delta_dtype: dtype of delta, torch.float32 or torch.bfloat16.
        offload_delta: keep delta in host memory, and on the device only what is being worked on.
        master_dtype: dtype of the master copy of bfloat16 and float16 parameters, torch.float32 or
            torch.bfloat16 (which stands for the parameters' own): in their own, what a step changes
            by less than half a unit in the last place is lost.
        masters: the float32 master copies by name, placed as the parameters, which are what they
            round to; allocated here where None. They are up to date after `plain`.
        backend: "auto", "triton", "torch" or "interpret".

    Attributes:
        names: the parameters' names, in order.
        backends: the backend of every chunk class.
        refused: 0-d int64, in how many steps the gradients were left out because they, or a
            `grad_scale` that is a tensor, were not finite; on the device.
        layout: how this rank's part of them is cut; what `validate_results` wants.
        parts: this rank's part of each parameter.

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
        undecayed: Container[str] = (),
        delta_dtype: torch.dtype = torch.float32,
        offload_delta: bool = False,
        master_dtype: torch.dtype = torch.float32,
        masters: Mapping[str, Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        check_compression(compression_decay, compression_topk, compression_chunk, weight_decay)
        for what, dtype in (("master_dtype", master_dtype), ("delta_dtype", delta_dtype)):
            if dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{what} must be torch.float32 or torch.bfloat16, got {dtype}")
        self.compression_decay = compression_decay
        self.weight_decay = weight_decay
        self._undecayed = undecayed
        trained = _trained(named_parameters)
        self.names = [name for name, _ in trained]
        self._parameters = [p for _, p in trained]
        self._wholes = [
            ParameterLayout.of(
                name,
                p.shape,
                p.dtype,
                p.device,
                compression_chunk=compression_chunk,
                compression_topk=compression_topk,
            )
            for name, p in trained
        ]
        warn_of_tiny_chunks(self._wholes, compression_chunk)
        self.parts = Parts(self._parameters, self._wholes)
        self.layout = Layout(
            self.parts.layouts,
            delta_dtype=delta_dtype,
            max_elements=MAX_OFFLOADED_ELEMENTS if offload_delta else None,
        )
        self.backends = tuple(checked_backend(plan, backend) for plan in self.layout.plans)
        self._delta = Momentum(self.layout, offload=offload_delta)
        self._master_dtype = master_dtype
        self._master: list[Tensor] = []
        self._given = [masters.get(n, p) for n, p in trained] if masters else None
        self._looking_ahead = False
        self._ahead_rate: float | Tensor | None = None  # None: delta has changed since
        self._shrink: float | Tensor | None = None  # weight decay that is still to be done
        self._guard = GradientGuard(self._parameters, type(self).__name__)

    @property
    def refused(self) -> Tensor:
        """See the class."""
        return self._guard.refused

    @property
    def looking_ahead(self) -> bool:
        """Whether the parameters hold the look-ahead, which nothing has undone yet."""
        return self._looking_ahead

    @torch.no_grad()
    def look_ahead(self, prev_lr: float | Tensor) -> None:
        """Keep the plain parameters aside, then `parameters -= prev_lr * sign(delta)`.

        Nothing is left to do where `update` was called with the same learning rate.
        """
        if self._looking_ahead:
            if _same(self._ahead_rate, prev_lr):
                return
            self.plain()
        tensors = self._take_up()
        for at, (plan, backend) in enumerate(zip(self.layout.plans, self.backends, strict=True)):
            lookahead(
                plan, [self._master[m.position] for m in plan.members], self._delta.fetch(at),
                _every(prev_lr, plan), [tensors[m.position] for m in plan.members],
                backend=backend,
            )  # fmt: skip
        self.parts.push()
        self._looking_ahead, self._ahead_rate = True, prev_lr

    def plain_shards(self) -> dict[str, Tensor]:
        """In the look-ahead, until `compress`: plain shards by name, wide ones; a collective."""
        assert self._looking_ahead and self._shrink is None
        return dict(zip(self.names, self.parts.shards(self._master), strict=True))

    @torch.no_grad()
    def plain(self) -> None:
        """Make the parameters the plain ones, weight decay done.

        For evaluation, export and checkpoints between steps. The next `look_ahead` begins anew.
        """
        self._finish_decay()
        if self._looking_ahead:
            torch._foreach_copy_(self.parts.tensors(), self._master)
            self.parts.push()
            self._bring_back()
            self._looking_ahead = False

    @torch.no_grad()
    def compress(
        self,
        previous: Sequence[Entries] | None,
        lr: float | Tensor,
        *,
        grad_scale: float | Tensor | None = None,
    ) -> list[Entries]:
        """Take up the gradients and compress: `delta = decay * (delta - sent) + lr * gradient`.

        Weight decay falls due: the next `update` does it in passing, or `plain`.

        Args:
            previous: what the last call returned, which is subtracted from delta; None for the
                first.
            lr: learning rate of this step.
            grad_scale: factor on the gradients (clipping). A 0-d float32 tensor on the parameters'
                device is not waited for, and is not finite where the caller has found gradients
                that are not; without one they are looked through here, one pass more (and a
                collective, where parameters are distributed). What is not finite is left out
                whole and `refused` counts it. A gradient of None is zero.

        Returns:
            One `Entries` per plan of `layout`, the indices ascending.

        Raises:
            TypeError: a gradient is sparse.
            ValueError: a parameter has been frozen since.
        """
        for name, parameter in zip(self.names, self._parameters, strict=True):
            check_dense(name, parameter.grad)
            if not parameter.requires_grad:
                raise ValueError(
                    f"parameter {name} has been frozen since the optimiser was made, which all "
                    "peers would have to know; make a new one"
                )
        if isinstance(grad_scale, Tensor):
            self._guard.count(grad_scale)
        else:
            grad_scale = self._guard.scale((p.grad for p in self._parameters), grad_scale)
        self._finish_decay()
        if self.weight_decay != 0.0:
            self._shrink = 1.0 - self._rate(lr) * self.weight_decay
        gradients = self.parts.gradients()
        sent: Sequence[Entries | None] = previous or [None] * len(self.layout.plans)
        entries = []
        for at, (plan, backend, own) in enumerate(
            zip(self.layout.plans, self.backends, sent, strict=True)
        ):
            delta = self._delta.fetch(at)
            entries.append(
                encode(
                    plan,
                    delta,
                    [gradients[m.position] for m in plan.members],
                    _every(lr, plan),
                    decay=self.compression_decay,
                    gradient_scale=grad_scale,
                    previous=own,
                    backend=backend,
                )
            )
            self._delta.keep(at, delta)
        self._ahead_rate = None
        return entries

    def plan_deltas(self) -> list[Tensor]:
        """The state itself, `[chunks, h, w]` of each plan; in host memory where offloaded."""
        return self._delta.buffers()

    @torch.no_grad()
    def update(self, entries: Sequence[Entries], lr: float | Tensor) -> None:
        """`parameters -= lr * sign(decode(mean of the peers' entries))`, weight decay done.

        Of parameters in the look-ahead it is the master copy that changes, and they become the next
        look-ahead; plain ones stay plain.

        Args:
            entries: the peers' entries side by side, one `Entries` per plan. Nothing is checked.
            lr: learning rate.
        """
        ahead = self._looking_ahead
        plain, tensors = self._begin(), self.parts.tensors()
        for at, (plan, backend, e) in enumerate(
            zip(self.layout.plans, self.backends, entries, strict=True)
        ):
            apply(
                plan,
                [plain[m.position] for m in plan.members],
                e,
                _every(lr, plan),
                shrinks=self._shrinks(plan),
                ahead=[tensors[m.position] for m in plan.members] if ahead else None,
                delta=self._delta.fetch(at) if ahead else None,
                backend=backend,
            )
        self._end()
        self._shrink = None
        self._ahead_rate = lr if ahead else None

    def _begin(self) -> list[Tensor]:
        """The plain parameters, to be changed in place; then `_end`."""
        if self._looking_ahead:
            return self._master
        if any(map(self._is_wide, self._parameters)):
            self._take_up()
            return self._master
        self.parts.pull()
        return self.parts.tensors()

    def _end(self) -> None:
        """Bring the parameters up to date with what `_begin` gave, or with their look-ahead."""
        if not self._looking_ahead and any(map(self._is_wide, self._parameters)):
            torch._foreach_copy_(self.parts.tensors(), self._master)
            self._bring_back()
        self.parts.push()

    def _take_up(self) -> list[Tensor]:
        """Make the master copy that of the parameters, which are plain; returns them.

        Where it is wider, it keeps what is more than the parameters hold: all but what somebody
        else has changed since they were rounded from it. Nothing is waited for.
        """
        self.parts.pull()
        tensors = self.parts.tensors()
        if not self._master:
            given = tensors if self._given is None else self.parts.of(self._given)
            self._master = [
                g if g.dtype != t.dtype else t.to(self._master_type(t), copy=True)
                for t, g in zip(tensors, given, strict=True)
            ]
            return tensors
        for master, t in zip(self._master, tensors, strict=True):
            if self._is_wide(t):
                torch.where(master.to(t.dtype) == t, master, t.to(master.dtype), out=master)
            else:
                master.copy_(t)
        return tensors

    def _bring_back(self) -> None:
        """Bring the master copies that were given up to date; a collective for divided chunks."""
        if self._given is not None:
            self.parts.bring_back(self._master, self._given)

    def _master_type(self, parameter: Tensor) -> torch.dtype:
        return torch.float32 if self._is_wide(parameter) else parameter.dtype

    def _is_wide(self, parameter: Tensor) -> bool:
        """Whether a parameter's master copy is wider than it."""
        return self._master_dtype == torch.float32 and parameter.dtype.itemsize < 4

    def _rate(self, rate: float | Tensor) -> float | Tensor:
        """A learning rate in the precision of the kernels."""
        if any(plan.compute_dtype == torch.float64 for plan in self.layout.plans):
            return rate
        return single(rate)

    def zero_momentum(self) -> None:
        """Forget all momentum: delta becomes zero."""
        self.plain()
        self._delta.zero()

    def momentum(self) -> dict[str, Tensor]:
        """Delta by parameter name, in the encoded shape; views where they can be.

        Of a sharded parameter a DTensor, or the whole where its chunks have been divided among
        ranks, which makes this a collective.
        """
        return {name: self._whole_delta(i) for i, name in enumerate(self.names)}

    def _whole_delta(self, position: int) -> Tensor:
        return self.parts.whole(position, self._delta.of_parameter(position))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A copy of the state on the CPU: `{"delta": {name: tensor in the encoded shape}}`.

        The encoded shape is `[..., R/h, C/w, h, w]`, `[N/w, w]` for a vector. Parameters are not
        part of it, but for a master copy that is wider than they, `"master"`, where there is one by
        now. That of a sharded parameter is whole on every rank; a collective then.
        """
        self._finish_decay()
        state = {"delta": {name: self._whole_delta(i) for i, name in enumerate(self.names)}}
        if self._master:
            state["master"] = {
                name: self.parts.whole(i, self._chunks_of(i).contiguous())
                for i, name in enumerate(self.names)
                if self._is_wide(self._parameters[i])
            }
        return {
            kind: {name: full_tensor(t).to("cpu", copy=True) for name, t in tensors.items()}
            for kind, tensors in state.items()
            if tensors
        }

    def _chunks_of(self, position: int) -> Tensor:
        """A view of a parameter's master copy in the encoded shape."""
        layout, master = self.parts.layouts[position], self._master[position]
        return chunk_view(master, layout.h, layout.w).view(layout.xshape)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; deltas of another dtype are converted.

        A master copy goes on from where it was for parameters that are still what it rounds to;
        load them before the next step. Without one in the state, or in this run, they are it.

        Raises:
            ValueError: a parameter is missing, unknown or cut otherwise; nothing has been changed
                then.
        """
        if "delta" not in state_dict:
            raise ValueError(f"a Distro state has the key delta, got {sorted(state_dict)}")
        saved: Mapping[str, Tensor] = state_dict["delta"]
        masters: Mapping[str, Tensor] = state_dict.get("master", {})
        for kind, found in (("delta", set(saved)), ("master", set(masters))):
            for name in sorted(found ^ set(self.names) if kind == "delta" else found - set(saved)):
                where = "no such parameter" if name in found else "missing from the saved state"
                raise ValueError(f"{kind} of parameter {name}: {where}")
        for p in self._wholes:
            check_delta_shape(p, saved[p.name])
            if p.name in masters:
                check_delta_shape(p, masters[p.name], "master")
        self.plain()
        if masters:
            self._take_up()
        for i, (name, parameter) in enumerate(zip(self.names, self._parameters, strict=True)):
            self._delta.set(i, self.parts.own(i, saved[name].to(parameter.device)))
            if name in masters and self._is_wide(parameter):
                own = self.parts.own(i, masters[name].to(parameter.device))
                self._chunks_of(i).copy_(own.view(self.parts.layouts[i].xshape))

    def _decayed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors, one per parameter, those that weight decay is for."""
        pairs = zip(self.names, tensors, strict=True)
        return [tensor for name, tensor in pairs if name not in self._undecayed]

    def _shrinks(self, plan: ChunkPlan) -> Rates | None:
        """Factors on the members of a class that decay has left to do; None for none."""
        shrink = self._shrink
        if shrink is None:
            return None
        factors = [
            1.0 if self.names[m.position] in self._undecayed else shrink for m in plan.members
        ]
        if all(factor is shrink for factor in factors):
            return _every(shrink, plan)
        if not isinstance(shrink, Tensor):
            return factors  # type: ignore[return-value]
        return torch.stack([shrink if f is shrink else torch.ones_like(shrink) for f in factors])

    def _finish_decay(self) -> None:
        """Do the weight decay that no `update` has done in passing."""
        if self._shrink is None:
            return
        torch._foreach_mul_(self._decayed(self._begin()), self._shrink)
        if not self._looking_ahead:
            self._end()
        self._shrink = None


def _trained(
    named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
) -> list[tuple[str, Tensor]]:
    """Names and tensors of the parameters that require gradients, sorted by name."""
    if isinstance(named_parameters, Mapping):
        named_parameters = named_parameters.items()
    trained = sorted(((n, p) for n, p in named_parameters if p.requires_grad), key=lambda np: np[0])
    if not trained:
        raise ValueError("named_parameters holds no parameter that requires gradients")
    for (name, _), (following, _) in itertools.pairwise(trained):
        if name == following:
            raise ValueError(f"named_parameters holds {name} twice")
    return trained


def _every(rate: float | Tensor, plan: ChunkPlan) -> Rates:
    """One rate for all members of a class."""
    return rate if isinstance(rate, Tensor) else [rate] * len(plan.members)


def _same(a: float | Tensor | None, b: float | Tensor) -> bool:
    """Whether two rates are known to be equal, without looking at what is on a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b
