"""Form the gradients of gates and of β of a chunk, from the sums of its tokens.

`token_gradients` calls it in the end. HEADS of the value heads are taken together. Where gates are
α = 0, or below e**-60, the sums over inner pairs are formed over again (`rare_pairs`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    ALPHA,
    EXP_OF_LIFT,
    L2NORM_EPSILON,
    LIFT,
    LIFTED,
    NO_DECAY,
    chunk_decay,
    chunk_row,
    decay,
    head_tile,
    kept_tile,
    owner,
    read_beta,
    read_gates,
    read_tile,
    sequence,
    widened,
    written,
)
from gdn_ops.backends.triton.kernels.pair_gradients import (
    ENDS,
    ERASED,
    INNER,
    OF_BETA,
    SMALL_BETA,
    STARTS,
)

HEADS = tl.constexpr(4)
"""Value heads whose gradients are formed together."""

ROWS = tl.constexpr(16)
"""Rows of pairs that are formed together: few, for the registers of `token_gradients`."""

WIDTH = tl.constexpr(64)
"""Columns of K that are read at a time for them."""


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
def log_decay(gates, hv, slot, i, j, HV, chunk_slots, C: tl.constexpr):
    """Return G_i − G_j and z_i − z_j, (tokens i, tokens j)."""
    hi_i, lo_i, z_i = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
    hi, lo, z = read_gates(gates, hv, slot, j, HV, chunk_slots, C)
    log = (hi_i[:, None] - hi[None, :]) + (lo_i[:, None] - lo[None, :])
    return log, z_i[:, None] - z[None, :]


@triton.jit
def sum_of_squares(x):
    """Return the sum of the squares of every row, float32."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def rare_rows(
    q, k, v, d_o, gates, u, d_rhs, scale, e, i, row, first, place, hv, r, slot, length, chunk_slots,
    q_token, k_token, v_batch, v_token, v_head, o_token, o_head,
    HV, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ROWS rows of E (ROWS, C) for a value head, from row e.

    Args:
        q, k: the rows of the sequence for a key head.
        d_o: the same for its first value head.
        u, d_rhs: (HV, chunk_slots, C, V).
        the others: as in `token_gradients`.
    """
    at = hv * chunk_slots + slot
    # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ                                            [ROWS, C]
    dp = tl.zeros([ROWS, C], tl.float32)
    da = tl.zeros([ROWS, C], tl.float32)
    for column in tl.range(0, V, BV, num_stages=1, disable_licm=True):
        g = head_tile(d_o, r, o_head, place + e, column, o_token, length, V, ROWS, BV, False)
        if ERASE:
            U = kept_tile(u, at, 0, column, C, V, C, BV, False)
            dR = kept_tile(d_rhs, at, e, column, C, V, ROWS, BV, False)
            da = tl.dot(dR, tl.trans(U), da, input_precision=PRECISION)
        else:
            dv = column + tl.arange(0, BV)
            U = written(
                u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv,
                place + i < length, dv < V, HV, chunk_slots, V, C, ERASE, PRECISION,
            )  # fmt: skip
        dp = tl.dot(widened(g), tl.trans(U), dp, input_precision=PRECISION)
    # Columns of K are taken by blocks, for the registers.
    BC: tl.constexpr = min(BK, WIDTH)
    qk = tl.zeros([ROWS, C], tl.float32)
    kk = tl.zeros([ROWS, C], tl.float32)
    q_square = tl.zeros([ROWS], tl.float32)
    row_square = tl.zeros([ROWS], tl.float32)
    k_square = tl.zeros([C], tl.float32)
    for column in tl.range(0, K, BC, num_stages=1, disable_licm=True):
        k_tile = read_tile(k, place, column, k_token, length, K, C, BC, False)
        q_tile = read_tile(q, place + e, column, q_token, length, K, ROWS, BC, False)
        qk = tl.dot(q_tile, tl.trans(k_tile), qk, input_precision=PRECISION)
        if ERASE:
            k_rows = read_tile(k, place + e, column, k_token, length, K, ROWS, BC, False)
            kk = tl.dot(k_rows, tl.trans(k_tile), kk, input_precision=PRECISION)
            if NORM:
                row_square += sum_of_squares(k_rows)
        if NORM:
            q_square += sum_of_squares(q_tile)
            k_square += sum_of_squares(k_tile)
    dp *= qk * scale
    if NORM:
        dp *= tl.rsqrt(q_square + L2NORM_EPSILON)[:, None]
    if ERASE:
        da *= kk
        if NORM:
            da *= tl.rsqrt(row_square + L2NORM_EPSILON)[:, None]
        beta = read_beta(gates, hv, slot, e + tl.arange(0, ROWS), HV, chunk_slots, C)
        dp -= da * beta[:, None]
    if NORM:
        dp *= tl.rsqrt(k_square + L2NORM_EPSILON)[None, :]
    return dp


@triton.jit
def rare_pairs(
    q, k, v, d_o, gates, u, d_rhs, sums, scale, i, row, first, place, h, slot, length,
    chunk_slots, q_token, k_token, v_batch, v_token, v_head, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sums of inner pairs over again for t with α_t = 0, or below e**-60.

    Few chunks have such tokens. E is formed again for them, so that the others need not hold it.
    """
    HV = H * R
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        hi_C, _lo_C, z_C = read_gates(gates, hv, slot, C - 1, HV, chunk_slots, C)
        # Kind 0: X¹ where α_t = 0. Kind 1: X, lifted, where α_t is faint.
        first_kind = tl.where(z_C > 0, 0, 1)
        end_kind = tl.where(hi_C < -LIFT, 2, 1)
        for kind in tl.range(first_kind, end_kind, disable_licm=True):
            # Sum X over rows from the last one on, for every column.
            below = tl.zeros([C], tl.float32)
            for n in tl.range(0, C, ROWS, disable_licm=True):
                e = C - ROWS - n
                t = e + tl.arange(0, ROWS)
                X = rare_rows(
                    q, k, v, d_o, gates, u, d_rhs, scale, e, i, row, first, place, hv, r, slot,
                    length, chunk_slots, q_token, k_token, v_batch, v_token, v_head, o_token,
                    o_head, HV, K, V, C, BK, BV, ERASE, NORM, PRECISION,
                )  # fmt: skip
                log, zeros = log_decay(gates, hv, slot, t, i, HV, chunk_slots, C)
                log += tl.where(kind == 1, LIFT, 0.0)
                X *= tl.exp(tl.where(log > 0.0, 0.0, log))
                X = tl.where((zeros == 1 - kind) & (t[:, None] > i[None, :]), X, 0.0)
                # §5 the sum over i ≥ t > j                                            [ROWS, C]
                from_t = tl.cumsum(X, 0, reverse=True) + below[None, :]
                inner = tl.sum(tl.where(t[:, None] > i[None, :], from_t, 0.0), 1)
                below += tl.sum(X, 0)
                is_rare = faint_at(gates, hv, slot, t, HV, chunk_slots, C)
                if kind == 0:
                    is_rare = zeros_at(gates, hv, slot, t, HV, chunk_slots, C)
                to_inner = chunk_row(sums, HV * INNER + hv, slot, t, chunk_slots, C)
                tl.store(to_inner, inner, mask=is_rare)
                if ERASE:
                    to_inner = chunk_row(sums, HV * (INNER + 1) + hv, slot, t, chunk_slots, C)
                    tl.store(to_inner, tl.zeros([ROWS], tl.float32), mask=is_rare)


