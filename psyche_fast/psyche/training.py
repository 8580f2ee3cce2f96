"""What Psyche's `train` and `optimize` ask of a rank beyond our own core's.

Every replica trains the whole batch, results come from rank 0 with the operations, and learning
rates may be warmed up for a node that joins late.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from psyche_fast import config
from psyche_fast.batch import Batch
from psyche_fast.distro import DistroResult, DistroStep
from psyche_fast.distro.results import (
    collect,
    collect_own,
    own_results,
    to_results,
    whole_results,
)
from psyche_fast.models import CausalLM
from psyche_fast.psyche.messages import Hyperparameters, Optimize, Train, read_optimizer
from psyche_fast.rank.optimizers import AdamWOptimizer, Optimizer, distro_options
from psyche_fast.rank.topology import Topology
from psyche_fast.rank.trainer import Trainer, TrainOutput, trainable
from psyche_fast.schedules import warmup_factor

Results = list[list[DistroResult]]


class ReceivedDistro(DistroStep, Optimizer):
    """DisTrO on results that rank 0 sends, over whole parameters.

    Attributes:
        received: what came with the operation in hand: own results of the previous step for
            `train`, all peers' for `optimize`.
        generated: this rank's result of the last step, over whole parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], options: config.Optimizer) -> None:
        """Take the parameters by name."""
        # As Psyche's own trainer has it; rank 0 extracts the parameters themselves.
        super().__init__(parameters, master_dtype=torch.bfloat16, **distro_options(options))
        self.received: Results = []
        self.generated: list[DistroResult] = []

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """Compress.

        Raises:
            ValueError: a result is malformed.
        """
        previous = collect_own([own_results(self.parts, r) for r in self.received], self.layout)
        own = to_results(self.layout, self.compress(previous, lr, grad_scale=factor))
        self.generated = whole_results(self.parts, own)

    def step(self, lr: float) -> None:
        """Apply all peers' results of the previous step.

        Raises:
            ValueError: a result is malformed.
        """
        if self.received:
            own = [own_results(self.parts, peer) for peer in self.received]
            self.update(collect(own, self.layout), lr)


class PsycheTrainer(Trainer):
    """The trainer that `hyperparameters` asks for.

    Args:
        model: this rank's model.
        topology: this rank's place.
        operation: the hyperparameters.
    """

    def __init__(self, model: CausalLM, topology: Topology, operation: Hyperparameters) -> None:
        chosen = read_optimizer(operation.optimizer)
        options = config.Optimizer(max_grad_norm=0.0) if chosen is None else chosen.options()
        self.received: ReceivedDistro | None = None
        if options.distro:
            optimizer: Optimizer = ReceivedDistro(trainable(model), options)
            self.received = optimizer  # type: ignore[assignment]
        elif chosen is None:
            optimizer = Optimizer()
        else:
            optimizer = AdamWOptimizer(trainable(model), options)
        training = config.Training(
            # The protocol's is already times the data parallelism.
            micro_batch=-(-operation.micro_batch_size // topology.dp),
            grad_accum_in_fp32=operation.grad_accum_in_fp32,
            check_every=0,
        )
        self._warmup: tuple[int, int] | None = None
        super().__init__(
            model, topology, operation.schedule(), optimizer, training, options.max_grad_norm
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of `step`, with the warm-up of the operation in hand."""
        return super().learning_rate(step) * warmup_factor(step, self._warmup)

    def carry_out(
        self, operation: Train | Optimize, results: Results, batch: Batch | None = None
    ) -> TrainOutput | None:
        """Does what an operation asks for.

        Args:
            operation: it.
            results: what came with it.
            batch: of a train: the whole batch, the same on every rank.

        Returns:
            what a train gave; see `reported_loss`.

        Raises:
            ValueError: malformed sequence lengths, position ids or results.
        """
        self._warmup = operation.warmup_lr_between
        if self.received is not None:
            self.received.received = results
        if isinstance(operation, Optimize):
            self.optimize(operation.step)
            return None
        assert batch is not None
        if operation.zero_optim:
            self.zero()
        return self.train(operation.step, batch)


def reported_loss(output: TrainOutput) -> Tensor:
    """What a rank adds to the loss that Psyche's rank 0 sums up: fp32 `[1]`.

    Rank 0 pads a batch with rows without a real token and scales the mean loss by the share of the
    others, so that this undoes it.
    """
    rows = torch.tensor(output.row_tokens) > 0
    return (output.loss * rows.float().mean().to(output.loss.device)).view(1)
