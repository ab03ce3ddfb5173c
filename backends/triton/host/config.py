"""Choose the configuration of a call by rule from the rows of `table`, with no tuning at run time.

`gdn-ops bench --tune triton` measures the `neighbours` of a row and prints rows to paste.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Final

import torch

from gdn_ops.backends.triton.host import table
from gdn_ops.backends.triton.host.shapes import Config, StepConfig, Tiles
from gdn_ops.kernel_support.launches import recorded_target
from gdn_ops.kernel_support.tuning import Override, Row

TARGETS: Final = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Device classes that have rows."""

CHUNKS: Final = (16, 32, 64)
"""Chunk sizes that the kernels have."""

MOST_STEPS: Final = 8
"""Tokens per row up to which a call without gradients takes the decode kernel."""

FLOAT32_PRODUCTS: Final = ("tf32x3", "ieee")
"""Ways to form a float32 product; plain TF32 is none of them."""

KERNELS: Final = (
    "prepare",
    "states",
    "output",
    "reads_back",
    "state_gradients",
    "pair_gradients",
    "token_gradients",
)

_override = Override()
using = _override.using


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


def target(device: torch.device) -> str:
    """Return the device class that launches on a device are configured for."""
    recorded = recorded_target()
    if recorded is not None:
        return recorded
    # An emulation runs what a Hopper GPU would.
    return _target_of(device.index or 0) if device.type == "cuda" else "sm_90"


def sequence_key(device: torch.device, dtype: torch.dtype, K: int, V: int) -> tuple[str, int, str]:
    """Return the key of the row for a call of the sequence op."""
    kind = "float32" if dtype == torch.float32 else "low"
    return target(device), max(64, power_of_two(max(K, V))), kind


def step_key(device: torch.device, K: int, V: int) -> tuple[str, int]:
    """Return the key of the row for a call of a decode op."""
    return target(device), max(64, power_of_two(max(K, V)))


def choose(device: torch.device, dtype: torch.dtype, K: int, V: int) -> Config:
    """Return the configuration of a call of the sequence op."""
    return _override.choose(table.SEQUENCE, sequence_key(device, dtype, K, V))


def choose_step(device: torch.device, K: int, V: int) -> StepConfig:
    """Return the configuration of a call of a decode op."""
    return _override.choose(table.STEP, step_key(device, K, V))


def neighbours(row: Row) -> tuple[Row, ...]:
    """Return a row, and after it the rows that differ from it in a single choice."""
    found = [row.config]
    if isinstance(row.config, StepConfig):
        step = row.config
        found += [replace(step, BV=BV) for BV in (8, 16, 32, 64)]
        found += [replace(step, warps=warps) for warps in (1, 2, 4, 8)]
    else:
        config = row.config
        found += [replace(config, C=C) for C in CHUNKS]
        found += [replace(config, every=every) for every in (1, 2, 4)]
        found += [replace(config, pair_rows=rows) for rows in (32, 64)]
        found += [replace(config, reload=reload) for reload in (False, True)]
        for kernel in KERNELS:
            own: Tiles = getattr(config, kernel)
            tiles = [replace(own, BV=BV) for BV in (32, 64, 128) if kernel != "prepare"]
            tiles += [replace(own, warps=warps) for warps in (4, 8)]
            tiles += [replace(own, stages=stages) for stages in (1, 2, 3)]
            found += [replace(config, **{kernel: t}) for t in tiles]
    return tuple(Row(row.key, config) for config in dict.fromkeys(found))


def products(device: torch.device) -> str:
    """Return how float32 products are formed: tf32x3 on NVIDIA, ieee on AMD and by choice.

    `tf32x3` sums three TF32 products of the operands' high and low parts, on tensor cores; `ieee`
    multiplies in float32. GDN_OPS_TRITON_FLOAT32 chooses for NVIDIA, and is read at import.
    """
    return "ieee" if target(device).startswith("gfx") else _chosen_products


def _read_choice() -> str:
    found = os.environ.get("GDN_OPS_TRITON_FLOAT32", "") or FLOAT32_PRODUCTS[0]
    if found not in FLOAT32_PRODUCTS:
        raise ValueError(
            f"GDN_OPS_TRITON_FLOAT32 is {found!r}, should be one of {', '.join(FLOAT32_PRODUCTS)}"
        )
    return found


_chosen_products = _read_choice()
