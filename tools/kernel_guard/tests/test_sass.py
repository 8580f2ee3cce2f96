"""Counting from listings written by hand, whose counts can be told by eye."""

from __future__ import annotations

import pytest

from tools.kernel_guard import sass
from tools.kernel_guard.case import Loop
from tools.kernel_guard.sass import CountError, Program


def listing(*instructions: str) -> str:
    """As `cuobjdump -sass` prints it; a target is given as the number of an instruction."""
    lines = ["\tcode for sm_90", "\t\tFunction : kernel"]
    for i, text in enumerate(instructions):
        lines.append(f"        /*{16 * i:04x}*/      {text} ;     /* 0x000000000000794d */")
        lines.append("                               /* 0x000fea0003800000 */")
    return "\n".join(lines)


def at(number: int) -> str:
    return hex(16 * number)


def total(program: Program, *loops: Loop) -> float:
    matched = sass.match_loops(loops, program.loops)
    trips = {header: loop.trips / factor for header, (loop, factor) in matched.items()}
    return sum(program.executions(trips).values())


NESTED = listing(
    "S2R R0, SR_TID.X",
    "LDG.E R1, [R2.64]",  # 1: the outer loop
    "FADD R1, R1, R0",
    "FADD R1, R1, R3",  # 3: the inner loop
    "LDG.E R4, [R2.64]",
    f"@P0 BRA {at(3)}",
    "BAR.SYNC 0x0",
    f"@!P1 BRA {at(1)}",
    "EXIT",
    f"BRA {at(9)}",  # what ptxas puts behind the end: never reached
)


def test_instructions_count_as_often_as_the_loops_around_them_run():
    program = Program(NESTED)
    outer = Loop("outer", 10, (Loop("inner", 7),))
    # 2 outside; 4 in the outer loop alone, 3 in the inner one.
    assert total(program, outer) == 2 + 10 * (4 + 7 * 3)
    assert sass.describe(program.loops) == "0x10: 7 instructions { 0x30: 3 instructions }"


def test_a_loop_unrolled_by_a_factor_is_recognised_by_its_marker():
    rounds = ["REDUX.MAX.S32 UR1, R0", "LDG.E R1, [R2.64]"] * 4
    unrolled = Program(listing("MOV R0, R1", *rounds, f"@P0 BRA {at(1)}", "EXIT"))
    assert total(unrolled, Loop("rounds", 8, marker=("REDUX", 1))) == 2 + 2 * 9
    assert total(unrolled, Loop("rounds", 8, marker=("REDUX", 2))) == 2 + 4 * 9
    with pytest.raises(CountError, match=r"expected rounds with 3 REDUX; found 0x10: 9 .* 4 REDUX"):
        total(unrolled, Loop("rounds", 8, marker=("REDUX", 3)))


def test_loops_that_are_not_in_the_code_are_those_without_their_marker():
    program = Program(NESTED)
    loops = (
        Loop("first", 3, marker=("MUFU", 1)),
        Loop("second", 10, (Loop("inner", 7, marker=("LDG", 1)),), marker=("BAR", 1)),
    )
    assert total(program, *loops) == 2 + 10 * (4 + 7 * 3)


def test_a_loop_of_one_iteration_is_taken_to_be_none():
    program = Program(listing("MOV R0, R1", "FADD R1, R1, R0", f"@P0 BRA {at(1)}", "EXIT"))
    assert total(program, Loop("one", 1), Loop("many", 5), Loop("another", 1)) == 2 + 5 * 2


def test_loops_that_fit_in_several_ways_are_an_error():
    program = Program(listing("MOV R0, R1", "FADD R1, R1, R0", f"@P0 BRA {at(1)}", "EXIT"))
    with pytest.raises(CountError, match=r"fit in 2 ways \(give markers\): expected a; b; found"):
        total(program, Loop("a", 3), Loop("b", 5))


@pytest.mark.parametrize("loops", [(), (Loop("only", 3),), (Loop("a", 3), Loop("b", 4))])
def test_other_loops_than_expected_are_an_error_that_says_what_was_found(loops):
    with pytest.raises(
        CountError, match=r"do not fit: .*found 0x10: 7 instructions \{ 0x30: 3 instructions \}"
    ):
        total(Program(NESTED), *loops)


def test_of_two_branches_the_dearer_counts():
    program = Program(
        listing(
            f"@P0 BRA {at(3)}",
            "FADD R1, R1, R0",
            f"BRA {at(6)}",
            "FMUL R1, R1, R0",  # 3: the other branch, longer
            "FMUL R1, R1, R0",
            "FMUL R1, R1, R0",
            "EXIT",
        )
    )
    assert total(program) == 1 + 3 + 1


def test_a_predicated_exit_does_not_end_the_program():
    assert total(Program(listing("@P0 EXIT", "FADD R1, R1, R0", "EXIT"))) == 3


def test_a_branch_on_a_uniform_predicate_may_fall_through():
    program = Program(listing(f"BRA.U UP0, {at(2)}", "FADD R1, R1, R0", "EXIT"))
    assert total(program) == 3


def test_loops_that_wait_for_a_barrier_in_memory_count_once():
    program = Program(
        listing(
            "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR69+0x1000], R38",
            f"@!P0 BRA {at(4)}",
            "EXIT",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR69+0x1000], R38",  # 4: out of line
            f"@!P0 BRA {at(4)}",
            f"BRA {at(3)}",
        )
    )
    assert total(program) == 7
    assert sass.mma_count(program.code) == 1


