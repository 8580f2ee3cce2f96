"""Small kernels compiled ahead of time, in workers, while this process runs the interpreter."""

from __future__ import annotations

import importlib.util
import linecache
import os
from types import SimpleNamespace

import pytest

from tools.kernel_guard import aot

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tools.kernel_guard.case import Case

PROVIDER = "tools.kernel_guard.tests.small_kernels"


@pytest.fixture(scope="module")
def measured() -> dict[str, aot.Measurement]:
    """All small kernels on sm_90, by name."""
    return {one.name: one for one in aot.measure_all(targets=["sm_90"], provider=PROVIDER)}


@pytest.fixture(scope="module")
def told() -> list[tuple[int, int]]:
    """What progress has been told."""
    return []


@pytest.fixture(scope="module")
def products(told) -> dict[str, aot.Measurement]:
    """A matrix product by target."""
    found = aot.measure_all(
        kernels=["product 64"],
        provider=PROVIDER,
        progress=lambda done, total: told.append((done, total)),
    )
    return {one.target: one for one in found}


def test_compiling_leaves_this_process_and_its_interpreter_alone(measured):
    assert measured["add"].refused is None
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton import knobs

        assert knobs.runtime.interpret


def test_accesses_that_no_barrier_keeps_apart_are_found(measured):
    (found,) = measured["cleared at once"].races
    assert "load" in found
    assert "store" in found
    assert "of words have no barrier between them" in found
    assert all(one.races == () for name, one in measured.items() if name != "cleared at once")


def test_registers_shared_memory_and_spills_are_read(measured):
    add = measured["add"]
    # 8 elements a thread of three arrays and their addresses; nothing shared, nothing spilt.
    assert 16 <= add.registers <= 48
    assert (add.shared, add.spills, add.mma) == (0, 0, 0)
    assert measured["rounds four warps"].shared == 16  # one number from each warp
    greedy = measured["greedy"]
    # 256 numbers a thread, of which at most 128 fit.
    assert greedy.registers == 128
    assert greedy.spills >= 4 * (256 - 128)


def test_straight_code_counts_once_for_every_warp(measured):
    # 8 loads from each of two arrays need 2 x 2 wide loads, so the whole is far below one
    # instruction per element, and a multiple of the four warps.
    assert measured["add"].instructions % 4 == 0
    assert measured["add"].instructions < 1024


def test_one_more_iteration_costs_the_loop_once_more(measured):
    more = measured["nested 10 x 5"].instructions - measured["nested 10 x 4"].instructions
    # Ten tiles for ten rows: one more trip per tile, of at least load, root, sum, compare, jump.
    assert more == pytest.approx(round(more / 4) * 4, abs=0.2)
    assert 5 * 4 <= more <= 60 * 4


def test_other_loops_than_the_case_names_are_reported_with_what_was_found(measured):
    wrong = measured["nested one loop"]
    assert wrong.instructions is None
    assert wrong.uncounted.startswith("loops do not fit: expected rows; found 0x")
    assert wrong.registers == measured["nested 10 x 4"].registers


def test_barriers_in_the_rounds_are_found_where_there_are_any(measured):
    assert measured["rounds one warp"].round_barriers == 0
    assert measured["rounds four warps"].round_barriers > 0
    assert measured["rounds unrolled"].round_barriers > 0
    assert measured["add"].round_barriers is None
    assert measured["rounds one warp"].tags == ("rounds",)


def test_what_a_block_has_no_shared_memory_for_is_refused(measured):
    refused = measured["product wide"].refused
    assert refused == "needs 262144 bytes of shared memory, a block has 232448"
    assert measured["product wide"].registers is None


def test_what_triton_does_not_compile_is_refused_with_its_reason(measured):
    refused = measured["product thin"].refused
    assert refused.startswith("CompilationError: ")
    assert "K >= 16" in refused


