"""A further rank's part of a training step, in the arithmetic and order of Psyche's core.

Rank 0's trainer is compiled into the core and issues its collectives parameter by parameter. This
one takes part in exactly these, and adds none.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from psyche_fast.psyche import dtensor_helpers
from psyche_fast.psyche.interface import CausalLM
from psyche_fast.psyche.learning_rate import learning_rate
from psyche_fast.psyche.optimizers import Results, make_optimizer
from psyche_fast.schedules import LearningRateSchedule
from psyche_fast.sharding import full_tensor, local_tensor


class Trainer:
    """One rank's trainer, with the face of the one in Psyche's compiled extension.

    Args:
        device: this rank's, as a number or torch's; the model knows its own.
        causal_lm: this rank's model. Its parameters are taken now: after a forward FSDP2 hands out
            others, which are temporary.
        lr_scheduler_json: the schedule, as the core sends it.
        optimizer_json: the optimiser likewise.
        config_json: the model's configuration.
        micro_batch_size: rows of a micro-batch, all ranks together.
        grad_accum_in_fp32: False alone.

    Raises:
        ValueError: what is asked for is malformed, or the core itself cannot do it.
    """

    def __init__(
        self,
        device: int | torch.device,
        causal_lm: CausalLM,
        lr_scheduler_json: str,
        optimizer_json: str,
        config_json: str,
        micro_batch_size: int,
        grad_accum_in_fp32: bool,
    ) -> None:
        if grad_accum_in_fp32:
            raise ValueError(
                "grad_accum_in_fp32: Psyche's core cannot do it to a model that is spread over "
                "ranks; turn it off"
            )
        self._model = causal_lm
        self._schedule = LearningRateSchedule.from_json(json.loads(lr_scheduler_json))
        named = causal_lm.named_parameters()
        # by bytes, as Rust compares text
        names = sorted(named, key=str.encode)
        self._parameters = [named[name] for name in names]
        self._micro_batch_size = micro_batch_size
        self._optimizer = make_optimizer(json.loads(optimizer_json), self._parameters)
        causal_lm.train()

    def train(
        self,
        step: int,
        zero_optim: bool,
        batch_id: tuple[int, int],
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor | None,
        sequence_lengths: list[list[int]] | None,
        warmup_lr_between: tuple[int, int] | None,
        prev_self_distro_results: Results | None,
    ) -> tuple[None, float]:
        """Forward and backward over a batch and, with DisTrO, this rank's part of a result.

        Args:
            step: the step.
            zero_optim: whether the momentum is to be forgotten first.
            batch_id: of no consequence here.
            input_ids: int64 `[B, L]`, the whole batch, as the next three.
            labels: None where they are the inputs.
            position_ids: None for 0 .. L-1.
            sequence_lengths: the lengths of each row's documents.
            warmup_lr_between: see `schedules.warmup_factor`.
            prev_self_distro_results: rank 0's own of the step before.

        Returns:
            None in place of a result, and the mean loss of this rank's rows; micro-batches whose
            loss is not finite count as 0, as with rank 0.

        Raises:
            ValueError: a malformed batch.
        """
        lr = learning_rate(self._schedule, step, warmup_lr_between)
        prev_lr = learning_rate(self._schedule, max(step - 1, 0), warmup_lr_between)
        with torch.no_grad():
            for parameter in self._parameters:
                dtensor_helpers.zero_grad(parameter)
            if zero_optim:
                self._optimizer.zero()
            self._optimizer.before_batch(prev_lr)
        loss = self._forward_backward(input_ids, labels, position_ids, sequence_lengths)
        with torch.no_grad():
            self._optimizer.after_batch(prev_self_distro_results or [], prev_lr, lr)
        return None, float(loss)

    def _forward_backward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor | None,
        sequence_lengths: list[list[int]] | None,
    ) -> Tensor:
        size = self._micro_batch_size
        count = -(-len(input_ids) // size)
        inputs = input_ids.chunk(count)
        targets = inputs if labels is None else labels.chunk(count)
        positions = [None] * count if position_ids is None else position_ids.chunk(count)
        total = torch.zeros((), device=input_ids.device)
        for number in range(count):
            # The core cuts lengths by `size`, tensors evenly.
            cut = slice(number * size, (number + 1) * size)
            lengths = None if sequence_lengths is None else sequence_lengths[cut]
            _, loss = self._model.forward(
                inputs[number], targets[number], positions[number], lengths, None, float(count)
            )
            assert loss is not None, "there are labels"
            loss.backward()
            loss = loss.detach().float()
            total += torch.where(loss.isfinite(), loss, 0.0)
        return total

    @torch.no_grad()
    def optimize(
        self,
        step: int,
        warmup_lr_between: tuple[int, int] | None,
        distro_results: Results | None,
    ) -> None:
        """The optimiser's step, with DisTrO on the results of all peers.

        Args:
            step: the step.
            warmup_lr_between: see `schedules.warmup_factor`.
            distro_results: one list from each peer; empty for none.

        Raises:
            ValueError: the results are not of this model.
        """
        lr = learning_rate(self._schedule, step, warmup_lr_between)
        self._optimizer.step(distro_results or [], lr)

    @torch.no_grad()
    def extract(self) -> None:
        """This rank's part of gathering every parameter, one after another."""
        for parameter in self._parameters:
            full_tensor(parameter)

    @torch.no_grad()
    def truncate_bf16(self) -> None:
        """Rounds the parameters to bfloat16 in place."""
        for parameter in self._parameters:
            part = local_tensor(parameter)
            part.copy_(part.to(torch.bfloat16))
