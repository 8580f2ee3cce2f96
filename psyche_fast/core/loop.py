"""One step of a run, as rank 0 goes through it."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
        # One copy of the gradient in the parameters' type: what a dense exchange sends at least.
        dense = sum(p.numel() * p.element_size() for p in parameters)
        self._dense_bytes = dense if config.replicas > 1 else 0
        self._began = time.perf_counter()

    def _publish(self, operation: messages.Operation) -> None:
        self._store.publish(operation, self._device)

    def step(self, step: int, batch: Batch) -> dict[str, object]:
        """Trains one batch on all ranks.

        Returns:
            the step's line of ``metrics.jsonl``.
        """
        trainer, timer = self._trainer, self._timer
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
            left_out, refused = runtime.counts(output, trainer.topology, self._device)
        # DisTrO's results land one step late: nothing is applied after the very first train.
        if not self._config.distro or step > self._first:
            with timer.phase("optimize"):
                self._publish(messages.Optimize(step=step))
                trainer.optimize(step)
        self._num_tokens += batch.input_ids.numel()
        world = self._config.world_size
        loss = float(output.loss) / world / max(output.real_rows, 1e-9)
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        return {
            "step": step,
            "loss": loss,
            "grad_norm": float(output.grad_norm),
            "learning_rate": trainer.learning_rate(step),
            "num_tokens": self._num_tokens,
            "tokens_per_second": batch.input_ids.numel() / seconds,
            "step_seconds": seconds,
            "seconds": timer.take(),
            "bytes_sent": trainer.bytes_sent,
            "dense_bytes": self._dense_bytes,
            "nonfinite_losses": left_out,
            "refused_gradients": refused,
            "memory": memory_bytes(self._device),
            **({"optim_stats": trainer.stats} if trainer.stats else {}),
        }

    def save(self, path: Path) -> None:
        """Writes a checkpoint folder; all ranks take part.

        Raises:
            OSError: it cannot be written; the ranks are in step all the same.
        """
        self._publish(messages.Extract())
        save_model(path, self._trainer.model, self._trainer.extract(), self._side_files)
