"""Process long sequences a block of tokens at a time, so that each block stays in cache.

A chain of elementwise operations over a whole layer reads and writes memory once per operation,
fresh pages for every result; by blocks it reads and writes it once, and autograd keeps only the
operands: results are computed again, block by block, in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gdn_ops.call.transforms import are_active

_BLOCK = 1 << 19
"""Numbers in a block: with its results it stays in the caches of two cores."""

_FEW = 16
"""A sixteenth of a block takes less time than autograd's calls around a loop over blocks."""


def is_plain(x: Tensor) -> bool:
    """Return whether x is an ordinary CPU tensor, outside of graphs, transforms, forward mode."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not are_active()
    )


def runs_in_blocks(x: Tensor) -> bool:
    """Return whether x is plain, and large enough for blocks to pay off."""
    # In this order: a graph would take a comparison of its sizes for a condition on them.
    return is_plain(x) and x.numel() > _BLOCK // _FEW


def blocks(tokens: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each block of tokens; a token has `width` numbers."""
    length = max(1, _BLOCK // max(1, width))
    for start in range(0, tokens, length):
        yield start, min(tokens, start + length)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def differentiable_gradients(
    function: Callable[..., Tensor | tuple[Tensor | None, ...]],
    operands: Sequence[Tensor | None],
    needed: Sequence[bool],
    d_results: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return gradients of a function, themselves differentiable; None for those not needed.

    Args:
        function: returns a tensor or several.
        operands: its arguments.
        needed: whether the gradient of each is.
        d_results: the gradient of each result, None for one that has no influence.
    """
    wanted = [x for x, is_needed in zip(operands, needed, strict=True) if is_needed]
    with torch.enable_grad():
        results = function(*operands)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [
            (y, d)
            for y, d in zip(results, d_results, strict=True)
            if y is not None and d is not None and y.requires_grad
        ]
        gradients = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,  # type: ignore[arg-type]
                [d for _, d in pairs],
                create_graph=True,
                materialize_grads=True,
            )
        )
    return [next(gradients) if is_needed else None for is_needed in needed]
