"""Form the terms that are quadratic in a chunk, summed over the R value heads of a key head.

    reads   q, k, v, dO; gates, inv_norms; U, dRHS (HV, chunk_slots, C, V)
    writes  Σ s dP ⊙ D and Σ M (H, chunk_slots, C, C) in the dtype of what is kept; their parts of
            d log α and dβ, (parts + 1, HV, chunk_slots, C) float32

No sum leaves a program: no atomics, and the same call gives the same bits. In FLA they are part of
`chunk_bwd_dqkwg` and `prepare_wy_repr_bwd`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    ALPHA,
    LIFT,
    LIFTED,
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
    sequence,
    widened,
    written,
)


@triton.jit
def zeros_at(gates, hv, slot, t, HV, chunk_slots, C: tl.constexpr):
    """Return whether α_t = 0 for tokens t of a chunk, from the running count z: bool, like t."""
    z = chunk_row(gates, 2 * HV + hv, slot, t, chunk_slots, C)
    return tl.load(z) > tl.load(z - 1, mask=t > 0, other=0.0)


@triton.jit
def faint_at(gates, hv, slot, t, HV, chunk_slots, C: tl.constexpr):
    """Return whether 0 < α_t < e**-60 for tokens t of a chunk, from its log sums: bool, like t."""
    hi = chunk_row(gates, hv, slot, t, chunk_slots, C)
    lo = chunk_row(gates, HV + hv, slot, t, chunk_slots, C)
    rest = tl.load(lo) - tl.load(lo - 1, mask=t > 0, other=0.0)
    return (tl.load(hi) - tl.load(hi - 1, mask=t > 0, other=0.0)) + rest < -LIFT


@triton.jit
def straddling(X, i, j):
    """Return the sum of X_ij over the pairs i ≥ t > j, for t = 1 + j: (C,), of rows i.

    Only such pairs are added and none is subtracted: each holds α_t as a factor, so that
    the sum keeps its precision relative to a tiny α_t.
    """
    before_t = tl.cumsum(X, 1)
    return tl.sum(tl.where(i[:, None] > j[None, :], before_t, 0.0), 0)


@triton.jit(do_not_specialize=("N", "T", "chunk_slots", "H", "R"))
def pair_gradients(
    q, k, v, d_o, gates, inv_norms, u, d_rhs, d_qk, d_kk, gate_sums, beta_sums, cu_seqlens, scale,
    N, T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
    ERASE: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form Σ_r s dP ⊙ D and Σ_r M (H, chunk_slots, C, C), and their part of d log α, dβ.

    Grid (chunk_slots, H, C / ROWS): a program has ROWS rows of the squares.
    """
    HV = H * R
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
        inv_norm_j = tl.load(chunk_row(inv_norms, h, slot, j, chunk_slots, C))
    if GATE != NO_DECAY:
        from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, dk)
        q_i = tl.load(from_q, mask=valid_i[:, None] & in_k[None, :], other=0.0)
        qk = tl.dot(q_i, tl.trans(k_j), input_precision=PRECISION)
        if NORM:
            qk *= inverse_norm(q_i)[:, None] * inv_norm_j[None, :]
    if ERASE:
        from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, dk)
        k_i = tl.load(from_k, mask=valid_i[:, None] & in_k[None, :], other=0.0)
        kk = tl.dot(k_i, tl.trans(k_j), input_precision=PRECISION)
        if NORM:
            inv_norm_i = tl.load(chunk_row(inv_norms, h, slot, i, chunk_slots, C))
            kk *= inv_norm_i[:, None] * inv_norm_j[None, :]
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
                HV, chunk_slots, V, C, ERASE, PRECISION,
            )  # fmt: skip
            from_o = rows(d_o, row, o_batch, first, o_token, hv, o_head, i, dv)
            g = widened(tl.load(from_o, mask=valid_i[:, None] & in_v[None, :], other=0.0))
            # §5 dP = s lower(dO Uᵀ),  dA = −strict_lower(dRHS Uᵀ)               [ROWS, C]
            dP += tl.dot(g, tl.trans(U), input_precision=PRECISION)
            if ERASE:
                from_rhs = chunk_rows(d_rhs, hv, slot, i, dv, chunk_slots, C, V)
                dR = tl.load(from_rhs, mask=in_v[None, :], other=0.0)
                dA += tl.dot(dR, tl.trans(U), input_precision=PRECISION)
        dP = tl.where(i[:, None] >= j[None, :], dP * scale, 0.0)
        if GATE != NO_DECAY:
            hi_i, lo_i, z_i = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
            hi, lo, z = read_gates(gates, hv, slot, j, HV, chunk_slots, C)
            D = decay(
                hi_i[:, None], lo_i[:, None], z_i[:, None], hi[None, :], lo[None, :], z[None, :], 0
            )
            # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ                               [ROWS, C]
            E = dP * qk
            dP *= D
        sum_qk += dP
        if ERASE:
            # §5 dβ: rowsum(dA ⊙ K Kᵀ ⊙ D),  M = diag(β) dA ⊙ D                  [ROWS], [ROWS, C]
            beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
            dA = tl.where(i[:, None] > j[None, :], -dA, 0.0)
            if GATE != NO_DECAY:
                E += (dA * kk) * beta[:, None]
                dA *= D
            tl.store(chunk_row(beta_sums, hv, slot, i, chunk_slots, C), tl.sum(dA * kk, 1))
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
                is_zero = zeros_at(gates, hv, slot, tl.minimum(j + 1, C - 1), HV, chunk_slots, C)
                sums = tl.where(is_zero, straddling(E * D, i, j), sums)
            if GATE == ALPHA:  # noqa: SIM102  (known when compiled, the next one is not)
                if tl.min(hi, 0) < -LIFT:
                    D = decay(
                        hi_i[:, None], lo_i[:, None], z_i[:, None],
                        hi[None, :], lo[None, :], z[None, :], LIFTED,
                    )  # fmt: skip
                    is_faint = faint_at(
                        gates, hv, slot, tl.minimum(j + 1, C - 1), HV, chunk_slots, C
                    )
                    sums = tl.where(is_faint, straddling(E * D, i, j), sums)
            to_sums = chunk_row(gate_sums, part * HV + hv, slot, j, chunk_slots, C)
            tl.store(to_sums + 1, sums, mask=inner)
            tl.store(to_sums, tl.zeros([C], tl.float32), mask=j == 0)
    to_qk = chunk_rows(d_qk, h, slot, i, j, chunk_slots, C, C)
    tl.store(to_qk, operand(sum_qk, d_qk.dtype.element_ty, PRECISION))
    if ERASE:
        to_kk = chunk_rows(d_kk, h, slot, i, j, chunk_slots, C, C)
        tl.store(to_kk, operand(sum_kk, d_kk.dtype.element_ty, PRECISION))
