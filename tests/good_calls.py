"""Make good calls of the ops, to be changed into bad ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

B, T, H, HV, K, V = 2, 8, 4, 8, 16, 6


def sequence(
    b: int = B, t: int = T, h: int = H, hv: int = HV, key_dim: int = K, **changes: Any
) -> dict[str, Any]:
    """Return the arguments of a good `gated_delta` call, with changes."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, b, t, h, key_dim, generator=generator)
    arguments = {
        "q": q,
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": torch.randn(b, t, hv, V, generator=generator),
        "alpha": torch.rand(b, t, hv, generator=generator),
        "beta": torch.rand(b, t, hv, generator=generator),
    }
    return {**arguments, **changes}


def token(hv: int = HV, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a good `gated_delta_step` call, with changes."""
    arguments = {name: x[:, 0] for name, x in sequence(hv=hv).items()}
    return {**arguments, "state": states(B, hv), **changes}


def packed(cu_seqlens: Any, b: int = 1, **changes: Any) -> dict[str, Any]:
    return sequence(b=b, cu_seqlens=cu_seqlens, **changes)


def pooled(*slots: int, p: int = 5, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a good `gated_delta_step` call on a pool, with changes."""
    return token(**{"state": states(p), "state_indices": ints(*slots), **changes})


def draft(b: int = B, t: int = T, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a good `gated_delta_steps` call, with changes."""
    return sequence(b, t, **{"state": states(b), **changes})


def states(rows: int, hv: int = HV) -> Tensor:
    return torch.randn(rows, hv, K, V, generator=torch.Generator().manual_seed(1))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)
