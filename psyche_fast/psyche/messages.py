"""The operations that rank 0 sends, one strict type each, in Psyche's JSON.

An unknown operation, an unknown or missing field and a wrong type are a ValueError that names it:
every rank reads the same text, so every rank refuses it.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from psyche_fast import strict
from psyche_fast.schedules import LearningRateSchedule

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class AdamW(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Psyche's `{"AdamW": {...}}`."""

    betas: tuple[Fraction, Fraction]
    weight_decay: NotNegative
    eps: NotNegative
    clip_grad_norm: float | None = None


class Distro(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Psyche's `{"Distro": {...}}`."""

    clip_grad_norm: float | None = None
    weight_decay: NotNegative | None = None
    compression_decay: Annotated[float, Meta(ge=0, le=1)]
    compression_topk: Positive
    compression_chunk: Positive
    quantize_1bit: bool


def read_optimizer(obj: Any) -> AdamW | Distro | None:
    """Reads Psyche's optimiser: `{"AdamW": {...}}`, `{"Distro": {...}}`, or `"Dummy"` for None.

    A `clip_grad_norm` of null, or of 0 or less, is none.

    Raises:
        ValueError: another form, an unknown or missing field, or a wrong type or value.
    """
    if obj == "Dummy":
        return None
    if not isinstance(obj, dict):
        raise ValueError(f'optimizer: wanted "Dummy", {{"AdamW": ...}} or {{"Distro": ...}}: {obj}')
    forms: dict[str, type[AdamW] | type[Distro]] = {"AdamW": AdamW, "Distro": Distro}
    return strict.tagged(obj, forms, "optimizer")


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


class Operation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="operation"):
    """Base of all operations."""


class Hyperparameters(Operation, frozen=True, kw_only=True, tag="hyperparameters"):
    """Builds the trainer. `micro_batch_size` is already times the data parallelism."""

    lr_scheduler: Any
    optimizer: Any
    micro_batch_size: Positive
    grad_accum_in_fp32: bool

    def __post_init__(self) -> None:
        # Both are externally tagged: checked now, so that a wrong one is refused on arrival.
        self.schedule()
        read_optimizer(self.optimizer)

    def schedule(self) -> LearningRateSchedule:
        """The learning-rate schedule."""
        return LearningRateSchedule.from_json(self.lr_scheduler)


class _Step(Operation, frozen=True, kw_only=True):
    step: Count
    warmup_lr_between: tuple[int, int] | None = None
    results_len: Count = 0
    results_metadata: ResultsMetadata | None = None

    def __post_init__(self) -> None:
        if self.results_len > 0:
            if self.results_metadata is None:
                raise ValueError(f"results_len is {self.results_len} but results_metadata is null")
            self.results_metadata.check()


def _check_batch(batch_shape: tuple[int, int], lengths: list[list[int]] | None) -> None:
    if lengths is not None and len(lengths) != batch_shape[0]:
        raise ValueError(
            f"batch_sequence_lengths has {len(lengths)} rows, batch_shape {batch_shape[0]}"
        )


class Train(_Step, frozen=True, kw_only=True, tag="train"):
    """One batch: look-ahead, forward, backward; with DisTrO also this rank's next result."""

    zero_optim: bool
    batch_id: tuple[int, int]
    batch_shape: tuple[Positive, Positive]
    batch_has_labels: bool = False
    batch_has_position_ids: bool = False
    batch_sequence_lengths: list[list[int]] | None = None

    def __post_init__(self) -> None:
        _Step.__post_init__(self)
        _check_batch(self.batch_shape, self.batch_sequence_lengths)


class Optimize(_Step, frozen=True, kw_only=True, tag="optimize"):
    """The optimiser's step; with DisTrO on the results of all peers."""


class Forward(Operation, frozen=True, kw_only=True, tag="forward"):
    """Forward without gradient."""

    batch_shape: tuple[Positive, Positive]
    batch_has_labels: bool = False
    batch_has_position_ids: bool = False
    batch_sequence_lengths: list[list[int]] | None = None
    num_logits_to_keep: int | None = None
    loss_scale: float | None = None

    def __post_init__(self) -> None:
        _check_batch(self.batch_shape, self.batch_sequence_lengths)


class Extract(Operation, frozen=True, tag="extract"):
    """Every rank takes part in gathering the full parameters."""


class TruncateBf16(Operation, frozen=True, tag="truncate_bf16"):
    """Parameters rounded to bfloat16 in place."""


class Exit(Operation, frozen=True, tag="exit"):
    """Clean exit with status 0."""


OPERATIONS: dict[Any, type[Operation]] = {
    kind.__struct_config__.tag: kind
    for kind in (Hyperparameters, Train, Optimize, Forward, Extract, TruncateBf16, Exit)
}


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
    name = obj["operation"]
    if not isinstance(name, str) or name not in OPERATIONS:
        raise ValueError(f"{what}: unknown operation {name!r}, known: {', '.join(OPERATIONS)}")
    return strict.convert(obj, OPERATIONS[name], f"{what} ({name})")
