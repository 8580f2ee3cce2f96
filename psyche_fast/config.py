"""The configuration of a run: one struct for each part of the program that uses it.

`RunConfig` has Psyche's train example's names and defaults. A field is declared once, with its
range and its help: the command line's flags, the keys of `--config`, the checks and what travels
to the other ranks all come from it. The resolved configuration is written to the run
directory.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_type_hints

import msgspec
from msgspec import Meta

from psyche_fast import strict
from psyche_fast.budgets import fill, parse_duration, parse_micro_batch
from psyche_fast.exchanges import Exchange
from psyche_fast.locations import mixture_path, seed_key, written_out
from psyche_fast.options import (
    Amount,
    Count,
    Positive,
    Section,
    Seed,
    Share,
    flag,
    without_none,
    written,
)
from psyche_fast.options import describe as _help
from psyche_fast.ranks import Machines, Parallelism
from psyche_fast.schedules import BatchSizes, Schedule
from psyche_fast.views import Evaluation, Tracking

ARCHITECTURES = "PSYCHE_FAST_ARCHITECTURES"
"""Environment variable: which `module:function`, one or several with commas between, rank 0 may
have this rank import. Ranks that rank 0 starts have its own."""


class Model(Section, frozen=True, kw_only=True):
    """What is trained, for `models`."""

    model: Annotated[
        str, _help("model folder, a Hugging Face hub id, or fresh:20M and the like")
    ] = "emozilla/llama2-215m-init"
    python_arch: Annotated[str, _help("HfAuto, a registered name, or module:function")] = "HfAuto"
    param_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        _help("the parameters' type in forward and backward; auto = bfloat16 where it is fast"),
    ] = "auto"  # fmt: skip
    master_dtype: Annotated[
        Literal["float32", "bfloat16"],
        _help("what the optimizer adds to; bfloat16 loses small updates"),
    ] = "float32"  # fmt: skip
    save_dtype: Annotated[
        Literal["bfloat16", "float32"] | None, _help("the parameters' type in checkpoints")
    ] = None  # fmt: skip
    attn_implementation: Annotated[
        Literal["auto", "eager", "sdpa", "flash_attention_2"], _help("the same one on every rank")
    ] = "auto"
    sequence_length: Annotated[
        int, Meta(ge=2), _help("tokens per sequence; overrides the position limit")
    ] = 2048
    activation_checkpointing: Annotated[bool, _help("recompute activations to save memory")] = False
    compile: Annotated[bool, _help("compile the model's blocks with torch.compile")] = False
    liger: Annotated[bool, _help("Liger kernels in the model (CUDA, extra 'liger')")] = False
    loss: Annotated[
        Literal["auto", "plain", "chunked"],
        _help("chunked: never hold all logits; auto: where they would be large"),
    ] = "auto"  # fmt: skip

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.param_dtype == "float32" and self.master_dtype == "bfloat16":
            raise ValueError(
                "--master-dtype bfloat16 is narrower than --param-dtype float32; leave it out"
            )
        if self.liger and self.loss != "auto":
            raise ValueError(f"--loss {self.loss} with --liger: its kernels compute the loss")


class Data(Section, frozen=True, kw_only=True):
    """What it is trained on, for `data`."""

    data_path: Annotated[
        str,
        _help(
            "token files (.npy .bin .ds) or Parquet: folder, file, URL or mixture (.toml .json); "
            "in a file also a list of data sets, each with `path` and `weight`"
        ),
    ] = "data"
    token_size: Annotated[Literal[2, 4], _help("bytes per token in token files: 2 or 4")] = 2
    seed: Annotated[Seed | None, _help("shuffle the data with this seed; no seed, no shuffle")] = (
        None
    )
    seed_bytes: Annotated[
        str | None, _help("the same with Psyche's whole seed: 64 hexadecimal digits")
    ] = None  # fmt: skip

    data_cache: Annotated[
        str | None, _help("folder for blocks of files read by URL (default: the user's cache)")
    ] = None  # fmt: skip
    data_cache_gb: Annotated[Amount, _help("how much of them is kept")] = 32.0

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.seed_bytes is None:
            return
        if self.seed is not None:
            raise ValueError("--seed and --seed-bytes are two seeds: give one")
        if not re.fullmatch("[0-9a-fA-F]{64}", self.seed_bytes):
            raise ValueError(f"--seed-bytes must be 64 hexadecimal digits, got {self.seed_bytes!r}")

    @property
    def key(self) -> bytes | None:
        """The 32 bytes that the data are shuffled with, or None."""
        if self.seed_bytes is not None:
            return bytes.fromhex(self.seed_bytes)
        return None if self.seed is None else seed_key(self.seed)


class Training(Section, frozen=True, kw_only=True):
    """How a rank goes through its batch, for `rank.trainer`."""

    micro_batch: Annotated[
        Count, written(parse_micro_batch),
        _help("sequences per forward on one data-parallel rank; auto = as many as fit"),
    ] = 8  # fmt: skip
    grad_accum_in_fp32: Annotated[bool, _help("add up micro-batches' gradients in fp32")] = False
    defer_grad_sync: Annotated[
        bool, _help("FSDP2: reduce gradients once per step; see docs/running.md")
    ] = False  # fmt: skip
    optim_stats: Annotated[bool, _help("log norms of gradient and momentum per parameter")] = False
    check_every: Annotated[
        Count, _help("steps between checks that replicas are bit-identical; 0 = off")
    ] = 10


class Optimizer(Section, frozen=True, kw_only=True):
    """DisTrO or AdamW, for `rank.optimizers`."""

    distro: Annotated[bool, _help("train with DisTrO instead of AdamW")] = False
    max_grad_norm: Annotated[Amount, _help("clip the gradient's global norm; 0 = off")] = 1.0
    weight_decay: Annotated[Amount, _help("AdamW and DisTrO")] = 0.1
    decay: Annotated[
        Literal["all", "matrices"], _help("what weight decay is for")
    ] = "all"  # fmt: skip
    beta1: Annotated[Share, _help("AdamW")] = 0.9
    beta2: Annotated[Share, _help("AdamW")] = 0.95
    eps: Annotated[Amount, _help("AdamW")] = 1e-8
    compression_chunk: Annotated[Positive, _help("DisTrO: side of a DCT chunk")] = 64
    compression_topk: Annotated[Positive, _help("DisTrO: coefficients sent per chunk")] = 4
    compression_decay: Annotated[Share, _help("DisTrO: decay of the momentum")] = 0.999
    distro_quantization: Annotated[bool, _help("DisTrO: send signs only (1 bit)")] = False
    refuse_outliers: Annotated[
        Amount | None,
        _help("DisTrO: robust standard deviations by which a result may exceed the others' norm"),
    ] = None  # fmt: skip
    delta_dtype: Annotated[
        Literal["float32", "bfloat16"], _help("DisTrO: the momentum's type")
    ] = "float32"  # fmt: skip
    offload_delta: Annotated[bool, _help("DisTrO: keep the momentum in host memory (CUDA)")] = False

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        for name in ("distro_quantization", "offload_delta"):
            if getattr(self, name) and not self.distro:
                raise ValueError(f"{flag(name)} needs --distro")
        if self.refuse_outliers is not None and (not self.distro or self.distro_quantization):
            raise ValueError(
                "--refuse-outliers needs --distro without --distro-quantization: signs have all "
                "the same norm"
            )


RUN_ID = re.compile(r"\w[\w.-]{0,63}")
"""What a run may be called."""


class Run(Section, frozen=True, kw_only=True):
    """What the core does, for `core`."""

    total_batch: Annotated[Positive, _help("sequences per step, over all replicas")] = 256
    total_batch_start: Annotated[
        Positive | None, _help("sequences of step 1, from where they rise to --total-batch")
    ] = None  # fmt: skip
    batch_warmup_tokens: Annotated[
        Count, _help("tokens over which they rise; needs --total-batch-start")
    ] = 0  # fmt: skip
    max_time: Annotated[
        Amount | None, written(parse_duration),
        _help("end with a checkpoint after this time, as 90m, 8h or 1d12h"),
    ] = None  # fmt: skip
    output: Annotated[str | None, _help("run directory (default: runs/DATE-TIME)")] = None
    resume: Annotated[
        str | None, _help("go on exactly: auto, a step, the folder or URL of a run or checkpoint")
    ] = None  # fmt: skip
    fork: Annotated[
        str | None, _help("begin a run of its own, with other settings, from a checkpoint's state")
    ] = None  # fmt: skip
    save_path: Annotated[str | None, _help("also write the final model to this folder")] = None
    checkpoint_every: Annotated[Count, _help("steps between checkpoints; 0 = only at the end")] = 0
    keep: Annotated[Count, _help("checkpoints to keep, the newest ones; 0 = all")] = 0
    keep_every: Annotated[
        Count, _help("with --keep: also keep those of steps that this divides; 0 = none")
    ] = 0  # fmt: skip
    run_id: Annotated[
        str | None, _help("call checkpoints RUN_ID-stepN, as Psyche does")
    ] = None  # fmt: skip
    checkpoint_to: Annotated[
        str | None, _help("also upload checkpoints, state and all, to this URL: s3://, gs://, hf://")
    ] = None  # fmt: skip
    push_to_hub: Annotated[
        str | None, _help("also upload checkpoints to this repository of the Hugging Face hub")
    ] = None  # fmt: skip
    tracker: Annotated[
        Literal["none", "wandb", "trackio", "tensorboard", "mlflow"],
        _help("where metrics go besides metrics.jsonl"),
    ] = "none"
    metric_names: Annotated[
        Literal["psyche-fast", "psyche"],
        _help("what trackers call them: as in metrics.jsonl, or as Psyche's dashboards do"),
    ] = "psyche-fast"  # fmt: skip

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.resume is not None and self.fork is not None:
            raise ValueError("--resume and --fork: give one of them")
        if self.keep_every and not self.keep:
            raise ValueError("--keep-every needs --keep, without which all checkpoints are kept")
        # They become folders' names.
        if self.run_id is not None and not RUN_ID.fullmatch(self.run_id):
            raise ValueError(
                "--run-id: wanted up to 64 letters, digits and . _ - that begin with no . or -, "
                f"got {self.run_id!r}"
            )
        start = self.total_batch_start
        if (start is None) != (self.batch_warmup_tokens == 0):
            raise ValueError("--total-batch-start and --batch-warmup-tokens need each other")
        if start is not None and start > self.total_batch:
            raise ValueError(
                f"--total-batch-start {start} is more than --total-batch {self.total_batch}"
            )


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training run.

    Raises:
        ValueError: sections that do not go together, named by their flags.
    """

    model: Model = msgspec.field(default_factory=Model)
    data: Data = msgspec.field(default_factory=Data)
    training: Training = msgspec.field(default_factory=Training)
    optimizer: Optimizer = msgspec.field(default_factory=Optimizer)
    schedule: Schedule = msgspec.field(default_factory=Schedule)
    exchange: Exchange = msgspec.field(default_factory=Exchange)
    parallelism: Parallelism = msgspec.field(default_factory=Parallelism)
    machines: Machines = msgspec.field(default_factory=Machines)
    run: Run = msgspec.field(default_factory=Run)
    evaluation: Evaluation = msgspec.field(default_factory=Evaluation)
    tracking: Tracking = msgspec.field(default_factory=Tracking)

    def __post_init__(self) -> None:
        replicas, world_size = self.parallelism.copies, self.parallelism.world_size
        asked = "--simulate" if self.parallelism.simulate else "--replicas"
        self.exchange.check(
            distro=self.optimizer.distro,
            elastic=self.parallelism.elastic,
            simulate=self.parallelism.simulate,
            replicas=replicas,
            ranks_per_replica=self.parallelism.ranks_per_replica,
            has_masters=self.model.master_dtype == "float32",
        )
        exchanges = self.optimizer.distro or self.exchange.method or self.exchange.levels
        if replicas > 1 and not exchanges:
            raise ValueError(
                f"{asked} {replicas} needs --distro: AdamW has no exchange between peers "
                "(--method dense has)"
            )
        if self.optimizer.refuse_outliers is not None and replicas < 3:
            raise ValueError(
                f"--refuse-outliers needs {asked} 3 or more, got {replicas}: of two nobody can "
                "tell which is the outlier"
            )
        which = "--max-replicas" if self.parallelism.max_replicas else asked
        most = self.parallelism.max_replicas or replicas
        for name in ("total_batch", "total_batch_start"):
            rows = getattr(self.run, name)
            if rows is not None and rows < most:
                raise ValueError(
                    f"{flag(name)} {rows} is less than {which} {most}: "
                    "each needs a sequence to train on"
                )
        if self.parallelism.elastic and self.ranks_here % self.parallelism.ranks_per_replica:
            raise ValueError(
                f"--local-ranks {self.machines.local_ranks} with --elastic: a replica's "
                f"{self.parallelism.ranks_per_replica} ranks are started together, on one machine"
            )
        if self.machines.local_ranks > world_size:
            raise ValueError(
                f"--local-ranks {self.machines.local_ranks} is more than the run's "
                f"{world_size} ranks"
            )

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The configuration with these flags' values, by name whatever their section.

        `total_tokens` and `warmup_fraction` bring `total_steps` and `warmup_steps` with them.

        Raises:
            ValueError: values out of range, or that do not go together.
        """
        config = cls().replace(**values)
        found = fill(values, config.batch_sizes, config.schedule.total_steps)
        return config.replace(**found) if found else config

    def replace(self, **values: Any) -> Self:
        """The configuration with other values of these flags."""
        changes: dict[str, dict[str, Any]] = {}
        # Only `methods` have it with a share of what was sent.
        if values.get("method") == "distro" and values.get("subtract") is None:
            values["distro"] = True
        for name, value in values.items():
            changes.setdefault(FLAGS[name].section, {})[name] = value
        sections = {
            name: msgspec.structs.replace(getattr(self, name), **fields)
            for name, fields in changes.items()
        }
        return msgspec.structs.replace(self, **sections)

    @property
    def chooses_for_link(self) -> bool:
        """Whether settings are chosen by `--link`, which a simulated run has a clock for."""
        return self.exchange.link is not None and not self.parallelism.simulate

    @property
    def ranks_here(self) -> int:
        """Ranks on the core's machine, the core's own included."""
        return self.machines.local_ranks or self.parallelism.world_size

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences by step."""
        run = self.run
        return BatchSizes(
            start=run.total_batch_start or run.total_batch,
            end=run.total_batch,
            warmup_tokens=run.batch_warmup_tokens,
            sequence_length=self.model.sequence_length,
        )

    def to_dict(self) -> dict[str, Any]:
        """All values by the flags' names; None is left out."""
        values = {n: getattr(getattr(self, f.section), n) for n, f in FLAGS.items()}
        return {name: value for name, value in values.items() if value is not None}

    def to_toml(self) -> str:
        """A file that `--config` takes, as the run directory's `config.toml`."""
        tables: dict[str, dict[str, Any]] = {}
        values = self.to_dict()
        for name, value in values.items():
            if INSTEAD_OF.get(name) in values:
                continue  # it follows
            if name == "micro_batch" and value == 0:
                value = "auto"
            if name in _DATA and (described := written_out(value)) and set(described) == {"data"}:
                value = described["data"]
            tables.setdefault(FLAGS[name].section, {})[name] = value
        return msgspec.toml.encode(tables).decode()


