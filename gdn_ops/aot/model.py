"""Predict the time of a launch from its machine code: a stated model, not a measurement.

A GPU has P processors at f cycles a second with s schedulers each. A program has w warps, each of
which executes I instructions, B barriers, W waits for products, and M multiply-adds; n programs
share a processor. In cycles,

    issue(n)    I ceil(n w / s) c             c between two instructions of a scheduler
    matrix(n)   n w M / m                     m multiply-adds a cycle and processor
    serial      I c / 0.6 + 40 B + 100 W + matrix(1)
    wave(n)     max(issue(n) / 0.6, matrix(n), serial)

The serial time is that of one warp whose instructions and products wait for each other.

The time of a launch is the larger of the sum of its waves over f, and its bytes over 0.85 of the
bandwidth. A wave fills all processors with n programs, as many as fit; the last has the rest.
Bytes are those of every tensor that the launch reads, and of every one that it writes, once: what
several programs read is found in the cache.

The floors are the same without these factors: issue = I w G c / (P s f) of G programs, bytes over
the bandwidth. The factors and cycles are chosen, not measured: they are meant to be within 30 % on
Hopper, and to order candidates elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gdn_ops.aot.machine_code import Counts
from gdn_ops.aot.processors import Gpu

ISSUED: Final = 0.6
"""Share of a scheduler's cycles in which it issues, where nothing that is counted apart stalls."""

REACHED: Final = 0.85
"""Share of the bandwidth that a launch reaches."""

BARRIER: Final = 40
"""Cycles from the last warp that comes to a barrier to the first that goes on."""

WAIT: Final = 100
"""Cycles from the end of a product of a warp group to the first instruction that uses it."""


@dataclass(frozen=True)
class Prediction:
    """Hold the predicted time of a launch.

    Attributes:
        waves: how often all processors are filled; a fraction for the last one.
        issue_us: the floor by instructions, microseconds.
        bytes_us: the floor by bytes.
        us: the predicted time.
        bound: what takes it: "issue", "matrix", "serial" or "bytes".
    """

    waves: float
    issue_us: float
    bytes_us: float
    us: float
    bound: str


def predict(
    gpu: Gpu, work: Counts, warps: int, resident: int, grid: Sequence[int], nbytes: int
) -> Prediction:
    """Return the predicted time of a launch.

    Args:
        gpu: the GPU.
        work: what a warp of a program executes, trips counted.
        warps: of one program.
        resident: programs that one processor holds, at least 1.
        grid: sizes of the grid.
        nbytes: bytes of the tensors of the launch.
    """
    programs, slots = math.prod(grid), gpu.processors * resident
    full, rest = divmod(programs, slots)
    cycles = 0.0
    if full:
        cycles += full * max(_wave(gpu, work, warps, resident).values())
    if rest:
        cycles += max(_wave(gpu, work, warps, -(-rest // gpu.processors)).values())
    by_code, by_bytes = cycles / gpu.clock, nbytes / gpu.bandwidth
    typical = _wave(gpu, work, warps, resident if full else max(1, -(-rest // gpu.processors)))
    bound = "bytes" if by_bytes / REACHED > by_code else max(typical, key=typical.__getitem__)
    slots_taken = work.instructions * warps * programs * gpu.issue_cycles
    issue = slots_taken / (gpu.processors * gpu.schedulers * gpu.clock)
    time = max(by_code, by_bytes / REACHED)
    return Prediction(
        waves=round(programs / slots, 3),
        issue_us=round(1e6 * issue, 3),
        bytes_us=round(1e6 * by_bytes, 3),
        us=round(1e6 * time, 3),
        bound=bound,
    )


def _wave(gpu: Gpu, work: Counts, warps: int, programs: int) -> dict[str, float]:
    """Return the cycles of a wave with so many programs on a processor, by what takes them."""
    own = work.instructions * gpu.issue_cycles / ISSUED
    product = work.multiply_adds * warps / gpu.multiply_adds
    waits = work.waits + (work.phase_waits if gpu.products_signal else 0)
    return {
        "issue": own * -(-programs * warps // gpu.schedulers),
        "matrix": programs * product,
        "serial": own + BARRIER * work.barriers + WAIT * waits + product,
    }
