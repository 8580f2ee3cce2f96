"""Schedules: learning rates and batch sizes as pure functions of the step.

The four forms of learning rates and their JSON are Psyche's (externally tagged, as serde writes
them), for example `{"Cosine": {"base_lr": 4e-4, "warmup_init_lr": 0.0, "final_lr": 4e-5,
"warmup_steps": 500, "total_steps": 25000}}`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol

import msgspec

from psyche_fast import strict
from psyche_fast.budgets import parse_count
from psyche_fast.options import Amount, Count, Positive, Section, Share, flag, written
from psyche_fast.options import describe as _help


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

    def __post_init__(self) -> None:
        LearningRateSchedule.__post_init__(self)
        falls = ("base_lr", "cosine_decay_final_lr", "linear_decay_final_lr")
        for before, after in pairwise(falls):
            if getattr(self, after) > getattr(self, before):  # Psyche's core ends at its first step
                raise ValueError(
                    f"{after} {getattr(self, after):g} must not be more than {before} "
                    f"{getattr(self, before):g}"
                )

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


class LearningRates(Protocol):
    """Whatever knows the learning rate of a step."""

    def get_lr(self, step: int) -> float:
        """Learning rate of `step` (0 or more)."""
        ...


class ColdStart(msgspec.Struct, frozen=True):
    """A schedule under the further rise of a run's first steps (Psyche's cold start).

    The factor of the first step is 0, that of `first_step + steps` is 1.
    """

    schedule: LearningRateSchedule
    first_step: int
    steps: int

    def get_lr(self, step: int) -> float:
        """Learning rate of `step` (0 or more)."""
        between = (self.first_step, self.first_step + self.steps)
        return self.schedule.get_lr(step) * warmup_factor(step, between)


class BatchSizes(msgspec.Struct, frozen=True):
    """Sequences of each step: from `start` to `end`, in proportion to the tokens trained on.

    Attributes:
        start: of step 1.
        end: from `warmup_tokens` on.
        warmup_tokens: tokens of the rise; 0 for none.
        sequence_length: tokens of a sequence.
    """

    start: int
    end: int
    warmup_tokens: int
    sequence_length: int

    def after(self, sequences: int) -> int:
        """Sequences of the step that has so many before it."""
        tokens = sequences * self.sequence_length
        if tokens >= self.warmup_tokens:
            return self.end
        exact = self.start + (self.end - self.start) * (tokens / self.warmup_tokens)
        whole = math.floor(exact)
        return whole + (exact - whole >= 0.5)  # Psyche rounds halves up, Python to even

    def before(self, step: int) -> int:
        """Sequences of all steps (from 1) before `step`."""
        sequences, at = 0, 1
        while at < step and sequences * self.sequence_length < self.warmup_tokens:
            sequences += self.after(sequences)
            at += 1
        return sequences + (step - at) * self.end

    def steps(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Each step from `first` to `last`, the sequences before it and its own."""
        sequences = self.before(first)
        for step in range(first, last + 1):
            rows = self.after(sequences)
            yield step, sequences, rows
            sequences += rows


