"""Decode one token per row, or a few, in one launch.

One program per row, value head and block of BV columns of V: a row alone fills a GPU. The state
block, (K, BV) float32, stays in registers over the tokens.

    reads   q, k (B, T, H, K), v (B, T, HV, V); gate, β (B, T, HV), with CHANNELS the gate
            (B, T, HV, K); in place of β erase and write, (B, T, HV), or where they are of channels
            (B, T, HV, K) and (B, T, HV, V); state (B, HV, K, V), or a pool (P, HV, K, V) and the
            slot of every row, -1 to skip it
    writes  o (B, T, HV, V); the state, in place or not; on request the state after every token
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import L2NORM_EPSILON, LOG_ALPHA, NO_DECAY

OF_HEADS, OF_CHANNELS = tl.constexpr(1), tl.constexpr(2)
"""Say how a strength that stands apart is given: 0 where it is not."""


@triton.jit(do_not_specialize=("T", "H", "R"))
def tokens(
    q, k, v, gate, beta, erase, write, state, new_state, states, indices, o, scale,
    T, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    state_row, state_head, state_k, new_row, new_head, new_k,
    H, R, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr,
    NORM: tl.constexpr, HAS_STATE: tl.constexpr, KEEP: tl.constexpr, POOL: tl.constexpr,
    CHANNELS: tl.constexpr, ERASES: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Decode the tokens, see the module. Grid (B HV, ceil(V / BV))."""
    HV = H * R
    row = tl.program_id(0).to(tl.int64) // HV
    hv = tl.program_id(0).to(tl.int64) % HV
    h = hv // R
    dk = tl.arange(0, BK)
    dv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = dk < K, dv < V
    in_state = in_k[:, None] & in_v[None, :]
    place = row
    if POOL:
        place = tl.load(indices + row).to(tl.int64)
    is_read = in_state & (place >= 0)
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_STATE:
        cell = place * state_row + hv * state_head + (dk * state_k)[:, None] + dv[None, :]
        S += tl.load(state + cell, mask=is_read, other=0.0).to(tl.float32)
    for t in range(T):
        at = (row * T + t) * HV + hv
        q_t = tl.load(q + row * q_row + t * q_token + h * q_head + dk, mask=in_k, other=0.0)
        k_t = tl.load(k + row * k_row + t * k_token + h * k_head + dk, mask=in_k, other=0.0)
        v_t = tl.load(v + row * v_row + t * v_token + hv * v_head + dv, mask=in_v, other=0.0)
        q_t, k_t = q_t.to(tl.float32), k_t.to(tl.float32)
        if NORM:
            q_t *= 1.0 / tl.sqrt(tl.sum(q_t * q_t) + L2NORM_EPSILON)
            k_t *= 1.0 / tl.sqrt(tl.sum(k_t * k_t) + L2NORM_EPSILON)
        # §2 S' = α_t S_{t-1}                                                    [BK, BV]
        if GATE != NO_DECAY:
            if CHANNELS:
                alpha = tl.load(gate + at * K + dk, mask=in_k, other=0.0)[:, None].to(tl.float32)
            else:
                alpha = tl.load(gate + at).to(tl.float32)
            if GATE == LOG_ALPHA:
                alpha = tl.exp(alpha)
            S *= alpha
        # §2 u_t = β_t (v_t − S'ᵀ k_t), or w_t ⊙ v_t − S'ᵀ (e_t ⊙ k_t)             [BV]
        u = v_t.to(tl.float32)
        if WRITES == OF_CHANNELS:
            u *= tl.load(write + at * V + dv, mask=in_v, other=0.0).to(tl.float32)
        elif WRITES == OF_HEADS:
            u *= tl.load(write + at).to(tl.float32)
        erased = k_t
        if ERASES == OF_CHANNELS:
            erased *= tl.load(erase + at * K + dk, mask=in_k, other=0.0).to(tl.float32)
        elif ERASES == OF_HEADS:
            erased *= tl.load(erase + at).to(tl.float32)
        if ERASE:
            u -= tl.sum(S * erased[:, None], 0)
        if HAS_BETA:
            u *= tl.load(beta + at).to(tl.float32)
        # §2 S_t = S' + k_t u_tᵀ,  o_t = s S_tᵀ q_t                              [BK, BV], [BV]
        S += k_t[:, None] * u[None, :]
        x = scale * tl.sum(S * q_t[:, None], 0)
        if POOL:
            x = tl.where(place >= 0, x, 0.0)
        tl.store(o + at * V + dv, x.to(o.dtype.element_ty), mask=in_v)
        if KEEP:
            kept = S
            if POOL:
                kept = tl.where(place >= 0, S, 0.0)
            to = states + at * (K * V) + dk[:, None] * V + dv[None, :]
            tl.store(to, kept.to(states.dtype.element_ty), mask=in_state)
    cell = place * new_row + hv * new_head + (dk * new_k)[:, None] + dv[None, :]
    tl.store(new_state + cell, S.to(new_state.dtype.element_ty), mask=is_read)
