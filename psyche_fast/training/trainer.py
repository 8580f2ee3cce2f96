"""One rank's trainer: what each operation of the protocol does to model and optimiser.

The core (rank 0) and the sidecars run the same code; who sends what to whom is theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.collectives.identical import check_identical
from psyche_fast.config import OptimizerConfig
from psyche_fast.distro import DistroResult
from psyche_fast.models import CausalLM
from psyche_fast.schedules import LearningRateSchedule, warmup_factor
from psyche_fast.training.gradients import Fp32Accumulator, clip_factor, global_norm, gradients
from psyche_fast.training.optimizers import (
    Results,
    drop_gradients,
    local_parts,
    make_optimizer,
)
from psyche_fast.training.topology import Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOutput:
    """What one ``train`` gave on this rank.

    Attributes:
        loss: fp32 ``[1]``; the mean over all ranks is the batch's mean loss per real token, times
            the share of rows that have any (Psyche's rank 0 pads a batch with rows that have none
            and undoes that factor).
        grad_norm: fp32 0-d, of this replica, before clipping.
        nonfinite_losses: micro-batches left out because their loss was not finite.
        refused: whether the whole gradient was refused because it was not finite.
        real_rows: that share of rows.
        results: DisTrO's result.
    """

    loss: Tensor
    grad_norm: Tensor
    nonfinite_losses: int
    refused: bool
    real_rows: float
    results: list[DistroResult]


class Trainer:
    """Trains one rank's model.

    Args:
        model: this rank's model.
        topology: this rank's place.
        schedule: learning rates.
        optimizer: which optimiser.
        micro_batch_size: rows per micro-batch of one replica (already times dp).
        grad_accum_in_fp32: add up micro-batches' gradients in fp32.
        exchanges: replicas train shares of the batch and exchange results among themselves; else
            every replica trains the whole batch and results come from rank 0.
        check_every: steps between checks that the replicas hold the same bits; 0 for none.
        optim_stats: keep norms of gradient and momentum per parameter in ``stats``.
    """

    def __init__(
        self,
        model: CausalLM,
        topology: Topology,
        schedule: LearningRateSchedule,
        optimizer: OptimizerConfig,
        *,
        micro_batch_size: int,
        grad_accum_in_fp32: bool = False,
        exchanges: bool = False,
        check_every: int = 0,
        optim_stats: bool = False,
    ) -> None:
        self.model = model
        self.topology = topology
        self.schedule = schedule
        self.parameters = {n: p for n, p in model.named_parameters().items() if p.requires_grad}
        self._clip = optimizer.clip_grad_norm
        self._optimizer = make_optimizer(optimizer, self.parameters, topology.peers, exchanges)
        self._micro_batch_size = micro_batch_size
        # Autograd adds up in the parameters' own type: nothing to gain where that is fp32.
        wants = grad_accum_in_fp32 and any(
            p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters.values()
        )
        self._accumulator = Fp32Accumulator(self.parameters) if wants else None
        self._exchanges = exchanges
        self._check_every = check_every
        self._optim_stats = optim_stats
        self.stats: dict[str, float] = {}
        model.train()

    @property
    def bytes_sent(self) -> int:
        """Bytes of this rank's contribution to the last exchange."""
        return self._optimizer.bytes_sent

    def learning_rate(self, step: int, warmup_lr_between: tuple[int, int] | None = None) -> float:
        """Learning rate of ``step``, 0 or more."""
        return self.schedule.get_lr(step) * warmup_factor(step, warmup_lr_between)

    def train(
        self,
        step: int,
        batch: Batch,
        *,
        zero_optim: bool = False,
        warmup_lr_between: tuple[int, int] | None = None,
        results: Results | None = None,
    ) -> TrainOutput:
        """Look-ahead, forward and backward over all micro-batches, and DisTrO's result.

        Args:
            step: the step.
            batch: the whole batch, the same on every rank.
            zero_optim: forget the momentum first.
            warmup_lr_between: see ``schedules.warmup_factor``.
            results: own results of the previous step, where rank 0 sent them.

        Raises:
            ValueError: malformed sequence lengths, position ids or results.
        """
        lr = self.learning_rate(step, warmup_lr_between)
        prev_lr = self.learning_rate(max(step - 1, 0), warmup_lr_between)
        # Checked before anything changes.
        batch = self.model.prepare(batch)
        drop_gradients(self.parameters)
        if zero_optim:
            self._optimizer.zero()
        self._optimizer.before_forward(prev_lr)
        real_tokens = batch.real_tokens()
        real_rows = float((real_tokens > 0).float().mean())
        loss, left_out = self._forward_backward(batch, int(real_tokens.sum()))
        loss *= real_rows
        norm = global_norm(gradients(self.parameters.values()), self.model.device)
        refused = not bool(norm.isfinite())
        if refused:
            log.warning("step %d: the gradient is not finite and is refused", step)
            drop_gradients(self.parameters)
        if self._optim_stats:
            self.stats = self._statistics()
        own = self._optimizer.after_backward(
            results or [], prev_lr, lr, clip_factor(norm, self._clip)
        )
        return TrainOutput(loss, norm, left_out, refused, real_rows, own)

    def _forward_backward(self, batch: Batch, all_tokens: int) -> tuple[Tensor, int]:
        place = self.topology
        if self._exchanges:
            batch = batch.share(place.replica, place.replicas)
        tokens = int(batch.real_tokens().sum())
        total = torch.zeros(1, device=self.model.device)
        left_out = 0
        for micro in batch.micro_batches(self._micro_batch_size) if batch.rows else []:
            mine = micro.pad_rows(place.dp).share(place.shard, place.dp)
            # Every real token of the replica's share weighs the same, however the rows fall into
            # micro-batches; FSDP2 averages over its dp ranks, hence the factor.
            weight = place.dp * int(mine.real_tokens().sum()) / max(tokens, 1)
            loss = self.model.loss(mine) * weight
            if not self._agree(bool(loss.isfinite())):
                left_out += 1
                continue
            loss.backward()
            total += loss.detach().float()
            if self._accumulator is not None:
                self._accumulator.add()
        if self._accumulator is not None:
            self._accumulator.finish()
        if self._exchanges:
            total *= place.replicas * tokens / max(all_tokens, 1)
        return total, left_out

    def _agree(self, finite: bool) -> bool:
        """Whether the loss is finite on all ranks of the replica: backward is collective."""
        if self.topology.copy is None:
            return finite
        flag = torch.tensor(float(finite), device=self.model.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.topology.copy)
        return bool(flag)

    def optimize(
        self,
        step: int,
        *,
        warmup_lr_between: tuple[int, int] | None = None,
        results: Results | None = None,
    ) -> None:
        """The optimiser's step.

        Args:
            step: the step.
            warmup_lr_between: see ``schedules.warmup_factor``.
            results: all peers' results of the previous step, where rank 0 sent them.

        Raises:
            ValueError: a result is malformed.
            ReplicasDiffer: the replicas' parameters are no longer bit-identical.
        """
        if self._exchanges:
            results = None
        self._optimizer.step(results, self.learning_rate(step, warmup_lr_between))
        peers = self.topology.peers
        if peers is not None and self._check_every and step % self._check_every == 0:
            check_identical(local_parts(self.parameters), peers, step)

    @torch.no_grad()
    def forward(
        self,
        batch: Batch,
        *,
        num_logits_to_keep: int | None = None,
        loss_scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Forward without gradient, each dp rank on its rows: logits and, with labels, the loss."""
        place = self.topology
        mine = self.model.prepare(batch).pad_rows(place.dp).share(place.shard, place.dp)
        self.model.eval()
        try:
            return self.model.forward(
                mine, num_logits_to_keep=num_logits_to_keep, loss_scale=loss_scale
            )
        finally:
            self.model.train()

    @torch.no_grad()
    def extract(self) -> Iterator[tuple[str, Tensor | None]]:
        """The full parameters by checkpoint name, one at a time; every rank takes part.

        Yields:
            names, and the tensors on the CPU of each replica's first rank, None elsewhere.
        """
        yield from self.model.full_state_dict_iter()

    @torch.no_grad()
    def truncate_bf16(self) -> None:
        """Rounds the parameters to bfloat16 in place."""
        for part in local_parts(self.parameters).values():
            part.copy_(part.to(torch.bfloat16))

    def _statistics(self) -> dict[str, float]:
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        stats = {}
        for kind, tensors in (("grad_norm", grads), ("momentum_norm", self._optimizer.momentum())):
            for name, tensor in tensors.items():
                stats[f"{kind}/{name}"] = float(global_norm([tensor], self.model.device))
        return stats
