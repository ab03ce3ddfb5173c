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

from gdn_ops.aot.results import CompiledKernel
from gdn_ops.spec.names import unknown


class Budget(NamedTuple):
    """Describe what a program may use of a GPU, and what it must use.

    Attributes:
        shared: bytes of shared memory that one program can have.
        matrix: the instruction that a product in 16 bits must use, or nothing.
        least_rows: the fewest rows of such a product; a warp group multiplies 64.
    """

    shared: int
    matrix: str = ""
    least_rows: int = 64


BUDGETS: dict[str, Budget] = {
    "sm_80": Budget(163 * 1024),
    "sm_90": Budget(227 * 1024, matrix="HGMMA"),
    "sm_90a": Budget(227 * 1024, matrix="HGMMA"),
    "sm_100": Budget(227 * 1024),
    "sm_100a": Budget(227 * 1024),
    "sm_120a": Budget(99 * 1024),
    "gfx942": Budget(64 * 1024),
}
"""A100, H100 and H200 (twice), B200 (twice), RTX 50, MI300. An `a` is NVIDIA's name for a target
whose code may use all its instructions and runs on nothing newer; Triton leaves it out."""

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
        row: the kernel; its target is in BUDGETS.
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
    shared, matrix, least_rows = BUDGETS[row.target]
    if row.shared > shared:
        yield f"shared memory is {row.shared} bytes, should be at most {shared} on {row.target}"
    if row.spills > most:
        yield f"spills are {row.spills}, should be {f'at most {most}' if most else 'none'}"
    if not matrix or row.instructions.get(matrix):
        return
    for m, n, k, dtype in products:
        if dtype in LOW and m >= least_rows:
            yield f"no {matrix} on {row.target}, but a {dtype} product of {m} x {k} by {k} x {n}"
            return
