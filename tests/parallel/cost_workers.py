"""Count on one rank what a call sends: a function that its process can find by name."""

from __future__ import annotations

from typing import Any

import torch

from gdn_ops import parallel
from gdn_ops.spec.language import Sizes


def sent_bytes(
    group: Any,
    sizes: Sizes,
    strategy: str,
    zigzag: bool,
    dtype: str,
    rule: str = "gated_delta",
) -> dict[str, int]:
    """Return the bytes that this rank sends in a forward and its backward, by kind of exchange."""
    make = parallel.SequenceSplit.zigzag if zigzag else parallel.SequenceSplit.contiguous
    split, s = make(sizes.T, group), sizes
    of = getattr(torch, dtype)
    T = split.local_tokens
    torch.manual_seed(split.rank)
    q, k = (torch.randn(s.B, T, s.H, s.K).to(of).requires_grad_() for _ in range(2))
    v = torch.randn(s.B, T, s.HV, s.V).to(of)
    gates = torch.rand(2, s.B, T, s.HV)
    with parallel.counting() as traffic:
        o = parallel.gated_delta(q, k, v, *gates, split=split, strategy=strategy, rule=rule)
        assert isinstance(o, torch.Tensor)
        o.sum().backward()
    return dict(traffic.bytes)
