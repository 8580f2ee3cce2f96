"""Psyche's run files (`state.toml`), read as our own options.

Facts of PsycheFoundation/psyche, `shared/coordinator/src/{coordinator,model}.rs`: which keys there
are, and what its own check refuses.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from psyche_fast import strict
from psyche_fast.config import RUN_ID, RunConfig, beneath
from psyche_fast.locations import (
    DUMMY,
    HttpData,
    location_path,
    read_http,
)
from psyche_fast.options import Count, Positive
from psyche_fast.schedules import FORMS, SCHEDULES_OWN

_U16 = Annotated[int, Meta(ge=1, lt=1 << 16)]
_T = TypeVar("_T", bound=msgspec.Struct)

_UNUSED = {
    "run_id", "run_state", "progress", "epoch_state", "run_state_start_unix_timestamp",
    "pending_pause",
}  # fmt: skip
"""Top-level keys, most of which say how far a run with other clients has come."""


class Coordination(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[config]`; what has a default here is of rounds, witnesses and committees."""

    total_steps: Positive
    global_batch_size_start: _U16
    global_batch_size_end: _U16
    global_batch_size_warmup_tokens: Count = 0
    warmup_time: Count = 30
    cooldown_time: Count = 5
    epoch_time: Count = 600
    max_round_train_time: Count = 30
    round_witness_time: Count = 2
    min_clients: Count = 1
    init_min_clients: Count = 1
    verification_percent: Count = 0
    witness_nodes: Count = 0
    waiting_for_members_extra_time: Count = 3


_USED = {
    "total_steps", "global_batch_size_start", "global_batch_size_end",
    "global_batch_size_warmup_tokens",
}  # fmt: skip