@triton.jit
def outer_pairs(
    start, sums, corner, gates, hv, slot, i, HV, chunk_slots, C: tl.constexpr, CROSSED: tl.constexpr
):
    """Return the sum over pairs i ≥ t > j that leave the chunk: start, end, corner (§5), (., C)."""
    b, _d, b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, CROSSED)
    before = tl.maximum(i - 1, 0)
    _b, d, _b_C = chunk_decay(gates, hv, slot, before, HV, chunk_slots, C, CROSSED)
    end = tl.load(chunk_row(sums, HV * ENDS + hv, slot, before, chunk_slots, C))
    from_t = tl.cumsum(start * b, 1, reverse=True)
    before_t = tl.cumsum(tl.where(i > 0, end * d, 0.0), 1)
    return from_t + before_t + corner * b_C


@triton.jit
def gate_gradient(
    start, sums, corner, gate, inside, gates, hv, slot, i, HV, chunk_slots,
    C: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """Return d log α and, where α = 0, dα, or dα of every token, (., C)."""
    inner = tl.load(chunk_row(sums, HV * INNER + hv, slot, i, chunk_slots, C))
    if ERASE:
        inner += tl.load(chunk_row(sums, HV * (INNER + 1) + hv, slot, i, chunk_slots, C))
    total = outer_pairs(start, sums, corner, gates, hv, slot, i, HV, chunk_slots, C, 0) + inner
    is_zero = zeros_at(gates, hv, slot, i, HV, chunk_slots, C)
    if GATE == ALPHA:
        given = tl.load(gate, mask=inside, other=1.0).to(tl.float32)
        total = total / tl.where(is_zero, 1.0, given)
        hi_C, _lo_C, z_C = read_gates(gates, hv, slot, C - 1, HV, chunk_slots, C)
        if tl.max(tl.max(z_C, 1), 0) > 0:
            x = outer_pairs(start, sums, corner, gates, hv, slot, i, HV, chunk_slots, C, 1)
            total = tl.where(is_zero, x + inner, total)
        if tl.min(tl.min(hi_C, 1), 0) < -LIFT:
            is_faint = faint_at(gates, hv, slot, i, HV, chunk_slots, C)
            x = outer_pairs(start, sums, corner, gates, hv, slot, i, HV, chunk_slots, C, LIFTED)
            quotient = (x + inner) / tl.where(is_faint, given * EXP_OF_LIFT, 1.0)
            total = tl.where(is_faint, quotient, total)
    else:
        total = tl.where(is_zero, 0.0, total)
    return total


@triton.jit
def write_gradients(
    gate, gates, sums, corners, d_gate, d_beta, row, first, h, slot, valid, T, chunk_slots,
    H, R, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the gate and of β for the R value heads of a key head."""
    HV = H * R
    i, m = tl.arange(0, C)[None, :], tl.arange(0, BV)[None, :]
    for r_0 in range(0, R, HEADS):
        r = r_0 + tl.arange(0, HEADS)[:, None]
        # Heads beyond the last are formed like it, and not written.
        hv = h * R + tl.minimum(r, R - 1)
        inside = (r < R) & valid[None, :]
        at = (row * T + first) * HV + hv + i * HV
        beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
        if ERASE:
            erased = tl.load(chunk_row(sums, HV * ERASED + hv, slot, i, chunk_slots, C))
        if HAS_BETA:
            # §5 dβ = rowsum(dRHS ⊙ U) / β, or ... − b rowsum(dRHS ⊙ K S)                  [C]
            # Of tokens that are none, there may be no sum.
            from_sum = chunk_row(sums, HV * OF_BETA + hv, slot, i, chunk_slots, C)
            d_b = tl.load(from_sum, mask=inside, other=0.0)
            if ERASE:
                rest = erased
                if GATE != NO_DECAY:
                    hi, lo, z = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
                    rest *= decay(hi, lo, z, 0.0, 0.0, 0.0, 0)
                is_small = beta < SMALL_BETA
                d_b = tl.where(is_small, d_b - rest, d_b / tl.where(is_small, 1.0, beta))
            tl.store(d_beta + at, d_b.to(d_beta.dtype.element_ty), mask=inside)
        if GATE != NO_DECAY:
            # §5 d log α and, where α = 0, dα                                              [C]
            start = tl.load(chunk_row(sums, HV * STARTS + hv, slot, i, chunk_slots, C))
            if ERASE:
                start -= beta * erased
            corner = tl.load(chunk_row(corners, hv, slot, m, chunk_slots, BV))
            corner = tl.sum(corner, 1, keep_dims=True)
            total = gate_gradient(
                start, sums, corner, gate + at, inside, gates, hv, slot, i, HV, chunk_slots, C,
                GATE, ERASE,
            )  # fmt: skip
            tl.store(d_gate + at, total.to(d_gate.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradients(
    q, k, v, gate, d_o, gates, u, d_rhs, sums, corners, d_gate, d_beta, cu_seqlens, scale,
    slot, h, N, T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the gate and of β for a chunk and key head, as in `token_gradients`.

    Args:
        slot, h: the chunk and the key head.
        the others: as in `token_gradients`.
    """
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    place = chunk * C
    first = begin + place
    i = tl.arange(0, C)
    if GATE == ALPHA:
        q += row * q_batch + begin * q_token + tl.cast(h, tl.int64) * q_head
        k += row * k_batch + begin * k_token + tl.cast(h, tl.int64) * k_head
        d_o += row * o_batch + begin * o_token + tl.cast(h, tl.int64) * R * o_head
        rare_pairs(
            q, k, v, d_o, gates, u, d_rhs, sums, scale, i, row, first, place, h, slot, length,
            chunk_slots, q_token, k_token, v_batch, v_token, v_head, o_token, o_head,
            H, R, K, V, C, BK, BV, ERASE, NORM, PRECISION,
        )  # fmt: skip
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
    write_gradients(
        gate, gates, sums, corners, d_gate, d_beta, row, first, h, slot, place + i < length, T,
        chunk_slots, H, R, C, BV, GATE, HAS_BETA, ERASE,
    )  # fmt: skip
