"""Walk dS, the gradient of the state, back over the chunks; form s Pᵀ dO ahead of the walk.

`local_gradients` gives s Pᵀ dO for all chunks at once. `state_gradients` then walks the chunks of a
sequence backwards with dS, (K, BV) float32, in registers. FLA's names are `chunk_bwd_dv_local` and
`chunk_gated_delta_rule_bwd_dhu`.

    reads   q, k, dO (B, T, ., .); gates, inv_norms, T; dS of the final state (N, HV, K, V)
    writes  dRHS (HV, chunk_slots, C, V) over s Pᵀ dO, in the dtype of what is kept
            dS at every chunk's end (HV, chunk_slots, K, V), in that dtype
            dS of the initial state (N, HV, K, V) float32
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
def local_gradients(
    q, k, d_o, gates, inv_norms, d_rhs, cu_seqlens, scale,
    N, T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head, o_batch, o_token, o_head,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form s Pᵀ dO. Grid (chunk_slots, ceil(V / BV), H)."""
    HV: tl.constexpr = H * R
    slot, h = tl.program_id(0), tl.program_id(2)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    if chunk * C >= length:
        return
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_v = dv < V
    valid = chunk * C + i < length
    first = begin + chunk * C
    in_rows = valid[:, None] & (dk < K)[None, :]
    from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, dk)
    from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, dk)
    q_tile = tl.load(from_q, mask=in_rows, other=0.0)
    k_tile = tl.load(from_k, mask=in_rows, other=0.0)
    # K Qᵀ = (Q Kᵀ)ᵀ, formed as such: no product is transposed                  [C, C]
    kq = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
    if NORM:
        inv_norm = tl.load(chunk_row(inv_norms, h, slot, i, chunk_slots, C))
        kq *= inv_norm[:, None] * inverse_norm(q_tile)[None, :]
    kq = tl.where(i[:, None] <= i[None, :], kq, 0.0)
    for r in range(R):
        hv = h * R + r
        P = kq
        if GATE != NO_DECAY:
            hi, lo, z = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
            P = kq * decay(
                hi[None, :], lo[None, :], z[None, :], hi[:, None], lo[:, None], z[:, None], 0
            )
        from_o = rows(d_o, row, o_batch, first, o_token, hv, o_head, i, dv)
        g = widened(tl.load(from_o, mask=valid[:, None] & in_v[None, :], other=0.0))
        # §5 the first part of dU = s Pᵀ dO + diag(d) K dS_C                     [C, BV]
        x = tl.dot(operand(P, g.dtype, PRECISION), g, input_precision=PRECISION)
        to_rhs = chunk_rows(d_rhs, hv, slot, i, dv, chunk_slots, C, V)
        tl.store(to_rhs, x.to(d_rhs.dtype.element_ty), mask=in_v[None, :])


@triton.jit
def state_gradients(
    q, k, d_o, gates, inv_norms, inverses, d_final, d_rhs, d_states, d_initial, cu_seqlens, scale,
    T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head, o_batch, o_token, o_head,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr,
    NORM: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk dS back over the chunks of a sequence. Grid (N HV, ceil(V / BV))."""
    HV: tl.constexpr = H * R
    n, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    h = hv // R
    row, begin, length, first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = dk < K, dv < V
    in_state = in_k[:, None] & in_v[None, :]
    cell = dk[:, None] * V + dv[None, :]
    own = tl.program_id(0).to(tl.int64) * (K * V)
    dS = tl.load(d_final + own + cell, mask=in_state, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        chunk = chunks - 1 - step
        slot = first_slot + chunk
        to_states = chunk_rows(d_states, hv, slot, dk, dv, chunk_slots, K, V)
        kept = operand(dS, d_states.dtype.element_ty, PRECISION)
        tl.store(to_states, kept, mask=in_state)
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
        from_o = rows(d_o, row, o_batch, first, o_token, hv, o_head, i, dv)
        g = tl.load(from_o, mask=valid[:, None] & in_v[None, :], other=0.0).to(tl.float32) * scale
        at_rhs = chunk_rows(d_rhs, hv, slot, i, dv, chunk_slots, C, V)
        # §5 dU = s Pᵀ dO + diag(d) K dS_C                                       [C, BV]
        dS_low = operand(dS, k_tile.dtype, PRECISION)
        dU = tl.dot(k_tile, dS_low, input_precision=PRECISION)
        if NORM:
            dU *= inv_norm[:, None]
            g *= inv_norm_q[:, None]
        if GATE != NO_DECAY:
            b, d, b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
            dU *= d[:, None]
            g *= b[:, None]
        dU += tl.load(at_rhs, mask=in_v[None, :], other=0.0).to(tl.float32)
        if ERASE:
            # §5 dRHS = Tᵀ dU                                                    [C, BV]
            x = tl.load(chunk_rows(inverses, hv, slot, i, i, chunk_slots, C, C))
            dU = operand(dU, x.dtype, PRECISION)
            dU = tl.dot(tl.trans(x), dU, input_precision=PRECISION)
        tl.store(at_rhs, operand(dU, d_rhs.dtype.element_ty, PRECISION), mask=in_v[None, :])
        # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS            [BK, BV]
        if GATE != NO_DECAY:
            dS *= b_C
        g = operand(g, q_tile.dtype, PRECISION)
        dS += tl.dot(tl.trans(q_tile), g, input_precision=PRECISION)
        if ERASE:
            dU *= read_beta(gates, hv, slot, i, HV, chunk_slots, C)[:, None]
            if NORM:
                dU *= inv_norm[:, None]
            if GATE != NO_DECAY:
                dU *= b[:, None]
            dU = operand(-dU, k_tile.dtype, PRECISION)
            dS += tl.dot(tl.trans(k_tile), dU, input_precision=PRECISION)
    tl.store(d_initial + own + cell, dS, mask=in_state)