class Schedule(Section, frozen=True, kw_only=True):
    """Which steps there are and their learning rates."""

    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        _help("learning rates after the warm-up; wsd: stable, then a cosine, then a line"),
    ] = "cosine"  # fmt: skip
    learning_rate: Annotated[Amount, _help("peak")] = 4e-4
    warmup_steps: Annotated[Count, _help("linear rise to --learning-rate")] = 500
    warmup_fraction: Annotated[
        Share | None, _help("the same as a share of all steps, in place of --warmup-steps")
    ] = None  # fmt: skip
    warmup_init_lr: Annotated[Amount, _help("where that rise begins")] = 0.0
    final_lr: Annotated[
        Amount | None, _help("cosine, linear: where they end (default: a tenth of the peak)")
    ] = None  # fmt: skip
    schedule_steps: Annotated[
        Positive | None, _help("cosine, linear: step at which they end (default: --total-steps)")
    ] = None  # fmt: skip
    stable_steps: Annotated[
        Count | None, _help("wsd: steps at the peak (default: what the others leave)")
    ] = None  # fmt: skip
    cosine_decay_steps: Annotated[Count | None, _help("wsd: then a cosine (default: 0)")] = None
    cosine_decay_final_lr: Annotated[
        Amount | None, _help("wsd: where it ends (default: a tenth of the peak)")
    ] = None  # fmt: skip
    linear_decay_steps: Annotated[Count | None, _help("wsd: then a line (default: 0)")] = None
    linear_decay_final_lr: Annotated[Amount | None, _help("wsd: where it ends (default: 0)")] = None
    cold_start_warmup_steps: Annotated[
        Count, _help("a further factor, which rises from 0 at the first step to 1")
    ] = 0  # fmt: skip
    cold_start_step: Annotated[
        Positive | None, _help("where it is 0 (default: --start-step; a resumed run keeps its own)")
    ] = None  # fmt: skip
    total_steps: Annotated[Positive, _help("steps until the end of the run")] = 25000
    total_tokens: Annotated[
        Positive | None, written(parse_count),
        _help("tokens until the end, as 300M or 1.5B, in place of --total-steps"),
    ] = None  # fmt: skip
    start_step: Annotated[Positive, _help("first step: where the schedule and the data begin")] = 1

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.start_step > self.total_steps:
            raise ValueError(
                f"--start-step {self.start_step} is after --total-steps {self.total_steps}"
            )
        for names, kinds in SCHEDULES_OWN.items():
            for name in names:
                if getattr(self, name) is not None and self.schedule not in kinds:
                    raise ValueError(
                        f"{flag(name)} needs --schedule {' or '.join(kinds)}, not {self.schedule}"
                    )
        if self.schedule == "wsd":
            self._check_phases()

    def _check_phases(self) -> None:
        phases = (self.stable_steps, self.cosine_decay_steps, self.linear_decay_steps)
        if phases[0] is None and not phases[1] and not phases[2]:
            raise ValueError(
                "--schedule wsd needs --cosine-decay-steps, --linear-decay-steps or both"
            )
        try:
            self.plain_learning_rates()
        except ValueError as error:
            raise ValueError(f"--schedule wsd: {error}") from error

    @property
    def cold_start_begin(self) -> int:
        """The step at which a cold start's factor is 0."""
        return self.cold_start_step or self.start_step

    def learning_rates(self) -> LearningRates:
        """Learning rates by step; by default those of Psyche's train example."""
        schedule = self.plain_learning_rates()
        if not self.cold_start_warmup_steps:
            return schedule
        return ColdStart(schedule, self.cold_start_begin, self.cold_start_warmup_steps)

    def phases(self) -> list[int]:
        """The steps at which the schedule's phases begin after their warm-ups, or end."""
        schedule = self.plain_learning_rates()
        steps = [self.cold_start_begin + self.cold_start_warmup_steps, schedule.warmup_steps]
        if isinstance(schedule, WarmupStableDecay):
            for phase in ("stable_steps", "cosine_decay_steps", "linear_decay_steps"):
                steps.append(steps[-1] + getattr(schedule, phase))
        elif isinstance(schedule, _Decay):
            steps.append(schedule.total_steps)
        return steps

    def plain_learning_rates(self) -> LearningRateSchedule:
        """Learning rates without a cold start."""
        peak = self.learning_rate
        rise: dict[str, Any] = {
            "base_lr": peak,
            "warmup_init_lr": self.warmup_init_lr,
            "warmup_steps": self.warmup_steps,
        }
        tenth = peak / 10.0
        if self.schedule == "constant":
            return Constant(**rise)
        if self.schedule != "wsd":
            form = Cosine if self.schedule == "cosine" else Linear
            return form(
                **rise,
                final_lr=tenth if self.final_lr is None else self.final_lr,
                total_steps=self.schedule_steps or self.total_steps,
            )
        cosine, line = self.cosine_decay_steps or 0, self.linear_decay_steps or 0
        # Psyche's line begins where a cosine would have ended, even where none came before.
        middle = self.cosine_decay_final_lr
        if middle is None:
            middle = tenth if cosine else peak
        end = self.linear_decay_final_lr
        if end is None:
            end = 0.0 if line else middle
        stable = self.stable_steps
        if stable is None:
            stable = max(self.total_steps - self.warmup_steps - cosine - line, 0)
        return WarmupStableDecay(
            **rise,
            stable_steps=stable,
            cosine_decay_steps=cosine,
            cosine_decay_final_lr=middle,
            linear_decay_steps=line,
            linear_decay_final_lr=end,
        )


SCHEDULES_OWN = {
    ("final_lr", "schedule_steps"): ("cosine", "linear"),
    (
        "stable_steps", "cosine_decay_steps", "cosine_decay_final_lr", "linear_decay_steps",
        "linear_decay_final_lr",
    ): ("wsd",),
}  # fmt: skip
"""Options that only some schedules have."""
