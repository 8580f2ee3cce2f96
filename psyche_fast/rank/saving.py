"""A rank's part of writing and of reading checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from psyche_fast.config import FLAGS, RunConfig
from psyche_fast.rank import state
from psyche_fast.rank.protocol import Saved, report_saved
from psyche_fast.rank.trainer import Trainer

log = logging.getLogger(__name__)

_WORLD = ("replicas", "data_parallelism", "tensor_parallelism")
_FORM = (
    *("distro", "compression_chunk", "compression_topk", "distro_quantization", "delta_dtype"),
    *("offload_delta", "param_dtype", "master_dtype"),
)
"""Flags on which the form of an optimiser's state hangs."""


def state_folder(output: str | Path, step: int) -> Path:
    """Where the ranks write their parts of a step's state, until all have."""
    return Path(output, "checkpoints", f".state-{step:06d}")


def write_state(trainer: Trainer, store: dist.Store, output: str | Path, step: int) -> None:
    """Writes this rank's part of a step's state, and says so or what went wrong.

    Args:
        trainer: its parameters are plain.
        store: where rank 0 hears of it.
        output: the run directory.
        step: the last one that is in it.
    """
    folder, rank, place = state_folder(output, step), dist.get_rank(), trainer.topology
    try:
        files = [state.write_part(folder, state.rank_file(rank), trainer.state())]
        if place.replica == 0:
            parameters = trainer.parameter_state()
            files.append(state.write_part(folder, state.parameters_file(rank), parameters))
        saved = Saved(files=files)
    except OSError as error:
        log.warning("state of step %d not written: %s", step, error)
        saved = Saved(error=str(error))
    report_saved(store, step, rank, saved)


def restore(trainer: Trainer, config: RunConfig) -> None:
    """Takes up this rank's part of the checkpoint that `--resume` or `--fork` names, if any.

    Raises:
        ValueError: it is damaged, or another model's or optimiser's.
    """
    name = config.run.resume or config.run.fork
    if name is None:
        return
    folder = Path(name)
    manifest = state.read_manifest(folder)
    before = {n: manifest.config.get(n, FLAGS[n].default) for n in _WORLD}
    ranks = before["data_parallelism"] * before["tensor_parallelism"]
    place = dist.get_rank() % config.parallelism.ranks_per_replica
    replica = dist.get_rank() // config.parallelism.ranks_per_replica
    likely = min(place, ranks - 1)  # the very same where the ranks are placed alike
    parameters = state.Reader(
        folder, manifest, state.parameters_file(likely), [*map(state.parameters_file, range(ranks))]
    )
    if not parameters:
        raise ValueError(f"{folder} has no {state.parameters_file(0)}")
    is_new = replica >= before["replicas"]
    first = 0 if is_new else replica * ranks
    own = state.Reader(
        folder, manifest, state.rank_file(first + likely),
        [*map(state.rank_file, range(first, first + ranks))],
    )  # fmt: skip
    fits = _form(manifest.config) == _form(config.to_dict())
    trainer.load(parameters, own if fits and own else None, is_new=is_new)
    log.info("goes on from %s", folder)


def _form(config: dict[str, Any]) -> list[Any]:
    return [config.get(name, FLAGS[name].default) for name in _FORM]
