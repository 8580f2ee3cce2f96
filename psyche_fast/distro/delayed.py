"""`DisTrO`: results applied a step late, gradients taken ahead, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.distro.chunks import check_compression
from psyche_fast.distro.demo import learning_rate, shrink
from psyche_fast.distro.exchange import Exchange
from psyche_fast.distro.groups import ADAMW, accepts_references_order, copied_rate
from psyche_fast.distro.optim import Params, PeerOptimizer
from psyche_fast.distro.plans import Plan
from psyche_fast.kernels.apply import apply, lookahead, subtract
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries


class DisTrO(PeerOptimizer):
    """DisTrO in anybody's loop: `backward`, `step`, `zero_grad`.

    The t-th `step()`, with `lr` the learning rate of that moment, does what `Distro`'s calls do in
    Psyche's order, bit for bit::

        delta  = compression_decay * (delta - decode(own of step t-1)) + lr * grad
        own    = top-k of the chunked DCT of delta      # sent, and under way during the next step
        theta  = (1 - lr * weight_decay) * theta - lr * sign(decode(mean of step t-1's results))
        parameters = theta - lr * sign(delta)           # look-ahead: where the next gradient is due

    So parameters hold the look-ahead between steps, which differs between replicas; theta, the
    plain ones, are the same on all. `eval()` puts these into the parameters, to evaluate, to save a
    model or to change it, and `train()` goes back: call them where you call the model's.
    (Transformers' `Trainer` and accelerate do it of themselves for evaluation.) A step in
    evaluation is refused. `flush()` applies what is still under way, after the last step.

    On a GPU a step waits until the results of the last one are known to be right.

    What is said of `DeMo` holds here: peers, groups (`method="adamw"` for norms and embeddings,
    whose gradients are averaged at once), gradients, DTensors, GradScaler, streams.

    The state of a parameter is `delta`, as in `DeMo`, but for what the last step has sent still in
    it; `plain`, theta, in float32 for 16-bit parameters, which are rounded from it; `sent_indices`
    and `sent_values`; and `in_flight`, of how many replicas messages are under way: after a restart
    they are sent again, so that the run goes on to the bit. With another number of replicas they
    are forgotten, as if they had not been sent. Load the model first, then the optimiser: it sets
    the parameters.

    Args:
        params: as of `DeMo`.
        lr: learning rate.
        compression_decay: decay of delta per step, `0 <= beta < 1`.
        compression_topk: coefficients sent per chunk.
        compression_chunk: side of a chunk; a dimension is cut by its largest divisor that is not
            larger.
        weight_decay: decoupled weight decay.
        process_group: the peers, as of `DeMo`. Making the optimiser is a collective of all ranks
            where parameters are distributed, else of the peers.
        quantize: send the values' signs only, 1 bit each.
        backend: "auto", "triton", "torch" or "interpret".
        foreach: says nothing here; so does `fused`.
        fused: see `foreach`.
        maximize: refused where it is True, and so are `capturable` and `differentiable`.
        capturable: see `maximize`.
        differentiable: see `maximize`.

    Attributes:
        data_transmit: bytes that this rank sent in the last step.
        data_receive: bytes that it receives, its own included.
        refused: 0-d int64 on the parameters' device, in how many steps this rank's gradients were
            left out because they, or `grad_scale`, were not finite.
        is_training: whether parameters hold the look-ahead once there is one.

    Raises:
        ValueError: as of `DeMo`.
    """

    method = "distro"

    @accepts_references_order
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        compression_decay: float = 0.999,
        compression_topk: int = 4,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        *,
        quantize: bool = True,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_compression(compression_decay, compression_topk, compression_chunk, weight_decay)
        settings = {
            "compression_decay": compression_decay,
            "compression_topk": compression_topk,
            "compression_chunk": compression_chunk,
            "process_group": process_group,
            "quantize": quantize,
            "signs": quantize,
            "backend": backend,
            "is_training": True,
        }
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "compression_topk": compression_topk,
            "compression_chunk": compression_chunk,
        }
        flags = {"maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        super().__init__(params, defaults, settings, flags)

    quantize: bool
    is_training: bool

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their state starts at zero.

        Raises:
            ValueError: a setting out of range, or one that only the optimiser as a whole has.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["method"] != ADAMW:
            group.setdefault("previous_lr", 0.0)  # the one that the look-ahead was made with

    def _update(self, plan: Plan, factor: Tensor) -> None:
        if not self.is_training:
            raise RuntimeError("DisTrO.step was called in evaluation: call train() first")
        now = self._now
        if now.to_send_again:
            now.exchange.send(_own(plan))
            now.to_send_again = False
        now.exchange.poll()  # what has arrived is checked while the rest is launched
        gradients = plan.parts.gradients()
        for c in plan.classes:
            own = encode(
                c.plan,
                c.delta,
                c.of(gradients),
                c.rates(self.param_groups, learning_rate),
                decay=self.compression_decay,
                gradient_scale=factor.to(c.plan.device, non_blocking=True),
                previous=c.own if now.in_flight else None,
                backend=c.backend,
            )
            assert c.own is not None
            c.own.indices.copy_(own.indices)
            c.own.values.copy_(own.values)
        now.exchange.send(_own(plan))
        self.data_transmit = now.exchange.bytes_sent
        self.data_receive = plan.replicas * now.exchange.bytes_sent
        if not now.ahead:
            now.take_up(plan)
        for group in self.param_groups:
            if group["method"] != ADAMW:
                group["previous_lr"] = copied_rate(group["lr"])
        self._apply(plan, now.exchange.receive() if now.in_flight else None, decay=True)
        now.in_flight = True

    def _apply(self, plan: Plan, received: list[Entries] | None, *, decay: bool) -> None:
        """Results into the plain parameters, at the rates of the last step; then look ahead."""
        now, groups = self._now, self.param_groups
        decay = decay and any(group["weight_decay"] != 0.0 for group in groups)
        tensors = plan.parts.tensors()
        for at, c in enumerate(plan.classes):
            rates = c.rates(groups, learning_rate, "previous_lr")
            shrinks = c.rates(groups, shrink, "previous_lr") if decay else None
            plain, ahead = c.of(now.plain), c.of(tensors)
            if received is not None:
                apply(
                    c.plan, plain, received[at], rates,
                    shrinks=shrinks, ahead=ahead, delta=c.delta, backend=c.backend,
                )  # fmt: skip
                continue
            if shrinks is not None:
                for number, tensor in enumerate(plain):
                    tensor.mul_(shrinks if _is_single(shrinks) else shrinks[number])
            lookahead(c.plan, plain, c.delta, rates, ahead, backend=c.backend)
        plan.parts.push()
        now.ahead = True

    @torch.no_grad()
    def train(self) -> None:
        """Have the parameters hold the look-ahead again, after `eval`; a collective of a replica.

        What has been changed in the parameters meanwhile is taken up.
        """
        plan = self._current()
        self.is_training = True
        if self._now.in_flight and not self._now.ahead:
            self._now.take_up(plan)
            self._apply(plan, None, decay=False)

    @torch.no_grad()
    def eval(self) -> None:
        """Have the parameters hold the plain ones, the same on all replicas."""
        plan = self._current()
        self.is_training = False
        self._now.put_back(plan)

    @torch.no_grad()
    def flush(self) -> None:
        """Apply what is under way, at the last step's learning rates; parameters are plain then.

        A collective over the peers: after the last step. A step after it begins as the first did,
        with the momentum that there is.
        """
        if self._plan is None or not self._now.in_flight:
            return
        plan, now = self._plan, self._now
        if now.to_send_again:
            now.exchange.send(_own(plan))
            now.to_send_again = False
        if not now.ahead:
            now.take_up(plan)
        received = now.exchange.receive()
        if received is not None:
            self._apply(plan, received, decay=False)
        for c in plan.classes:
            assert c.own is not None
            subtract(c.plan, c.delta, c.own, backend=c.backend)
        now.in_flight = False
        now.put_back(plan)

    def add_state(self, plan: Plan) -> None:
        """See `Planned`."""
        self._now = _Now(plan, self._agreement(plan))
        indices = self._now.by_parameter(plan, [c.own.indices for c in plan.classes if c.own])
        values = self._now.by_parameter(plan, [c.own.values for c in plan.classes if c.own])
        for i, state in enumerate(plan.states):
            state["plain"] = self._now.plain[i]
            state["sent_indices" + plan.suffix] = indices[i]
            state["sent_values" + plan.suffix] = values[i]
            state["in_flight"] = torch.zeros((), dtype=torch.int64)

    def _publish(self, plan: Plan) -> None:
        if not self._now.ahead:
            self._now.take_up(plan)
        for state in plan.states:
            state["in_flight"].fill_(plan.replicas if self._now.in_flight else 0)

    def _resume(self, plan: Plan) -> None:
        now = self._now
        counts = {int(state["in_flight"]) for state in plan.states}
        now.ahead = counts != {0}  # else parameters are plain, and `plain` is taken from them
        now.in_flight = now.to_send_again = counts == {plan.replicas}
        if now.in_flight and self.is_training:
            self._apply(plan, None, decay=False)
        else:
            now.put_back(plan)

    def _agreement(self, plan: Plan) -> dist.ProcessGroup | None:
        """A group of gloo for what the peers refuse, made once for the same peers."""
        if plan.peers is None or plan.format is None:
            return None
        key, group = getattr(self, "_agreeing", (None, None))
        if key is plan.peers:
            return group
        sharded = any(isinstance(p, DTensor) for p in plan.compressed)
        ranks = None if sharded else dist.get_process_group_ranks(plan.peers)
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=ranks is not None)
        assert isinstance(made, dist.ProcessGroup)
        self._agreeing = (plan.peers, made)
        return made


class _Now:
    """What a plan of `DisTrO` has beside delta.

    Attributes:
        plain: the master copies of this rank's parts, one per compressed parameter.
        ahead: parameters hold the look-ahead, and `plain` is what counts.
        in_flight: results of the last step are under way, and own entries still in delta.
        to_send_again: they have been restored, and have yet to be sent.
        exchange: sends and receives; of no use where nothing is compressed.
    """

    def __init__(self, plan: Plan, agreement: dist.ProcessGroup | None) -> None:
        self.ahead = self.in_flight = self.to_send_again = False
        plan.parts.pull()
        self.plain = [
            t.to(torch.promote_types(t.dtype, torch.float32), copy=True)
            for t in plan.parts.tensors()
        ]
        if plan.format is not None:
            peers = None if agreement is None else plan.peers
            self.exchange = Exchange(plan.format, peers, agreement)
        for c in plan.classes:
            shape, device = (c.plan.chunks, c.plan.k), c.plan.device
            c.own = Entries(
                torch.zeros(shape, dtype=c.plan.index_dtype, device=device),
                torch.zeros(shape, dtype=c.plan.dtype, device=device),
                unique=True,
            )

    def by_parameter(self, plan: Plan, buffers: list[Tensor]) -> list[Tensor]:
        """Views `[*chunks, k]` of what lies chunk after chunk for each class."""
        views: dict[int, Tensor] = {}
        for c, buffer in zip(plan.classes, buffers, strict=True):
            for m in c.plan.members:
                part = buffer[m.start : m.start + m.count]
                views[m.position] = part.view(*m.lead, c.plan.k)
        return [views[i] for i in range(len(plan.compressed))]

    def take_up(self, plan: Plan) -> None:
        """Make `plain` that of the parameters, which are plain; a collective of a replica.

        Where it is wider, it keeps what is more than the parameters hold: all but what somebody
        else has changed since they were rounded from it.
        """
        plan.parts.pull()
        for master, t in zip(self.plain, plan.parts.tensors(), strict=True):
            if master.dtype != t.dtype:
                torch.where(master.to(t.dtype) == t, master, t.to(master.dtype), out=master)
            else:
                master.copy_(t)

    def put_back(self, plan: Plan) -> None:
        """Have the parameters hold the plain ones; a collective of a replica."""
        if self.ahead:
            torch._foreach_copy_(plan.parts.tensors(), self.plain)
            plan.parts.push()
            self.ahead = False


def _own(plan: Plan) -> list[Entries]:
    return [c.own for c in plan.classes if c.own is not None]


def _is_single(rates: Any) -> bool:
    return isinstance(rates, Tensor) and rates.dim() == 0
