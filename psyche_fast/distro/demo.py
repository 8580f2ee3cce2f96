"""`DeMo`: decoupled momentum as a `torch.optim.Optimizer` (DeMo, arXiv 2411.19870)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast import kernels
from psyche_fast.collectives import exchange
from psyche_fast.distro.layout import Layout, ParameterLayout, warn_of_tiny_chunks
from psyche_fast.distro.optimizer import check_compression, check_delta_shape
from psyche_fast.kernels.plan import Entries

_HYPERPARAMETERS = ("compression_decay", "compression_topk", "compression_chunk", "process_group")


class DeMo(torch.optim.Optimizer):
    """Sign descent on the momentum's largest DCT coefficients, which are all that peers exchange.

    Each `step()`, for every parameter::

        theta *= 1 - lr * weight_decay
        delta  = compression_decay * delta + lr * grad
        own    = top-k of the chunked DCT of delta      # ties to the lowest index
        delta -= decode(own)
        theta -= lr * sign(decode(mean over the peers of own))

    The peers are the ranks of `process_group`; one all-gather per step carries everything.
    Gradients must not be averaged between them by other means (run DDP under `no_sync`), and
    `.grad` is left as it is. A parameter without gradient takes part with a gradient of zero, so
    that all ranks stay in step.

    `state[p]["delta"]` is float32 (float64 for float64 parameters), in the encoded shape `[...,
    R/h, C/w, h, w]` (`[N/w, w]` for a vector); `state_dict` round-trips bit for bit.

    Args:
        params: tensors, parameter groups (each may have its own `lr` and `weight_decay`) or (name,
            tensor) pairs.
        lr: learning rate.
        compression_decay: decay of delta per step, `0 <= beta < 1`.
        compression_topk: coefficients sent per chunk.
        compression_chunk: side of a chunk; a dimension is cut by its largest divisor that is not
            larger.
        weight_decay: decoupled weight decay.
        process_group: the peers; the default group where None. Without torch.distributed there is
            one peer.
        backend: "auto" or "torch".

    Attributes:
        data_transmit: bytes of results that this rank sent in the last step.
        data_receive: bytes of results that it received, its own included.

    Raises:
        ValueError: an argument out of range, or a sharded parameter (`Distro` takes those).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_compression(compression_decay, compression_topk, compression_chunk, weight_decay)
        if lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        self.backend = kernels.resolve_backend(backend)
        self.compression_decay = compression_decay
        self.compression_topk = compression_topk
        self.compression_chunk = compression_chunk
        self.process_group = process_group
        self.data_transmit = 0
        self.data_receive = 0
        self._plan: _Plan | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._plan = _Plan(self)
        warn_of_tiny_chunks(self._plan.layout.parameters, compression_chunk)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; a collective over the peers.

        Args:
            closure: computes the loss and the gradients anew, before the step.

        Returns:
            What the closure returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is None:
            self._plan = _Plan(self)
        plan = self._plan
        rates = []
        for group in self.param_groups:
            taken = [p for p in group["params"] if p.requires_grad]
            rates += [float(group["lr"])] * len(taken)
            if group["weight_decay"] != 0.0 and taken:
                torch._foreach_mul_(taken, 1.0 - group["lr"] * group["weight_decay"])
        peers = self._peers()
        own = [self._encode(plan, i, rates) for i in range(len(plan.layout.plans))]
        self.data_transmit = sum(e.indices.nbytes + e.values.nbytes for e in own)
        self.data_receive = peers * self.data_transmit
        gathered = self._gather(plan, own) if peers > 1 else own
        for i, chunks in enumerate(plan.layout.plans):
            parameters = [plan.parameters[m.position] for m in chunks.members]
            lrs = [rates[m.position] for m in chunks.members]
            if peers == 1:
                # The mean is the own result: one decode serves delta and the parameters.
                kernels.subtract(
                    chunks,
                    plan.deltas[i],
                    own[i],
                    parameters=parameters,
                    learning_rates=lrs,
                    backend=self.backend,
                )
            else:
                kernels.subtract(chunks, plan.deltas[i], own[i], backend=self.backend)
                kernels.apply(chunks, parameters, gathered[i], lrs, backend=self.backend)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their delta starts at zero."""
        super().add_param_group(param_group)
        self._plan = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: a delta is missing or cut otherwise, naming the parameter; nothing has been
                changed then.
        """
        saved = self._saved_deltas(state_dict)
        super().load_state_dict(state_dict)
        # torch has converted the state to each parameter's dtype, which would round delta: put the
        # saved one in.
        for p, delta in saved.items():
            self.state[p]["delta"] = delta.detach().to(p.device, copy=True)
        self._plan = _Plan(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the plan and the process group, which cannot be copied."""
        kept = {name: getattr(self, name) for name in _HYPERPARAMETERS[:-1]}
        traffic = {"data_transmit": self.data_transmit, "data_receive": self.data_receive}
        return {**super().__getstate__(), **kept, **traffic, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; it exchanges with the default process group."""
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        self._plan = None

    def _peers(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def _encode(self, plan: _Plan, i: int, rates: list[float]) -> Entries:
        chunks = plan.layout.plans[i]
        return kernels.encode(
            chunks,
            plan.deltas[i],
            [plan.parameters[m.position].grad for m in chunks.members],
            [rates[m.position] for m in chunks.members],
            decay=self.compression_decay,
            backend=self.backend,
        )

    def _gather(self, plan: _Plan, own: list[Entries]) -> list[Entries]:
        """All peers' entries side by side, in rank order, one `Entries` per chunk class."""
        tensors = [t for e in own for t in (e.indices, e.values)]
        peers = exchange.start(tensors, self.process_group or dist.group.WORLD).wait()
        return [
            Entries(
                torch.cat([peer[2 * i] for peer in peers], dim=1).to(chunks.device),
                torch.cat([peer[2 * i + 1] for peer in peers], dim=1).to(chunks.device),
            )
            for i, chunks in enumerate(plan.layout.plans)
        ]

    def _saved_deltas(self, state_dict: dict[str, Any]) -> dict[Tensor, Tensor]:
        """The saved delta of every parameter here, checked."""
        saved: dict[Tensor, Tensor] = {}
        if len(state_dict["param_groups"]) != len(self.param_groups):
            return saved  # torch has the message for this
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if len(group["params"]) != len(saved_group["params"]):
                return saved
            for i, (p, key) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
                if not p.requires_grad:
                    continue
                layout = _layout_of(self, p, _name(group, i, key))
                entry = state_dict["state"].get(key, {})
                if "delta" not in entry:
                    raise ValueError(
                        f"delta of parameter {layout.name} is missing from the saved state"
                    )
                check_delta_shape(layout, entry["delta"])
                saved[p] = entry["delta"]
        return saved


class _Plan:
    """What `step` needs, worked out once; makes each `state[p]["delta"]` a view of its buffers."""

    def __init__(self, optimizer: DeMo) -> None:
        layouts = []
        self.parameters: list[Tensor] = []
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    name = _name(group, i, len(self.parameters))
                    layouts.append(_layout_of(optimizer, p, name))
                    self.parameters.append(p)
        self.layout = Layout(layouts)
        self.deltas = self.layout.zeros()
        for p, delta in zip(self.parameters, self.layout.views(self.deltas), strict=True):
            if "delta" in optimizer.state[p]:
                delta.copy_(optimizer.state[p]["delta"])
            optimizer.state[p]["delta"] = delta


def _name(group: dict[str, Any], i: int, position: int) -> str:
    names = group.get("param_names")
    return str(names[i]) if names else f"number {position}"


def _layout_of(optimizer: DeMo, parameter: Tensor, name: str) -> ParameterLayout:
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"parameter {name} is sharded (a DTensor), which DeMo does not take; use Distro"
        )
    return ParameterLayout.of(
        name,
        parameter.shape,
        parameter.dtype,
        parameter.device,
        compression_chunk=optimizer.compression_chunk,
        compression_topk=optimizer.compression_topk,
    )
