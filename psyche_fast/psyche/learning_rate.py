"""Learning rates to the bit as Psyche's core computes them: every rank steps its own shard.

`schedules` has the same four forms for our own core, with a cosine that stays at its end.
"""

from __future__ import annotations

import math

from psyche_fast.schedules import (
    Constant,
    Cosine,
    LearningRateSchedule,
    Linear,
    WarmupStableDecay,
    warmup_factor,
)


def learning_rate(
    schedule: LearningRateSchedule, step: int, warmup_lr_between: tuple[int, int] | None
) -> float:
    """Learning rate of `step`, with the factor for a node that joins late.

    Args:
        schedule: one of the four forms. Beyond its end the cosine rises again.
        step: the step.
        warmup_lr_between: see `schedules.warmup_factor`.
    """
    return _scheduled(schedule, step) * warmup_factor(step, warmup_lr_between)


def _scheduled(schedule: LearningRateSchedule, step: int) -> float:
    start, base, warmup = schedule.warmup_init_lr, schedule.base_lr, schedule.warmup_steps
    if step < warmup:
        return start + (base - start) * (step / warmup)
    step -= warmup
    match schedule:
        case Constant():
            return base
        case Linear(final_lr=final, total_steps=total):
            return (
                base + (final - base) * (step / (total - warmup))
                if step < total - warmup
                else final
            )
        case Cosine(final_lr=final, total_steps=total):
            if total <= warmup:
                raise ValueError(
                    f"lr_scheduler.Cosine: total_steps {total} must be over warmup_steps {warmup}"
                )
            return _half_cosine(base, final, step / (total - warmup))
        case WarmupStableDecay():
            return _after_stable(schedule, step - schedule.stable_steps)
    raise AssertionError(f"no rule for {schedule}")


def _after_stable(schedule: WarmupStableDecay, step: int) -> float:
    middle = schedule.cosine_decay_final_lr
    if step < 0:
        return schedule.base_lr
    if step < schedule.cosine_decay_steps:
        return _half_cosine(schedule.base_lr, middle, step / schedule.cosine_decay_steps)
    step -= schedule.cosine_decay_steps
    if step < schedule.linear_decay_steps:
        drop = middle - schedule.linear_decay_final_lr
        return middle - drop * (step / schedule.linear_decay_steps)
    return schedule.linear_decay_final_lr


def _half_cosine(first: float, last: float, done: float) -> float:
    return last + (first - last) * (0.5 * (1.0 + math.cos(math.pi * done)))