def test_every_target_multiplies_matrices_in_its_own_way(products):
    assert all(one.refused is None for one in products.values())
    mma = {target: one.mma for target, one in products.items()}
    # 64^3 multiply-adds by four warps: in steps of 16x8x16 (mma.sync), of 64x64x16 (wgmma and
    # tcgen05, one for the block), of 32x32x8 or 16x16x16 (MFMA).
    assert mma["sm_80"] == mma["sm_120"] == 64**3 // (16 * 8 * 16) // 4
    assert mma["sm_90"] == mma["sm_100"] == 64 // 16
    assert mma["gfx942"] in (64**3 // (32 * 32 * 8) // 4, 64**3 // (16 * 16 * 16) // 4)


def test_amd_gives_registers_but_no_count_of_instructions(products):
    amd = products["gfx942"]
    assert 16 <= amd.registers <= 512
    assert amd.scalars > 0
    assert amd.spills == 0
    assert amd.shared > 0
    assert amd.instructions is None
    assert products["sm_90"].scalars is None


def test_a_kernel_that_the_compiler_dies_of_is_refused_and_the_others_are_measured():
    deadly, add = aot.measure_all(
        targets=["gfx942"], provider="tools.kernel_guard.tests.crashing_kernels"
    )
    assert (deadly.name, deadly.refused) == ("deadly", "the compiler crashed")
    assert (add.name, add.refused) == ("add", None)
    assert add.registers > 0


def test_instructions_are_attributed_to_lines_of_the_source(measured):
    lines = aot.attribute_one("product 64", "sm_90", PROVIDER)
    assert sum(line.instructions for line in lines) == measured["product 64"].instructions
    assert lines == sorted(lines, key=lambda line: -line.instructions)
    [dot] = [line for line in lines if "HGMMA" in line.opcodes]
    assert dot.file.endswith("small_kernels.py")
    assert "tl.dot" in linecache.getline(dot.file, dot.line)
    assert dot.opcodes["HGMMA"] == 4 * 4  # four in the code, each by four warps


def test_one_kernel_at_a_time_is_attributed_and_only_for_nvidia():
    with pytest.raises(ValueError, match="'rounds' names several kernels: rounds one warp; rounds"):
        aot.attribute_one("rounds", "sm_90", PROVIDER)
    with pytest.raises(ValueError, match="NVIDIA's targets only, not gfx942"):
        aot.attribute_one("add", "gfx942", PROVIDER)


def test_progress_is_told_up_to_the_end(products, told):
    assert told == [(done, len(products)) for done in range(1, len(products) + 1)]


def test_unknown_targets_and_kernels_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"--target must be one of sm_80, .* gfx942; got 'sm_75'"):
        aot.measure_all(targets=["sm_75"], provider=PROVIDER)
    with pytest.raises(ValueError, match="--kernel 'sort': no such kernel; there are: add; nested"):
        aot.measure_all(kernels=["sort"], provider=PROVIDER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signature": {"x": "*fp32"}}, "arguments differ from the kernel's: out"),
        ({"constexprs": {"N": 1, "x": 1}}, "one given twice"),
        ({"constexprs": {"N": 1, "M": 1}}, "arguments differ from the kernel's: M"),
        ({"options": {"num_warp": 4}}, "no such option: num_warp"),
    ],
)
def test_a_case_that_does_not_describe_its_kernel_is_an_error(changes, message):
    kernel = SimpleNamespace(arg_names=["x", "out", "N"])
    right = {"signature": {"x": "*fp32", "out": "*fp32"}, "constexprs": {"N": 1}}
    with pytest.raises(ValueError, match=message):
        aot.compile_case(Case("k", "", kernel, **{**right, **changes}), aot.TARGETS["sm_90"])


AMDGCN = """
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[2:3], v[4:5], a[0:3]
; v_mfma in a comment
  - .agpr_count:     16
    .private_segment_fixed_size: 88
    .sgpr_count:     30
    .vgpr_count:     201
"""


def test_amd_metadata_are_read():
    assert aot.parse_amd(AMDGCN) == {"registers": 201, "scalars": 30, "spills": 88, "mma": 2}


def test_amd_assembly_without_metadata_is_an_error():
    with pytest.raises(RuntimeError, match=r"no \.vgpr_count"):
        aot.parse_amd("s_endpgm")
