"""The loops of machine code are found, and what is in them is counted."""

from __future__ import annotations

import re

import pytest

from errors import message_of
from gdn_ops.aot.amd_listing import read_amd
from gdn_ops.aot.loops import read_code
from gdn_ops.aot.machine_code import Code, Counts, Loop
from gdn_ops.aot.sass_listing import read_sass


def sass(*instructions: str) -> str:
    """Return a listing as cuobjdump prints it; `@3` at an end is the address of instruction 3."""
    lines = []
    for i, text in enumerate(instructions):
        plain = re.sub(r"@(\d+)$", lambda match: f"{16 * int(match[1]):#x}", text)
        lines.append(f"        /*{16 * i:04x}*/    {plain} ;    /* 0x000000000000794d */")
    return "\n\tcode for sm_90a\n\t\tFunction : kernel\n" + "\n".join(lines)


def code_of(*instructions: str) -> Code:
    return read_code(read_sass(sass(*instructions)))


def sizes(code: Code) -> list[tuple[int, int]]:
    """Return depth and own instructions of all loops."""
    return [(loop.depth, loop.own.instructions) for loop in code.loops]


def ended(*instructions: str) -> Code:
    return code_of(*instructions, "EXIT", f"BRA @{len(instructions) + 1}")


def test_the_jump_to_itself_at_the_end_is_no_loop() -> None:
    code = ended("S2R R0, SR_TID.X", "IADD3 R1, R0, 0x1, RZ")
    assert code == Code(Counts(instructions=3))


def test_a_loop_has_the_instructions_from_its_head_to_its_jump() -> None:
    code = ended("S2R R0, SR_TID.X", "IADD3 R1, R1, -0x1, RZ", "FADD R2, R2, R1", "@P0 BRA @1")
    assert sizes(code) == [(0, 3)]
    assert code.outside.instructions == 2 and code.irregular == 0


def test_loops_nest_and_each_instruction_belongs_to_the_innermost() -> None:
    code = ended(
        "MOV R0, RZ",
        "MOV R1, RZ",  # outer
        "FADD R2, R2, R1",  # first inner
        "@!P0 BRA @2",
        "FMUL R3, R2, R2",
        "LDS R4, [R3]",  # second inner
        "FADD R5, R5, R4",
        "BRA.U UP1, @5",
        "@P2 BRA @1",
        "FADD R9, R9, R9",  # a loop after it
        "@P3 BRA @9",
    )
    assert sizes(code) == [(0, 3), (1, 2), (1, 3), (0, 2)]
    assert [loop.parent for loop in code.loops] == [-1, 0, 0, -1]
    assert code.loops[2].own.shared_loads == 1
    # 100 trips of the outer loop, 3 and 5 of those inside; 7 of the last one.
    trips = {0: 100, 1: 3, 2: 5, 3: 7}
    assert code.trip(0, trips).instructions == 3 + 3 * 2 + 5 * 3
    assert code.trip(-1, trips).instructions == 2 + 100 * 24 + 7 * 2
    assert code.trip(-1, trips).shared_loads == 500
    assert code.hot(trips) == 0 and code.hot(trips | {0: 0}) == 3


def test_a_loop_may_end_in_the_middle_and_jump_back_without_a_condition() -> None:
    code = code_of("MOV R0, RZ", "FADD R1, R1, R0", "@!P0 EXIT", "BRA @1", "BRA @4")
    assert sizes(code) == [(0, 3)] and code.outside.instructions == 1


def test_jumps_forward_and_out_of_a_loop_are_no_loops() -> None:
    code = ended(
        "MOV R0, RZ", "@P1 BRA @3", "FADD R1, R1, R1", "@P2 BRA @6", "@P0 BRA @1", "BRA @6", "NOP"
    )
    assert sizes(code) == [(0, 4)]
    assert code.outside.instructions == 4


def test_a_slow_path_behind_the_end_belongs_to_the_loop_that_it_returns_to() -> None:
    code = code_of(
        "MOV R0, RZ",
        "@P1 BRA @6",  # head, and the way to the slow path
        "FADD R1, R1, R1",
        "@P0 BRA @1",
        "EXIT",
        "BRA @5",
        "MUFU.RCP R2, R1",
        "BRA @2",
    )
    assert sizes(code) == [(0, 5)]
    assert code.loops[0].own.special == 1


def test_a_slow_path_of_no_loop_makes_none() -> None:
    code = code_of("@P1 BRA @3", "FADD R1, R1, R1", "EXIT", "MUFU.RCP R2, R1", "BRA @1")
    assert code == Code(Counts(instructions=5, special=1))


