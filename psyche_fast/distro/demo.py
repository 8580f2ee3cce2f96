"""`DeMo`: decoupled momentum as a `torch.optim.Optimizer` (DeMo, arXiv 2411.19870)."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.distro import exchange
from psyche_fast.distro.chunks import check_compression
from psyche_fast.distro.groups import accepts_references_order, highest
from psyche_fast.distro.optim import Params, PeerOptimizer
from psyche_fast.distro.plans import Plan
from psyche_fast.distro.verdict import agree
from psyche_fast.kernels.apply import apply, subtract
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries

logger = logging.getLogger(__name__)


class DeMo(PeerOptimizer):
    """Sign descent on the momentum's largest DCT coefficients, which are all that peers exchange.

    Each `step()`, for every parameter::

        theta *= 1 - lr * weight_decay
        delta  = compression_decay * delta + lr * grad
        own    = top-k of the chunked DCT of delta      # ties to the lowest index
        delta -= decode(own)                            # left to the next step, or `flush`
        theta -= lr * sign(decode(mean over the peers of own))

    The peers are the ranks of `process_group`; one all-gather per step carries everything.
    Gradients must not be averaged between them by other means: run DDP under `no_sync`, or with
    `register_comm_hook(None, noop_hook)`; the first step warns where all peers have the same ones.
    `.grad` is left as it is, and may have been accumulated. A parameter without gradient takes part
    with a gradient of zero, so that all ranks stay in step. Gradients of which an element is NaN or
    infinite are left out, all of the step's: delta would never be rid of it. Parameters that are
    frozen are left alone, and those that are unfrozen later join in, with what delta they had; all
    peers have to do it alike. Under a `GradScaler` a step in which any rank has found gradients
    that are not finite is left out on all.

    Groups with `method="adamw"` (norms, embeddings) are trained by torch's AdamW, with `betas` and
    `eps` as options, on the mean of the peers' gradients, which an all-reduce takes in float32. Of
    their parameters one that has no gradient on any peer is left alone, as torch does it.

    DTensor parameters work too (FSDP2, tensor parallelism): a replica is sharded, and the peers are
    the ranks with the same shard in other replicas, `mesh.get_group("replicate")`. Each rank
    compresses its own chunks; where a shard's edge cuts some, these are divided among the ranks of
    the replica, and steps are collectives of these. What a mesh replicates, as FSDP2 over a mesh of
    two dimensions does (HSDP), would have dense averages for gradients, and is refused.

    `state[p]["delta"]` is float32 (float64 for float64 parameters), in the encoded shape `[...,
    R/h, C/w, h, w]` (`[N/w, w]` for a vector). The next step takes out of it what the last one has
    sent, in the same pass as everything else: read it after `flush`. `state_dict`, copies and
    pickles have it done; they round-trip, and change nothing of the run, to the bit. What is only
    this replica's is called `delta/replica-N` in them, so that `torch.distributed.checkpoint` keeps
    all replicas' apart, and reshards each. Who loads with fewer replicas drops those that are left;
    more have none to load, which is refused.

    A learning rate may be a 0-d float32 tensor on the parameters' device, which is not waited for.
    There is neither `momentum` nor `betas` to schedule: OneCycleLR and CyclicLR want
    `cycle_momentum=False`.

    All steps belong on one CUDA stream: the kernels share the optimiser's scratch memory, which two
    streams would write at once. Steps may move to another stream once the former one has done its
    work (`torch.cuda.synchronize()`); before, they are refused with a RuntimeError.

    Args:
        params: tensors, parameter groups (each may have its own `method`, `lr`, `weight_decay`,
            `compression_topk` and `compression_chunk`) or (name, tensor) pairs.
        lr: learning rate. Where it is given by name, what else follows `params` may be in the
            reference's order, `compression_decay` first.
        compression_decay: decay of delta per step, `0 <= beta < 1`.
        compression_topk: coefficients sent per chunk.
        compression_chunk: side of a chunk; a dimension is cut by its largest divisor that is not
            larger.
        weight_decay: decoupled weight decay.
        process_group: the peers. Where None: the default group for plain parameters, nobody for
            those that are distributed over all ranks. Without torch.distributed there is one peer.
        backend: "auto", "triton", "torch" or "interpret".
        foreach: says nothing here, all chunks of a shape being one launch; so does `fused`.
        fused: see `foreach`.
        maximize: refused where it is True, and so are `capturable` and `differentiable`.
        capturable: see `maximize`.
        differentiable: see `maximize`.

    Attributes:
        data_transmit: bytes that this rank hands to exchanges in the last step: the message with
            its results, and dense gradients of AdamW's groups.
        data_receive: bytes of results that it received, its own included, and of such gradients.
        refused: 0-d int64 on the parameters' device, in how many steps this rank's gradients were
            left out because they, or `grad_scale`, were not finite.

    Raises:
        ValueError: an argument out of range, a setting that a group cannot have, a backend that
            cannot run, or parameters that are distributed over the peers.
    """

    method = "demo"
    _number: int

    @accepts_references_order
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        *,
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
            "backend": backend,
            "_number": 0,  # of the last exchange: what is sent twice is refused
        }
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "compression_topk": compression_topk,
            "compression_chunk": compression_chunk,
        }
        flags = {"maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        super().__init__(params, defaults, settings, flags)

    def _update(self, plan: Plan, factor: Tensor) -> None:
        gradients = plan.parts.gradients()
        for c in plan.classes:
            c.own = encode(
                c.plan,
                c.delta,
                c.of(gradients),
                c.rates(self.param_groups, learning_rate),
                decay=self.compression_decay,
                gradient_scale=factor.to(c.plan.device, non_blocking=True),
                previous=c.own,
                backend=c.backend,
            )
        received = self._gather(plan)
        if received is None:
            return
        decayed = any(group["weight_decay"] != 0.0 for group in self.param_groups)
        plan.parts.pull()
        tensors = plan.parts.tensors()
        for c, entries in zip(plan.classes, received, strict=True):
            apply(
                c.plan,
                c.of(tensors),
                entries,
                c.rates(self.param_groups, learning_rate),
                shrinks=c.rates(self.param_groups, shrink) if decayed else None,
                backend=c.backend,
            )
        plan.parts.push()

    @torch.no_grad()
    def flush(self) -> None:
        """Bring `state[p]["delta"]` up to date: take out of it what the last step has sent.

        Later steps are the same with it or without, to the bit.
        """
        for c in self._plan.classes if self._plan is not None else ():
            if c.own is not None:
                subtract(c.plan, c.delta, c.own, backend=c.backend)
                c.own = None

    def _publish(self, plan: Plan) -> None:
        self.flush()

    def _gather(self, plan: Plan) -> list[Entries] | None:
        """The peers' entries side by side, in rank order, one `Entries` per chunk class.

        What a peer has sent that cannot be right, or has not arrived whole at all peers, is left
        out by all, with a warning that names the sender; None where nothing remains.
        """
        own = [c.own for c in plan.classes if c.own is not None]
        form = plan.format
        assert form is not None
        self.data_transmit = form.size
        self.data_receive = plan.replicas * form.size
        if plan.peers is None:
            return own
        self._number += 1
        pending = exchange.start(form.pack(own, self._number, plan.replica), plan.peers)
        messages = pending.host()
        found = form.faults(messages, self._number, range(plan.replicas))
        refused, _ = agree(found | form.decode(messages, found)[1], messages, plan.peers)
        if self._guard.groups:  # what one shard leaves out, all leave out
            flags = torch.tensor([float(peer in refused) for peer in range(plan.replicas)])
            for peer in highest(flags, self._guard.groups).nonzero().view(-1).tolist():
                refused.setdefault(peer, "that of another shard is refused")
        entries, faults = form.begin_unpack(pending.wait(), leave_out=refused).result()
        for peer, what in sorted((refused | faults).items()):
            logger.warning("DeMo: the result of peer %d is refused: %s", peer, what)
        return entries


def learning_rate(group: dict[str, Any], rate: float | Tensor) -> float | Tensor:
    """A group's learning rate, for `ChunkClass.rates`."""
    return rate


def shrink(group: dict[str, Any], rate: float | Tensor) -> float | Tensor:
    """A group's factor on its parameters, for `ChunkClass.rates`."""
    return 1.0 - rate * group["weight_decay"]  # type: ignore[no-any-return]
