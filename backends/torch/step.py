"""One token in plain torch: two passes over the state instead of the recurrence's four."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.bind import Call
from gdn_ops.numerics import l2norm


def step(call: Call) -> tuple[Tensor, Tensor]:
    """Run `gated_delta_step`.

    With S' = α S, S_tᵀ q = S'ᵀ q + (k·q) u, so that q and k read the old state together and
    the new state is only written.
    """
    s, dtype = call.sizes, call.compute_dtype
    q, k = ((l2norm(x) if call.qk_l2norm else x.to(dtype)) for x in (call.q, call.k))
    v = call.v.to(dtype)
    beta = None if call.beta is None else call.beta.to(dtype).unsqueeze(-1)
    alpha = _alpha(call)
    if call.state is None:
        state = torch.zeros(s.B, s.HV, s.K, s.V, dtype=dtype, device=call.device)
    else:
        state = call.state if call.inplace else call.state.to(dtype)
    work = state.to(dtype)
    if s.R > 1:
        q, k = (x.repeat_interleave(s.R, 1) for x in (q, k))
    # §2 S_{t-1}ᵀ [q, k]                              [2, V]
    read = torch.matmul(torch.stack((q, k), 2), work)
    qS, kS = read.unbind(2)
    if alpha is not None:
        qS, kS = qS * alpha, kS * alpha
    # §2 u_t = β_t (v_t − S'ᵀ k_t)                    [V]
    u = v - kS if call.rule.has_erase else v
    if beta is not None:
        u = u * beta
    # §2 o_t = s (S'ᵀ q_t + (k_t·q_t) u_t)            [V]
    o = call.scale * (qS + (q * k).sum(-1, keepdim=True) * u)
    # §2 S_t = α_t S_{t-1} + k_t u_tᵀ                 [K, V]
    outer = k.unsqueeze(-1), u.unsqueeze(-2)
    if call.inplace:
        if alpha is not None:
            work = work.mul_(alpha.unsqueeze(-1)) if work is state else work * alpha.unsqueeze(-1)
        work = work.addcmul_(*outer)
        if work is not state:
            state.copy_(work)
        return o.to(call.v.dtype), state
    work = work * alpha.unsqueeze(-1) if alpha is not None else work
    new = torch.addcmul(work, *outer)
    stored = new.dtype if call.state is None else call.state.dtype
    return o.to(call.v.dtype), new.to(stored)


def _alpha(call: Call) -> Tensor | None:
    """Return the decay (B, HV, 1), or None where nothing decays."""
    if call.alpha is not None:
        return call.alpha.to(call.compute_dtype).unsqueeze(-1)
    if call.log_alpha is not None:
        return call.log_alpha.to(call.compute_dtype).exp().unsqueeze(-1)
    return None
