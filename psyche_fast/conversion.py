"""Our configuration as one of Psyche's run files, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from psyche_fast import strict
from psyche_fast.config import FLAGS, Data, RunConfig, read_toml
from psyche_fast.locations import DUMMY, MIXTURE, Source, is_mixture, scheme, shown, write_http
from psyche_fast.runfile import AdamW, Coordination, Distro, read_run_file


def is_run_file(table: Mapping[str, Any]) -> bool:
    """Whether a TOML file's table is one of Psyche's, not our configuration."""
    model = table.get("model")
    return isinstance(table.get("config"), dict) or (isinstance(model, dict) and "LLM" in model)


def convert(path: str, run_id: str | None) -> tuple[str, tuple[str, ...]]:
    """Writes our configuration of a run file, or a run file of our configuration.

    Args:
        path: either, told by its keys.
        run_id: the name of the run in a run file; None for the configuration's own.

    Returns:
        the other's text, and lines about what has no place in it.

    Raises:
        ValueError: the file cannot be read, or has what the other cannot have.
    """
    table = strict.load_toml(path, path)
    if not is_run_file(table):
        text, left_out = write_run_file(RunConfig.of(**read_toml(path)), run_id)
        return text, (f"left out {', '.join(left_out)}",) if left_out else ()
    file = read_run_file(path)
    notes = [f"left out {reason}" for reason in file.refused.values()]
    return RunConfig.of(**file.values).to_toml(), (file.ignored_line(), *notes)


def write_run_file(config: RunConfig, run_id: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Writes a run file of Psyche's.

    Times, clients and witnesses, which a run here has none of, get values that Psyche's check
    takes.

    Args:
        config: the run.
        run_id: its name; None for `--run-id`'s, or `psyche-fast`.

    Returns:
        the file's text, and the options that it has no place for, of those that were changed.

    Raises:
        ValueError: its model, data or a number has no form in Psyche.
    """
    schedule, run = config.schedule, config.run
    rates = schedule.plain_learning_rates()
    times = Coordination(total_steps=1, global_batch_size_start=1, global_batch_size_end=1)
    rounds = schedule.cold_start_warmup_steps + 1
    clients = config.parallelism.replicas
    sizes = config.batch_sizes
    if run.total_batch >= 1 << 16:
        raise ValueError(f"--total-batch {run.total_batch}: Psyche's are at most 65535")
    settings = {
        **msgspec.to_builtins(times),
        "epoch_time": max(600, times.warmup_time + rounds * times.max_round_train_time),
        "min_clients": clients,
        "init_min_clients": clients,
        "global_batch_size_start": sizes.start,
        "global_batch_size_end": sizes.end,
        "global_batch_size_warmup_tokens": sizes.warmup_tokens,
        "total_steps": schedule.total_steps,
    }
    architecture = config.model.python_arch
    if architecture not in ("HfAuto", "HfLlama", "HfDeepseek"):
        raise ValueError(f"--python-arch {architecture}: Psyche has no such architecture")
    llm = {
        "architecture": architecture,
        "data_type": "Pretraining",
        "max_seq_len": config.model.sequence_length,
        "cold_start_warmup_steps": schedule.cold_start_warmup_steps,
        "checkpoint": _write_checkpoint(config.model.model),
        "data_location": _write_data(config.data),
        "lr_schedule": rates.to_json(),
        "optimizer": _write_optimizer(config),
    }
    content = {
        "run_id": run_id or run.run_id or "psyche-fast",
        "run_state": "WaitingForMembers",
        "config": settings,
        "model": {"LLM": llm},
    }
    return msgspec.toml.encode(content).decode(), _left_out(config)


_WRITTEN = {
    "model", "python_arch", "sequence_length", "data_path", "token_size", "seed", "seed_bytes",
    "replicas", "run_id", "total_batch", "total_batch_start", "batch_warmup_tokens",
}  # fmt: skip
_PSYCHES = {"param_dtype": "bfloat16"}
"""What Psyche has without being told."""
_OF_DISTRO = {
    "distro", "distro_quantization", "compression_chunk", "compression_topk", "compression_decay",
    "weight_decay", "max_grad_norm",
}  # fmt: skip
_OF_ADAMW = {"distro", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm"}


def _left_out(config: RunConfig) -> tuple[str, ...]:
    written = _WRITTEN | (_OF_DISTRO if config.optimizer.distro else _OF_ADAMW)
    written |= {name for name, known in FLAGS.items() if known.section == "schedule"}
    written -= {"start_step", "cold_start_step"}
    data = config.data
    if "Http" not in _write_data(data):
        written -= {"token_size", "seed", "seed_bytes"}
    return tuple(
        f"{name} = {value!r}"
        for name, value in config.to_dict().items()
        if name not in written and value not in (FLAGS[name].default, _PSYCHES.get(name))
    )


def _write_checkpoint(model: str) -> dict[str, Any]:
    if model == DUMMY:
        return {"Dummy": {"repo_id": ""}}
    name, _, revision = model.partition("@")
    if revision and not Path(model).exists():
        return {"Hub": {"repo_id": name, "revision": revision}}
    return {"Hub": {"repo_id": model}}


def _write_data(data: Data) -> Any:
    path = data.data_path
    if path == DUMMY:
        return "Dummy"
    http = write_http(Source(path, data.token_size, data.key))
    if http is not None:
        return {"Http": http}
    kind = scheme(path.removeprefix(MIXTURE))
    if is_mixture(path) and kind in ("http", "https"):
        return {"WeightedHttp": path.removeprefix(MIXTURE)}
    hub_id = path.removeprefix("hf://datasets/")
    if kind == "hf" and hub_id.count("/") == 1:
        return {"Preprocessed": hub_id}
    if kind is not None or is_mixture(path):
        raise ValueError(f"--data-path {shown(path)}: Psyche has no location for it")
    return {"Preprocessed" if any(Path(path).glob("*.parquet")) else "Local": path}


def _write_optimizer(config: RunConfig) -> dict[str, Any]:
    options, method = config.optimizer, config.exchange.method
    clip = options.max_grad_norm or None
    if method not in (None, "distro"):
        raise ValueError(f"--method {method}: Psyche has DisTrO and AdamW alone")
    if not options.distro:
        betas = (options.beta1, options.beta2)
        return {
            "AdamW": AdamW(
                betas=betas, weight_decay=options.weight_decay, eps=options.eps, clip_grad_norm=clip
            )
        }
    for name in ("compression_chunk", "compression_topk"):
        if getattr(options, name) >= 1 << 16:
            raise ValueError(f"{name} {getattr(options, name)}: Psyche's are at most 65535")
    return {
        "Distro": Distro(
            clip_grad_norm=clip,
            weight_decay=options.weight_decay,
            compression_decay=options.compression_decay,
            compression_topk=options.compression_topk,
            compression_chunk=options.compression_chunk,
            quantize_1bit=options.distro_quantization,
        )
    }
