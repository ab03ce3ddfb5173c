"""Try a replacement on an example: it must give the results of the original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALLOWED = 1e-4
"""Largest difference relative to the original's norm; another formula is off by far more."""


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return a tensor of normal numbers for each shape, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    return [torch.randn(shape, generator=generator, **made) for shape in shapes]


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Compute on the CPU in float32 without gradients, whatever the surroundings have set.

    A model is often built, and its module loaded, while "meta" is the device and bfloat16 the
    default dtype.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


Run = Callable[[], Sequence[Tensor | None]]


def difference(original: Run, replacement: Run) -> str | None:
    """Return how two computations of the same thing differ, or None if they agree.

    Errors of either are differences too: whatever happens here, a model must load.
    """
    try:
        expected = original()
    except Exception as error:
        return f"cannot be tried: {type(error).__name__}: {error}"
    return difference_from(expected, replacement)


def difference_from(expected: Sequence[Tensor | None], replacement: Run) -> str | None:
    """Return how a computation differs from results of the original, or None if it agrees."""
    try:
        results = replacement()
        return _first_difference(results, expected)
    except Exception as error:
        return f"cannot be replaced on an example: {type(error).__name__}: {error}"


def _first_difference(
    results: Sequence[Tensor | None], expected: Sequence[Tensor | None]
) -> str | None:
    for a, b in zip(results, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return f"gives {_kind(b)} on an example where gdn_ops gives {_kind(a)}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"gives {_kind(b)} on an example where gdn_ops gives {_kind(a)}"
        else:
            error = float((a - b).norm() / b.norm())
            # Not `error > ALLOWED`: NaN is a difference.
            if not error <= ALLOWED:
                return f"gives other numbers on an example: relative difference {error:.1e}"
    return None


def _kind(x: Tensor | None) -> str:
    if x is None:
        return "None"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