def test_a_call_that_never_returns_is_a_jump():
    """So ptxas leaves loops on sm_80: were it no jump, the last two would never be reached."""
    program = Program(
        listing(
            "MOV R0, R1",
            "FADD R1, R1, R0",  # 1: the loop
            f"@P4 CALL.REL.NOINC {at(4)}",
            f"BRA {at(1)}",
            "STG.E [R2.64], R1",
            "EXIT",
        )
    )
    assert total(program, Loop("sum", 6)) == 1 + 6 * 3 + 2


def test_a_subroutine_called_in_a_loop_is_an_error_and_before_it_none():
    def program(inside: bool) -> Program:
        call = f"CALL.REL.NOINC {at(5)}"
        return Program(
            listing(
                "MOV R0, R1" if inside else call,
                call if inside else "MOV R0, R1",  # 1: the loop
                "FADD R1, R1, R0",
                f"@P0 BRA {at(1)}",
                "EXIT",
                "MUFU.RCP R1, R1",  # 5: the subroutine
                "RET.REL.NODEC R2 0x0",
            )
        )

    assert total(program(False), Loop("sum", 4)) == 1 + 4 * 3 + 1
    with pytest.raises(CountError, match="a loop calls a subroutine at 0x10"):
        total(program(True), Loop("sum", 4))


def test_threads_that_wait_for_each_other_go_on_where_they_agreed_to():
    program = Program(
        listing(
            f"BSSY B0, {at(5)}",
            f"@P0 BRA {at(3)}",
            "BSYNC B0",
            "FADD R1, R1, R0",  # 3: the longer way to the same place
            "BSYNC B0",
            "EXIT",
        )
    )
    assert total(program) == 2 + 2 + 1


def test_a_loop_with_two_entries_is_an_error():
    program = Program(
        listing(
            f"@P0 BRA {at(2)}", "FADD R1, R1, R0", "FADD R1, R1, R0", f"@P1 BRA {at(1)}", "EXIT"
        )
    )
    with pytest.raises(CountError, match="entered at 2 places"):
        total(program)


def test_indirect_branches_are_an_error():
    with pytest.raises(CountError, match="indirect branch at 0x10"):
        Program(listing("MOV R0, R1", "BRX R4 -0x10", "EXIT"))


def test_a_listing_without_code_is_an_error():
    with pytest.raises(CountError, match="no instructions"):
        Program("no kernel here")


def test_what_the_scheduler_is_told_is_no_operand():
    text = listing(
        "MOV R0, R1                 &wr=0x0  ?trans1",
        "FADD R1, R1, R0            &req={0} ?WAIT5_END_GROUP",
        f"@!P0 BRA {at(1)}          &req={{0}}",
        "EXIT                       ?trans5",
    )
    assert total(Program(text), Loop("sum", 5)) == 1 + 5 * 2 + 1


def test_padding_neither_counts_nor_leads_astray():
    program = Program(listing("MOV R0, R1", f"BRA {at(2)}", "NOP", "FADD R1, R1, R0", "EXIT"))
    assert total(program) == 4


def barriers(program: Program, *loops: Loop) -> int | None:
    return sass.barriers_in("rounds", program, loops, sass.match_loops(loops, program.loops))


def test_barriers_are_counted_within_the_loop_only():
    assert barriers(Program(NESTED), Loop("rounds", 10, (Loop("inner", 7),))) == 1
    assert barriers(Program(NESTED), Loop("outer", 10, (Loop("rounds", 7),))) == 0
    assert barriers(Program(NESTED), Loop("outer", 10, (Loop("inner", 7),))) is None


def test_barriers_of_a_loop_unrolled_whole_lie_between_its_markers():
    code = [
        "BAR.SYNC 0x0",
        "LDG.E R1, [R2.64]",
        "BAR.SYNC 0x0",
        "LDG.E R1, [R2.64]",
        "BAR.SYNC 0x0",
    ]
    program = Program(listing(*code, "EXIT"))
    assert barriers(program, Loop("rounds", 2, marker=("LDG", 1))) == 1
    with pytest.raises(CountError, match="unrolled and has no marker"):
        barriers(program, Loop("rounds", 2))
    with pytest.raises(CountError, match="marker REDUX is nowhere"):
        barriers(program, Loop("rounds", 2, marker=("REDUX", 1)))


def test_markers_in_loops_beside_the_unrolled_one_are_none_of_its():
    program = Program(
        listing(
            "LDG.E R1, [R2.64]",  # 0: another loop, with a barrier
            "BAR.SYNC 0x0",
            "STG.E [R2.64], R1",
            f"@P0 BRA {at(0)}",
            "LDG.E R1, [R2.64]",
            "LDG.E R1, [R2.64]",
            "EXIT",
        )
    )
    loops = (Loop("stores", 9, marker=("STG", 1)), Loop("rounds", 2, marker=("LDG", 2)))
    assert barriers(program, *loops) == 0


def test_an_instruction_is_of_the_line_named_last():
    text = """
        //## File "/src/kernel.py", line 7
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   S2R R1, SR_TID.X ;
        //## File "/src/inner.py", line 30
        /*0020*/                   FADD R1, R1, R0 ;
        //## File "/src/kernel.py", line 11
        /*0030*/                   EXIT ;
    """
    outer, inner = "/src/kernel.py", "/src/inner.py"
    lines = {0: (outer, 7), 16: (outer, 7), 32: (inner, 30), 48: (outer, 11)}
    assert sass.source_lines(text) == lines
