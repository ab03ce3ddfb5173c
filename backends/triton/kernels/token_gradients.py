"""Compute all gradients of a chunk, given dRHS, dS and what `pair_gradients` has formed.

No sum leaves a program: no atomics, and the same call gives the same bits. FLA forms them with
`chunk_bwd_dqkwg` and `prepare_wy_repr_bwd`.

    reads   q, k, v, dO; gates, inv_norms, α; U, dRHS (HV, chunk_slots, C, V); S, dS
            (HV, chunk_slots, V, K), transposed
    writes  dq, dk (B, T, H, K), dv (B, T, HV, V), dα or d log α, dβ (B, T, HV)
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    ALPHA,
    EXP_OF_LIFT,
    LIFT,
    LIFTED,
    NO_DECAY,
    chunk_decay,
    chunk_row,
    chunk_rows,
    inverse_norm,
    operand,
    owner,
    read_beta,
    read_gates,
    rows,
    sequence,
    widened,
    written,
)
from gdn_ops.backends.triton.kernels.pair_gradients import faint_at, zeros_at


@triton.jit
def gate_gradient(
    start, end, corner, gates, hv, slot, i, HV, chunk_slots, C: tl.constexpr, CROSSED: tl.constexpr
):
    """Return the sum over pairs i ≥ t > j that leave the chunk: start, end, corner (§5), (C,)."""
    b, d, b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, CROSSED)
    from_t = tl.cumsum(start * b, 0, reverse=True)
    before = tl.sum(tl.where(i[:, None] > i[None, :], (end * d)[None, :], 0.0), 1)
    return from_t + before + corner * b_C


@triton.jit
def gate_total(
    start, end, corner, gate, valid, gate_sums, gates, hv, slot, i, HV, chunk_slots,
    C: tl.constexpr, PARTS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Return d log α and, where α = 0, dα, or dα of every token, (C,)."""
    sums = tl.load(chunk_row(gate_sums, hv, slot, i, chunk_slots, C))
    for part in tl.static_range(1, PARTS):
        sums += tl.load(chunk_row(gate_sums, part * HV + hv, slot, i, chunk_slots, C))
    total = gate_gradient(start, end, corner, gates, hv, slot, i, HV, chunk_slots, C, 0) + sums
    given = tl.load(gate, mask=valid, other=1.0).to(tl.float32)
    is_zero = zeros_at(gates, hv, slot, i, HV, chunk_slots, C)
    if GATE == ALPHA:
        total = total / tl.where(is_zero, 1.0, given)
        hi_C, _lo_C, z_C = read_gates(gates, hv, slot, C - 1, HV, chunk_slots, C)
        if z_C > 0:
            at_zero = gate_gradient(start, end, corner, gates, hv, slot, i, HV, chunk_slots, C, 1)
            total = tl.where(is_zero, at_zero + sums, total)
        if hi_C < -LIFT:
            is_faint = faint_at(gates, hv, slot, i, HV, chunk_slots, C)
            lifted = gate_gradient(
                start, end, corner, gates, hv, slot, i, HV, chunk_slots, C, LIFTED
            )
            quotient = (lifted + sums) / tl.where(is_faint, given * EXP_OF_LIFT, 1.0)
            total = tl.where(is_faint, quotient, total)
    else:
        total = tl.where(is_zero, 0.0, total)
    return total


@triton.jit
def projected(d_x, tile, inv_norm):
    """Return the gradient of y from that of y / ‖y‖, (C, BK)."""
    wide = tile.to(tl.float32) * inv_norm[:, None]
    return (d_x - wide * tl.sum(wide * d_x, 1)[:, None]) * inv_norm[:, None]


