"""One rank's trainer: what each operation of the protocol does to model and optimiser.

The core (rank 0) and the sidecars run the same code; who sends what to whom is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from psyche_fast.batch import Batch
from psyche_fast.config import OptimizerConfig
from psyche_fast.distro import DistroResult, replicas
from psyche_fast.models import CausalLM
from psyche_fast.rank.gradients import (
    Fp32Accumulator,
    clip_factor,
    drop_gradients,
    global_norm,
    gradients,
    local_parts,
)
from psyche_fast.rank.optimizers import Results, make_optimizer
from psyche_fast.rank.topology import Topology
from psyche_fast.schedules import LearningRateSchedule, warmup_factor


@dataclass(frozen=True)
class TrainOutput:
    """What one ``train`` gave on this rank. Tensors lie on its device and are not waited for.

    Attributes:
        step: the step.
        loss: fp32 ``[1]``. Where replicas exchange: the sum over the real tokens of this replica's
            rows, averaged over its ranks. Else the mean over all ranks is the batch's mean loss
            per real token, times the share of rows that have any (Psyche's rank 0 pads a batch
            with rows that have none and undoes that factor).
        grad_norm: fp32 0-d, of this replica, before clipping.
        nonfinite_losses: micro-batches left out because their loss was not finite.
        refused: bool 0-d; whether the whole gradient was refused because it was not finite.
        kept: fp32 ``[1]``; what ``loss`` would be if every loss that was kept had been 1.
        results: DisTrO's result.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    nonfinite_losses: int
    refused: Tensor
    kept: Tensor
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
            every replica trains the same batch and results come from rank 0.
        check_every: steps between checks that the replicas hold the same bits; 0 for none.
        optim_stats: keep norms of gradient and momentum per parameter in ``stats``.
        delta_dtype: DisTrO's momentum's type.
        offload_delta: keep DisTrO's momentum in host memory.
        defer_grad_sync: FSDP2 reduces gradients with the last micro-batch only. Until then each
            rank holds the gradient of all of the replica's (or its slice's) parameters, in fp32.
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
        delta_dtype: torch.dtype = torch.float32,
        offload_delta: bool = False,
        defer_grad_sync: bool = False,
    ) -> None:
        self.model = model
        self.topology = topology
        self.schedule = schedule
        self.parameters = {n: p for n, p in model.named_parameters().items() if p.requires_grad}
        self._clip = optimizer.clip_grad_norm
        self._optimizer = make_optimizer(
            optimizer,
            self.parameters,
            topology.peers,
            exchanges,
            delta_dtype=delta_dtype,
            offload_delta=offload_delta,
        )
        self._micro_batch_size = micro_batch_size
        # Autograd adds up in the parameters' own type: nothing to gain where that is fp32.
        wants = grad_accum_in_fp32 and any(
            p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters.values()
        )
        self._accumulator = Fp32Accumulator(self.parameters) if wants else None
        self._exchanges = exchanges
        self._defers = defer_grad_sync and isinstance(model.module, FSDPModule)
        self._check_every = check_every
        self._optim_stats = optim_stats
        self._step = 0
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
            batch: what this replica trains, the same on each of its ranks: where replicas exchange
                its share, else the whole batch.
            zero_optim: forget the momentum first.
            warmup_lr_between: see ``schedules.warmup_factor``.
            results: own results of the previous step, where rank 0 sent them.

        Raises:
            ValueError: malformed sequence lengths, position ids or results.
        """
        self._step = step
        lr = self.learning_rate(step, warmup_lr_between)
        prev_lr = self.learning_rate(max(step - 1, 0), warmup_lr_between)
        # Checked before anything changes.
        batch = self.model.prepare(batch)
        drop_gradients(self.parameters.values())
        if zero_optim:
            self._optimizer.zero_momentum()
        self._optimizer.look_ahead(prev_lr)
        real_tokens = batch.real_tokens()
        tokens = int(real_tokens.sum())
        loss, kept, left_out = self._forward_backward(batch, tokens)
        counted = tokens if self._exchanges else (real_tokens > 0).float().mean()
        loss *= counted
        kept *= counted
        if self._accumulator is not None:
            norm = self._accumulator.finish()
        else:
            norm = global_norm(gradients(self.parameters.values()), self.model.device)
        if self._optim_stats:
            self.stats = self._statistics(bool(norm.isfinite()))
        own = self._optimizer.after_backward(
            results or [], prev_lr, lr, clip_factor(norm, self._clip)
        )
        return TrainOutput(step, loss, norm, left_out, ~norm.isfinite(), kept, own)

    def _forward_backward(self, batch: Batch, tokens: int) -> tuple[Tensor, Tensor, int]:
        place = self.topology
        total, kept = torch.zeros(2, 1, device=self.model.device)
        left_out = 0
        kept_one: Batch | None = None
        micros = batch.micro_batches(self._micro_batch_size)
        for number, micro in enumerate(micros, start=1):
            mine = micro.pad_rows(place.dp).share(place.shard, place.dp)
            # Every real token of the batch weighs the same, however the rows fall into
            # micro-batches; FSDP2 averages over its dp ranks, hence the factor.
            weight = place.dp * int(mine.real_tokens().sum()) / max(tokens, 1)
            self._optimizer.receive()
            loss = self.model.loss(mine) * weight
            last = number == len(micros)
            finite = self._agree(bool(loss.isfinite()))
            self._optimizer.receive()  # while the backward runs, the host may come to its end
            if not finite:
                left_out += 1
                if last and self._defers and kept_one is not None:
                    self._reduce_deferred(kept_one)
                continue
            if self._defers:
                self._sync_gradients(last)
                kept_one = mine
            loss.backward()
            total += loss.detach().float()
            kept += weight
            if self._accumulator is not None and (last or not self._defers):
                self._accumulator.add(last=last)
        return total, kept, left_out

    def _sync_gradients(self, now: bool) -> None:
        assert isinstance(self.model.module, FSDPModule)
        self.model.module.set_requires_gradient_sync(now)

    def _reduce_deferred(self, kept: Batch) -> None:
        """Reduces what micro-batches have left where the last of them is left out.

        FSDP2 reduces in a backward only; this one adds nothing.
        """
        self._sync_gradients(True)
        (self.model.loss(kept) * 0.0).backward()
        if self._accumulator is not None:
            self._accumulator.add(last=True)

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
        if self._check_every and step % self._check_every == 0:
            self.check_replicas()

    def plain(self) -> None:
        """Makes the model's parameters the plain ones, for forward, extract and checkpoints.

        Nothing that ranks exchange is under way any more then.

        Between steps DisTrO leaves them in the look-ahead for the next one.
        """
        self._optimizer.plain()
        self._optimizer.settle()

    def check_replicas(self) -> None:
        """Compares the parameters' bits with the other replicas', where there are any.

        Raises:
            ReplicasDiffer: they are not the same.
        """
        if self._exchanges and self.topology.peers is not None:
            self._optimizer.plain()
            tensors = local_parts(self.parameters)
            replicas.start(tensors, self.topology.peers, self._step).finish()

    def _statistics(self, finite: bool) -> dict[str, float]:
        grads = {n: p.grad for n, p in self.parameters.items() if finite and p.grad is not None}
        stats = {}
        for kind, tensors in (("grad_norm", grads), ("momentum_norm", self._optimizer.momentum())):
            for name, tensor in tensors.items():
                stats[f"{kind}/{name}"] = float(global_norm([tensor], self.model.device))
        return stats
