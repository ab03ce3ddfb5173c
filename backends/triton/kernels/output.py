"""Compute the output of every chunk, all in parallel: the third launch. FLA's is `chunk_fwd_o`.

One program per CHUNKS_PER_STATE chunks, block of BV columns of V and, where that is 1, key head:
Q Kᵀ is then formed once for its R value heads. Where it is more, a program has one value head and
carries the state over the chunks between two kept ones.

    reads   q, k (B, T, H, K); gates, inv_norms; U (HV, chunk_slots, C, V), or v without an error
            term; states (HV, state_slots, K, V)
    writes  o (B, T, HV, V)
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    NO_DECAY,
    chunk_row,
    chunk_rows,
    decay,
    inverse_norm,
    operand,
    owner,
    read_beta,
    read_gates,
    rows,
    scaled_rows,
    sequence,
    widened,
)
from gdn_ops.backends.triton.kernels.states import chunk_decay


@triton.jit
def written(
    u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid, in_v, HV,
    chunk_slots, V: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return U of a chunk (C, BV): kept, or diag(β) V for rules without an error term."""
    if ERASE:
        from_u = chunk_rows(u, hv, slot, i, dv, chunk_slots, C, V)
        return tl.load(from_u, mask=in_v[None, :], other=0.0)
    from_v = rows(v, row, v_batch, first, v_token, hv, v_head, i, dv)
    values = widened(tl.load(from_v, mask=valid[:, None] & in_v[None, :], other=0.0))
    beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
    return operand(values.to(tl.float32) * beta[:, None], values.dtype, PRECISION)


@triton.jit
def output(
    q, k, v, gates, inv_norms, u, states, o, cu_seqlens, scale,
    N, T, chunk_slots, state_slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, CHUNKS_PER_STATE: tl.constexpr, GATE: tl.constexpr,
    ERASE: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the output, see the module.

    Grid (state_slots, ceil(V / BV), H if CHUNKS_PER_STATE == 1 else H R).
    """
    HV: tl.constexpr = H * R
    HEADS: tl.constexpr = R if CHUNKS_PER_STATE == 1 else 1
    state_slot = tl.program_id(0)
    n, group = owner(state_slot, cu_seqlens, N, T, C * CHUNKS_PER_STATE, VARLEN)
    row, begin, length, first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    rest = length - group * CHUNKS_PER_STATE * C
    if rest <= 0:
        return
    hv_0 = tl.program_id(2) * HEADS
    h = hv_0 // R
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = dk < K, dv < V
    in_state = in_k[:, None] & in_v[None, :]
    causal = i[:, None] >= i[None, :]
    if CHUNKS_PER_STATE > 1:
        from_states = chunk_rows(states, hv_0, state_slot, dk, dv, state_slots, K, V)
        S = tl.load(from_states, mask=in_state, other=0.0).to(tl.float32)
    for step in range(tl.minimum(CHUNKS_PER_STATE, tl.cdiv(rest, C))):
        chunk = group * CHUNKS_PER_STATE + step
        slot = first_slot + chunk
        valid = chunk * C + i < length
        first = begin + chunk * C
        in_rows = valid[:, None] & in_k[None, :]
        from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, dk)
        from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, dk)
        q_tile = widened(tl.load(from_q, mask=in_rows, other=0.0))
        k_tile = widened(tl.load(from_k, mask=in_rows, other=0.0))
        if NORM:
            inv_norm = tl.load(chunk_row(inv_norms, h, slot, i, chunk_slots, C))
            k_tile, inv_norm = scaled_rows(k_tile, inv_norm)
            q_tile, inv_norm_q = scaled_rows(q_tile, inverse_norm(q_tile))
        # Q Kᵀ, once for HEADS value heads                                       [C, C]
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        factor = tl.full([C], scale, tl.float32)
        if NORM:
            qk *= inv_norm[None, :]
            factor *= inv_norm_q
        qk = tl.where(causal, qk, 0.0)
        for r in range(HEADS):
            hv = hv_0 + r
            if CHUNKS_PER_STATE == 1:
                from_states = chunk_rows(states, hv, state_slot, dk, dv, state_slots, K, V)
                S_low = tl.load(from_states, mask=in_state, other=0.0)
            else:
                S_low = operand(S, q_tile.dtype, PRECISION)
            U = written(
                u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid, in_v,
                HV, chunk_slots, V, C, ERASE, PRECISION,
            )  # fmt: skip
            # §3 O = s (diag(b) Q S + lower(Q Kᵀ ⊙ D) U)                         [C, BV]
            x = tl.dot(q_tile, S_low, input_precision=PRECISION)
            P = qk
            if GATE != NO_DECAY:
                hi, lo, z = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
                b, d, b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
                x *= b[:, None]
                P = qk * decay(
                    hi[:, None], lo[:, None], z[:, None], hi[None, :], lo[None, :], z[None, :], 0
                )
            x += tl.dot(operand(P, U.dtype, PRECISION), U, input_precision=PRECISION)
            x *= factor[:, None]
            to_o = rows(o, row * T, HV * V, first, HV * V, hv, V, i, dv)
            tl.store(to_o, x.to(o.dtype.element_ty), mask=valid[:, None] & in_v[None, :])
            if CHUNKS_PER_STATE > 1:
                # §3 S_C = b_C S + (diag(d) K)ᵀ U                                [BK, BV]
                weighted = U.to(tl.float32)
                if NORM:
                    weighted *= inv_norm[:, None]
                if GATE != NO_DECAY:
                    weighted *= d[:, None]
                    S *= b_C
                weighted = operand(weighted, k_tile.dtype, PRECISION)
                S += tl.dot(tl.trans(k_tile), weighted, input_precision=PRECISION)
