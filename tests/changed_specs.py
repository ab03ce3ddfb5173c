"""Make specs that differ from GATED_DELTA in one thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gdn_ops import GATED_DELTA
from gdn_ops.spec.language import OpSpec


def with_arg(name: str, /, **changes: Any) -> OpSpec:
    """Return GATED_DELTA with one argument changed."""
    args = (replace(arg, **changes) if arg.name == name else arg for arg in GATED_DELTA.args)
    return replace(GATED_DELTA, args=tuple(args))


def with_output(**changes: Any) -> OpSpec:
    """Return GATED_DELTA with its final state changed."""
    o, state = GATED_DELTA.outputs
    return replace(GATED_DELTA, outputs=(o, replace(state, **changes)))