@dataclass(frozen=True)
class Flag:
    """One option, as the command line and `--config` know it.

    Attributes:
        section: the field of `RunConfig` that has it.
        kind: its type: a class or a `Literal`.
        default: its value where nobody gives one.
        help: what it does.
        parse: reads words for its value; None where there are none.
    """

    section: str
    kind: Any
    default: Any
    help: str
    parse: Callable[[str], Any] | None = None


def _flags() -> dict[str, Flag]:
    flags: dict[str, Flag] = {}
    for section, kind in get_type_hints(RunConfig).items():
        default, bare = kind(), get_type_hints(kind)
        for name, hint in get_type_hints(kind, include_extras=True).items():
            assert name not in flags, f"{name} is in two sections"
            help = next(meta.description for meta in hint.__metadata__ if meta.description)
            words = [meta.extra["parse"] for meta in hint.__metadata__ if meta.extra]
            kind_of = without_none(bare[name])
            parse = words[0] if words else None
            flags[name] = Flag(section, kind_of, getattr(default, name), help, parse)
    return flags


INSTEAD_OF = {"total_steps": "total_tokens", "warmup_steps": "warmup_fraction"}
"""Options that follow from another where that is given."""

FLAGS: Mapping[str, Flag] = _flags()
"""Every option by its name, in the order of the sections."""


