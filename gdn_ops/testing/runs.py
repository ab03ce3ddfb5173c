"""Calls cut, joined and compared: what the laws are written with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from gdn_ops.testing.example import Example, Results, run
from gdn_ops.testing.oracle import Verdict, judgement

Law = Callable[[str, Example], Verdict]
"""From a backend's name and an example to a verdict."""


def without_sequences(example: Example) -> Example:
    """Return the example as a rectangular batch."""
    return replace(example, lengths=None) if example.lengths is not None else example


def token_slice(arguments: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """Return the arguments of some of the tokens."""
    names = ("q", "k", "v", "alpha", "log_alpha", "beta")
    return {
        name: x[:, tokens] if name in names and x is not None else x
        for name, x in arguments.items()
    }


def single(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop the token axis, of length 1."""
    return {n: x.squeeze(1) if isinstance(x, Tensor) else x for n, x in arguments.items()}


def plain(arguments: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """Return (o, final_state)."""
    out = run(arguments, backend, None)
    return out["o"], out["final_state"]


def compare(example: Example, results: Results, others: Results, factor: float = 2.0) -> Verdict:
    """Compare two sets of results of one call."""
    gradients = any(name.startswith("d_") for name in others)
    return judgement(example, gradients).compare(results, others, factor)
