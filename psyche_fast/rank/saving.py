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
    rank, ranks = dist.get_rank(), config.parallelism.ranks_per_replica
    parameters = state.read_part(folder, manifest, state.parameters_file(rank % ranks))
    if parameters is None:
        raise ValueError(f"{folder} has no {state.parameters_file(rank % ranks)}")
    own = state.read_part(folder, manifest, state.rank_file(rank))
    if own is None:  # of a replica that is new
        first = state.read_part(folder, manifest, state.rank_file(rank % ranks)) or {}
        shared = ("random/", "optimizer/messages")
        own = {name: tensor for name, tensor in first.items() if name.startswith(shared)}
    if _form(manifest.config) != _form(config.to_dict()):
        own = {}
    trainer.load_state(parameters, own)
    log.info("goes on from %s", folder)


def _form(config: dict[str, Any]) -> list[Any]:
    return [config.get(name, FLAGS[name].default) for name in _FORM]
