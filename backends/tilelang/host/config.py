"""Choose the configuration of a call by rule from the rows of `table`, with no tuning at run time.

`gdn-ops bench --tune tilelang` measures the neighbours of a row and prints rows to paste.
"""

from __future__ import annotations

import functools
from typing import Final

import torch

from gdn_ops.backends.tilelang.host import table
from gdn_ops.backends.tilelang.host.table import Config
from gdn_ops.call.bind import Call
from gdn_ops.kernel_support.backend import Tables, environment_choice
from gdn_ops.kernel_support.tuning import StepConfig
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import GATED_DELTA

TARGETS: Final = ("sm_90a", "sm_80", "sm_100a", "sm_120a")
"""Device classes that have rows."""

CHUNKS: Final = (32, 64)
"""Chunk sizes that the kernels have: four warps do not share a product of 16 by 16."""

ONE_SEGMENT: Final = 2**30
"""Tokens of a segment where a sequence is not cut: more than fit, and in 32 bits."""

LEAST_CHUNKS: Final = 32
"""Chunks of a sequence from which on it may be cut. By count of launches, not measured."""

LEAST_SEGMENT: Final = 8
"""Chunks that a segment has at least: forming its map costs as much as walking it twice. By count
of products, not measured."""

NARROWEST: Final = 32
"""Columns of V that a program of the walks has at least. By width of the products, not measured."""


def width_class(K: int) -> int:
    """Return the width of the tiles that hold a key, which decides shared memory and registers."""
    return -(-K // 64) * 64


@functools.cache
def _target_of(index: int) -> str:
    """Return the device class of a GPU, or one that needs no more shared memory than it has.

    Consumer GPUs, sm_86, sm_89 and sm_120, have 99 KiB of shared memory per program.
    """
    capability = torch.cuda.get_device_capability(index)
    if capability == (8, 0):
        return "sm_80"
    return {9: "sm_90a", 10: "sm_100a"}.get(capability[0], "sm_120a")


tables: Final = Tables(
    {**table.SEQUENCE, **table.STEP},
    target_of=_target_of,
    # An emulation runs what a Hopper GPU would.
    emulated="sm_90a",
    width_of=lambda K, V: width_class(K),
    step={"BV": (8, 16, 32), "warps": (1, 2)},
    sequence={"C": CHUNKS},
    # Longer chunks than those of a row may not fit the shared memory.
    allows=lambda own, other: isinstance(own, StepConfig) or other.C <= own.C,
)


def shape_reasons(call: Call) -> list[str]:
    """Return why the tiles that a call of the sequence op needs do not fit the shared memory."""
    K, is_sequence = call.sizes.K, call.op is GATED_DELTA
    if not is_sequence or (call.device.type == "cuda" and not torch.cuda.is_available()):
        return []
    key = tables.key(call.device, K, call.sizes.V, call.tokens.q.dtype)
    what = f"{str(call.tokens.q.dtype).removeprefix('torch.')} with K={K} on {key[0]}"
    row = table.SEQUENCE.get(key)
    if row is None:
        widths = [width for target, width, kind in table.SEQUENCE if (target, kind) == key[::2]]
        is_known = K in range(16, 257, 16)
        return [f"{what} (supported: K up to {max(widths)})"] if is_known else []
    if call.chunk_size in CHUNKS and call.chunk_size > row.C:
        return [f"chunk_size={call.chunk_size} (at most {row.C} for {what})"]
    return []


def columns(device: torch.device, s: Sizes, BV: int) -> int:
    """Return how many columns of V a program of the walks has, at most BV.

    V is split further where more than a third of the processors would be idle: twice the programs
    of nearly as many take two turns. What is computed for a column does not depend on it.
    """
    while BV > NARROWEST and 7 * tables.processors(device) > 10 * s.N * s.HV * -(-s.V // BV):
        BV //= 2
    return BV


def segment_chunks(device: torch.device, s: Sizes, C: int, config: Config) -> int:
    """Return how many chunks of a sequence are walked by one program (docs/math.md §6).

    A sequence is cut into segments where the walk over whole sequences would leave more than half
    of the GPU idle and a sequence has LEAST_CHUNKS or more; then into so many that the grid fills
    the GPU about once. What a sequence computes so depends, in its rounding, on how many others
    are in the call; GDN_OPS_TILELANG_SEGMENTS=off, read at import, never cuts.
    """
    if config.segment is not None:
        return config.segment
    programs = s.N * s.HV * -(-s.V // columns(device, s, config.states.BV))
    chunks = -(-s.B * s.T // (max(s.N, 1) * C))
    processor_count = tables.processors(device)
    if not _cuts or chunks < LEAST_CHUNKS or 2 * programs >= processor_count:
        return ONE_SEGMENT // C
    return max(LEAST_SEGMENT, -(-chunks // (processor_count // programs)))


_cuts = environment_choice("GDN_OPS_TILELANG_SEGMENTS", ("on", "off")) == "on"
