"""Checks of everything that can be wrong with a run, before anything is spawned or written."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from psyche_fast.config import FLAGS, RunConfig, flag
from psyche_fast.core.evaluation import Held, look_at
from psyche_fast.core.fitting import largest_micro_batch
from psyche_fast.core.hub import check_hub
from psyche_fast.core.remote import open_remote
from psyche_fast.core.resume import Start, check_start, find_start, identity
from psyche_fast.data import (
    BlockCache,
    Dataset,
    DummyDataset,
    check_card,
    folders_of,
    open_dataset,
)
from psyche_fast.devices import multiplies_bf16, working_dtype
from psyche_fast.distro.chunks import chunk_side
from psyche_fast.kernels.backends import explain, hindrance
from psyche_fast.locations import shown
from psyche_fast.metrics.formatting import format_bytes, format_count
from psyche_fast.metrics.trackers import check_tracker
from psyche_fast.models import choose_attention, registry
from psyche_fast.models.loading import check_fit
from psyche_fast.models.source import (
    FilesSource,
    ModelSummary,
    check_model,
    resolve_model,
    tensor_shapes,
    text_config,
    vocabulary_size,
)
from psyche_fast.rank.choice import CHOSEN
from psyche_fast.rank.levels import levels_of
from psyche_fast.rank.link import AUTO
from psyche_fast.rank.method import method_of
from psyche_fast.ranks import Parallelism
from psyche_fast.start import knock, tls
from psyche_fast.start.devices import Devices, choose_devices
from psyche_fast.start.early import cores


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    Attributes:
        config: as the user gave it.
        resolved: what every rank is told: `auto` and 0 replaced by what they stand for.
        source: the model's files.
        dataset: the data, opened.
        data: what tells it from other data.
        devices: of the ranks on this machine.
        summary: lines for the user.
        trackers: what trackers call the run that goes on, by their names.
        held: what is evaluated and sampled.
    """

    config: RunConfig
    resolved: RunConfig
    source: FilesSource
    dataset: Dataset
    data: dict[str, Any]
    devices: Devices
    summary: tuple[str, ...]
    trackers: dict[str, str] = field(default_factory=dict)
    held: Held = field(default_factory=Held)


