"""Everything that can be wrong with a run, found before anything is spawned or written."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_fast.config import RunConfig, flag
from psyche_fast.data import Dataset, open_dataset
from psyche_fast.metrics.formatting import format_count
from psyche_fast.metrics.trackers import check_tracker
from psyche_fast.models import choose_attention, registry
from psyche_fast.models.source import FilesSource, check_model, resolve_model
from psyche_fast.psyche.messages import Settings
from psyche_fast.start.devices import Devices, choose_devices, cores


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    Attributes:
        config: as the user gave it.
        source: the model's files.
        dataset: the data, opened.
        devices: of the ranks on this machine.
        settings: what sidecars are told beyond Psyche's protocol.
        summary: lines for the user.
    """

    config: RunConfig
    source: FilesSource
    dataset: Dataset
    devices: Devices
    settings: Settings
    summary: tuple[str, ...]


def make_plan(config: RunConfig, *, ranks_on_this_machine: int | None = None) -> Plan:
    """Resolves and checks a run.

    Args:
        config: the run.
        ranks_on_this_machine: those that share its cores, where others than the core start them.

    Raises:
        ValueError: what is wrong, in one line with its flag.
    """
    if config.output is not None:
        _check_output(Path(config.output), config.start_step)
    if config.save_path is not None:
        _check_save_path(Path(config.save_path))
    check_tracker(config.tracker)
    devices = choose_devices(config.device, config.ranks_here)
    registry.resolve(config.python_arch)
    source = resolve_model(config.model)
    model = check_model(source, config.python_arch)
    attention = choose_attention(
        config.attn_implementation, devices.devices[0].type, model.model_type
    )
    dataset = open_dataset(
        config.data_path,
        token_size=config.token_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )
    vocabulary = model.config.get("vocab_size")
    if isinstance(vocabulary, int):
        dataset.check_vocabulary(vocabulary)
    on_cpu = devices.backend == "gloo"
    _check_parallelism(model.config, config.tensor_parallelism)
    for name in ("liger", "offload_delta"):
        if getattr(config, name) and on_cpu:
            raise ValueError(f"{flag(name)} needs a CUDA device")
    sharing = ranks_on_this_machine or config.ranks_here
    split = _splits(config, on_cpu, sharing)
    threads = config.threads or (max(1, cores() // sharing) if on_cpu else 0)
    settings = Settings(
        replicas=config.replicas,
        param_dtype=config.param_dtype,
        attn_implementation=attention,
        sequence_length=config.sequence_length,
        activation_checkpointing=config.activation_checkpointing,
        liger=config.liger,
        compile=config.compile,
        optim_stats=config.optim_stats,
        check_every=config.check_every,
        delta_dtype=config.delta_dtype,
        offload_delta=config.offload_delta,
        defer_grad_sync=config.defer_grad_sync,
        split=split,
        threads=threads or None,
        timeout=config.timeout,
    )
    needed = config.total_steps * config.total_batch
    passes = needed / len(dataset)
    again = f", read {passes:.1f} times" if passes > 1 else ""
    optimizer = "AdamW"
    if config.distro:
        bits = ", 1 bit" if config.distro_quantization else ""
        optimizer = f"DisTrO (top {config.compression_topk} of {config.compression_chunk}^2{bits})"
    summary = (
        f"model    {config.model}: {model.model_type or config.python_arch}, "
        f"{format_count(model.num_parameters)} parameters",
        f"data     {config.data_path}: {format_count(len(dataset))} sequences of "
        f"{config.sequence_length} tokens, {format_count(needed)} needed{again}",
        f"ranks    {config.replicas} replicas x {config.data_parallelism} data x "
        f"{config.tensor_parallelism} tensor parallel on {devices.describe()}"
        + (", gloo between replicas" if split else "")
        + (f", {threads} threads each" if threads else ""),
        f"training {optimizer}, {config.param_dtype}, {attention} attention, "
        f"{math.ceil(config.total_batch / config.replicas)} sequences per replica and step",
    )
    return Plan(config, source, dataset, devices, settings, summary)


def _splits(config: RunConfig, on_cpu: bool, ranks_here: int) -> bool:
    """Whether results go over gloo while what is inside a replica goes over NCCL.

    A collective of NCCL's holds multiprocessors of the GPU until the last byte is in; over a link
    between machines that is most of a step, which gloo's threads wait for on the host instead.
    """
    if on_cpu and config.device_backend != "auto":
        raise ValueError(
            f"--device-backend {config.device_backend} needs CUDA devices; a CPU has only gloo"
        )
    if on_cpu or config.replicas == 1:
        return False
    several = ranks_here < config.world_size
    return config.device_backend == "split" or (config.device_backend == "auto" and several)


def _check_output(output: Path, start_step: int) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is there and is not a folder")
    if start_step == 1 and (output / "metrics.jsonl").exists():
        raise ValueError(
            f"--output {output} already holds a run; name another folder, or --start-step to go on"
        )


def _check_save_path(path: Path) -> None:
    # Resolved: "." and links have no name of their own to put a folder under.
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--save-path {path} is there already; name a new folder or an empty one")
    parent = next(p for p in path.parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--save-path {path}: {parent} cannot be written to")


def _check_parallelism(model: dict[str, Any], tp: int) -> None:
    for key in ("num_attention_heads", "num_key_value_heads"):
        count = model.get(key)
        if isinstance(count, int) and count % tp:
            raise ValueError(
                f"--tensor-parallelism {tp} does not divide the model's {key}, {count}"
            )
