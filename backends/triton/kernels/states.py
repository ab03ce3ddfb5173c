"""Walk the state over the chunks of a sequence, the only serial part: the second launch.

One program per sequence, value head and block of BV columns of V; the state, (K, BV) float32,
stays in registers. Three products per chunk depend on it: K S, T E and Kᵀ U. FLA's name for the
walk is `chunk_gated_delta_rule_fwd_h`.

    reads   k, v (B, T, ., .); gates, inv_norms, T; the initial state (N, HV, K, V)
    writes  U (HV, chunk_slots, C, V) in the dtype of what is kept, only with an error term
            states (HV, state_slots, K, V) in that dtype: S at the start of every
            CHUNKS_PER_STATE-th chunk
            the final state (N, HV, K, V) float32
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    NO_DECAY,
    chunk_row,
    chunk_rows,
    decay,
    operand,
    read_beta,
    read_gates,
    rows,
    scaled_rows,
    sequence,
    widened,
)


@triton.jit
def chunk_decay(gates, hv, slot, i, HV, chunk_slots, C: tl.constexpr, CROSSED: tl.constexpr):
    """Return b (C,), d (C,) and b_C of a chunk (docs/math.md §3), with CROSSED zeros in between."""
    hi, lo, z = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
    hi_C, lo_C, z_C = read_gates(gates, hv, slot, C - 1, HV, chunk_slots, C)
    b = decay(hi, lo, z, 0.0, 0.0, 0.0, CROSSED)
    d = decay(hi_C, lo_C, z_C, hi, lo, z, CROSSED)
    return b, d, decay(hi_C, lo_C, z_C, 0.0, 0.0, 0.0, CROSSED)


@triton.jit
def states(
    k, v, gates, inv_norms, inverses, initial, u, states, final, cu_seqlens,
    T, chunk_slots, state_slots, k_batch, k_token, k_head, v_batch, v_token, v_head,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, CHUNKS_PER_STATE: tl.constexpr, GATE: tl.constexpr,
    ERASE: tl.constexpr, NORM: tl.constexpr, HAS_INITIAL: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the state over the chunks, see the module. Grid (N HV, ceil(V / BV))."""
    HV: tl.constexpr = H * R
    n, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    h = hv // R
    row, begin, length, first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    _row, _begin, _length, first_state_slot = sequence(
        n, cu_seqlens, T, C * CHUNKS_PER_STATE, VARLEN
    )
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = dk < K, dv < V
    in_state = in_k[:, None] & in_v[None, :]
    cell = dk[:, None] * V + dv[None, :]
    own = tl.program_id(0).to(tl.int64) * (K * V)
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        S += tl.load(initial + own + cell, mask=in_state, other=0.0).to(tl.float32)
    for chunk in range(tl.cdiv(length, C)):
        slot = first_slot + chunk
        if chunk % CHUNKS_PER_STATE == 0:
            state_slot = first_state_slot + chunk // CHUNKS_PER_STATE
            to_states = chunk_rows(states, hv, state_slot, dk, dv, state_slots, K, V)
            kept = operand(S, states.dtype.element_ty, PRECISION)
            tl.store(to_states, kept, mask=in_state)
        valid = chunk * C + i < length
        first = begin + chunk * C
        from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, dk)
        k_tile = widened(tl.load(from_k, mask=valid[:, None] & in_k[None, :], other=0.0))
        from_v = rows(v, row, v_batch, first, v_token, hv, v_head, i, dv)
        v_tile = tl.load(from_v, mask=valid[:, None] & in_v[None, :], other=0.0)
        beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
        if GATE != NO_DECAY:
            b, d, b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
        if NORM:
            inv_norm = tl.load(chunk_row(inv_norms, h, slot, i, chunk_slots, C))
            k_tile, inv_norm = scaled_rows(k_tile, inv_norm)
        if ERASE:
            # §3 E = V − diag(b) K S                                             [C, BV]
            S_low = operand(S, k_tile.dtype, PRECISION)
            kS = tl.dot(k_tile, S_low, input_precision=PRECISION)
            if NORM:
                kS *= inv_norm[:, None]
            if GATE != NO_DECAY:
                kS *= b[:, None]
            E = (v_tile.to(tl.float32) - kS) * beta[:, None]
            # §3 U = T diag(β) E                                                 [C, BV]
            x = tl.load(chunk_rows(inverses, hv, slot, i, i, chunk_slots, C, C))
            U = tl.dot(x, operand(E, x.dtype, PRECISION), input_precision=PRECISION)
            to_u = chunk_rows(u, hv, slot, i, dv, chunk_slots, C, V)
            tl.store(to_u, operand(U, u.dtype.element_ty, PRECISION), mask=in_v[None, :])
        else:
            U = v_tile.to(tl.float32) * beta[:, None]
        # §3 S_C = b_C S + (diag(d) K)ᵀ U                                        [BK, BV]
        if NORM:
            U *= inv_norm[:, None]
        if GATE != NO_DECAY:
            U *= d[:, None]
            S *= b_C
        U = operand(U, k_tile.dtype, PRECISION)
        S += tl.dot(tl.trans(k_tile), U, input_precision=PRECISION)
    tl.store(final + own + cell, S, mask=in_state)
