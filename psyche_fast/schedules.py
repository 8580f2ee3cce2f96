"""Learning-rate schedules: pure functions from a step to a learning rate.

The four forms and their JSON are Psyche's (externally tagged, as serde writes them), for example
`{"Cosine": {"base_lr": 4e-4, "warmup_init_lr": 0.0, "final_lr": 4e-5, "warmup_steps": 500,
"total_steps": 25000}}`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import msgspec

from psyche_fast import strict


class LearningRateSchedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear warm-up and what follows it; `from_json` and `to_json` speak Psyche's forms."""

    base_lr: float
    warmup_init_lr: float
    warmup_steps: int

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def get_lr(self, step: int) -> float:
        """Learning rate of `step` (0 or more)."""
        if step < self.warmup_steps:
            rise = self.base_lr - self.warmup_init_lr
            return self.warmup_init_lr + rise * step / self.warmup_steps
        return self._after_warmup(step - self.warmup_steps)

    @abstractmethod
    def _after_warmup(self, step: int) -> float:
        """Learning rate `step` steps after the warm-up."""

    @staticmethod
    def from_json(obj: Any) -> LearningRateSchedule:
        """Builds the schedule of an externally tagged object.

        Raises:
            ValueError: not exactly one known form, an unknown or missing field, a wrong type, or
                a negative value.
        """
        return strict.tagged(obj, FORMS, "lr_scheduler")

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` takes."""
        return {type(self).__name__: msgspec.to_builtins(self)}


class Constant(LearningRateSchedule, frozen=True):
    """Linear warm-up, then `base_lr`."""

    def _after_warmup(self, step: int) -> float:
        return self.base_lr


class _Decay(LearningRateSchedule, frozen=True):
    final_lr: float
    total_steps: int

    def _after_warmup(self, step: int) -> float:
        length = self.total_steps - self.warmup_steps
        # Clamped: past the end Psyche's cosine rises again, ours stays at final_lr. A warm-up
        # longer than the whole (a short trial run) leaves no decay at all.
        if step >= length:
            return self.final_lr
        return self._decay(step / length)

    @abstractmethod
    def _decay(self, done: float) -> float: ...


class Linear(_Decay, frozen=True):
    """Linear warm-up, then a line to `final_lr` at `total_steps`, which then stays."""

    def _decay(self, done: float) -> float:
        return self.base_lr + (self.final_lr - self.base_lr) * done


class Cosine(_Decay, frozen=True):
    """Linear warm-up, then half a cosine to `final_lr` at `total_steps`, which then stays."""

    def _decay(self, done: float) -> float:
        return self.final_lr + (self.base_lr - self.final_lr) * 0.5 * (
            1.0 + math.cos(math.pi * done)
        )


class WarmupStableDecay(LearningRateSchedule, frozen=True):
    """Linear warm-up, a stable phase, a cosine phase, a linear phase, then constant.

    A phase of zero steps is skipped.
    """

    cosine_decay_final_lr: float
    linear_decay_final_lr: float
    stable_steps: int
    cosine_decay_steps: int
    linear_decay_steps: int

    def _after_warmup(self, step: int) -> float:
        if step < self.stable_steps:
            return self.base_lr
        step -= self.stable_steps
        if step < self.cosine_decay_steps:
            drop = self.base_lr - self.cosine_decay_final_lr
            return self.cosine_decay_final_lr + drop * 0.5 * (
                1.0 + math.cos(math.pi * step / self.cosine_decay_steps)
            )
        step -= self.cosine_decay_steps
        if step < self.linear_decay_steps:
            # Even where no cosine phase came before: Psyche's rule, and rank 0's.
            start = self.cosine_decay_final_lr
            return start + (self.linear_decay_final_lr - start) * step / self.linear_decay_steps
        return self.linear_decay_final_lr


FORMS: dict[str, type[LearningRateSchedule]] = {
    form.__name__: form for form in (Constant, Linear, Cosine, WarmupStableDecay)
}


def warmup_factor(step: int, warmup_lr_between: tuple[int, int] | None) -> float:
    """Psyche's further factor for a node that joins late.

    Args:
        step: the step.
        warmup_lr_between: first and last step of the rise, or None.

    Returns:
        `(step - a) / (e - a)` between the two, 1 elsewhere and where they are equal.
    """
    if warmup_lr_between is None:
        return 1.0
    start, end = warmup_lr_between
    if start <= step <= end and start != end:
        return (step - start) / (end - start)
    return 1.0
