"""Decode in plain torch: one token by docs/math.md §2, a few by §3 without segments.

One token takes as few passes over the state as eager ops allow. With several the state is read
once and written once, whatever their number; their decays are products of gates, not differences
of logarithms, so an exact zero needs no second count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.torch.loading import wide_gates
from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import compute_dtype, l2norm
from gdn_ops.kernel_support.host_memory import empty, settle_allocator

TOKENS = 16
"""Tokens of one chunk; a longer call is cut. What is done per pair of tokens stays small."""


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
    if call.widths.apart:
        return _advance_apart(call)
    return advance_token(*call.tokens[:6], call.state, options=StepOptions.of(call))


def _advance_apart(call: Call) -> tuple[Tensor, Tensor]:
    """Run one token whose erase and write strengths differ (docs/math.md §9)."""
    s, dtype, v = call.sizes, call.compute_dtype, call.tokens.v
    rows = s.B * s.HV
    alpha, erase, write = (None if x is None else x.flatten(0, 1) for x in wide_gates(call))
    assert erase is not None and write is not None
    state = call.state
    if state is None:
        state = torch.zeros(s.B, s.HV, s.K, s.V, dtype=dtype, device=call.device)
    q, k = call.tokens.q, call.tokens.k
    q_t, k_t = (_per_value_head(x, s.HV, dtype, call.qk_l2norm) for x in (q, k))
    # §9 S' = diag(α_t) S_{t-1}                       [K, V]
    work = state.to(dtype).reshape(rows, s.K, s.V)
    if alpha is not None:
        work = work * alpha.unsqueeze(-1)
    # §9 u_t = w_t ⊙ v_t − S'ᵀ (e_t ⊙ k_t)            [V]
    v_t = v.to(dtype).reshape(rows, 1, s.V) * write.unsqueeze(1)
    u = torch.baddbmm(v_t, k_t * erase.unsqueeze(1), work, alpha=-1)
    # §9 S_t = S' + k_t u_tᵀ,  o_t = s S_tᵀ q_t       [K, V]
    work = torch.addcmul(work, k_t.mT, u)
    o = torch.bmm(q_t * call.scale, work).view(s.B, s.HV, s.V).to(v.dtype)
    new = work.view(s.B, s.HV, s.K, s.V)
    return o, state.copy_(new) if call.inplace else new.to(state.dtype)


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
        alpha, log_alpha: (B, HV), or (B, HV, K) for every channel, or None.
        beta: (B, HV) or None.
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
        factor = _to(decay, dtype).reshape(rows, K if decay.dim() == 3 else 1, 1)
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


class Chunk(NamedTuple):
    """Hold the operands of one chunk in the compute dtype; a row is a value head of a batch row.

    Attributes:
        q, k: (rows, C, K), q times the scale.
        v: (rows, C, V).
        alpha: (rows, C, 1), or None for 1.
        beta: (rows, C, 1), or None for 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    beta: Tensor | None


