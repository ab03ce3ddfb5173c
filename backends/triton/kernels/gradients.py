"""Compute all gradients of a chunk, given dRHS and dS: the parallel part of the backward.

`pair_gradients` forms the terms that are quadratic in the chunk, summed over the R value heads of
a key head; `token_gradients` the gradients themselves. No sum leaves a program: no atomics, and the
same call gives the same bits.

    reads   q, k, v, dO; gates, norms, α; U, dRHS (HV, slots, C, V); S, dS (HV, slots, K, V)
    writes  dq, dk (B, T, H, K), dv (B, T, HV, V), dα or d log α, dβ (B, T, HV)
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    ALPHA,
    NO_DECAY,
    decay,
    inverse_norm,
    kept_row,
    kept_rows,
    owner,
    read_beta,
    read_gates,
    rows,
    sequence,
)
from gdn_ops.backends.triton.kernels.output import written
from gdn_ops.backends.triton.kernels.states import chunk_decay


@triton.jit
def zeros_at(gates, hv, slot, t, HV, slots, C: tl.constexpr):
    """Return whether α_t = 0 for tokens t of a chunk, from the running count z: bool, like t."""
    z = kept_row(gates, 2 * HV + hv, slot, t, slots, C)
    return tl.load(z) > tl.load(z - 1, mask=t > 0, other=0.0)


@triton.jit
def straddling(X, i, j):
    """Return the sum of X_ij over the pairs i ≥ t > j, for t = 1 + j: (C,), of rows i.

    Only such pairs are added and none is subtracted: each holds α_t as a factor, so that
    the sum keeps its precision relative to a tiny α_t.
    """
    before_t = tl.cumsum(X, 1)
    return tl.sum(tl.where(i[:, None] > j[None, :], before_t, 0.0), 0)


@triton.jit
def pair_gradients(
    q, k, v, d_o, gates, norms, u, d_rhs, d_qk, d_kk, gate_sums, beta_sums, cu_seqlens, scale,
    N, T, slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
    ERASE: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form Σ_r s dP ⊙ D and Σ_r M (H, slots, C, C), and their part of d log α, dβ.

    Grid (slots, H, C / ROWS): a program has ROWS rows of the squares.
    """
    HV: tl.constexpr = H * R
    slot, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    if chunk * C >= length:
        return
    i, j, dk = part * ROWS + tl.arange(0, ROWS), tl.arange(0, C), tl.arange(0, BK)
    in_k = dk < K
    valid_i, valid_j = chunk * C + i < length, chunk * C + j < length
    first = begin + chunk * C
    from_k = rows(k, row, k_batch, first, k_token, h, k_head, j, dk)
    k_j = tl.load(from_k, mask=valid_j[:, None] & in_k[None, :], other=0.0)
    if NORM:
        norm_j = tl.load(kept_row(norms, h, slot, j, slots, C))
    if GATE != NO_DECAY:
        from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, dk)
        q_i = tl.load(from_q, mask=valid_i[:, None] & in_k[None, :], other=0.0)
        qk = tl.dot(q_i, tl.trans(k_j), input_precision=PRECISION)
        if NORM:
            qk *= inverse_norm(q_i)[:, None] * norm_j[None, :]
    if ERASE:
        from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, dk)
        k_i = tl.load(from_k, mask=valid_i[:, None] & in_k[None, :], other=0.0)
        kk = tl.dot(k_i, tl.trans(k_j), input_precision=PRECISION)
        if NORM:
            norm_i = tl.load(kept_row(norms, h, slot, i, slots, C))
            kk *= norm_i[:, None] * norm_j[None, :]
    sum_qk = tl.zeros([ROWS, C], tl.float32)
    sum_kk = tl.zeros([ROWS, C], tl.float32)
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        dP = tl.zeros([ROWS, C], tl.float32)
        dA = tl.zeros([ROWS, C], tl.float32)
        for column in tl.range(0, V, BV, disable_licm=True):
            dv = column + tl.arange(0, BV)
            in_v = dv < V
            U = written(
                u, v, gates, hv, slot, j, first, row, v_batch, v_token, v_head, dv, valid_j, in_v,
                HV, slots, V, C, ERASE,
            )  # fmt: skip
            from_o = rows(d_o, row, o_batch, first, o_token, hv, o_head, i, dv)
            g = tl.load(from_o, mask=valid_i[:, None] & in_v[None, :], other=0.0)
            # §5 dP = s lower(dO Uᵀ),  dA = −strict_lower(dRHS Uᵀ)               [ROWS, C]
            dP += tl.dot(g, tl.trans(U), input_precision=PRECISION)
            if ERASE:
                from_rhs = kept_rows(d_rhs, hv, slot, i, dv, slots, C, V)
                dR = tl.load(from_rhs, mask=in_v[None, :], other=0.0)
                dA += tl.dot(dR, tl.trans(U), input_precision=PRECISION)
        dP = tl.where(i[:, None] >= j[None, :], dP * scale, 0.0)
        if GATE != NO_DECAY:
            hi_i, lo_i, z_i = read_gates(gates, hv, slot, i, HV, slots, C)
            hi, lo, z = read_gates(gates, hv, slot, j, HV, slots, C)
            D = decay(
                hi_i[:, None], lo_i[:, None], z_i[:, None], hi[None, :], lo[None, :], z[None, :], 0
            )
            # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ                               [ROWS, C]
            E = dP * qk
            dP *= D
        sum_qk += dP
        if ERASE:
            # §5 dβ: rowsum(dA ⊙ K Kᵀ ⊙ D),  M = diag(β) dA ⊙ D                  [ROWS], [ROWS, C]
            beta = read_beta(gates, hv, slot, i, HV, slots, C)
            dA = tl.where(i[:, None] > j[None, :], -dA, 0.0)
            if GATE != NO_DECAY:
                E += (dA * kk) * beta[:, None]
                dA *= D
            tl.store(kept_row(beta_sums, hv, slot, i, slots, C), tl.sum(dA * kk, 1))
            sum_kk += dA * beta[:, None]
        if GATE != NO_DECAY:
            # §5 d log α_t: X = E ⊙ D over i ≥ t > j, or X¹ where α_t = 0        [C]
            sums = straddling(E * D, i, j)
            inner = j < C - 1
            if tl.max(z, 0) > 0:
                D = decay(
                    hi_i[:, None], lo_i[:, None], z_i[:, None],
                    hi[None, :], lo[None, :], z[None, :], 1,
                )  # fmt: skip
                is_zero = zeros_at(gates, hv, slot, tl.minimum(j + 1, C - 1), HV, slots, C)
                sums = tl.where(is_zero, straddling(E * D, i, j), sums)
            to_sums = kept_row(gate_sums, part * HV + hv, slot, j, slots, C)
            tl.store(to_sums + 1, sums, mask=inner)
            tl.store(to_sums, tl.zeros([C], tl.float32), mask=j == 0)
    to_qk = kept_rows(d_qk, h, slot, i, j, slots, C, C)
    tl.store(to_qk, sum_qk.to(d_qk.dtype.element_ty))
    if ERASE:
        to_kk = kept_rows(d_kk, h, slot, i, j, slots, C, C)
        tl.store(to_kk, sum_kk.to(d_kk.dtype.element_ty))