@triton.jit
def through_states(
    d_x, q_tile, inv_norm_q, d_o, gates, states, starts, scale, row, first, h, slot, i, dk, valid,
    chunk_slots, o_batch, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dQ (C, BK) with what comes through the states added; store E in column start."""
    HV = H * R
    in_k = dk < K
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        start = tl.zeros([C], tl.float32)
        b = tl.full([C], 1.0, tl.float32)
        if GATE != NO_DECAY:
            b, _d, _b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
        for column in tl.range(0, V, BV, disable_licm=True):
            dv = column + tl.arange(0, BV)
            in_v = dv < V
            in_state = in_v[:, None] & in_k[None, :]
            from_states = chunk_rows(states, hv, slot, dv, dk, chunk_slots, V, K)
            S = tl.load(from_states, mask=in_state, other=0.0)
            from_o = rows(d_o, row, o_batch, first, o_token, hv, o_head, i, dv)
            g = widened(tl.load(from_o, mask=valid[:, None] & in_v[None, :], other=0.0))
            # §5 s diag(b) dO Sᵀ to dQ; E_i,start += s rowsum(dO ⊙ Q S)          [C, BK]
            x = tl.dot(g, S, input_precision=PRECISION) * scale
            start += tl.sum(x * (q_tile.to(tl.float32) * inv_norm_q[:, None]), 1)
            d_x += x * b[:, None]
        if GATE != NO_DECAY:
            tl.store(chunk_row(starts, hv, slot, i, chunk_slots, C), start)
    return d_x


@triton.jit
def key_terms(
    d_x, k_tile, inv_norm_k, b, d, beta, v, u, d_rhs, gates, states, d_states, d_v, from_k, row,
    first, hv, slot, i, dk, valid, T, chunk_slots, v_batch, v_token, v_head,
    HV, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    RELOAD: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a head's terms to dK (C, BK), and write its dV.

    Returns:
        dK; E in row C; rowsum(dRHS ⊙ K S); rowsum(dRHS ⊙ V): (C,); and E_C,start (1,).
    """
    end = tl.zeros([C], tl.float32)
    erased = tl.zeros([C], tl.float32)
    d_b = tl.zeros([C], tl.float32)
    corner = tl.zeros([1], tl.float32)
    in_k = dk < K
    in_rows = valid[:, None] & in_k[None, :]
    for column in tl.range(0, V, BV, disable_licm=True):
        dv = column + tl.arange(0, BV)
        in_v = dv < V
        in_state = in_v[:, None] & in_k[None, :]
        in_values = valid[:, None] & in_v[None, :]
        S = tl.load(
            chunk_rows(states, hv, slot, dv, dk, chunk_slots, V, K), mask=in_state, other=0.0
        )
        from_rhs = chunk_rows(d_rhs, hv, slot, i, dv, chunk_slots, C, V)
        dR = tl.load(from_rhs, mask=in_v[None, :], other=0.0)
        if ERASE:
            # §5 − diag(βb) dRHS Sᵀ to dK; − β rowsum(dRHS ⊙ K S) to E_i,start
            x = tl.dot(dR, S, input_precision=PRECISION)
            if RELOAD:
                k_tile = tl.load(from_k, mask=in_rows, other=0.0)
            erased += tl.sum(x * (k_tile.to(tl.float32) * inv_norm_k[:, None]), 1)
            d_x -= x * (beta * b)[:, None]
        # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ V) ...                   [C, BV]
        from_v = rows(v, row, v_batch, first, v_token, hv, v_head, i, dv)
        values = tl.load(from_v, mask=in_values, other=0.0).to(tl.float32)
        d_b += tl.sum(dR.to(tl.float32) * values, 1)
        to_v = rows(d_v, row * T, HV * V, first, HV * V, hv, V, i, dv)
        x = dR.to(tl.float32) * beta[:, None]
        tl.store(to_v, x.to(d_v.dtype.element_ty), mask=in_values)
        # §5 diag(d) U dS_Cᵀ to dK; E_C,j += rowsum((K dS_C) ⊙ U)            [C, BK]
        from_states = chunk_rows(d_states, hv, slot, dv, dk, chunk_slots, V, K)
        dS = tl.load(from_states, mask=in_state, other=0.0)
        # §5 E_C,start = ⟨dS_C, S⟩
        if GATE != NO_DECAY:
            corner += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        U = written(
            u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid, in_v,
            HV, chunk_slots, V, C, ERASE, PRECISION,
        )  # fmt: skip
        x = tl.dot(U, dS, input_precision=PRECISION)
        if RELOAD:
            k_tile = tl.load(from_k, mask=in_rows, other=0.0)
        end += tl.sum(x * (k_tile.to(tl.float32) * inv_norm_k[:, None]), 1)
        d_x += x * d[:, None]
    return d_x, end, erased, d_b, corner


@triton.jit(do_not_specialize=("N", "T", "chunk_slots", "H", "R"))
def token_gradients(
    q, k, v, gate, d_o, gates, inv_norms, u, d_rhs, states, d_states, d_qk, d_kk, gate_sums,
    beta_sums, starts, d_q, d_k, d_v, d_gate, d_beta, cu_seqlens, scale,
    N, T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, RELOAD: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form dq, dk, dv, the gate's gradient and dβ. Grid (chunk_slots, H).

    RELOAD: whether k is read again (from a cache) where it is needed, instead of held.
    """
    HV = H * R
    slot, h = tl.program_id(0), tl.program_id(1)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    if chunk * C >= length:
        return
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    in_k = dk < K
    valid = chunk * C + i < length
    first = begin + chunk * C
    in_rows = valid[:, None] & in_k[None, :]
    from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, dk)
    from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, dk)
    q_tile = tl.load(from_q, mask=in_rows, other=0.0)
    k_tile = tl.load(from_k, mask=in_rows, other=0.0)
    inv_norm_q = tl.full([C], 1.0, tl.float32)
    inv_norm_k = tl.full([C], 1.0, tl.float32)
    if NORM:
        inv_norm_q = inverse_norm(q_tile)
        inv_norm_k = inverse_norm(k_tile)
    # First dQ, then dK: both sums at once would not fit the registers.
    pairs = tl.load(chunk_rows(d_qk, h, slot, i, i, chunk_slots, C, C))
    hat = widened(k_tile)
    if NORM:
        hat = operand(k_tile.to(tl.float32) * inv_norm_k[:, None], hat.dtype, PRECISION)
    # §5 (dP ⊙ D) K to dQ, of the normalised q, k                                [C, BK]
    d_x = tl.dot(pairs, hat, input_precision=PRECISION)
    d_x = through_states(
        d_x, q_tile, inv_norm_q, d_o, gates, states, starts, scale, row, first, h, slot, i, dk,
        valid, chunk_slots, o_batch, o_token, o_head, H, R, K, V, C, BV, GATE, PRECISION,
    )  # fmt: skip
    if NORM:
        d_x = projected(d_x, q_tile, inv_norm_q)
    to_q = rows(d_q, row * T, H * K, first, H * K, h, K, i, dk)
    tl.store(to_q, d_x.to(d_q.dtype.element_ty), mask=in_rows)
    # Wait: a thread reads what another one has stored in `starts`.
    tl.debug_barrier()

    # §5 (dP ⊙ D)ᵀ Q,  (M + Mᵀ) K to dK                                          [C, BK]
    q_hat = widened(q_tile)
    if NORM:
        q_hat = operand(q_tile.to(tl.float32) * inv_norm_q[:, None], q_hat.dtype, PRECISION)
    d_x = tl.dot(tl.trans(pairs), q_hat, input_precision=PRECISION)
    if ERASE:
        M = tl.load(chunk_rows(d_kk, h, slot, i, i, chunk_slots, C, C))
        d_x += tl.dot(M, hat, input_precision=PRECISION)
        d_x += tl.dot(tl.trans(M), hat, input_precision=PRECISION)
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
        b = tl.full([C], 1.0, tl.float32)
        d = tl.full([C], 1.0, tl.float32)
        if GATE != NO_DECAY:
            b, d, _b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
        d_x, end, erased, d_b, corner = key_terms(
            d_x, k_tile, inv_norm_k, b, d, beta, v, u, d_rhs, gates, states, d_states, d_v, from_k,
            row, first, hv, slot, i, dk, valid, T, chunk_slots, v_batch, v_token, v_head,
            HV, K, V, C, BV, RELOAD, GATE, ERASE, PRECISION,
        )  # fmt: skip
        at = (row * T + first) * HV + hv + i * HV
        if ERASE:
            # §5 dβ = rowsum(dRHS ⊙ (V − diag(b) K S)) + rowsum(dA ⊙ K Kᵀ ⊙ D)   [C]
            d_b += tl.load(chunk_row(beta_sums, hv, slot, i, chunk_slots, C)) - b * erased
        if HAS_BETA:
            tl.store(d_beta + at, d_b.to(d_beta.dtype.element_ty), mask=valid)
        if GATE != NO_DECAY:
            # §5 d log α and, where α = 0, dα                                    [C]
            start = tl.load(chunk_row(starts, hv, slot, i, chunk_slots, C)) - beta * erased
            total = gate_total(
                start, end, corner, gate + at, valid, gate_sums, gates, hv, slot, i, HV,
                chunk_slots, C, PARTS, GATE,
            )  # fmt: skip
            tl.store(d_gate + at, total.to(d_gate.dtype.element_ty), mask=valid)
    if RELOAD:
        k_tile = tl.load(from_k, mask=in_rows, other=0.0)
    if NORM:
        d_x = projected(d_x, k_tile, inv_norm_k)
    to_k = rows(d_k, row * T, H * K, first, H * K, h, K, i, dk)
    tl.store(to_k, d_x.to(d_k.dtype.element_ty), mask=in_rows)
