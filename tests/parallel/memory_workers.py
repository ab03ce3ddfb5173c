"""Measure the memory of one rank; it is done in processes that have just started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gdn_ops import parallel

HEADS, WIDTH = 4, 64
FEW = 256
"""Tokens of the call that loads libraries and starts threads, ahead of the one that is measured."""


def resident_growth(group: Any, tokens: int, how: dict[str, str], gathers: bool = False) -> int:
    """Return by how many bytes a call raises the resident memory of this rank at its peak.

    Args:
        group: of the ranks.
        tokens: T of all of them, in float32 with HEADS heads of WIDTH x WIDTH.
        how: strategy and backend of the call.
        gathers: whether this rank holds the keys and values of all ranks beside its own.
    """
    _call(group, FEW, how, gathers)
    before, peak_before = _status("VmRSS"), _status("VmHWM")
    _call(group, tokens, how, gathers)
    peak = _status("VmHWM")
    # Otherwise the peak is of what was before.
    assert peak > peak_before
    return peak - before


def _call(group: Any, tokens: int, how: dict[str, str], gathers: bool) -> None:
    """Make inputs, compute, and compute the gradients."""
    split = parallel.SequenceSplit.contiguous(tokens, group)
    shape = (1, split.local_tokens, HEADS)
    q, k, v = (torch.rand(*shape, WIDTH, requires_grad=True) for _ in range(3))
    alpha, beta = (torch.rand(shape, requires_grad=True) for _ in range(2))
    held = [split.whole(x.detach()) for x in (k, v)] if gathers else []
    o = parallel.gated_delta(q, k, v, alpha, beta, split=split, qk_l2norm=True, **how)
    o.backward(torch.ones_like(o))
    del held


def _status(name: str) -> int:
    """Return a number of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kibibytes) * 1024
