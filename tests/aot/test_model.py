"""The programs that fit a processor, and the predicted time of made-up kernels."""

from __future__ import annotations

import pytest

from gdn_ops.aot.machine_code import Counts
from gdn_ops.aot.model import predict
from gdn_ops.aot.processors import GPUS, programs_per_processor
from gdn_ops.kernel_support.backend import PROCESSORS

HOPPER, AMPERE, MI300 = GPUS["sm_90"], GPUS["sm_80"], GPUS["gfx942"]


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "programs"),
    [
        # By registers: 64 Ki of 32 bits, given to a warp in multiples of 256.
        ("sm_90", 255, 4, 0, 2),
        ("sm_90", 249, 4, 109 * 1024, 2),
        ("sm_90", 255, 8, 0, 1),
        ("sm_90", 168, 4, 0, 3),
        ("sm_90", 169, 4, 0, 2),
        ("sm_90", 128, 4, 0, 4),
        ("sm_90", 128, 8, 0, 2),
        ("sm_90", 64, 8, 0, 4),
        ("sm_90", 255, 16, 0, 0),
        # By warps and by programs.
        ("sm_90", 32, 4, 0, 16),
        ("sm_90", 32, 32, 0, 2),
        ("sm_90", 16, 1, 0, 32),
        ("sm_120a", 32, 4, 0, 12),
        ("sm_120a", 16, 1, 0, 24),
        # By shared memory: 228 KiB, of which each program takes 1 KiB more.
        ("sm_90", 32, 4, 113 * 1024, 2),
        ("sm_90", 32, 4, 113 * 1024 + 1, 1),
        ("sm_90", 32, 4, 227 * 1024, 1),
        ("sm_90", 32, 4, 227 * 1024 + 1, 0),
        ("sm_80", 32, 4, 81 * 1024, 2),
        ("sm_80", 32, 4, 81 * 1024 + 1, 1),
        ("sm_80", 32, 4, 163 * 1024, 1),
        ("sm_100", 32, 4, 113 * 1024, 2),
        ("sm_120a", 32, 4, 49 * 1024, 2),
        # AMD: 512 registers and 8 waves per SIMD, 64 KiB in steps of 512 bytes.
        ("gfx942", 512, 4, 0, 1),
        ("gfx942", 256, 4, 0, 2),
        ("gfx942", 257, 4, 0, 1),
        ("gfx942", 128, 8, 0, 2),
        ("gfx942", 24, 4, 0, 8),
        ("gfx942", 24, 1, 0, 16),
        ("gfx942", 24, 4, 32 * 1024, 2),
        ("gfx942", 24, 4, 32 * 1024 + 1, 1),
    ],
)
def test_so_many_programs_fit_a_processor(
    target: str, registers: int, warps: int, shared: int, programs: int
) -> None:
    assert programs_per_processor(GPUS[target], registers, warps, shared) == programs


def test_the_constants_are_those_of_the_data_sheets() -> None:
    assert (HOPPER.processors, HOPPER.clock, HOPPER.bandwidth) == (132, 1.755e9, 4.8e12)
    # Dense TFLOP/s in 16 bits, at the boost clock where another one is assumed.
    for target, clock, flops in (
        ("sm_80", 1.41e9, 312e12),
        ("sm_90", 1.83e9, 989e12),
        ("sm_100", 1.855e9, 2.25e15),
        ("sm_120a", 2.407e9, 209.5e12),
        ("gfx942", 2.1e9, 1307e12),
    ):
        gpu = GPUS[target]
        assert 2 * gpu.multiply_adds * gpu.processors * clock == pytest.approx(flops, rel=2e-3)
    assert all(gpu.sources and gpu.program_shared < 2**18 for gpu in GPUS.values())