@triton.jit
def gate_gradient(
    start, end, corner, gates, hv, slot, i, HV, slots, C: tl.constexpr, CROSSED: tl.constexpr
):
    """Return the sum over pairs i ≥ t > j that leave the chunk: start, end, corner (§5), (C,)."""
    b, d, b_C = chunk_decay(gates, hv, slot, i, HV, slots, C, CROSSED)
    from_t = tl.cumsum(start * b, 0, reverse=True)
    before = tl.sum(tl.where(i[:, None] > i[None, :], (end * d)[None, :], 0.0), 1)
    return from_t + before + corner * b_C


@triton.jit
def token_gradients(
    q, k, v, gate, d_o, gates, norms, u, d_rhs, kept, d_states, d_qk, d_kk, gate_sums, beta_sums,
    starts, d_q, d_k, d_v, d_gate, d_beta, cu_seqlens, scale,
    N, T, slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, RELOAD: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form dq, dk, dv, the gate's gradient and dβ. Grid (slots, H).

    RELOAD: whether k is read again (from a cache) where it is needed, instead of held.
    """
    HV: tl.constexpr = H * R
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
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if NORM:
        q_norm = inverse_norm(q_tile)
        k_norm = inverse_norm(k_tile)
    # First dQ, then dK: both sums at once would not fit the registers.
    pairs = tl.load(kept_rows(d_qk, h, slot, i, i, slots, C, C))
    hat = k_tile
    if NORM:
        hat = (k_tile.to(tl.float32) * k_norm[:, None]).to(k_tile.dtype)
    # §5 (dP ⊙ D) K to dQ, of the normalised q, k                                [C, BK]
    d_x = tl.dot(pairs, hat, input_precision=PRECISION)
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        start = tl.zeros([C], tl.float32)
        b = tl.full([C], 1.0, tl.float32)
        if GATE != NO_DECAY:
            b, _d, _b_C = chunk_decay(gates, hv, slot, i, HV, slots, C, 0)
        for column in tl.range(0, V, BV, disable_licm=True):
            dv = column + tl.arange(0, BV)
            in_v = dv < V
            in_state = in_k[:, None] & in_v[None, :]
            S = tl.load(kept_rows(kept, hv, slot, dk, dv, slots, K, V), mask=in_state, other=0.0)
            from_o = rows(d_o, row, o_batch, first, o_token, hv, o_head, i, dv)
            g = tl.load(from_o, mask=valid[:, None] & in_v[None, :], other=0.0)
            # §5 s diag(b) dO Sᵀ to dQ; E_i,start += s rowsum(dO ⊙ Q S)          [C, BK]
            x = tl.dot(g, tl.trans(S), input_precision=PRECISION) * scale
            start += tl.sum(x * q_tile.to(tl.float32), 1) * q_norm
            d_x += x * b[:, None]
        if GATE != NO_DECAY:
            tl.store(kept_row(starts, hv, slot, i, slots, C), start)
    if NORM:
        wide = q_tile.to(tl.float32) * q_norm[:, None]
        d_x = (d_x - wide * tl.sum(wide * d_x, 1)[:, None]) * q_norm[:, None]
    to_q = rows(d_q, row * T, H * K, first, H * K, h, K, i, dk)
    tl.store(to_q, d_x.to(d_q.dtype.element_ty), mask=in_rows)
    # What one thread has stored in `starts` another one reads.
    tl.debug_barrier()

    # §5 (dP ⊙ D)ᵀ Q,  (M + Mᵀ) K to dK                                          [C, BK]
    if NORM:
        q_tile = (q_tile.to(tl.float32) * q_norm[:, None]).to(q_tile.dtype)
    d_x = tl.dot(tl.trans(pairs), q_tile, input_precision=PRECISION)
    if ERASE:
        M = tl.load(kept_rows(d_kk, h, slot, i, i, slots, C, C))
        d_x += tl.dot(M, hat, input_precision=PRECISION)
        d_x += tl.dot(tl.trans(M), hat, input_precision=PRECISION)
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        end = tl.zeros([C], tl.float32)
        erased = tl.zeros([C], tl.float32)
        d_b = tl.zeros([C], tl.float32)
        corner = tl.zeros([1], tl.float32)
        beta = read_beta(gates, hv, slot, i, HV, slots, C)
        b = tl.full([C], 1.0, tl.float32)
        d = tl.full([C], 1.0, tl.float32)
        if GATE != NO_DECAY:
            b, d, _b_C = chunk_decay(gates, hv, slot, i, HV, slots, C, 0)
        for column in tl.range(0, V, BV, disable_licm=True):
            dv = column + tl.arange(0, BV)
            in_v = dv < V
            in_state = in_k[:, None] & in_v[None, :]
            in_values = valid[:, None] & in_v[None, :]
            S = tl.load(kept_rows(kept, hv, slot, dk, dv, slots, K, V), mask=in_state, other=0.0)
            from_rhs = kept_rows(d_rhs, hv, slot, i, dv, slots, C, V)
            dR = tl.load(from_rhs, mask=in_v[None, :], other=0.0)
            if ERASE:
                # §5 − diag(βb) dRHS Sᵀ to dK; − β rowsum(dRHS ⊙ K S) to E_i,start
                x = tl.dot(dR, tl.trans(S), input_precision=PRECISION)
                if RELOAD:
                    k_tile = tl.load(from_k, mask=in_rows, other=0.0)
                erased += tl.sum(x * k_tile.to(tl.float32), 1) * k_norm
                d_x -= x * (beta * b)[:, None]
            # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ V) ...                   [C, BV]
            from_v = rows(v, row, v_batch, first, v_token, hv, v_head, i, dv)
            values = tl.load(from_v, mask=in_values, other=0.0).to(tl.float32)
            d_b += tl.sum(dR.to(tl.float32) * values, 1)
            to_v = rows(d_v, row * T, HV * V, first, HV * V, hv, V, i, dv)
            x = dR.to(tl.float32) * beta[:, None]
            tl.store(to_v, x.to(d_v.dtype.element_ty), mask=in_values)
            # §5 diag(d) U dS_Cᵀ to dK; E_C,j += rowsum((K dS_C) ⊙ U)            [C, BK]
            from_states = kept_rows(d_states, hv, slot, dk, dv, slots, K, V)
            dS = tl.load(from_states, mask=in_state, other=0.0)
            # §5 E_C,start = ⟨dS_C, S⟩
            if GATE != NO_DECAY:
                corner += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
            U = written(
                u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid, in_v,
                HV, slots, V, C, ERASE,
            )  # fmt: skip
            x = tl.dot(U, tl.trans(dS), input_precision=PRECISION)
            if RELOAD:
                k_tile = tl.load(from_k, mask=in_rows, other=0.0)
            end += tl.sum(x * k_tile.to(tl.float32), 1) * k_norm
            d_x += x * d[:, None]
        at = (row * T + first) * HV + hv + i * HV
        if ERASE:
            # §5 dβ = rowsum(dRHS ⊙ (V − diag(b) K S)) + rowsum(dA ⊙ K Kᵀ ⊙ D)   [C]
            d_b += tl.load(kept_row(beta_sums, hv, slot, i, slots, C)) - b * erased
        if HAS_BETA:
            tl.store(d_beta + at, d_b.to(d_beta.dtype.element_ty), mask=valid)
        if GATE != NO_DECAY:
            # §5 d log α and, where α = 0, dα                                    [C]
            start = tl.load(kept_row(starts, hv, slot, i, slots, C)) - beta * erased
            sums = tl.load(kept_row(gate_sums, hv, slot, i, slots, C))
            for part in tl.static_range(1, PARTS):
                sums += tl.load(kept_row(gate_sums, part * HV + hv, slot, i, slots, C))
            total = gate_gradient(start, end, corner, gates, hv, slot, i, HV, slots, C, 0) + sums
            given = tl.load(gate + at, mask=valid, other=1.0).to(tl.float32)
            is_zero = zeros_at(gates, hv, slot, i, HV, slots, C)
            if GATE == ALPHA:
                total = total / tl.where(is_zero, 1.0, given)
                _hi_C, _lo_C, z_C = read_gates(gates, hv, slot, C - 1, HV, slots, C)
                if z_C > 0:
                    at_zero = gate_gradient(start, end, corner, gates, hv, slot, i, HV, slots, C, 1)
                    total = tl.where(is_zero, at_zero + sums, total)
            else:
                total = tl.where(is_zero, 0.0, total)
            tl.store(d_gate + at, total.to(d_gate.dtype.element_ty), mask=valid)
    if RELOAD:
        k_tile = tl.load(from_k, mask=in_rows, other=0.0)
    if NORM:
        wide = k_tile.to(tl.float32) * k_norm[:, None]
        d_x = (d_x - wide * tl.sum(wide * d_x, 1)[:, None]) * k_norm[:, None]
    to_k = rows(d_k, row * T, H * K, first, H * K, h, K, i, dk)
    tl.store(to_k, d_x.to(d_k.dtype.element_ty), mask=in_rows)
