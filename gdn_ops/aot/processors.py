"""Describe the GPUs that kernels are compiled for, and count the programs that one processor holds.

A processor is a streaming multiprocessor (AMD: compute unit), a program a thread block (AMD: work
group), a warp on AMD a wave of 64 lanes.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Describe a GPU.

    Attributes:
        name: of the product whose processors, clock and bandwidth these are.
        processors: how many it has.
        clock: cycles per second.
        bandwidth: of its memory, bytes per second.
        multiply_adds: of 16-bit products, per cycle and processor, dense.
        shared: bytes of shared memory of one processor.
        program_shared: bytes of shared memory that one program can have.
        reserved: bytes that each program takes beside its own.
        shared_unit: bytes that shared memory is given out in multiples of.
        registers: per thread, of all warps of a scheduler together.
        register_unit: registers per thread that are given out at a time.
        warps: the most of one scheduler.
        programs: the most of one processor.
        schedulers: of one processor; each issues from its own warps.
        issue_cycles: cycles between two instructions of a scheduler.
        products_signal: whether products signal a barrier in shared memory, so that SYNCS waits
            for them; elsewhere it waits for copies that came long ago.
        lanes: of a warp.
        sources: where the numbers are from.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    multiply_adds: int
    shared: int
    program_shared: int
    reserved: int
    shared_unit: int
    registers: int
    register_unit: int
    warps: int
    programs: int
    schedulers: int
    issue_cycles: int
    products_signal: bool
    lanes: int
    sources: str


_CUDA = "CUDA Programming Guide, technical specifications per compute capability"


def _nvidia(
    name: str, processors: int, clock: float, bandwidth: float, multiply_adds: int, kib: int,
    sources: str, *, warps: int = 16, programs: int = 32,
) -> Gpu:  # fmt: skip
    """Return an NVIDIA GPU: 64 Ki registers, 1 KiB of shared memory per program for the system."""
    return Gpu(
        name, processors, clock, bandwidth, multiply_adds, kib * 1024, (kib - 1) * 1024, 1024, 128,
        65536 // 4 // 32, 8, warps, programs, 4, 1, name == "B200", 32,
        f"{_CUDA}; {sources}",
    )  # fmt: skip


_A100 = _nvidia(
    "A100 SXM 80 GB", 108, 1.410e9, 2.039e12, 1024, 164,
    "A100 architecture whitepaper: 108 processors, boost clock 1410 MHz; data sheet: 2039 GB/s",
)  # fmt: skip
_H200 = _nvidia(
    "H200", 132, 1.755e9, 4.8e12, 2048, 228,
    "H100 architecture whitepaper: 132 processors; H200 data sheet: 4.8 TB/s; 1755 MHz is assumed, "
    "below the 1830 MHz that the 989 TFLOP/s of the data sheet mean",
)  # fmt: skip
_B200 = _nvidia(
    "B200", 148, 1.855e9, 8.0e12, 4096, 228,
    "Blackwell data sheet: 2.25 PFLOP/s dense in 16 bits, 1855 MHz with 148 processors of "
    "4096 multiply-adds a cycle; 8 TB/s",
)  # fmt: skip
_RTX_5090 = _nvidia(
    "RTX 5090", 170, 2.407e9, 1.792e12, 256, 100,
    "RTX Blackwell architecture whitepaper: 170 processors, boost clock 2407 MHz, 1792 GB/s, "
    "209.5 TFLOP/s in bfloat16 with sums in float32",
    warps=12, programs=24,
)  # fmt: skip
_MI300X = Gpu(
    "MI300X", 304, 2.1e9, 5.3e12, 1024, 64 * 1024, 64 * 1024, 0, 512,
    512, 8, 8, 16, 4, 4, False, 64,
    "MI300X data sheet: 304 compute units, 2100 MHz, 5.3 TB/s, 1307.4 TFLOP/s in 16 bits; LLVM's "
    "AMDGPUBaseInfo for gfx942: 512 registers and 8 waves per SIMD, 16 groups of several waves; "
    "CDNA3 whitepaper: a SIMD takes 4 cycles for a wave of 64 lanes",
)  # fmt: skip

GPUS: dict[str, Gpu] = {
    "sm_80": _A100,
    **dict.fromkeys(("sm_90", "sm_90a"), _H200),
    **dict.fromkeys(("sm_100", "sm_100a"), _B200),
    "sm_120a": _RTX_5090,
    "gfx942": _MI300X,
}
"""By target. An `a` is NVIDIA's name for a target whose code may use all its instructions and runs
on nothing newer; Triton leaves it out."""


def programs_per_processor(gpu: Gpu, registers: int, warps: int, shared: int) -> int:
    """Return how many programs a processor holds at a time, 0 where not even one fits.

    Each scheduler has its own registers and warps. The scalar registers of AMD are not counted.

    Args:
        gpu: the GPU.
        registers: per thread; on AMD vector and accumulation registers together.
        warps: of one program.
        shared: bytes of shared memory of one program.
    """
    unit = gpu.register_unit
    own = -(-max(registers, 1) // unit) * unit
    resident = min(gpu.registers // own, gpu.warps) * gpu.schedulers
    taken = -(-(shared + gpu.reserved) // gpu.shared_unit) * gpu.shared_unit
    by_shared = gpu.shared // taken if taken else gpu.programs
    return min(resident // max(warps, 1), by_shared, gpu.programs)
