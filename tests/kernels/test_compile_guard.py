"""The compile guard: what it holds the kernels to, and that it speaks up when they are not."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from psyche_fast.kernels import limits
from psyche_fast.kernels.aot import TARGETS, Measurement
from psyche_fast.kernels.limits import CEILINGS, Limits, check, updated

MEASURED = Measurement(
    "encode",
    "64x64 k=8 fp32 delta, fp32 gradient",
    "sm_90",
    registers=124,
    spills=40,
    shared=32768,
    mma=24,
    instructions=4501.2,
    round_barriers=0,
    tags=("64x64", "rounds"),
)
NAME = MEASURED.name
ALLOWED = updated(Limits(), [MEASURED], "3.7.1", whole=True)


def faults(limits: Limits = ALLOWED, *, triton: str = "3.7.1", **changes: object) -> list[str]:
    """What the guard says about the encode kernel with something changed."""
    return check([dataclasses.replace(MEASURED, **changes)], limits, triton, whole=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_are_within_their_limits():
    """On the GPU that they were designed for and on AMD's; `.ci/run` does all."""
    command = ["kernels", "--check", "--json", "--target", "sm_90", "--target", "gfx942"]
    run = subprocess.run(
        [sys.executable, "-m", "psyche_fast", *command],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    assert report["faults"] == []
    assert run.returncode == 0, run.stderr
    assert {one["target"] for one in report["measurements"]} == {"sm_90", "gfx942"}
    found = [Measurement(**{**one, "tags": tuple(one["tags"])}) for one in report["measurements"]]
    for ceiling in CEILINGS:
        covered = [one for one in found if ceiling.covers(one)]
        assert covered, f"no kernel is held to {ceiling}"
        assert all(getattr(one, ceiling.metric) is not None for one in covered)


def test_limits_are_what_was_measured_and_a_margin():
    assert ALLOWED.triton == "3.7.1"
    assert ALLOWED.cases == {
        NAME: {
            "sm_90": {
                "registers": 128,
                "spills": 48,
                "shared": 32768,
                "instructions": 4640,  # 4636.2, up to a multiple of ten
                "mma": 24,
                "round_barriers": 0,
            }
        }
    }
    assert limits.with_margin("instructions", 97) == 100
    assert limits.with_margin("spills", 0) == 16
    assert limits.with_margin("spills", 41) == 64


def test_what_was_measured_is_within_its_own_limits():
    assert faults() == []


@pytest.mark.parametrize(
    ("metric", "within", "beyond"),
    [
        ("registers", 128, 129),
        ("spills", 48, 49),
        ("shared", 32768, 32784),
        ("instructions", 4640, 4640.4),
        ("round_barriers", 0, 1),
        ("mma", 24, 25),
    ],
)
def test_each_limit_is_kept_up_to_its_value(metric, within, beyond):
    assert faults(**{metric: within}) == []
    told = faults(**{metric: beyond})
    most = ALLOWED.cases[NAME]["sm_90"][metric]
    assert f"{NAME} on sm_90: {metric} {beyond:g}, at most {most:g}" in told


def test_fewer_matrix_instructions_are_a_fault_too():
    assert faults(mma=22) == [f"{NAME} on sm_90: mma 22, not 24: is a product done without them?"]


def loose(triton: str = "3.7.1") -> Limits:
    """Limits that nothing exceeds, so that only the ceilings speak."""
    return Limits(triton, {NAME: {"sm_90": dict.fromkeys(limits.FOREIGN, 10**6) | {"mma": 24}}})


@pytest.mark.parametrize(
    ("metric", "most"), [("spills", 64), ("instructions", 4800), ("round_barriers", 0)]
)
def test_ceilings_hold_whatever_the_limits_say(metric, most):
    assert faults(loose(), **{metric: most}) == []
    assert faults(loose(), **{metric: most + 1}) == [
        f"{NAME} on sm_90: {metric} {most + 1}, designed for at most {most}"
    ]


def ceilings(name: str, target: str = "sm_90", tags: tuple[str, ...] = ()) -> dict[str, int]:
    kernel, _, variant = name.partition(" ")
    one = Measurement(kernel, variant, target, tags=tags)
    return {ceiling.metric: ceiling.most for ceiling in CEILINGS if ceiling.covers(one)}


def test_ceilings_are_for_the_classes_that_the_design_gives_figures_of():
    wide, rounds = ("64x64",), ("64x64", "rounds")
    assert ceilings("encode 64x64 k=32 fp32 delta, bf16 gradient", tags=rounds) == {
        "spills": 64,
        "instructions": 7200,
        "round_barriers": 0,
    }
    assert ceilings("encode 64x64 k=64 fp32 delta, fp32 gradient", tags=rounds) == {
        "round_barriers": 0
    }
    assert ceilings("encode 64x64 k=8 fp32 delta, fp32 gradient", "sm_80", rounds) == {
        "round_barriers": 0
    }
    assert ceilings("encode 64x64 k=8 fp32 delta, fp32 gradient", "gfx942", rounds) == {}
    apply = "apply 64x64 128 signs, bf16 parameter, fp32 delta, look-ahead"
    assert ceilings(f"{apply} in place", tags=wide) == {"spills": 64, "instructions": 3950}
    assert ceilings(f"{apply} copy", tags=wide) == {"spills": 64}
    assert ceilings("encode 50x50 k=8 fp32 delta, fp32 gradient") == {}


def test_another_triton_gets_a_tolerance_and_no_more():
    changed = {"registers": 147, "spills": 48 + 384, "instructions": 6496, "mma": 26}
    assert faults(triton="3.6.0", **changed) == []
    assert len(faults(**changed)) == 6  # four limits and two ceilings
    told = faults(triton="3.6.0", registers=148, spills=433, round_barriers=1)
    assert [fault.split(": ")[1].split()[0] for fault in told] == [
        "registers",
        "spills",
        "round_barriers",
        "round_barriers",  # the ceiling
    ]


def test_a_case_without_limits_is_a_fault():
    [told] = faults(Limits("3.7.1"))
    assert told == f"{NAME} on sm_90: has no limits (psyche-fast kernels --update-limits)"


def test_a_metric_without_a_limit_or_without_a_value_is_a_fault():
    [told] = faults(updated(Limits(), [dataclasses.replace(MEASURED, instructions=None)], "3.7.1",
                            whole=True))  # fmt: skip
    assert told.endswith("instructions 4501.2, the limit is None (--update-limits)")
    [told] = faults(instructions=None)
    assert told.endswith("instructions None, the limit is 4640 (--update-limits)")


def test_instructions_that_could_not_be_counted_are_a_fault():
    told = faults(instructions=None, round_barriers=None, uncounted="loops do not fit: ...")
    assert told == [f"{NAME} on sm_90: loops do not fit: ..."]


def test_a_kernel_that_does_not_compile_is_a_fault_unless_the_limits_say_why():
    refused = Measurement(
        MEASURED.kernel, MEASURED.variant, "gfx942", refused="the compiler crashed"
    )
    compiles = dataclasses.replace(MEASURED, target="gfx942", instructions=None)
    known = updated(Limits(), [refused], "3.7.1", whole=True)
    assert known.cases[NAME] == {"gfx942": {"refused": "the compiler crashed"}}
    assert check([refused], known, "3.7.1", whole=False) == []
    [told] = check([compiles], known, "3.7.1", whole=False)
    assert told == f"{NAME} on gfx942: compiles, though the limits say: the compiler crashed"
    expected = updated(Limits(), [compiles], "3.7.1", whole=True)
    assert check([refused], expected, "3.7.1", whole=False) == [
        f"{NAME} on gfx942: the compiler crashed"
    ]


def test_limits_of_what_is_gone_are_a_fault_when_all_was_measured():
    stale = Limits("3.7.1", {**ALLOWED.cases, "sort 64x64": {"sm_80": {}, "sm_90": {}}})
    told = check([MEASURED], stale, "3.7.1")
    assert "sort 64x64 on sm_80, sm_90: limits of a case that is gone" in told
    assert any("the ceiling on instructions of 'apply" in fault for fault in told)
    assert check([MEASURED], stale, "3.7.1", whole=False) == []


def test_updating_a_part_keeps_the_rest_and_updating_all_drops_it():
    other = dataclasses.replace(MEASURED, target="sm_80", registers=100)
    part = updated(ALLOWED, [other], "3.7.1", whole=False)
    assert part.cases[NAME]["sm_90"] == ALLOWED.cases[NAME]["sm_90"]
    assert part.cases[NAME]["sm_80"]["registers"] == 104
    assert list(updated(ALLOWED, [other], "3.7.1", whole=True).cases[NAME]) == ["sm_80"]


def test_limits_of_two_versions_of_triton_are_not_mixed():
    with pytest.raises(ValueError, match=r"taken with Triton 3\.7\.1, this is 3\.9\.0"):
        updated(ALLOWED, [MEASURED], "3.9.0", whole=False)


def test_the_file_has_one_line_per_case_and_target_in_a_settled_order(tmp_path):
    path = tmp_path / "limits.toml"
    names = ["encode k=32", "apply", "encode k=8"]
    lines = {"sm_100": {"registers": 8}, "sm_80": {"refused": 'an "odd" reason'}}
    written = Limits("3.7.1", dict.fromkeys(names, lines))
    limits.write(written, path)
    assert limits.read(path) == written
    text = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in text if line.startswith("[")] == [
        '[limits."apply"]',
        '[limits."encode k=8"]',
        '[limits."encode k=32"]',
    ]
    start = text.index('[limits."encode k=8"]')
    assert text[start + 1 : start + 3] == [
        'sm_80 = { refused = "an \\"odd\\" reason" }',
        "sm_100 = { registers = 8 }",
    ]
    limits.write(limits.read(path), path)
    assert path.read_text(encoding="utf-8").splitlines() == text


def test_a_malformed_file_is_named_and_a_missing_one_holds_no_limits(tmp_path):
    path = tmp_path / "limits.toml"
    assert limits.read(path) == Limits()
    path.write_text("[limits]\n")
    with pytest.raises(ValueError, match=r"limits\.toml is malformed: KeyError\('triton'\)"):
        limits.read(path)


def test_the_projects_limits_name_the_targets_that_there_are():
    shipped = limits.read()
    assert shipped.triton
    assert all(set(lines) == set(TARGETS) for lines in shipped.cases.values())
