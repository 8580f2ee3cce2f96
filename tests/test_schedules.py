from __future__ import annotations

import math
from typing import Any

import pytest

from psyche_fast import LearningRateSchedule
from psyche_fast.schedules import (
    BatchSizes,
    ColdStart,
    Constant,
    Cosine,
    Linear,
    WarmupStableDecay,
    warmup_factor,
)

COSINE = {
    "base_lr": 4e-4, "warmup_init_lr": 1e-5, "final_lr": 4e-5, "warmup_steps": 10,
    "total_steps": 110,
}  # fmt: skip
WSD = {
    "base_lr": 1.0, "warmup_init_lr": 0.0, "warmup_steps": 4, "cosine_decay_final_lr": 0.4,
    "linear_decay_final_lr": 0.1, "stable_steps": 6, "cosine_decay_steps": 10,
    "linear_decay_steps": 5,
}  # fmt: skip


def rate(obj: object, step: int) -> float:
    return LearningRateSchedule.from_json(obj).get_lr(step)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-5), (5, 1e-5 + (4e-4 - 1e-5) / 2), (10, 4e-4), (60, 2.2e-4), (110, 4e-5), (999, 4e-5)],
)
def test_cosine(step: int, expected: float) -> None:
    assert rate({"Cosine": COSINE}, step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(10, 4e-4), (35, 3.1e-4), (110, 4e-5), (111, 4e-5)])
def test_linear(step: int, expected: float) -> None:
    assert rate({"Linear": COSINE}, step) == pytest.approx(expected, rel=1e-12)


def test_constant() -> None:
    schedule = {"Constant": {"base_lr": 0.5, "warmup_init_lr": 0.1, "warmup_steps": 4}}
    assert [rate(schedule, s) for s in (0, 1, 4, 10**6)] == pytest.approx([0.1, 0.2, 0.5, 0.5])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (2, 0.5), (4, 1.0), (9, 1.0), (10, 1.0), (15, 0.7), (20, 0.4), (22, 0.4 - 0.12),
        (25, 0.1), (1000, 0.1),
    ],
)  # fmt: skip
def test_warmup_stable_decay(step: int, expected: float) -> None:
    assert rate({"WarmupStableDecay": WSD}, step) == pytest.approx(expected, rel=1e-12)


def test_phases_of_no_steps_are_skipped() -> None:
    only_linear = {**WSD, "stable_steps": 0, "cosine_decay_steps": 0, "warmup_steps": 0}
    assert rate({"WarmupStableDecay": only_linear}, 0) == 0.4
    assert rate({"WarmupStableDecay": only_linear}, 1) == pytest.approx(0.4 - 0.3 / 5)
    only_cosine = {**WSD, "stable_steps": 0, "linear_decay_steps": 0}
    assert rate({"WarmupStableDecay": only_cosine}, 4) == 1.0
    assert rate({"WarmupStableDecay": only_cosine}, 14) == 0.1


