"""Choose the configuration of a call by rule from the rows of `table`, with no tuning at run time.

`gdn-ops bench --tune triton` measures the neighbours of a row and prints rows to paste.
"""

from __future__ import annotations

import functools
from typing import Final

import torch

from gdn_ops.backends.triton.host import table
from gdn_ops.kernel_support.backend import Tables, environment_choice

TARGETS: Final = table.TARGETS

CHUNKS: Final = (16, 32, 64)
"""Chunk sizes that the kernels have."""

FLOAT32_PRODUCTS: Final = ("tf32x3", "ieee")
"""Ways to form a float32 product; plain TF32 is none of them."""


@functools.cache
def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n and 16."""
    return max(16, 1 << (n - 1).bit_length())


@functools.cache
def _target_of(index: int) -> str:
    """Return the device class of a GPU, or one that needs no more shared memory than it has.

    Consumer GPUs, sm_86, sm_89 and sm_120, have 99 KiB of shared memory, which sm_80's rows fit.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def _width_class(K: int, V: int) -> int:
    """Return the head-dim class: that of K, since V is taken by blocks."""
    return max(64, power_of_two(K))


tables: Final = Tables(
    {**table.SEQUENCE, **table.STEP},
    target_of=_target_of,
    # An emulation runs what a Hopper GPU would.
    emulated="sm_90",
    width_of=_width_class,
    step={"BV": (8, 16, 32, 64), "warps": (1, 2, 4, 8)},
    sequence={
        "C": CHUNKS,
        "descriptors": (False, True),
    },
)


float32_products = environment_choice("GDN_OPS_TRITON_FLOAT32", FLOAT32_PRODUCTS)
"""Name the way float32 products are formed on NVIDIA; on AMD it is "ieee".

`tf32x3` sums three TF32 products of the operands' high and low parts, on tensor cores; `ieee`
multiplies in float32. GDN_OPS_TRITON_FLOAT32 chooses, and is read at import.
"""