def make_plan(config: RunConfig, *, ranks_on_this_machine: int | None = None) -> Plan:
    """Resolves and checks a run.

    Args:
        config: the run.
        ranks_on_this_machine: those that share its cores, where others than the core start them.

    Raises:
        ValueError: what is wrong, in one line with its flag.
    """
    machines = config.machines
    knock.check(machines.host, machines.secret_file)
    tls.check(machines.tls_key, machines.tls_cert, machines.tls_ca)
    start = find_start(config)
    if config.run.output is not None and config.run.resume is None:
        _check_output(Path(config.run.output), config)
    config = _from_start(config, start)
    run, parallelism = config.run, config.parallelism
    if run.save_path is not None:
        check_save_path(Path(run.save_path), Path(run.output or "runs/of-this-start"))
    check_tracker(run.tracker, config.tracking)
    if run.push_to_hub is not None:
        check_hub(run.push_to_hub)
    if run.checkpoint_to is not None:
        open_remote(run.checkpoint_to, "--checkpoint-to")
    devices = choose_devices(config.machines.device, config.ranks_here)
    kind = devices.devices[0].type
    typed = _typed(config, start, kind)
    products = _slow_products(config, typed, kind)
    config, options = typed, typed.model
    method_of(config)
    levels_of(config)
    registry.resolve(options.python_arch)
    source = resolve_model(options.model)
    model = check_model(source, options.python_arch)
    attention = choose_attention(
        options.attn_implementation, devices.devices[0].type, model.model_type
    )
    check_fit(
        source, options.python_arch, attn_implementation=attention,
        sequence_length=options.sequence_length,
    )  # fmt: skip
    dataset = open_dataset(
        config.data.data_path,
        token_size=config.data.token_size,
        sequence_length=options.sequence_length,
        seed=config.data.key,
        cache=BlockCache(config.data.data_cache, int(config.data.data_cache_gb * 1e9)),
    )
    vocabulary = vocabulary_size(model.config)
    if vocabulary is not None:
        dataset.check_vocabulary(vocabulary)
    cards = _cards(config, source, dataset)
    held = look_at(config, source, vocabulary)
    on_cpu = devices.backend == "gloo"
    _check_parallelism(text_config(model.config), parallelism.tensor_parallelism)
    on_gpus = {"liger": options.liger, "offload_delta": config.optimizer.offload_delta}
    for name, wanted in on_gpus.items():
        if wanted and on_cpu:
            raise ValueError(f"{flag(name)} needs a CUDA device")
    sharing = ranks_on_this_machine or config.ranks_here
    split = parallelism.elastic or _splits(parallelism, on_cpu, sharing)
    threads = config.machines.threads or (max(1, cores() // sharing) if on_cpu else 0)
    micro_batch = config.training.micro_batch
    fitted: tuple[str, ...] = ()
    if micro_batch == 0 and start is not None:
        micro_batch = start.manifest.config["micro_batch"]  # whatever fits by now: bits hang on it
    elif micro_batch == 0:
        fit = largest_micro_batch(config, model.config, devices.devices[0], sharing)
        micro_batch = fit.micro_batch
        fitted = (
            f"memory   micro-batches of {micro_batch} sequences: about "
            f"{format_bytes(fit.needed)} of the {format_bytes(fit.free)} that a rank may take",
        )
    resolved = config.replace(
        micro_batch=micro_batch,
        attn_implementation=attention,
        device_backend="split" if split else "nccl",
        threads=threads,
    )
    summary = _summary(config, resolved, model, dataset, devices) + products + cards
    summary += fitted + held.notes
    if start is not None:
        summary += check_start(start, resolved, dataset, devices.devices[0])
    if config.optimizer.distro and not on_cpu:
        summary += (_kernels(config, devices.devices[0], tensor_shapes(source).values()),)
    trackers = start.manifest.tracker if start is not None and run.fork is None else {}
    return Plan(
        config, resolved, source, dataset, identity(dataset), devices, summary, trackers, held
    )


def _summary(
    config: RunConfig,
    resolved: RunConfig,
    model: ModelSummary,
    dataset: Dataset,
    devices: Devices,
) -> tuple[str, ...]:
    optimizer, parallelism, rows = config.optimizer, resolved.parallelism, config.run.total_batch
    needed = config.batch_sizes.before(config.schedule.total_steps + 1)
    passes = needed / len(dataset)
    again = f", read {passes:.1f} times" if passes > 1 else ""
    there = "endless" if isinstance(dataset, DummyDataset) else format_count(len(dataset))
    sizes = config.batch_sizes
    rise = ""
    if sizes.warmup_tokens:
        tokens = format_count(sizes.warmup_tokens)
        rise = f" (from {math.ceil(sizes.start / parallelism.copies)} on, over {tokens} tokens)"
    method = config.exchange.method or config.exchange.levels or "AdamW"
    if optimizer.distro:
        chunks = f"{optimizer.compression_topk} of {optimizer.compression_chunk}^2"
        method = f"DisTrO (top {chunks}{', 1 bit' if optimizer.distro_quantization else ''})"
    threads = resolved.machines.threads
    return (
        f"model    {config.model.model}: {model.model_type or config.model.python_arch}, "
        f"{format_count(model.num_parameters)} parameters",
        f"data     {shown(config.data.data_path)}: {there} sequences of "
        f"{config.model.sequence_length} tokens, {format_count(needed)} needed{again}",
        (
            f"ranks    1 for {parallelism.simulate} replicas in turn"
            if parallelism.simulate
            else f"ranks    {parallelism.replicas} replicas x {parallelism.data_parallelism} data "
            f"x {parallelism.tensor_parallelism} tensor parallel"
        )
        + f" on {devices.describe()}"
        + (", gloo between replicas" if parallelism.device_backend == "split" else "")
        + (f", {threads} threads each" if threads else ""),
        f"training {method}, {config.model.param_dtype}{_masters(config)}, "
        f"{resolved.model.attn_implementation} attention, "
        f"{math.ceil(rows / parallelism.copies)} sequences per replica and step{rise}, "
        f"weight decay {optimizer.weight_decay:g} of "
        f"{'all parameters' if optimizer.decay == 'all' else 'matrices'}",
        *_lost_updates(config),
        *left_over(config),
        *_in_clear(config),
    )


def _cards(config: RunConfig, source: FilesSource, dataset: Dataset) -> tuple[str, ...]:
    """What the data's cards say, which has to be what the model's tokenizer and the files are."""
    lines = [
        check_card(
            folder,
            token_size=config.data.token_size,
            sequence_length=config.model.sequence_length,
            tokenizer=source.named("tokenizer.json"),
            model=config.model.model,
        )
        for folder in folders_of(dataset)
    ]
    return tuple(line for line in lines if line is not None)


def _in_clear(config: RunConfig) -> tuple[str, ...]:
    machines = config.machines
    safe = machines.tls_key is not None or knock.is_own_machine(machines.host)
    return () if safe else (tls.IN_CLEAR,)


def _masters(config: RunConfig) -> str:
    wide = config.model.param_dtype == "float32" or config.model.master_dtype == "bfloat16"
    return "" if wide else " with fp32 masters"


def _typed(config: RunConfig, start: Start | None, device_type: str) -> RunConfig:
    """The run with its parameters' type: one that goes on keeps what it had on any machine."""
    given = config.model.param_dtype
    if given == "auto" and start is not None:
        given = start.manifest.config["param_dtype"]
    return config.replace(param_dtype=working_dtype(given, config.model.master_dtype, device_type))


def _slow_products(given: RunConfig, config: RunConfig, device_type: str) -> tuple[str, ...]:
    """What became of a type whose products torch emulates on this device."""
    if multiplies_bf16(device_type) or given.model.param_dtype == "float32":
        return ()
    if config.model.param_dtype == "float32":
        return (
            "dtype    float32: torch emulates products of bfloat16 on this device, many times "
            "slower (--param-dtype bfloat16 has them all the same)",
        )
    return (
        "warning  --param-dtype bfloat16: torch emulates its products on this device, many times "
        "slower than --param-dtype float32",
    )


def _lost_updates(config: RunConfig) -> tuple[str, ...]:
    """What bf16 parameters without masters lose, both methods' steps being of about the rate."""
    if config.model.master_dtype == "float32":
        return ()
    rate = config.schedule.learning_rate
    # Neighbours of numbers in [2^e, 2^(e+1)) are 2^(e-7) apart, and half of that is rounded away.
    power = math.ceil(math.log2(rate)) + 8 if rate > 0 else -math.inf
    return (
        f"warning  --master-dtype bfloat16: at --learning-rate {rate:g} weights of "
        f"{2.0**power:.2g} and more (of norms, usually all) never change; float32 masters learn",
    )


def left_over(config: RunConfig) -> tuple[str, ...]:
    """The last local steps, where nothing is sent after them."""
    method, steps = method_of(config), config.schedule.total_steps
    if (levels := levels_of(config)) is not None:
        method = levels[-1][1]  # rounds of the levels below end with those of the outermost
    if config.chooses_for_link and config.exchange.every is None:
        return ()  # the local steps are chosen when the run starts
    left = 0 if method is None else steps % method.every
    if method is None or not left:
        return ()
    return (
        f"warning  --total-steps {steps} is no multiple of {method.every}, the local steps of a "
        f"round: the last {left} are in no model that is saved",
    )


def _kernels(config: RunConfig, device: torch.device, shapes: Iterable[tuple[int, ...]]) -> str:
    """Which kernels DisTrO's step takes on a GPU, and for what it cannot take the fast ones."""
    name, reason = explain(device)
    line = f"kernels  {name} ({reason})"
    if name == "torch":
        return line
    chunk, dtype = config.optimizer.compression_chunk, getattr(torch, config.model.param_dtype)
    hindered = []
    for shape in shapes:
        h, w = (chunk_side(size, chunk) for size in (1, 1, *shape)[-2:])
        hindered.append(hindrance(h, w, dtype))
    reasons = [reason for reason in hindered if reason is not None]
    if not reasons:
        return line
    commonest, _ = Counter(reasons).most_common(1)[0]
    return f"{line}; plain PyTorch for {len(reasons)} of {len(hindered)} tensors, most: {commonest}"


def _splits(parallelism: Parallelism, on_cpu: bool, ranks_here: int) -> bool:
    """Whether results go over gloo while what is inside a replica goes over NCCL.

    A collective of NCCL's holds multiprocessors of the GPU until the last byte is in; over a link
    between machines that is most of a step, which gloo's threads wait for on the host instead.
    """
    wanted = parallelism.device_backend
    if on_cpu and wanted != "auto":
        raise ValueError(f"--device-backend {wanted} needs CUDA devices; a CPU has only gloo")
    if on_cpu or parallelism.replicas == 1:
        return False
    several = ranks_here < parallelism.world_size
    return wanted == "split" or (wanted == "auto" and several)


def _from_start(config: RunConfig, start: Start | None) -> RunConfig:
    """The run where it goes on: in its own directory, or with `--fork` in another."""
    if start is None:
        return config.replace(resume=None)
    folder, step = start.folder, start.manifest.step
    if config.schedule.start_step not in (1, step + 1):
        raise ValueError(
            f"--start-step {config.schedule.start_step}: {folder} goes on with step {step + 1}"
        )
    if step >= config.schedule.total_steps:
        raise ValueError(
            f"{folder} is of step {step}: nothing is left of --total-steps "
            f"{config.schedule.total_steps}"
        )
    changes: dict[str, Any] = {"start_step": step + 1}
    if config.schedule.cold_start_warmup_steps:  # which is of the run's own first steps
        saved = start.manifest.config
        changes["cold_start_step"] = saved.get("cold_start_step", saved.get("start_step", 1))
    changes["resume" if config.run.resume else "fork"] = str(folder)
    was = start.manifest.config
    if config.run.resume and config.chooses_for_link and "link" in was:
        # What was chosen then stays; what is given is looked at as ever.
        chosen = {name: was[name] for name in CHOSEN if name in was}
        changes |= {name: v for name, v in chosen.items() if _is_default(config, name)}
        if config.exchange.link == AUTO:
            changes["link"] = was["link"]
    if config.run.resume and config.run.output is None and folder.parent.name == "checkpoints":
        changes["output"] = str(folder.parent.parent)
    return config.replace(**changes)


def _is_default(config: RunConfig, name: str) -> bool:
    known = FLAGS[name]
    return bool(getattr(getattr(config, known.section), name) == known.default)


def _check_output(output: Path, config: RunConfig) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} exists and is not a folder")
    begins = config.schedule.start_step == 1 or config.run.fork is not None
    if begins and (output / "metrics.jsonl").exists():
        raise ValueError(
            f"--output {output} already holds a run; name another folder, or --resume auto to go on"
        )


def check_save_path(path: Path, output: Path) -> None:
    """Checks that the final model can be written to a folder of its own.

    Args:
        path: `--save-path`.
        output: the run directory.

    Raises:
        ValueError: something is in the way, or one of the two is in the other.
    """
    # Resolved: "." and links have no name of their own to put a folder under.
    path, output = path.resolve(), output.resolve()
    if path in (output, *output.parents) or output in path.parents:
        raise ValueError(
            f"--save-path {path} and the run directory, --output {output}, are in one another; "
            "name a folder apart from it"
        )
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
