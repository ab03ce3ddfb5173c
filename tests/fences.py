"""Tensors between fences: what is written outside of one is seen in them."""

from __future__ import annotations

import torch
from torch import Tensor

FENCE = 64
"""Numbers on either side."""


def fenced(x: Tensor, value: float) -> Tensor:
    """Return x inside a larger allocation that is full of a value on both sides."""
    wide = torch.full((x.numel() + 2 * FENCE,), value, dtype=x.dtype)
    return wide[FENCE : FENCE + x.numel()].copy_(x.reshape(-1)).view(x.shape)


def fences(x: Tensor) -> Tensor:
    """Return what lies on both sides of a fenced tensor."""
    storage = x.new_empty(0).set_(x.untyped_storage())
    return torch.cat((storage[:FENCE], storage[-FENCE:]))