class _Llm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[model.LLM]`; what is tagged is read by itself."""

    max_seq_len: Annotated[int, Meta(ge=2)]
    cold_start_warmup_steps: Count
    architecture: Literal["HfLlama", "HfDeepseek", "HfAuto", "Torchtitan"]
    checkpoint: Any
    data_type: Literal["Pretraining", "Finetuning"]
    data_location: Any
    lr_schedule: Any
    optimizer: Any


class _HubRepo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    repo_id: str
    revision: str | None = None


class _GcsRepo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bucket: str
    prefix: str | None = None


_CHECKPOINTS: dict[str, type[_HubRepo] | type[_GcsRepo]] = {
    "Dummy": _HubRepo, "Hub": _HubRepo, "P2P": _HubRepo, "Gcs": _GcsRepo, "P2PGcs": _GcsRepo,
}  # fmt: skip


class AdamW(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """Psyche's `AdamW`."""

    betas: tuple[float, float]
    weight_decay: float
    eps: float
    clip_grad_norm: float | None = None

    def options(self) -> dict[str, Any]:
        """Ours, but for clipping."""
        return {
            "distro": False,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "weight_decay": self.weight_decay,
            "eps": self.eps,
        }


class Distro(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """Psyche's `Distro`."""

    clip_grad_norm: float | None = None
    weight_decay: float | None = None
    compression_decay: float
    compression_topk: _U16
    compression_chunk: _U16
    quantize_1bit: bool

    def options(self) -> dict[str, Any]:
        """Ours, but for clipping."""
        return {
            "distro": True,
            "weight_decay": self.weight_decay or 0.0,
            "compression_decay": self.compression_decay,
            "compression_topk": self.compression_topk,
            "compression_chunk": self.compression_chunk,
            "distro_quantization": self.quantize_1bit,
        }


_OPTIMIZERS: dict[str, type[AdamW] | type[Distro]] = {"AdamW": AdamW, "Distro": Distro}


@dataclass(frozen=True)
class RunFile:
    """What a run file asks for.

    Attributes:
        what: how to call it in an error.
        values: our options by name.
        refused: options that its values cannot give, and why; another value may.
        ignored: its keys that have no meaning here.
    """

    what: str
    values: dict[str, Any]
    refused: dict[str, str]
    ignored: tuple[str, ...]

    def ignored_line(self) -> str:
        """What a user is told of the keys that are ignored."""
        return f"ignored  {', '.join(self.ignored)}: there are no rounds with other clients here"

    def check(self, over: Mapping[str, Any]) -> None:
        """Checks that a run can begin with others' values over its own.

        Raises:
            ValueError: a value that is refused has no other over it.
        """
        for name, reason in self.refused.items():
            if name not in over:
                raise ValueError(f"{self.what}: {reason}")

    def under(self, over: Mapping[str, Any]) -> dict[str, Any]:
        """Its values with others over them.

        A batch size, a seed or a kind of schedule takes along what belongs to the file's own.
        """
        gone: set[str] = set()
        if "total_batch" in over:
            gone |= {"total_batch_start", "batch_warmup_tokens"}
        if "seed" in over:
            gone.add("seed_bytes")
        if over.get("distro") is False:
            gone.add("distro_quantization")
        if over.get("schedule", self.values["schedule"]) != self.values["schedule"]:
            gone |= {name for names in SCHEDULES_OWN for name in names}
        kept = {name: value for name, value in self.values.items() if name not in gone}
        return beneath(kept, over)


def read_run_file(path: str) -> RunFile:
    """Reads `--run-file`.

    Raises:
        ValueError: no such file, not TOML, an unknown or missing key, or a wrong value.
    """
    what = f"--run-file {path}"
    table = strict.load_toml(path, what)
    _check_keys(table, {"config", "model"}, _UNUSED, what)
    config = _struct(table["config"], Coordination, f"{what}: config")
    models = _table(table["model"], f"{what}: model")
    _check_keys(models, {"LLM"}, set(), f"{what}: model")
    where = f"{what}: model.LLM"
    llm = _struct(models["LLM"], _Llm, where)
    values: dict[str, Any] = {
        "sequence_length": llm.max_seq_len,
        "python_arch": llm.architecture,
        "total_steps": config.total_steps,
        "cold_start_warmup_steps": llm.cold_start_warmup_steps,
        **_batches(config, f"{what}: config"),
        **_schedule(llm.lr_schedule, f"{where}.lr_schedule"),
    }
    run_id = table.get("run_id")
    if run_id is not None:
        if not isinstance(run_id, str):
            raise ValueError(f"{what}: run_id: wanted text, got {run_id!r}")
        if RUN_ID.fullmatch(run_id):
            values["run_id"] = run_id
    refused: dict[str, str] = {}
    if llm.architecture == "Torchtitan":
        refused["python_arch"] = (
            "model.LLM.architecture 'Torchtitan' needs a fork of torchtitan, whose model code is "
            "not here; --python-arch HfAuto loads Hugging Face models"
        )
    readers = (
        ("checkpoint", _checkpoint, "model"),
        ("data_location", _data, "data_path"),
        ("optimizer", _optimizer, "distro"),
    )
    for key, read, option in readers:
        found = read(getattr(llm, key), f"{where}.{key}")
        if isinstance(found, str):
            refused[option] = f"model.LLM.{key} {found}"
        else:
            values |= found
    ignored = [key for key in table if key in _UNUSED and key not in values]
    ignored += [f"config.{key}" for key in table["config"] if key not in _USED]
    ignored.append("model.LLM.data_type")
    try:
        RunConfig.of(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return RunFile(what, values, refused, tuple(ignored))


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: wanted a table, got {value!r}")
    return value


def _check_keys(table: Mapping[str, Any], wanted: set[str], known: set[str], what: str) -> None:
    for key in table:
        if key not in wanted | known:
            near = difflib.get_close_matches(key, wanted | known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{what}: there is no key {key!r}{hint}")
    for key in sorted(wanted - table.keys()):
        raise ValueError(f"{what}: key {key!r} is missing")


def _struct(value: Any, kind: type[_T], what: str) -> _T:
    fields = msgspec.structs.fields(kind)
    required = {field.name for field in fields if field.required}
    _check_keys(_table(value, what), required, {field.name for field in fields}, what)
    return strict.convert(value, kind, what)


def _batches(config: Coordination, what: str) -> dict[str, Any]:
    start, end = config.global_batch_size_start, config.global_batch_size_end
    if start > end:
        raise ValueError(
            f"{what}: global_batch_size_start {start} is more than global_batch_size_end {end}"
        )
    tokens = config.global_batch_size_warmup_tokens
    if start == end or tokens == 0:  # without tokens to rise over, all batches are the last one
        return {"total_batch": end}
    return {"total_batch": end, "total_batch_start": start, "batch_warmup_tokens": tokens}


def _schedule(value: Any, what: str) -> dict[str, Any]:
    schedule = strict.tagged(value, FORMS, what)
    fields = msgspec.to_builtins(schedule)
    fields["learning_rate"] = fields.pop("base_lr")
    if "total_steps" in fields:
        fields["schedule_steps"] = fields.pop("total_steps")
    return {"schedule": _KINDS[type(schedule).__name__], **fields}


_KINDS = {
    "Constant": "constant", "Linear": "linear", "Cosine": "cosine", "WarmupStableDecay": "wsd",
}  # fmt: skip


def _checkpoint(value: Any, what: str) -> dict[str, Any] | str:
    """The option `model`, or why there is none."""
    if value == "Ephemeral":
        return "'Ephemeral' names no model to begin with, and Psyche refuses it too; give --model"
    repo = strict.tagged(value, _CHECKPOINTS, what)
    ((form, _),) = value.items()
    if isinstance(repo, _GcsRepo):
        place = f"gs://{repo.bucket}" + (f"/{repo.prefix}" if repo.prefix else "")
        return f"{form!r}: models are not read from buckets; copy {place} and give --model FOLDER"
    if form == "Dummy":
        return {"model": DUMMY}
    name = repo.repo_id + (f"@{repo.revision}" if repo.revision else "")
    if not repo.repo_id:
        raise ValueError(f"{what}.{form}.repo_id must not be empty")
    if form == "P2P":
        return (
            "'P2P' takes the model from other clients of the run, which are not here; give --model "
            f"(the run began with {name})"
        )
    return {"model": name}


def _data(value: Any, what: str) -> dict[str, Any] | str:
    """The options of the section `data`, or why there are none."""
    if value == "Dummy":
        return {"data_path": DUMMY}
    forms: dict[str, Any] = dict.fromkeys(("Server", "Local", "WeightedHttp", "Preprocessed"), str)
    content = strict.tagged(value, {**forms, "Http": HttpData}, what)
    ((form, _),) = value.items()
    if isinstance(content, HttpData):
        source = read_http(content, f"{what}.Http")
        assert source.token_size is not None
        return {"data_path": source.path, "token_size": source.token_size, **_seed(source.key)}
    if form == "Server":
        return (
            f"'Server' {content}: the protocol of Psyche's data server is not spoken here; give "
            "--data-path with the data that it serves, or with its data.toml"
        )
    return {"data_path": location_path(form, content, what)}


def _seed(key: bytes | None) -> dict[str, Any]:
    if key is None:
        return {}
    if not any(key[:28]):
        return {"seed": int.from_bytes(key, "big")}
    return {"seed_bytes": key.hex()}


def _optimizer(value: Any, what: str) -> dict[str, Any] | str:
    if value == "Dummy":
        return (
            "'Dummy' trains nothing: Psyche's own check of a model refuses it ('bad optimizer'); "
            "give --distro or --no-distro (AdamW)"
        )
    chosen = strict.tagged(value, _OPTIMIZERS, what)
    # Psyche clips only where the number is over 0.
    options = {**chosen.options(), "max_grad_norm": max(chosen.clip_grad_norm or 0.0, 0.0)}
    try:
        RunConfig.of(**options)
    except ValueError as error:
        raise ValueError(f"{what}.{type(chosen).__name__}: {error}") from error
    return options
