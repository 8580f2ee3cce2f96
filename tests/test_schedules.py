from __future__ import annotations

import math

import pytest

from psyche_fast import LearningRateSchedule
from psyche_fast.schedules import warmup_factor

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
