"""Judge compiled kernels by the limits of their GPU.

A kernel fails with

    more shared memory than a program has
    spills, where the sample is a reference: bfloat16, K = V = 128, nothing but defaults
    a product of bfloat16 or float16 that could use HGMMA and does not, on Hopper
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from gdn_ops.aot.processors import GPUS
from gdn_ops.aot.results import CompiledKernel
from gdn_ops.spec.names import unknown

MATRIX = {"sm_90": "HGMMA", "sm_90a": "HGMMA"}
"""The instruction that a product in 16 bits must use, by target."""

LEAST_ROWS = 64
"""The fewest rows of such a product; a warp group multiplies 64."""

AllowedSpills = Mapping[tuple[str, str], tuple[int, str]]
"""(kernel, target) -> the most spills that a reference may have, and why they must be."""

LOW = ("bf16", "f16", "bfloat16", "float16")
"""The names of the dtypes of 16 bits, in MLIR and in TileLang."""


_NAMED = {
    "a100": "sm_80",
    **dict.fromkeys(("h100", "h200", "gh200"), "sm_90"),
    **dict.fromkeys(("b200", "gb200"), "sm_100"),
    "mi300": "gfx942",
}
"""Architectures of GPUs, by how their names start."""


def refusal(target: str, known: Sequence[str]) -> str:
    """Return the error text for a target that is none of those known.

    Without its `a`, a target is one for all later GPUs too: nvcc and TileLang then silently leave
    out the instructions that only one generation has, like Hopper's wgmma.
    """
    prefix = next((p for name, p in _NAMED.items() if target.casefold().startswith(name)), "-")
    meant = next((own for own in known if own.removesuffix("a") == prefix), None)
    if meant is not None:
        return f"target {target!r} is the name of a GPU: use {meant}, its architecture"
    if f"{target}a" in known:
        return f"target {target!r} is compiled without wgmma and its like: use {target}a"
    return unknown("target", target, known)


class Product(NamedTuple):
    """Describe a product of blocks in the source: (M, K) by (K, N)."""

    M: int
    N: int
    K: int
    dtype: str


def with_failures(
    row: CompiledKernel, products: Iterable[Product], is_reference: bool, granted: AllowedSpills
) -> CompiledKernel:
    """Return a compiled kernel with what it does that its target forbids.

    Args:
        row: the kernel; its target is in GPUS.
        products: the products in its source.
        is_reference: whether a reference sample launches it.
        granted: spills that a reference may have.
    """
    most, reason = granted.get((row.kernel, row.target), (0, ""))
    failures = tuple(_failures(row, products, most if is_reference else row.spills))
    note = reason if row.spills and row.spills <= most else ""
    return replace(row, failures=failures, note=note)


def _failures(row: CompiledKernel, products: Iterable[Product], most: int) -> Iterator[str]:
    """Yield what a kernel does that its target forbids, given the most spills it may have."""
    shared, matrix = GPUS[row.target].program_shared, MATRIX.get(row.target)
    if row.shared > shared:
        yield f"shared memory is {row.shared} bytes, should be at most {shared} on {row.target}"
    if row.spills > most:
        yield f"spills are {row.spills}, should be {f'at most {most}' if most else 'none'}"
    if not matrix or row.instructions.get(matrix):
        return
    for m, n, k, dtype in products:
        if dtype in LOW and m >= LEAST_ROWS:
            yield f"no {matrix} on {row.target}, but a {dtype} product of {m} x {k} by {k} x {n}"
            return
