"""One token in plain torch: the state is read once for q and k together, then updated."""

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

    With S' = α S, S_tᵀ q = S'ᵀ q + (k·q) u, so that q and k read the old state in one pass.

    Args:
        q, k: (B, H, K).
        v: (B, HV, V).
        alpha, log_alpha, beta: (B, HV) or None.
        state: (B, HV, K, V), or None for zeros; updated itself if options.inplace.
        options: the rest of the call.
    """
    dtype = compute_dtype(q.dtype)
    repeats = v.shape[1] // q.shape[1] if q.shape[1] else 1
    decay = alpha.to(dtype) if alpha is not None else None
    if log_alpha is not None:
        decay = log_alpha.to(dtype).exp()
    if state is None:
        state = torch.zeros(*v.shape[:2], k.shape[2], v.shape[2], dtype=dtype, device=v.device)
    qk = torch.stack((q, k), 2)
    qk = l2norm(qk) if options.qk_l2norm else qk.to(dtype)
    if repeats > 1:
        qk = qk.repeat_interleave(repeats, 1)
    # §2 S' = α_t S_{t-1}                             [K, V]
    work = state if state.dtype == dtype else state.to(dtype)
    if decay is not None:
        factor = decay[..., None, None]
        work = work.mul_(factor) if options.inplace else work * factor
    # §2 S'ᵀ [q, k]                                   [2, V]
    qS, kS = torch.matmul(qk, work).unbind(2)
    # §2 u_t = β_t (v_t − S'ᵀ k_t)                    [V]
    u = v if v.dtype == dtype else v.to(dtype)
    if options.has_erase:
        u = u - kS
    if beta is not None:
        u = u * beta.to(dtype).unsqueeze(-1)
    # §2 o_t = s (S'ᵀ q_t + (k_t·q_t) u_t)            [V]
    q_t, k_t = qk.unbind(2)
    o = torch.addcmul(qS, (q_t * k_t).sum(-1, keepdim=True), u) * options.scale
    # §2 S_t = S' + k_t u_tᵀ                          [K, V]
    if options.inplace:
        work.addcmul_(k_t.unsqueeze(-1), u.unsqueeze(-2))
        return o.to(v.dtype), state if work is state else state.copy_(work)
    new = torch.addcmul(work, k_t.unsqueeze(-1), u.unsqueeze(-2))
    return o.to(v.dtype), new.to(state.dtype)
