"""Define the numerical conventions that all backends share: dtypes, normalisation, gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

L2NORM_EPSILON = 1e-6
"""Added to the sum of squares, as in FLA and the transformers models."""

LOG_FLOOR = -1000.0
"""exp(LOG_FLOOR) is 0 in float64; smaller log gates are raised to it, which changes nothing
but keeps their sums in range (docs/math.md §4)."""


class LogGate(NamedTuple):
    """Hold a decay gate as two numbers per token (docs/math.md §4): alpha = [not zero] exp(log).

    Attributes:
        log: log alpha where alpha > 0, else 0; finite, in the dtype of cumulative sums.
        zero: bool, where alpha is 0; None when no gate is.
    """

    log: Tensor
    zero: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gates, state and solve: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cumulative_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of cumulative log sums.

    float64 where the device has it: after a strong decay, G_i - G_j of later tokens is a
    small difference of large numbers, and float32 would lose |G| 2**-24 of D.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def inverse_norm(x: Tensor) -> Tensor:
    """Return 1 / sqrt(sum(x²) + 1e-6) over the last axis, which is kept."""
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPSILON)


def l2norm(x: Tensor) -> Tensor:
    """Return x / sqrt(sum(x²) + 1e-6) over the last axis, in the compute dtype."""
    x = x.to(compute_dtype(x.dtype))
    return x * inverse_norm(x)


def l2norm_backward(x: Tensor, d_normalised: Tensor) -> Tensor:
    """Return the gradient of `l2norm` with respect to x."""
    x = x.to(d_normalised.dtype)
    r = inverse_norm(x)
    y = x * r
    return r * (d_normalised - y * (y * d_normalised).sum(-1, keepdim=True))


def log_gate(alpha: Tensor | None, log_alpha: Tensor | None) -> LogGate:
    """Split a gate into a finite logarithm and a mask of its zeros (docs/math.md §4).

    A positive alpha acts as itself, however small: only 0 counts as 0.

    Args:
        alpha: the gate in [0, 1], or None.
        log_alpha: the gate in [-inf, 0]; exactly one of the two is given.
    """
    given = log_alpha if alpha is None else alpha
    if given is None:
        raise ValueError("log_gate needs alpha or log_alpha")
    wide = cumulative_dtype(given.device)
    gate = given.to(wide)
    if alpha is not None:
        zero = gate == 0
        log = torch.where(zero, 1.0, gate).log()
    else:
        zero = torch.isneginf(gate)
        log = torch.where(zero, 0.0, gate).clamp(min=LOG_FLOOR)
    return LogGate(log, zero if bool(zero.any()) else None)
