"""One token in plain torch: the recurrence of MATH §2 in as few passes as eager ops allow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.bind import Call
from gdn_ops.numerics import compute_dtype, l2norm


class StepOptions(NamedTuple):
    """What of a step is not a tensor."""

    scale: float
    has_erase: bool
    qk_l2norm: bool
    inplace: bool

    @staticmethod
    def of(call: Call) -> StepOptions:
        return StepOptions(call.scale, call.rule.has_erase, call.qk_l2norm, call.inplace)


def step(call: Call) -> tuple[Tensor, Tensor]:
    """Run `gated_delta_step`."""
    return advance_token(*call.tensors(), options=StepOptions.of(call))  # type: ignore[arg-type]


def advance_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    log_alpha: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    *,
    options: StepOptions,
) -> tuple[Tensor, Tensor]:
    """Run one token; return o (B, HV, V) and the state (B, HV, K, V).

    Args:
        q, k: (B, H, K).
        v: (B, HV, V).
        alpha, log_alpha, beta: (B, HV) or None.
        state: (B, HV, K, V), or None for zeros; updated itself if options.inplace.
        options: the rest of the call.
    """
    dtype = compute_dtype(q.dtype)
    B, HV, V = v.shape
    K, rows = q.shape[2], B * HV
    decay = alpha if alpha is None or alpha.dtype == dtype else alpha.to(dtype)
    if log_alpha is not None:
        decay = log_alpha.to(dtype).exp()
    if state is None:
        state = torch.zeros(B, HV, K, V, dtype=dtype, device=v.device)
    q_t, k_t = (_per_value_head(x, HV, dtype, options.qk_l2norm) for x in (q, k))
    # §2 S' = α_t S_{t-1}                             [K, V]
    work = state.to(dtype).contiguous()
    if decay is not None:
        factor = decay.reshape(B, HV, 1, 1)
        work = work.mul_(factor) if options.inplace else work * factor
    # §2 u_t = β_t (v_t − S'ᵀ k_t)                    [V]
    u = v.to(dtype).reshape(rows, 1, V)
    if options.has_erase:
        u = torch.baddbmm(u, k_t, work.view(rows, K, V), alpha=-1)
    if beta is not None:
        u = u * beta.to(dtype).reshape(rows, 1, 1)
    # §2 S_t = S' + k_t u_tᵀ                          [K, V]
    outer = k_t.view(B, HV, K, 1), u.view(B, HV, 1, V)
    work = work.addcmul_(*outer) if options.inplace else torch.addcmul(work, *outer)
    # §2 o_t = s S_tᵀ q_t                             [V]
    o = torch.bmm(q_t * options.scale, work.view(rows, K, V)).view(B, HV, V).to(v.dtype)
    if not options.inplace:
        return o, work.to(state.dtype)
    return o, state if work is state else state.copy_(work)


def _per_value_head(x: Tensor, heads: int, dtype: torch.dtype, normalise: bool) -> Tensor:
    """(B, H, K) to (B HV, 1, K): value head h reads key head h // R."""
    x = l2norm(x) if normalise else x.to(dtype)
    B, H, K = x.shape
    if heads != H:
        x = x.unsqueeze(2).expand(B, H, heads // H, K)
    return x.reshape(B * heads, 1, K)
