"""The compile guard: what it holds the kernels to, and that it speaks up when they are not."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from tools.kernel_guard import limits
from tools.kernel_guard.aot import TARGETS, Measurement
from tools.kernel_guard.limits import CEILINGS, Limits, allowed, check, updated

ROOT = Path(__file__).parents[3]
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
    known = allowed({limits.triton: limits}, triton)
    return check([dataclasses.replace(MEASURED, **changes)], known, whole=False)


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


def loose() -> Limits:
    """Limits that nothing exceeds, so that only the ceilings speak."""
    return Limits("3.7.1", {NAME: {"sm_90": dict.fromkeys(limits.FOREIGN, 10**6) | {"mma": 24}}})


@pytest.mark.parametrize(
    ("metric", "most"), [("spills", 72), ("instructions", 5100), ("round_barriers", 0)]
)
def test_ceilings_hold_whatever_the_limits_say(metric, most):
    assert faults(loose(), **{metric: most}) == []
    assert faults(loose(), **{metric: most + 1}) == [
        f"{NAME} on sm_90: {metric} {most + 1}, designed for at most {most}"
    ]


def test_ceilings_are_loose_under_a_triton_that_the_kernels_were_not_designed_with():
    other = Limits("3.6.0", loose().cases)
    assert faults(other, triton="3.6.0", instructions=7140) == []
    assert faults(other, triton="3.6.0", instructions=7141) == [
        f"{NAME} on sm_90: instructions 7141, designed for at most 7140"
    ]


def ceilings(name: str, target: str = "sm_90", tags: tuple[str, ...] = ()) -> dict[str, int]:
    kernel, _, variant = name.partition(" ")
    one = Measurement(kernel, variant, target, tags=tags)
    return {ceiling.metric: ceiling.most for ceiling in CEILINGS if ceiling.covers(one)}


def test_ceilings_are_for_the_classes_that_the_design_gives_figures_of():
    wide, rounds = ("64x64",), ("64x64", "rounds")
    assert ceilings("encode 64x64 k=32 fp32 delta, bf16 gradient", tags=rounds) == {
        "spills": 72,
        "instructions": 7500,
        "round_barriers": 0,
    }
    assert ceilings("encode 64x64 k=64 fp32 delta, fp32 gradient", tags=rounds) == {
        "round_barriers": 0
    }
    assert ceilings("encode 64x64 k=8 fp32 delta, fp32 gradient", "sm_80", rounds) == {
        "round_barriers": 0
    }
    assert ceilings("encode 64x64 k=8 fp32 delta, fp32 gradient", "gfx942", rounds) == {}
    apply = "apply 64x64 128 signs, bf16 parameter, fp32 delta, bf16 look-ahead"
    assert ceilings(apply, tags=wide) == {"spills": 72, "instructions": 4250}
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


def test_another_triton_is_held_to_the_highest_of_all_limits():
    old = dataclasses.replace(MEASURED, registers=100, spills=200, shared=None)
    refused = {"refused": "the compiler crashed"}
    known = {
        "3.6.0": Limits("3.6.0", {"a": {"sm_80": refused, "sm_90": refused}, **taken(old)}),
        "3.7.1": Limits("3.7.1", {"a": {"sm_80": {"mma": 2}, "sm_90": refused}, **taken(MEASURED)}),
    }
    for version, own in known.items():
        assert allowed(known, version) is own
    merged = allowed(known, "3.8.0")
    assert merged.triton == ""
    assert merged.cases["a"] == {"sm_80": {"mma": 2}, "sm_90": refused}
    assert merged.cases[NAME]["sm_90"] == {
        **ALLOWED.cases[NAME]["sm_90"],
        "registers": 128,
        "spills": 208,
    }
    assert allowed(dict(reversed(known.items())), "3.8.0") == merged
    assert allowed({}, "3.8.0") == Limits()


def taken(one: Measurement) -> dict[str, dict[str, limits.Line]]:
    return updated(Limits(), [one], "any", whole=True).cases


def test_a_case_without_limits_is_a_fault():
    [told] = faults(Limits("3.7.1"))
    assert told == f"{NAME} on sm_90: has no limits (make kernels ARGS=--update-limits)"


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
    assert check([refused], known, whole=False) == []
    [told] = check([compiles], known, whole=False)
    assert told == f"{NAME} on gfx942: compiles, though the limits say: the compiler crashed"
    expected = updated(Limits(), [compiles], "3.7.1", whole=True)
    assert check([refused], expected, whole=False) == [f"{NAME} on gfx942: the compiler crashed"]


def test_limits_of_what_is_gone_are_a_fault_when_all_was_measured():
    stale = Limits("3.7.1", {**ALLOWED.cases, "sort 64x64": {"sm_80": {}, "sm_90": {}}})
    told = check([MEASURED], stale)
    assert "sort 64x64 on sm_80, sm_90: limits of a case that is gone" in told
    assert any("the ceiling on instructions of 'apply" in fault for fault in told)
    assert check([MEASURED], stale, whole=False) == []


def test_updating_a_part_keeps_the_rest_and_updating_all_drops_it():
    other = dataclasses.replace(MEASURED, target="sm_80", registers=100)
    part = updated(ALLOWED, [other], "3.7.1", whole=False)
    assert part.cases[NAME]["sm_90"] == ALLOWED.cases[NAME]["sm_90"]
    assert part.cases[NAME]["sm_80"]["registers"] == 104
    assert list(updated(ALLOWED, [other], "3.7.1", whole=True).cases[NAME]) == ["sm_80"]


def test_a_version_of_triton_gets_all_its_limits_at_once():
    with pytest.raises(ValueError, match=r"no limits for Triton 3\.9\.0 yet: take all of them"):
        updated(Limits(), [MEASURED], "3.9.0", whole=False)


def test_the_file_has_one_line_per_case_and_target_in_a_settled_order(tmp_path):
    names = ["encode k=32", "apply", "encode k=8"]
    lines = {"sm_100": {"registers": 8}, "sm_80": {"refused": 'an "odd" reason'}}
    written = Limits("3.7.1", dict.fromkeys(names, lines))
    path = limits.write(written, tmp_path)
    assert path == tmp_path / "limits-3.7.1.toml"
    assert limits.read_all(tmp_path) == {"3.7.1": written}
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
    limits.write(limits.read_all(tmp_path)["3.7.1"], tmp_path)
    assert path.read_text(encoding="utf-8").splitlines() == text


def test_a_malformed_file_is_named_and_without_one_there_are_no_limits(tmp_path):
    assert limits.read_all(tmp_path) == {}
    path = tmp_path / "limits-3.7.1.toml"
    path.write_text("[limits]\n")
    with pytest.raises(
        ValueError, match=r"limits-3\.7\.1\.toml is malformed: KeyError\('triton'\)"
    ):
        limits.read_all(tmp_path)
    path.write_text('triton = "3.6.0"\n')
    with pytest.raises(ValueError, match=r"limits-3\.7\.1\.toml is of Triton 3\.6\.0"):
        limits.read_all(tmp_path)


def test_the_projects_limits_name_the_targets_that_there_are():
    for shipped in limits.read_all().values():
        assert all(set(lines) == set(TARGETS) for lines in shipped.cases.values())


def test_there_are_limits_for_the_oldest_triton_and_for_the_pinned_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [oldest] = [one for one in project["dependencies"] if one.startswith("triton>=")]
    [pinned] = re.findall(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    known = limits.read_all()
    assert pinned == limits.DESIGNED_WITH
    assert pinned in known
    [other] = known.keys() - {pinned}
    assert other.startswith(re.split("[,;]", oldest.removeprefix("triton>="))[0] + ".")
    assert known[pinned].cases.keys() == known[other].cases.keys()
