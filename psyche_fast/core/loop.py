"""One step of a run, as rank 0 goes through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.metrics import PhaseTimer, memory_bytes
from psyche_fast.models import packing
from psyche_fast.psyche import messages
from psyche_fast.psyche.store import CoreStore
from psyche_fast.psyche.tensors import pack_batch
from psyche_fast.rank.checkpoint import save_model
from psyche_fast.rank.serve import Totals
from psyche_fast.rank.trainer import Trainer


@dataclass(frozen=True)
class _Sent:
    """A step that the sidecars have been sent."""

    number: int  # its operation's
    mine: Batch  # what replica 0 trains
    tokens: int  # of all replicas


@dataclass(frozen=True)
class _Trained:
    """A step whose line waits for the other ranks' part."""

    number: int
    totals: Totals
    grad_norm: Tensor
    line: dict[str, object]
    seconds: dict[str, float]


class StepLoop:
    """Sends, trains, exchanges, optimises and accounts for one step at a time.

    Nothing that the ranks say to each other is waited for in the step that it belongs to: a step's
    operation and batch are sent before the step before it is trained, and its line is written after
    the step that follows it. Over a slow link that costs no time as long as a step takes longer
    than a few round trips.

    Args:
        config: the run.
        store: where operations are published.
        trainer: rank 0's own.
        batches: gives the steps' batches in turn.
        report: takes the steps' lines of ``metrics.jsonl`` in turn.
        device: rank 0's own.
        timer: phases of a step are charged to it.
        side_files: what checkpoints take along from the model's folder.
    """

    def __init__(
        self,
        config: RunConfig,
        store: CoreStore,
        trainer: Trainer,
        batches: Iterator[tuple[int, Batch]],
        report: Callable[[dict[str, object]], None],
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
        self._batches = batches
        self._report = report
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
        self._next: _Sent | ValueError | OSError | None = None
        self._trained: _Trained | None = None

    def step(self, step: int, *, saves: bool, last: bool) -> None:
        """Trains one batch on all ranks and reports the step before.

        Args:
            step: the step.
            saves: ``save`` and ``finish`` follow this step.
            last: no step follows.

        Raises:
            ValueError: the batch cannot be read or has a token that the model does not know.
            OSError: the batch cannot be read.
        """
        trainer, timer = self._trainer, self._timer
        began = time.perf_counter()
        if self._next is None:
            self._next = self._send(step)
        sent = self._next
        if not isinstance(sent, _Sent):
            self._finish_line()
            raise sent
        # In the order in which the sidecars carry them out.
        if saves:
            self._store.publish(messages.Extract())
        self._next = None if last else self._send(step + 1)
        with timer.phase("train"):
            output = trainer.train(step, sent.mine)
            totals = Totals(output, trainer)
        if self._optimizes(step):
            with timer.phase("optimize"):
                trainer.optimize(step)
        self._finish_line()
        self._num_tokens += sent.tokens
        seconds = time.perf_counter() - began
        line: dict[str, object] = {
            "step": step,
            "learning_rate": trainer.learning_rate(step),
            "num_tokens": self._num_tokens,
            "tokens_per_second": sent.tokens / seconds,
            "step_seconds": seconds,
            "dense_bytes": self._dense_bytes,
            "memory": memory_bytes(self._device),
            **({"optim_stats": trainer.stats} if trainer.stats else {}),
        }
        self._trained = _Trained(sent.number, totals, output.grad_norm, line, timer.take())

    def save(self, path: Path) -> None:
        """Writes a checkpoint folder; all ranks take part.

        Raises:
            OSError: it cannot be written; the ranks are in step all the same.
            ReplicasDiffer: there is nothing worth writing.
        """
        self._trainer.plain()
        if self._config.check_every:
            self._trainer.check_replicas()
        model = self._trainer.model
        save_model(path, model, model.full_state_dict_iter(), self._side_files)

    def finish(self) -> None:
        """Reports the step that was trained last, with the time that its checkpoint took."""
        self._finish_line(saved=True)

    def _optimizes(self, step: int) -> bool:
        # DisTrO's results land one step late: nothing is applied after the very first train.
        return not self._config.distro or step > self._first

    def _send(self, step: int) -> _Sent | ValueError | OSError:
        """Leaves a step for the sidecars; an error is for the step itself, not the one before."""
        try:
            with self._timer.phase("data"):
                _, batch = next(self._batches)
                self._check(step, batch)
        except (ValueError, OSError) as error:
            return error
        with self._timer.phase("send"):
            share = lambda replica: batch.share(replica, self._config.replicas)  # noqa: E731
            number = self._store.publish_parts(
                {replica: self._part(step, share(replica)) for replica in self._store.readers}
            )
            return _Sent(number, share(0), batch.input_ids.numel())

    def _part(self, step: int, batch: Batch) -> tuple[messages.Train, bytes]:
        rows = self._config.total_batch
        operation = messages.Train(
            step=step,
            zero_optim=False,
            batch_id=((step - 1) * rows, step * rows - 1),
            batch_shape=(batch.rows, batch.input_ids.shape[1]),
            batch_has_labels=batch.labels is not None,
            batch_has_position_ids=batch.position_ids is not None,
            batch_sequence_lengths=batch.sequence_lengths,
            optimize=self._optimizes(step) or msgspec.UNSET,
        )
        return operation, pack_batch(batch)

    def _check(self, step: int, batch: Batch) -> None:
        """Here and not only where it is trained: a replica alone would end in mid-step."""
        try:
            packing.prepare(batch)
        except ValueError as error:
            raise ValueError(f"step {step}: {error} (--data-path)") from error
        if isinstance(self._vocabulary, int) and int(batch.input_ids.max()) >= self._vocabulary:
            raise ValueError(
                f"step {step}: token id {int(batch.input_ids.max())} in the data is outside the "
                f"model's vocabulary of {self._vocabulary} (--data-path, --model)"
            )

    def _finish_line(self, *, saved: bool = False) -> None:
        trained, self._trained = self._trained, None
        if trained is None:
            return
        with self._timer.phase("counts"):
            counts = trained.totals.wait()
        more = self._timer.take() if saved else {}
        phases = {**trained.seconds, **more}
        # Every rank has trained the step, and so has read what came before it.
        self._store.forget(trained.number)
        self._report(
            {
                "step": trained.line["step"],
                "loss": counts.loss,
                "grad_norm": float(trained.grad_norm),
                **trained.line,
                "seconds": {p: trained.seconds.get(p, 0.0) + more.get(p, 0.0) for p in phases},
                "bytes_sent": counts.bytes_sent,
                "nonfinite_losses": counts.nonfinite_losses,
                "refused_gradients": counts.refused_gradients,
            }
        )
