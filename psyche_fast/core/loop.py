"""One step of a run, as rank 0 goes through it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from psyche_fast import runtime
from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.metrics import PhaseTimer, memory_bytes
from psyche_fast.protocol import messages
from psyche_fast.protocol.store import CoreStore
from psyche_fast.protocol.tensors import send_batch
from psyche_fast.training.checkpoint import save_model
from psyche_fast.training.trainer import Trainer


class StepLoop:
    """Sends, trains, exchanges, optimises and accounts for one step at a time.

    Args:
        config: the run.
        store: where operations are published.
        trainer: rank 0's own.
        device: rank 0's own.
        timer: phases of a step are charged to it.
        side_files: what checkpoints take along from the model's folder.
    """

    def __init__(
        self,
        config: RunConfig,
        store: CoreStore,
        trainer: Trainer,
        *,
        device: torch.device,
        timer: PhaseTimer,
        side_files: Sequence[Path],
    ) -> None:
        self._config = config
        self._timer = timer
        self._device = device
        self._store = store
        self._trainer = trainer
        self._side_files = side_files
        self._first = config.start_step
        tokens = config.total_batch * config.sequence_length
        self._num_tokens = (self._first - 1) * tokens
        parameters = trainer.parameters.values()
        # Of one replica: one copy of the gradient in the parameters' type, what a dense exchange
        # sends at least.
        dense = sum(p.numel() * p.element_size() for p in parameters)
        self._dense_bytes = dense if config.replicas > 1 else 0
        self._vocabulary = trainer.model.config.get("vocab_size")

    def _publish(self, operation: messages.Operation) -> None:
        self._store.publish(operation, self._device)

    def step(self, step: int, batches: Iterator[tuple[int, Batch]]) -> dict[str, object]:
        """Trains one batch on all ranks.

        Args:
            step: the step.
            batches: gives its batch next.

        Returns:
            the step's line of ``metrics.jsonl``.

        Raises:
            ValueError: the batch has a token that the model does not know.
        """
        trainer, timer = self._trainer, self._timer
        began = time.perf_counter()
        with timer.phase("data"):
            _, batch = next(batches)
            self._check_tokens(step, batch)
        with timer.phase("send"):
            self._publish(
                messages.Train(
                    step=step,
                    zero_optim=False,
                    batch_id=((step - 1) * batch.rows, step * batch.rows - 1),
                    batch_shape=(batch.rows, batch.input_ids.shape[1]),
                    batch_has_labels=batch.labels is not None,
                    batch_has_position_ids=batch.position_ids is not None,
                    batch_sequence_lengths=batch.sequence_lengths,
                )
            )
            batch = send_batch(batch, self._device)
        with timer.phase("train"):
            output = trainer.train(step, batch)
        with timer.phase("loss"):
            dist.all_reduce(output.loss)
            counts = runtime.counts(output, trainer)
        # DisTrO's results land one step late: nothing is applied after the very first train.
        if not self._config.distro or step > self._first:
            with timer.phase("optimize"):
                self._publish(messages.Optimize(step=step))
                trainer.optimize(step)
        self._num_tokens += batch.input_ids.numel()
        seconds = time.perf_counter() - began
        return {
            "step": step,
            "loss": float(output.loss) / counts.kept if counts.kept else math.nan,
            "grad_norm": float(output.grad_norm),
            "learning_rate": trainer.learning_rate(step),
            "num_tokens": self._num_tokens,
            "tokens_per_second": batch.input_ids.numel() / seconds,
            "step_seconds": seconds,
            "seconds": timer.take(),
            "bytes_sent": counts.bytes_sent,
            "dense_bytes": self._dense_bytes,
            "nonfinite_losses": counts.nonfinite_losses,
            "refused_gradients": counts.refused_gradients,
            "memory": memory_bytes(self._device),
            **({"optim_stats": trainer.stats} if trainer.stats else {}),
        }

    def save(self, path: Path) -> None:
        """Writes a checkpoint folder; all ranks take part.

        Raises:
            OSError: it cannot be written; the ranks are in step all the same.
            ReplicasDiffer: there is nothing worth writing.
        """
        self._publish(messages.Extract())
        self._trainer.plain()
        if self._config.check_every:
            self._trainer.check_replicas()
        model = self._trainer.model
        save_model(path, model, model.full_state_dict_iter(), self._side_files)

    def _check_tokens(self, step: int, batch: Batch) -> None:
        if isinstance(self._vocabulary, int) and int(batch.input_ids.max()) >= self._vocabulary:
            raise ValueError(
                f"step {step}: token id {int(batch.input_ids.max())} in the data is outside the "
                f"model's vocabulary of {self._vocabulary} (--data-path, --model)"
            )
