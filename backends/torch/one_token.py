"""Decode one token in plain torch: docs/math.md §2 in as few passes as eager ops allow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import compute_dtype, l2norm


class StepOptions(NamedTuple):
    """Hold the options of a step that are not tensors."""

    scale: float
    has_erase: bool
    qk_l2norm: bool
    inplace: bool

    @staticmethod
    def of(call: Call) -> StepOptions:
        return StepOptions(call.scale, call.rule.has_erase, call.qk_l2norm, call.inplace)


def decode_one(call: Call) -> tuple[Tensor, Tensor]:
    """Run `gated_delta_step`."""
    return advance_token(*call.tokens, call.state, options=StepOptions.of(call))


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
    decay = alpha if log_alpha is None else _to(log_alpha, dtype).exp()
    if state is None:
        state = torch.zeros(B, HV, K, V, dtype=dtype, device=v.device)
    q_t, k_t = (_per_value_head(x, HV, dtype, options.qk_l2norm) for x in (q, k))
    # §2 S' = α_t S_{t-1}                             [K, V]
    held = _to(state, dtype).contiguous()
    work, is_own = held.view(rows, K, V), options.inplace
    if decay is not None:
        factor = _to(decay, dtype).reshape(rows, 1, 1)
        work = work.mul_(factor) if is_own else work * factor
        # A fresh S' may be written as well, unless autograd keeps it for a backward.
        is_own = is_own or not torch.is_grad_enabled()
    # §2 u_t = β_t (v_t − S'ᵀ k_t)                    [V]
    u = v_t = _to(v, dtype).reshape(rows, 1, V)
    if options.has_erase:
        u = torch.baddbmm(u, k_t, work, alpha=-1)
    if beta is not None:
        u = u * _to(beta, dtype).reshape(rows, 1, 1)
    # §2 S_t = S' + k_t u_tᵀ                          [K, V]
    k_column = k_t.mT
    work = work.addcmul_(k_column, u) if is_own else torch.addcmul(work, k_column, u)
    # §2 o_t = s S_tᵀ q_t                             [V]
    o = torch.baddbmm(v_t, q_t, work, beta=0, alpha=options.scale)
    o = _to(o.view(B, HV, V), v.dtype)
    if not options.inplace:
        return o, _to(work.view(B, HV, K, V), state.dtype)
    return o, state if held is state else state.copy_(held)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert x to a dtype, without the microsecond that x.to(dtype) takes to do nothing."""
    return x if x.dtype is dtype else x.to(dtype)


def _per_value_head(x: Tensor, heads: int, dtype: torch.dtype, normalise: bool) -> Tensor:
    """Reshape (B, H, K) to (B HV, 1, K): value head h reads key head h // R."""
    x = l2norm(x) if normalise else _to(x, dtype)
    B, H, K = x.shape
    if heads != H:
        x = x.unsqueeze(2).expand(B, H, heads // H, K)
    return x.reshape(B * heads, 1, K)