def test_the_floor_by_instructions_is_as_the_formula_says() -> None:
    # 3534 instructions a head, 4 heads, 4 warps, 128 chunks and 16 key heads.
    time = predict(HOPPER, Counts(instructions=4 * 3534), 4, 2, (128, 16), 0)
    assert time.issue_us == pytest.approx(4 * 3534 * 4 * 2048 / (132 * 4 * 1.755e3), abs=1e-3)
    assert time.issue_us == pytest.approx(125, abs=0.1)
    assert time.bytes_us == 0 and time.waves == round(2048 / 264, 3)


def test_waves_are_counted_whole() -> None:
    work, us = Counts(instructions=6000), 1e-6
    cycles = 6000 / 0.6
    # One wave, however few programs: the last processor is as slow as the first.
    for programs in (1, 132):
        assert predict(HOPPER, work, 4, 1, (programs,), 0).us * us == pytest.approx(
            cycles / 1.755e9, abs=1e-9
        )
    for programs, waves in ((133, 2), (264, 2), (265, 3)):
        assert predict(HOPPER, work, 4, 1, (programs,), 0).us * us == pytest.approx(
            waves * cycles / 1.755e9, abs=1e-9
        )
    # Two that share a processor take turns: as long as one after the other.
    both = predict(HOPPER, work, 4, 2, (264,), 0)
    assert both.us == predict(HOPPER, work, 4, 1, (264,), 0).us
    assert (both.waves, both.bound) == (1.0, "issue")


def test_a_program_by_itself_waits_for_its_barriers_and_products() -> None:
    work = Counts(instructions=600, barriers=10, waits=3, phase_waits=5, multiply_adds=4096)
    # 600 / 0.6, 40 a barrier, 100 a wait, and 4 warps' products at 2048 a cycle.
    serial = predict(HOPPER, work, 4, 2, (132,), 0)
    assert serial.us == pytest.approx((1000 + 400 + 300 + 8) / 1755, abs=1e-3)
    assert serial.bound == "serial"
    # A second one on each processor hides in the waits of the first.
    assert predict(HOPPER, work, 4, 1, (264,), 0).us == pytest.approx(2 * serial.us, abs=2e-3)
    assert predict(HOPPER, work, 4, 2, (264,), 0).us == pytest.approx(2000 / 1755, abs=1e-3)
    # Products of Blackwell signal a barrier in shared memory.
    blackwell = predict(GPUS["sm_100"], work, 4, 2, (132,), 0)
    assert blackwell.us == pytest.approx((1000 + 400 + 800 + 4) / 1855, abs=1e-3)


def test_products_and_bytes_may_bound_a_launch() -> None:
    work = Counts(instructions=600, multiply_adds=2048 * 10000)
    assert predict(HOPPER, work, 4, 2, (264,), 0).us == pytest.approx(80000 / 1755, abs=1e-2)
    assert predict(HOPPER, work, 4, 2, (264,), 0).bound == "matrix"
    time = predict(HOPPER, work, 4, 2, (264,), 4_800_000_000)
    assert (time.bytes_us, time.bound) == (1000.0, "bytes")
    assert time.us == pytest.approx(1000 / 0.85, abs=1e-3)


def test_a_simd_of_amd_takes_four_cycles_an_instruction() -> None:
    work = Counts(instructions=600)
    assert predict(MI300, work, 4, 1, (304,), 0).us == pytest.approx(4000 / 2100, abs=1e-3)
    assert predict(MI300, work, 4, 1, (304,), 0).issue_us == pytest.approx(2400 / 2100, abs=1e-3)
    assert predict(AMPERE, work, 4, 1, (108,), 0).us == pytest.approx(1000 / 1410, abs=1e-3)


def test_the_same_code_has_the_same_time() -> None:
    work = Counts(instructions=12345, barriers=7, waits=3, multiply_adds=98765)
    first, again = (predict(HOPPER, work, 8, 1, (77, 3), 123456) for _ in range(2))
    assert first == again


def test_recorded_launches_are_planned_for_the_processors_of_the_model() -> None:
    assert {name: GPUS[name].processors for name in PROCESSORS} == PROCESSORS