def beneath(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the flags' names with others over them: of two that say one thing, theirs."""
    gone = {n for pair in INSTEAD_OF.items() if not over.keys().isdisjoint(pair) for n in pair}
    return {name: value for name, value in values.items() if name not in gone} | dict(over)


_DATA = frozenset({"data_path", "eval_data"})
"""Options that may be a list of data sets in a file, as `[[data]]` of a mixture's."""
_GONE = frozenset({"mixed_gpus"})
"""Options of earlier versions, which files of their runs may have; they changed no numbers."""


def read_toml(path: str) -> dict[str, Any]:
    """Reads `--config`: flags by name, in tables by section or without; `-` and `_` are the same.

    Raises:
        ValueError: no such file, not TOML, or a key that does not exist (the nearest is named).
    """
    what = f"--config {path}"
    table = strict.load_toml(path, what)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if not isinstance(value, dict):
            _add(values, key, value, what)
        elif key not in RunConfig.__struct_fields__:
            raise ValueError(f"{what}: there is no table [{key}]{_near(key, sections=True)}")
        else:
            for inner, content in value.items():
                if inner in _GONE:
                    continue
                name = _add(values, inner, content, f"{what}: [{key}]")
                if FLAGS[name].section != key:
                    raise ValueError(
                        f"{what}: {inner!r} is in [{key}], not [{FLAGS[name].section}]"
                    )
    return values


def _add(values: dict[str, Any], key: str, value: Any, what: str) -> str:
    name = key.replace("-", "_")
    if name not in FLAGS:
        raise ValueError(f"{what}: there is no key {key!r}{_near(name)}")
    if name in values:
        raise ValueError(f"{what}: key {name!r} appears twice, as {key!r} too")
    if name == "levels" and isinstance(value, list):
        value = ",".join(map(str, value))
    if name in _DATA and isinstance(value, list):
        value = mixture_path(value, f"{what}: {key}")
    parse = FLAGS[name].parse
    if parse is not None and isinstance(value, str):
        try:
            value = parse(value)
        except ValueError as error:
            raise ValueError(f"{what}: {key}: {error}") from error
    values[name] = strict.convert(value, FLAGS[name].kind, f"{what}: {key}")
    return name


def _near(name: str, *, sections: bool = False) -> str:
    near = difflib.get_close_matches(name, RunConfig.__struct_fields__ if sections else FLAGS, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
