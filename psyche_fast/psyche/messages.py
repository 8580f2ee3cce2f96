"""The operations that rank 0 sends, one strict type each, in Psyche's JSON.

An unknown operation, an unknown or missing field and a wrong type are a ValueError that names it:
every rank reads the same text, so every rank refuses it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from psyche_fast import strict
from psyche_fast.config import OptimizerConfig, optimizer_from_json
from psyche_fast.schedules import LearningRateSchedule


class ResultsMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes and types of the results that follow; lists run over parameters in name order.

    The types are c10 ScalarType numbers of the first parameter's tensors. For no results at all
    Psyche's core writes an object of nulls.
    """

    sparse_idx_size: list[list[int]] | None
    sparse_idx_dtype: int | None
    sparse_val_size: list[list[int]] | None
    sparse_val_dtype: int | None
    xshape: list[list[int]] | None
    totalk: list[int] | None

    def check(self) -> None:
        """Refuses what does not describe results.

        Raises:
            ValueError: a field is null, or the lists are of different lengths.
        """
        fields = msgspec.structs.asdict(self)
        nulls = [name for name, value in fields.items() if value is None]
        if nulls:
            raise ValueError(f"results_metadata: {', '.join(nulls)} must not be null")
        lengths = {name: len(value) for name, value in fields.items() if isinstance(value, list)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"results_metadata: lists of different lengths: {lengths}")


class Operation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all operations."""

    name: ClassVar[str]


class Hyperparameters(Operation, frozen=True, kw_only=True):
    """Builds the trainer. ``micro_batch_size`` is already times the data parallelism."""

    name: ClassVar[str] = "hyperparameters"
    lr_scheduler: Any
    optimizer: Any
    micro_batch_size: int
    grad_accum_in_fp32: bool

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        # Both are externally tagged: checked here, so that a wrong one is refused on arrival.
        self.schedule()
        self.optimizer_config()

    def schedule(self) -> LearningRateSchedule:
        """The learning-rate schedule."""
        return LearningRateSchedule.from_json(self.lr_scheduler)

    def optimizer_config(self) -> OptimizerConfig:
        """The optimiser."""
        return optimizer_from_json(self.optimizer)


class _Step(Operation, frozen=True, kw_only=True):
    step: int
    warmup_lr_between: tuple[int, int] | None = None
    results_len: int = 0
    results_metadata: ResultsMetadata | None = None

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step must not be negative, got {self.step}")
        if self.results_len < 0:
            raise ValueError(f"results_len must not be negative, got {self.results_len}")
        if self.results_len > 0:
            if self.results_metadata is None:
                raise ValueError(f"results_len is {self.results_len} but results_metadata is null")
            self.results_metadata.check()


def _check_batch(batch_shape: tuple[int, int], lengths: list[list[int]] | None) -> None:
    if min(batch_shape) < 1:
        raise ValueError(f"batch_shape must be positive, got {list(batch_shape)}")
    if lengths is not None and len(lengths) != batch_shape[0]:
        raise ValueError(
            f"batch_sequence_lengths has {len(lengths)} rows, batch_shape {batch_shape[0]}"
        )


class Train(_Step, frozen=True, kw_only=True):
    """One batch: look-ahead, forward, backward; with DisTrO also this rank's next result."""

    name: ClassVar[str] = "train"
    zero_optim: bool
    batch_id: tuple[int, int]
    batch_shape: tuple[int, int]
    batch_has_labels: bool = False
    batch_has_position_ids: bool = False
    batch_sequence_lengths: list[list[int]] | None = None
    optimize: bool | msgspec.UnsetType = msgspec.UNSET
    """Ours, absent in Psyche's: the optimiser's step follows without an operation of its own."""

    def __post_init__(self) -> None:
        _Step.__post_init__(self)
        _check_batch(self.batch_shape, self.batch_sequence_lengths)


class Optimize(_Step, frozen=True, kw_only=True):
    """The optimiser's step; with DisTrO on the results of all peers."""

    name: ClassVar[str] = "optimize"


class Forward(Operation, frozen=True, kw_only=True):
    """Forward without gradient."""

    name: ClassVar[str] = "forward"
    batch_shape: tuple[int, int]
    batch_has_labels: bool = False
    batch_has_position_ids: bool = False
    batch_sequence_lengths: list[list[int]] | None = None
    num_logits_to_keep: int | None = None
    loss_scale: float | None = None

    def __post_init__(self) -> None:
        _check_batch(self.batch_shape, self.batch_sequence_lengths)


class Extract(Operation, frozen=True, kw_only=True):
    """Every rank takes part in gathering the full parameters."""

    name: ClassVar[str] = "extract"


class TruncateBf16(Operation, frozen=True, kw_only=True):
    """Parameters rounded to bfloat16 in place."""

    name: ClassVar[str] = "truncate_bf16"


class Exit(Operation, frozen=True, kw_only=True):
    """Clean exit with status 0."""

    name: ClassVar[str] = "exit"


OPERATIONS: dict[str, type[Operation]] = {
    kind.name: kind
    for kind in (Hyperparameters, Train, Optimize, Forward, Extract, TruncateBf16, Exit)
}


def encode(operation: Operation) -> str:
    """The JSON object of an operation."""
    fields = {"operation": operation.name, **msgspec.to_builtins(operation)}
    return msgspec.json.encode(fields).decode()


def decode(text: str | bytes, number: int) -> Operation:
    """Reads one operation.

    Args:
        text: the JSON object.
        number: the operation's number in the store, for errors.

    Raises:
        ValueError: what is wrong, and where.
    """
    what = f"operation {number}"
    obj = strict.loads(text, what)
    if not isinstance(obj, dict) or "operation" not in obj:
        raise ValueError(f"{what}: wanted an object with the field 'operation', got {obj!r}")
    name = obj.pop("operation")
    if not isinstance(name, str) or name not in OPERATIONS:
        raise ValueError(f"{what}: unknown operation {name!r}, known: {', '.join(OPERATIONS)}")
    return strict.convert(obj, OPERATIONS[name], f"{what} ({name})")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What our core says beyond Psyche's protocol. The defaults are Psyche's behaviour."""

    replicas: int | None = None
    """DisTrO peers. None, as Psyche does: each group of dp * tp ranks trains the whole batch,
    results come from rank 0, and every operation is followed by a barrier and broadcasts. A number:
    operations are sent ahead, each replica is sent its share of the batch and trains that, and
    results are exchanged among the ranks."""
    param_dtype: str = "bfloat16"
    attn_implementation: str = "auto"
    sequence_length: int | None = None
    activation_checkpointing: bool = False
    liger: bool = False
    compile: bool = False
    optim_stats: bool = False
    check_every: int = 0
    delta_dtype: str = "float32"
    offload_delta: bool = False
    defer_grad_sync: bool = False
    split: bool = False
    """What goes from replica to replica goes over gloo; inside a replica ``--backend`` is used."""
    threads: int | None = None
    timeout: int | None = None