def decode_many(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `gated_delta_steps`."""
    if call.sizes.T == 1 and not call.return_states:
        token = call.tokens.map(lambda x: x.squeeze(1))
        o, state = decode_one(call.with_tensors(token, call.state))
        return o.unsqueeze(1), state, None
    settle_allocator()
    s, wide, given = call.sizes, call.compute_dtype, call.state
    stored = wide if given is None else given.dtype
    shape = (s.B * s.HV, s.K, s.V)
    if given is None:
        held = torch.zeros(shape, dtype=wide, device=call.device)
    else:
        held = given.to(wide).contiguous()
    state = held.view(shape)
    # Ours to overwrite: a conversion, or the very tensor that the caller wants updated.
    inplace = held is not given or call.inplace
    states = None
    if call.return_states:
        states = empty((s.B, s.T, s.HV, s.K, s.V), stored, call.device)
    o = torch.empty(call.tokens.v.shape, dtype=call.tokens.v.dtype, device=call.device)
    for start in range(0, s.T, TOKENS):
        tokens = slice(start, start + TOKENS)
        into = None if states is None else states[:, tokens]
        out, state = advance_chunk(_load(call, tokens), state, call.rule.has_erase, inplace, into)
        o[:, tokens] = out.unflatten(0, (s.B, s.HV)).transpose(1, 2)
        inplace = True
    new = state.view(s.B, s.HV, s.K, s.V)
    if given is None:
        return o, new, states
    if call.inplace:
        updated = states is None and held is given
        return o, given if updated else given.copy_(new), states
    # With T = 0 the state is still the given one, which no result may be a view of.
    return o, new.to(stored, copy=not s.T), states


def _load(call: Call, tokens: slice) -> Chunk:
    """Return some tokens of a call as a chunk, q and k repeated for every value head."""
    s, dtype = call.sizes, call.compute_dtype

    def rows(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if x.shape[1] != s.HV:
            x = x.repeat_interleave(s.R, 1)
        return x.reshape(s.B * s.HV, *x.shape[2:])

    def gate(x: Tensor | None) -> Tensor | None:
        return None if x is None else rows(x[:, tokens].to(dtype).unsqueeze(-1))

    q, k = (x[:, tokens] for x in (call.tokens.q, call.tokens.k))
    q, k = (l2norm(x) if call.qk_l2norm else x.to(dtype) for x in (q, k))
    log_alpha = gate(call.tokens.log_alpha)
    return Chunk(
        rows(q * call.scale),
        rows(k),
        rows(call.tokens.v[:, tokens].to(dtype)),
        gate(call.tokens.alpha) if log_alpha is None else log_alpha.exp(),
        gate(call.tokens.beta),
    )


def _decays(alpha: Tensor) -> Tensor:
    """Return D (rows, C, C + 1), its first column b and the others D_ij, 1 above the diagonal.

    Args:
        alpha: (rows, C, 1).
    """
    tokens = alpha.shape[1]
    since = torch.ones(tokens, tokens + 1, dtype=torch.bool, device=alpha.device).tril_()
    # §3 D_ij = Π_{j<l≤i} α_l,  b_i = D_{i,start}     [C, C + 1]
    return torch.where(since, alpha, 1.0).cumprod(1)


def advance_chunk(
    x: Chunk, state: Tensor, has_erase: bool, inplace: bool, states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run one chunk.

    Args:
        x: the chunk.
        state: (rows, K, V) before it; overwritten if `inplace`.
        has_erase: as in the rule.
        inplace: whether the state is ours to overwrite.
        states: (B, C, HV, K, V) to write the state after every token to, or None.

    Returns:
        o (rows, C, V) and the state after the chunk.
    """
    tokens = x.k.shape[1]
    D = None if x.alpha is None else _decays(x.alpha)
    kq = torch.cat((x.k, x.q), 1)
    # §3 K S_0 and Q S_0                              [2 C, V]
    read = torch.bmm(kq, state)
    # §3 K Kᵀ and Q Kᵀ                                [2 C, C]
    pairs = torch.bmm(kq, x.k.mT)
    if D is not None:
        read = read * D[:, :, :1].repeat(1, 2, 1)
        pairs = pairs * D[:, :, 1:].repeat(1, 2, 1)
    # §3 (I + A) U = diag(β) (V − diag(b) K S_0),  A = strict_lower(diag(β) (K Kᵀ ⊙ D))  [C, V]
    u = x.v - read[:, :tokens] if has_erase else x.v
    if x.beta is not None:
        u = u * x.beta
    if has_erase:
        A = pairs[:, :tokens] if x.beta is None else pairs[:, :tokens] * x.beta
        # The solve answers column by column, in which no product below is fast.
        u = torch.linalg.solve_triangular(A, u, upper=False, unitriangular=True).contiguous()
    # §3 O = s (diag(b) Q S_0 + lower(Q Kᵀ ⊙ D) U)    [C, V]
    o = torch.baddbmm(read[:, tokens:], pairs[:, tokens:].tril(), u)
    if states is not None:
        return o, _every_state(x, u, state, states)
    # §3 S_C = b_C S_0 + (diag(d) K)ᵀ U               [K, V]
    if D is None:
        return o, torch.baddbmm(state, x.k.mT, u, out=state if inplace else None)
    state = torch.mul(state, D[:, -1:, :1], out=state if inplace else None)
    return o, state.baddbmm_((x.k * D[:, -1, 1:, None]).mT, u)


def _every_state(x: Chunk, u: Tensor, state: Tensor, states: Tensor) -> Tensor:
    """Write the state after every token to `states`; return the last one, in memory of its own."""
    batch, tokens, heads = states.shape[:3]
    state, k, u = (y.unflatten(0, (batch, heads)) for y in (state, x.k, u))
    alpha = None if x.alpha is None else x.alpha.unflatten(0, (batch, heads))
    # A state that is stored narrower is kept in the compute dtype beside what is stored.
    work = None if states.dtype == state.dtype else torch.empty_like(state)
    for t in range(tokens):
        # §2 S_t = α_t S_{t-1} + k_t u_tᵀ             [K, V]
        now = states[:, t] if work is None else work
        if alpha is None:
            now.copy_(state)
        else:
            torch.mul(state, alpha[:, :, t, :, None], out=now)
        state = now.addcmul_(k[:, :, t, :, None], u[:, :, t, None, :])
        if work is not None:
            states[:, t] = work
    return state.contiguous().flatten(0, 1) if work is not None else state.flatten(0, 1).clone()
