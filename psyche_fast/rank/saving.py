"""A rank's part of writing and of reading checkpoints."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist

from psyche_fast.config import FLAGS, RunConfig
from psyche_fast.rank import state
from psyche_fast.rank.protocol import Saved, report_saved
from psyche_fast.rank.trainer import Trainer

log = logging.getLogger(__name__)

SPLIT = ("data_parallelism", "tensor_parallelism")
_WORLD = ("replicas", *SPLIT)
_FORM = (
    *("distro", "compression_chunk", "compression_topk", "distro_quantization", "delta_dtype"),
    *("offload_delta", "param_dtype", "master_dtype", "method", "every", "fragments", "delay"),
    *("mix", "chunk", "topk", "values", "subtract", "outer_momentum"),
)
"""Flags on which the form of an optimiser's state hangs."""


def state_folder(output: str | Path, step: int) -> Path:
    """Where the ranks write their parts of a step's state, until all have."""
    return Path(output, "checkpoints", f".state-{step:06d}")


class StateWriter:
    """Writes this rank's part of states in a thread, one after the other.

    Training waits for nothing: copies are made during the next step's forward and backward. No
    collective is in the thread: what was written, or what went wrong, goes to rank 0 through the
    store.

    Args:
        store: where rank 0 hears of it; a connection of its own.
        output: the run directory.
    """

    def __init__(self, store: dist.Store, output: str | Path) -> None:
        self._store, self._output = store, output
        self._thread: threading.Thread | None = None

    def save(self, trainer: Trainer, step: int, *, at_once: bool) -> None:
        """Begins to write the state after a step; all ranks take part.

        Args:
            trainer: this rank's.
            step: the step.
            at_once: not during the next step but now, and nothing is trained until `wait` returns.

        Raises:
            ReplicasDiffer: there is nothing worth saving. Where it is not `at_once` the trainer's
                next `optimize` raises that.
        """
        self.wait()
        rank = trainer.topology.rank
        if not at_once:
            trainer.take_snapshot(step, partial(self._begin, rank, step))
            return
        trainer.drop_snapshot()
        trainer.plain()
        trainer.check_replicas(step)
        self._begin(rank, step, trainer.files())

    def _begin(self, rank: int, step: int, parts: dict[str, state.State] | Exception) -> None:
        arguments = rank, step, parts
        self._thread = threading.Thread(
            target=self._write, args=arguments, daemon=True, name="state"
        )
        self._thread.start()

    def close(self) -> None:
        """Waits until nothing is being written, when rank 0 is done with all checkpoints."""
        self.wait()
        self._sweep(dist.get_rank())

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, rank: int, step: int, parts: dict[str, state.State] | Exception) -> None:
        folder = state_folder(self._output, step)
        files: list[state.StateFile] = []
        error: str | None = None
        try:
            self._sweep(rank)
            if isinstance(parts, Exception):
                raise OSError(f"no copy of the state: {parts}") from parts
            for name, pieces in sorted(parts.items()):  # of parameters first: they are the model
                files.append(state.write_part(folder, name, pieces))
        except OSError as failed:
            log.warning("state of step %d not written: %s", step, failed)
            error = str(failed)
        report_saved(self._store, step, rank, Saved(files=files, error=error))

    def _sweep(self, rank: int) -> None:
        """Removes what this rank has written earlier and rank 0, on another machine, did not see.

        Where it did, it is in its checkpoint by now, or gone.
        """
        for name in (state.rank_file(rank), state.parameters_file(rank)):
            for path in Path(self._output, "checkpoints").glob(f".state-*/{name}"):
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not the last one
                    path.parent.rmdir()


def restore(trainer: Trainer, config: RunConfig) -> None:
    """Takes up this rank's part of the checkpoint that `--resume` or `--fork` names, if any.

    Raises:
        ValueError: it is damaged, or another model's or optimiser's.
    """
    name = config.run.resume or config.run.fork
    if name is None:
        return
    folder = Path(name)
    for one in trainer.parts():
        _restore(one, folder, config)


def _restore(trainer: Trainer, folder: Path, config: RunConfig) -> None:
    manifest = state.read_manifest(folder)
    before = {n: manifest.config.get(n, FLAGS[n].default) for n in _WORLD}
    ranks = before["data_parallelism"] * before["tensor_parallelism"]
    replica, place = divmod(trainer.topology.rank, config.parallelism.ranks_per_replica)
    likely = min(place, ranks - 1)  # the very same where the ranks are placed alike
    written, files = folder / state.FOLDER, manifest.files
    parameters = state.Reader(
        written, files, state.parameters_file(likely), [*map(state.parameters_file, range(ranks))]
    )
    if not parameters:
        raise ValueError(f"{folder} has no {state.parameters_file(0)}")
    # An elastic run may have written without a replica, and with further ones.
    kept = {file.name for file in files}
    is_new = state.rank_file(replica * ranks) not in kept
    first = 0 if is_new else replica * ranks
    own = state.Reader(
        written, files, state.rank_file(first + likely),
        [*map(state.rank_file, range(first, first + ranks))],
    )  # fmt: skip
    if not own:
        raise ValueError(f"{folder} has no {state.rank_file(first + likely)}")
    trainer.load(parameters, own if fits(manifest, config) else None, is_new=is_new)
    momentum = ", where its replica has no state: without momentum" if is_new else ""
    log.info("goes on from %s%s", folder, momentum)


def fits(manifest: state.Manifest, config: RunConfig) -> bool:
    """Whether an optimiser's state has the form that a run's has; if not, only parameters do."""
    now = config.to_dict()
    form = (*_FORM, *(SPLIT if is_by_method(config) else ()))
    return all(
        manifest.config.get(name, FLAGS[name].default) == now.get(name, FLAGS[name].default)
        for name in form
    )


def is_by_method(config: RunConfig) -> bool:
    """Whether a run's state is a method's: each rank's own, for the shards that it has."""
    return config.exchange.method is not None and not config.optimizer.distro
