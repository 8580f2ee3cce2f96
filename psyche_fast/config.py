"""Every configuration of the product: what a run does, and which optimiser it uses.

``RunConfig`` has Psyche's train example's names and defaults; a TOML file may give any of its
fields, the command line goes over it, and the resolved configuration is written to the run
directory. The command line's flags are made from these fields, so that a name, a default and a
help text stand in one place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec

from psyche_fast import strict

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
DeltaDtype = Literal["float32", "bfloat16"]
DeviceBackend = Literal["auto", "nccl", "split"]
ParamDtype = Literal["bfloat16", "float32"]
TrackerName = Literal["none", "wandb", "trackio", "tensorboard"]


class AdamW(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Psyche's ``{"AdamW": {...}}``."""

    betas: tuple[float, float]
    weight_decay: float
    eps: float
    clip_grad_norm: float | None = None


class Distro(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Psyche's ``{"Distro": {...}}``."""

    clip_grad_norm: float | None = None
    weight_decay: float | None = None
    compression_decay: float
    compression_topk: int
    compression_chunk: int
    quantize_1bit: bool


class Dummy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Psyche's ``"Dummy"``: trains, and changes nothing."""

    clip_grad_norm: None = None


OptimizerConfig = AdamW | Distro | Dummy


def optimizer_from_json(obj: Any) -> OptimizerConfig:
    """Reads Psyche's optimiser form: ``"Dummy"``, ``{"AdamW": {...}}`` or ``{"Distro": {...}}``.

    Raises:
        ValueError: another form, an unknown or missing field, or a wrong type or value.
    """
    if obj == "Dummy":
        return Dummy()
    forms: dict[str, type[AdamW] | type[Distro]] = {"AdamW": AdamW, "Distro": Distro}
    if not isinstance(obj, dict) or len(obj) != 1 or next(iter(obj)) not in forms:
        raise ValueError(f'optimizer: wanted "Dummy", {{"AdamW": ...}} or {{"Distro": ...}}: {obj}')
    ((name, fields),) = obj.items()
    config = strict.convert(fields, forms[name], f"optimizer.{name}")
    clip = config.clip_grad_norm
    if clip is not None and clip <= 0:
        raise ValueError(f"optimizer.{name}.clip_grad_norm must be over 0 or null, got {clip}")
    return config


def optimizer_to_json(config: OptimizerConfig) -> Any:
    """The object that ``optimizer_from_json`` takes."""
    if isinstance(config, Dummy):
        return "Dummy"
    return {type(config).__name__: msgspec.to_builtins(config)}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Each field is the flag of that name (``--total-batch``)."""

    model: str = _option("emozilla/llama2-215m-init", "model folder, or a Hugging Face hub id")
    data_path: str = _option("data", "folder of token files (.npy .bin .ds) or Parquet files")
    sequence_length: int = _option(2048, "tokens per sequence; overrides the position limit")
    token_size: int = _option(2, "bytes per token in token files: 2 or 4")
    micro_batch: int = _option(8, "sequences per forward on one data-parallel rank")
    total_batch: int = _option(256, "sequences per step, over all replicas")
    beta1: float = _option(0.9, "AdamW")
    beta2: float = _option(0.95, "AdamW")
    weight_decay: float = _option(0.1, "AdamW and DisTrO")
    eps: float = _option(1e-8, "AdamW")
    learning_rate: float = _option(4e-4, "peak; a cosine falls from it to a tenth")
    warmup_steps: int = _option(500, "linear rise from 0 to --learning-rate")
    total_steps: int = _option(25000, "steps until the end of the schedule and the run")
    max_grad_norm: float = _option(1.0, "clip the gradient's global norm; 0 = off")
    tensor_parallelism: int = _option(1, "ranks that share each layer of one replica")
    data_parallelism: int = _option(1, "ranks that shard one replica with FSDP2")
    optim_stats: bool = _option(False, "log norms of gradient and momentum per parameter")
    device: str = _option("auto", "auto, cpu, cuda, cuda:N or cuda:X,Y (one per rank)")
    grad_accum_in_fp32: bool = _option(False, "add up micro-batches' gradients in fp32")
    defer_grad_sync: bool = _option(False, "FSDP2: reduce gradients once per step; see README")
    compression_chunk: int = _option(64, "DisTrO: side of a DCT chunk")
    compression_topk: int = _option(4, "DisTrO: coefficients sent per chunk")
    compression_decay: float = _option(0.999, "DisTrO: decay of the momentum")
    delta_dtype: DeltaDtype = _option("float32", "DisTrO: the momentum's type")
    offload_delta: bool = _option(False, "DisTrO: keep the momentum in host memory (CUDA)")
    distro: bool = _option(False, "train with DisTrO instead of AdamW")
    distro_quantization: bool = _option(False, "DisTrO: send signs only (1 bit)")
    attn_implementation: Attention = _option("auto", "the same one on every rank")
    start_step: int = _option(1, "first step: where the schedule and the data begin")
    python_arch: str = _option("HfAuto", "HfAuto, a registered name, or module:function")
    seed: int | None = _option(None, "shuffle the data with this seed; no seed, no shuffle")
    save_path: str | None = _option(None, "also write the final model to this folder")
    replicas: int = _option(1, "DisTrO peers; ranks = replicas x data x tensor parallelism")
    param_dtype: ParamDtype = _option("bfloat16", "the parameters' type")
    output: str | None = _option(None, "run directory (default: runs/DATE-TIME)")
    checkpoint_every: int = _option(0, "steps between checkpoints; 0 = only at the end")
    check_every: int = _option(10, "steps between checks that replicas are bit-identical; 0 = off")
    activation_checkpointing: bool = _option(False, "recompute activations to save memory")
    compile: bool = _option(False, "compile the model's blocks with torch.compile")
    liger: bool = _option(False, "Liger kernels in the model (CUDA, extra 'liger')")
    tracker: TrackerName = _option("none", "where metrics go besides metrics.jsonl")
    threads: int = _option(0, "CPU threads per rank; 0 = the cores shared evenly")
    device_backend: DeviceBackend = _option(
        "auto", "between replicas on GPUs: nccl, or gloo (split); auto = split on several machines"
    )
    mixed_gpus: bool = _option(False, "let replicas try GPUs of several generations; see README")
    host: str = _option("127.0.0.1", "address on which the core listens; another one is opt-in")
    port: int = _option(0, "port of the core's store; 0 = a free one")
    local_ranks: int = _option(0, "ranks on this machine, the rest by `sidecar`; 0 = all")
    timeout: int = _option(600, "seconds until a collective that a rank misses is an error")

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag(name)} must be a finite number, got {value}")
        for name in ("sequence_length", "micro_batch", "total_batch", "total_steps", "replicas",
                     "tensor_parallelism", "data_parallelism", "start_step", "timeout",
                     "compression_chunk", "compression_topk"):  # fmt: skip
            self._at_least(name, 1)
        for name in ("weight_decay", "eps", "learning_rate", "warmup_steps", "max_grad_norm",
                     "checkpoint_every", "check_every", "threads", "local_ranks"):  # fmt: skip
            self._at_least(name, 0)
        for name in ("beta1", "beta2", "compression_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be in [0, 1), got {getattr(self, name)}")
        if self.token_size not in (2, 4):
            raise ValueError(f"--token-size must be 2 or 4, got {self.token_size}")
        if self.sequence_length < 2:
            raise ValueError("--sequence-length must be at least 2: a token is learnt from another")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in [0, 2^32), got {self.seed}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port must be in [0, 65536), got {self.port}")
        if self.start_step > self.total_steps:
            raise ValueError(
                f"--start-step {self.start_step} is after --total-steps {self.total_steps}"
            )
        if self.replicas > 1 and not self.distro:
            raise ValueError(
                f"--replicas {self.replicas} needs --distro: AdamW has no exchange between peers"
            )
        if self.total_batch < self.replicas:
            raise ValueError(
                f"--total-batch {self.total_batch} is less than --replicas {self.replicas}: "
                "each needs a sequence to train on"
            )
        for name in ("distro_quantization", "offload_delta"):
            if getattr(self, name) and not self.distro:
                raise ValueError(f"{flag(name)} needs --distro")
        if self.local_ranks > self.world_size:
            raise ValueError(
                f"--local-ranks {self.local_ranks} is more than the run's {self.world_size} ranks"
            )

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{flag(name)} must be at least {least}, got {getattr(self, name)}")

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.data_parallelism * self.tensor_parallelism

    @property
    def world_size(self) -> int:
        """All ranks of the run, the core's own included."""
        return self.replicas * self.ranks_per_replica

    @property
    def ranks_here(self) -> int:
        """Ranks on the core's machine, the core's own included."""
        return self.local_ranks or self.world_size

    def lr_scheduler(self) -> dict[str, Any]:
        """Psyche's train example's schedule in the protocol's form."""
        return {
            "Cosine": {
                "base_lr": self.learning_rate,
                "warmup_init_lr": 0.0,
                "final_lr": self.learning_rate / 10.0,
                "warmup_steps": self.warmup_steps,
                "total_steps": self.total_steps,
            }
        }

    def optimizer(self) -> OptimizerConfig:
        """The optimiser in the protocol's form."""
        clip = self.max_grad_norm or None
        if self.distro:
            return Distro(
                clip_grad_norm=clip,
                weight_decay=self.weight_decay,
                compression_decay=self.compression_decay,
                compression_topk=self.compression_topk,
                compression_chunk=self.compression_chunk,
                quantize_1bit=self.distro_quantization,
            )
        return AdamW(
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
            eps=self.eps,
            clip_grad_norm=clip,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, as the run directory's ``config.toml`` has them (None is left out)."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def to_toml(self) -> str:
        """A file that ``--config`` takes."""
        return msgspec.toml.encode(self.to_dict()).decode()


def flag(name: str) -> str:
    """The command line's flag of a field."""
    return "--" + name.replace("_", "-")


def read_toml(path: str) -> dict[str, Any]:
    """Reads ``--config``: a TOML table with ``RunConfig``'s fields; ``-`` and ``_`` are the same.

    Raises:
        ValueError: no such file, not TOML, or a key that does not exist (the nearest is named).
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not TOML: {error}") from error
    hints = get_type_hints(RunConfig)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--config {path}: there is no key {key!r}{hint}")
        if name in values:
            raise ValueError(f"--config {path}: key {name!r} appears twice, as {key!r} too")
        values[name] = strict.convert(value, hints[name], f"--config {path}: {key}")
    return values