def test_a_loop_that_waits_is_no_loop_that_counts() -> None:
    wait = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA @2")
    code = ended("MOV R0, RZ", "FADD R1, R1, R1", *wait, "FADD R3, R3, R3", "@P1 BRA @1")
    assert sizes(code) == [(0, 3), (1, 2)]
    assert [loop.is_wait for loop in code.loops] == [False, True]
    assert code.counting == [0] and code.children(0) == []
    # It is gone through once a trip.
    assert code.trip(-1, {0: 10}).instructions == 2 + 10 * 5
    assert code.trip(0, {0: 10}).phase_waits == 1
    sleeping = ended("MOV R0, RZ", "NANOSLEEP 0x64", "@P0 BRA @1")
    assert sleeping.counting == []
    computing = ended("MOV R0, RZ", "NANOSLEEP 0x64", *["FADD R1, R1, R1"] * 30, "@P0 BRA @1")
    assert computing.counting == [0]


def test_a_function_that_is_called_is_counted_as_a_call_and_is_no_loop() -> None:
    code = code_of(
        *("MOV R0, RZ", "CALL.REL.NOINC @6", "FADD R1, R1, R1", "@P0 BRA @1", "EXIT", "BRA @5"),
        *("FADD R8, R8, R8", "@P1 BRA @6", "RET.REL.NODEC R20 0x0"),
    )
    assert sizes(code) == [(0, 3)] and code.loops[0].own.calls == 1


def test_a_call_that_never_returns_is_a_jump_out_of_a_loop() -> None:
    # How ptxas for sm_80 leaves a loop whose jump back has no condition.
    code = ended(
        *("MOV R0, RZ", "FADD R1, R1, R1", "@P5 CALL.REL.NOINC @4", "BRA @1"),
        *("FADD R2, R2, R2", "@P3 BRA @4"),
    )
    assert sizes(code) == [(0, 3), (0, 2)]
    assert code.loops[0].own.calls == 0


def test_lanes_may_meet_again_where_bssy_says() -> None:
    meeting = (
        *("BSSY B0, @6", "@P1 BRA @3", "BSYNC B0", "FADD R1, R1, R1", "EXIT", "NOP"),
        *("FADD R2, R2, R2", "@P0 BRA @0"),
    )
    # The way back to the head is that of BSSY alone; the line before it is never reached.
    assert sizes(ended(*meeting)) == [(0, 5)]
    assert sizes(ended("NOP", *meeting[1:])) == []


def test_a_loop_for_lanes_that_differ_counts_once() -> None:
    code = ended("@P3 R2UR P1, UR20, R13", "SYNCS.EXCH.64 URZ, [UR20], UR4", "@P3 BRA.U.ANY @0")
    assert [loop.is_wait for loop in code.loops] == [True]


def test_a_place_where_lanes_meet_may_be_moved() -> None:
    moved = (
        *("BSSY B0, @9", "BMOV.32.CLEAR R6, B0", "BSSY B0, @5", "@P1 BRA @5", "BSYNC B0"),
        *("BMOV.32 B11, R6", "BSYNC B11", "FADD R1, R1, R1", "EXIT", "FADD R2, R2, R2"),
    )
    # What B0 says after the move is not where B11 leads to: line 7 is never reached.
    code = ended(*moved, "@P0 BRA @0")
    assert sizes(code) == [(0, 9)] and not code.irregular


def test_lines_before_a_head_that_may_be_skipped_belong_to_its_loop() -> None:
    # Line 1 is run where P0 does not hold: on the way in, and once more before every round.
    jumps = ("@P0 BRA @2", "MOV R0, RZ", "FADD R1, R1, R1", "@P1 BRA @1", "@P2 BRA @2", "EXIT")
    code = code_of(*jumps)
    assert sizes(code) == [(0, 4)] and not code.irregular