def test_json_round_trip_and_warmup_longer_than_the_run() -> None:
    for obj in ({"Cosine": COSINE}, {"Linear": COSINE}, {"WarmupStableDecay": WSD}):
        assert LearningRateSchedule.from_json(obj).to_json() == obj
    short = {**COSINE, "total_steps": 5}
    assert rate({"Cosine": short}, 4) == rate({"Cosine": COSINE}, 4)
    assert rate({"Cosine": short}, 10) == 4e-5


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        ({"Exponential": {}}, "unknown form 'Exponential'"),
        ("Cosine", "wanted an object"),
        ({"Cosine": COSINE, "Linear": COSINE}, "wanted an object"),
        ({"Cosine": {**COSINE, "tempo": 1}}, "unknown field `tempo`"),
        ({"Constant": {"base_lr": 1.0}}, "missing required field"),
        ({"Cosine": {**COSINE, "base_lr": "4e-4"}}, "Expected `float`"),
        ({"Cosine": {**COSINE, "base_lr": math.inf}}, "not a finite number"),
        ({"Cosine": {**COSINE, "warmup_steps": -1}}, "must not be negative"),
    ],
)
def test_malformed(obj: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LearningRateSchedule.from_json(obj)


def test_warmup_factor() -> None:
    assert [warmup_factor(s, (10, 20)) for s in (9, 10, 15, 20, 21)] == [1.0, 0.0, 0.5, 1.0, 1.0]
    assert warmup_factor(7, (7, 7)) == 1.0
    assert warmup_factor(7, None) == 1.0


def constant(base: float, warmup: int, first: float) -> LearningRateSchedule:
    return Constant(base_lr=base, warmup_steps=warmup, warmup_init_lr=first)


def decay(form: Any, base: float, warmup: int, first: float, total: int, final: float) -> Any:
    return form(
        base_lr=base, warmup_steps=warmup, warmup_init_lr=first, total_steps=total, final_lr=final
    )


def wsd(base: float, warmup: int, first: float, *phases: float) -> LearningRateSchedule:
    stable, cosine, cosine_final, line, line_final = phases
    return WarmupStableDecay(
        base_lr=base, warmup_steps=warmup, warmup_init_lr=first, stable_steps=int(stable),
        cosine_decay_steps=int(cosine), cosine_decay_final_lr=cosine_final,
        linear_decay_steps=int(line), linear_decay_final_lr=line_final,
    )  # fmt: skip


WARMUP = {0: 0.001, 5: 0.0055}
PSYCHES = [
    (constant(0.01, 10, 0.001), {**WARMUP, 9: 0.0091, 10: 0.01, 100: 0.01, 1000: 0.01}),
    (decay(Linear, 0.01, 10, 0.001, 100, 0.0001),
     {**WARMUP, 10: 0.01, 55: 0.00505, 100: 0.0001, 200: 0.0001}),
    (decay(Cosine, 0.01, 10, 0.001, 110, 0.0), {**WARMUP, 10: 0.01, 60: 0.005, 110: 0.0}),
    (wsd(0.01, 10, 0.001, 60, 110, 0.001, 20, 0.0),
     {**WARMUP, 10: 0.01, 30: 0.01, 69: 0.01, 70: 0.01, 180: 0.001, 190: 0.0005, 200: 0.0, 250: 0}),
    (constant(0.01, 0, 0.001), {0: 0.01}),
    (decay(Linear, 0.01, 10, 0.01, 100, 0.001), {5: 0.01}),
    (decay(Cosine, 0.01, 10, 0.001, 100, 0.01), {50: 0.01}),
    (wsd(0.01, 0, 0.001, 0, 0, 0.001, 0, 0.001), {0: 0.001}),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "expected"), PSYCHES)
def test_figures_of_psyches_own_tests(
    schedule: LearningRateSchedule, expected: dict[int, float]
) -> None:
    for step, rate_ in expected.items():
        assert schedule.get_lr(step) == pytest.approx(rate_, rel=1e-12, abs=1e-18), step


def test_figures_of_psyches_own_tests_that_are_rounded() -> None:
    schedule = wsd(0.01, 10, 0.001, 60, 110, 0.001, 20, 0.0)
    for step, rate_ in {125: 0.0055, 179: 0.001, 199: 0.0001}.items():
        assert schedule.get_lr(step) == pytest.approx(rate_, abs=1e-4)


def test_phases_that_would_rise_are_refused() -> None:
    # Psyche's core asserts it at the first step.
    with pytest.raises(ValueError, match=r"cosine_decay_final_lr 0\.02 .* base_lr 0\.01"):
        wsd(0.01, 0, 0.0, 1, 1, 0.02, 0, 0.0)
    with pytest.raises(ValueError, match=r"linear_decay_final_lr 0\.005 .* cosine_decay_final_lr"):
        wsd(0.01, 0, 0.0, 1, 1, 0.001, 0, 0.005)


def test_a_cold_start_is_a_further_rise_from_the_first_step() -> None:
    schedule = ColdStart(constant(0.5, 0, 0.0), first_step=11, steps=4)
    rates = {s: schedule.get_lr(s) for s in (10, 11, 12, 13, 15, 16)}
    assert rates == {10: 0.5, 11: 0.0, 12: 0.125, 13: 0.25, 15: 0.5, 16: 0.5}


def test_batch_sizes_grow_with_the_tokens_before_them() -> None:
    sizes = BatchSizes(start=4, end=9, warmup_tokens=1000, sequence_length=10)
    # 100 sequences of warm-up: 4 + 5 * sequences / 100, halves up.
    before, expected = 0, []
    for step in range(1, 31):
        rows = 9 if before >= 100 else math.floor(4 + 5 * before / 100 + 0.5)
        expected.append((step, before, rows))
        before += rows
    assert list(sizes.steps(1, 30)) == expected
    assert list(sizes.steps(12, 30)) == expected[11:]
    assert [sizes.before(step) for step in range(1, 31)] == [b for _, b, _ in expected]
    assert (sizes.after(10), sizes.after(9)) == (5, 4)  # 4.5 is 5; Python would round it to 4
    assert sizes.after(100) == sizes.after(10**6) == 9


def test_batch_sizes_without_a_warm_up_are_all_the_last_one() -> None:
    sizes = BatchSizes(start=4, end=9, warmup_tokens=0, sequence_length=10)
    assert list(sizes.steps(3, 4)) == [(3, 18, 9), (4, 27, 9)]
    assert BatchSizes(4, 4, 1000, 10).before(10**9) == 4 * (10**9 - 1)