@pytest.mark.parametrize(
    ("instruction", "counts"),
    [
        (
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4].tnspA.tnspB, R24, gsb0",
            Counts(matrix=1, hgmma=1, multiply_adds=64 * 64 * 16 // 4),
        ),
        (
            "HGMMA.64x128x16.F32.BF16 R24, R4.reuse, gdesc[UR4].tnspB, R24",
            Counts(matrix=1, hgmma=1, register_a=1, multiply_adds=64 * 128 * 16 // 4),
        ),
        (
            "HGMMA.64x32x8.F32.TF32 R24, R4, gdesc[UR4], RZ, !UPT",
            Counts(matrix=1, hgmma=1, register_a=1, multiply_adds=64 * 32 * 8 // 4 * 2),
        ),
        ("HMMA.16816.F32.BF16 R4, R8, R2, R4", Counts(matrix=1, multiply_adds=2048)),
        ("HMMA.1688.F32.TF32 R4, R8, R2, RZ", Counts(matrix=1, multiply_adds=2048)),
        ("UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12], idesc[UR4], UPT", Counts(matrix=1)),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", Counts(barriers=1)),
        ("BAR.RED.POPC.DEFER_BLOCKING 0x0, P1", Counts(barriers=1)),
        ("BAR.ARV 0x1, 0x100", Counts()),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", Counts(waits=1)),
        ("WARPGROUP.ARRIVE", Counts()),
        ("LDS.128 R4, [R8]", Counts(shared_loads=1)),
        ("LDSM.16.MT88.4 R4, [R8]", Counts(shared_loads=1)),
        ("STS.64 [R8], R4", Counts(shared_stores=1)),
        ("STSM.16.M88.4 [R8], R4", Counts(shared_stores=1)),
        ("@P0 SHFL.BFLY PT, R4, R8, 0x1, 0x1f", Counts(shuffles=1)),
        ("LDL R2, [R1+0x8]", Counts(spills=1)),
        ("@!UP1 STL.64 [R1+0x8], R2", Counts(spills=1)),
        ("MUFU.EX2 R4, R8", Counts(special=1)),
        ("LDG.E.128 R4, [R8.64]", Counts()),
        ("DEPBAR.LE SB0, 0x0", Counts()),
    ],
)
def test_instructions_are_counted_by_kind(instruction: str, counts: Counts) -> None:
    (line,) = read_sass(sass(instruction))
    assert line.counts == counts.plus(Counts(instructions=1))
    assert line.goes_on and not line.targets


def test_code_of_which_the_flow_is_not_known_is_irregular() -> None:
    assert code_of("BRX R2 -0x40", "EXIT").irregular == 1
    # A way into a loop beside its head: 2 and 3 jump to each other, and 1 to both.
    assert code_of("MOV R0, RZ", "@P0 BRA @3", "@P1 BRA @4", "@P2 BRA @2", "EXIT").irregular == 1
    # A product that no way leads to.
    assert code_of("EXIT", "HMMA.16816.F32.BF16 R4, R8, R2, R4", "EXIT").irregular == 1


def test_code_survives_json() -> None:
    wait = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA @1")
    code = ended("LDS R0, [R1]", *wait, "HMMA.16816.F32.BF16 R4, R8, R2, R4", "@P0 BRA @0")
    values = code.values()
    assert values["loops"][1] == {
        "parent": 0,
        "depth": 1,
        "is_wait": True,
        "own": {"instructions": 2, "phase_waits": 1},
    }
    assert Code.of(values) == code


def test_a_listing_that_is_not_of_one_kernel_is_an_error() -> None:
    assert message_of(ValueError, read_sass, sass("EXIT") + "\n\t\tFunction : other\n") == (
        "the listing is of kernel, other, should be of one function"
    )
    assert message_of(ValueError, read_sass, sass("BRA 0x40", "EXIT")) == (
        "the listing jumps to 0x40, which it lacks"
    )


# AMD.


AMD = """
\t.text
states:                                 ; @states
.Lfunc_begin0:
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_1
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tds_read_b64 v[0:1], v2
\tds_write_b64 v2, v[0:1]
\tds_bpermute_b32 v4, v5, v6
\tv_add_f32_dpp v1, v2, v3 row_shr:1 row_mask:0xf
\tv_exp_f32_e32 v1, v2
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tv_mfma_f32_16x16x4_f32 a[0:3], v0, v1, a[0:3]
\ts_barrier
\tbuffer_store_dword v1, off, s[0:3], 0 ; 4-byte Folded Spill
\ts_cbranch_scc1 .LBB0_2
; %bb.3:
\tscratch_load_dword v1, off, off
\ts_cbranch_vccnz .LBB0_1
; %bb.4:
\ts_endpgm
.Lfunc_end0:
\ts_nop 0
"""


def test_loops_are_found_in_amd_assembly() -> None:
    code = read_code(read_amd(AMD))
    assert code.outside == Counts(instructions=3)
    assert code.loops == (
        Loop(
            *(-1, 0, False),
            Counts(
                instructions=7, shared_loads=1, shared_stores=1, shuffles=2, special=1, spills=1
            ),
        ),
        Loop(
            *(0, 1, False),
            Counts(
                instructions=5,
                matrix=2,
                multiply_adds=32 * 32 * 8 + 8 * 16 * 16 * 4,
                barriers=1,
                spills=1,
            ),
        ),
    )


def test_amd_assembly_that_jumps_to_an_unknown_label_is_an_error() -> None:
    assert message_of(ValueError, read_amd, "\ts_branch .LBB0_9\n") == (
        "the listing jumps to '.LBB0_9', which it lacks"
    )
    assert read_code(read_amd("\ts_setpc_b64 s[30:31]\n")).irregular == 1
