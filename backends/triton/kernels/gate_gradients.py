"""Form the gradients of gates and of β of a chunk: the last launch of a backward.

One program per chunk and key head; it takes HEADS of the value heads together. Where gates are
α = 0, or below e**-60, it forms the sums over inner pairs over again (`rare_pairs`).

    reads   the sums of `token_gradients`; gates, α; where gates are rare q, k, v, dO, U, dRHS
    writes  dα or d log α, dβ (B, T, HV)
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
    decay,
    inverse_norm,
    owner,
    read_beta,
    read_gates,
    read_tile,
    sequence,
    tiles_of,
)
from gdn_ops.backends.triton.kernels.pair_gradients import (
    ENDS,
    ERASED,
    INNER,
    OF_BETA,
    SMALL_BETA,
    STARTS,
    faint_at,
    rare_pairs,
    zeros_at,
)

HEADS = tl.constexpr(4)
"""Value heads whose gradients are formed together."""


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


@triton.jit(do_not_specialize=("N", "T", "chunk_slots", "H", "R"))
def gate_gradients(
    q, k, v, gate, d_o, gates, u, d_rhs, sums, corners, places, d_gate, d_beta, cu_seqlens, scale,
    N, T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form the gate's gradient and dβ, see the module. Grid (chunk_slots, H)."""
    HV = H * R
    slot, h = tl.program_id(0), tl.program_id(1)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    place = chunk * C
    if place >= length:
        return
    first = begin + place
    i = tl.arange(0, C)
    if GATE == ALPHA:
        o_start = row * o_batch + begin * o_token + tl.cast(h, tl.int64) * R * o_head
        g_tiles = tiles_of(d_o, o_start, o_token, length, R * V, C, BV, TMA)
        u_tiles = u
        if ERASE:
            u_tiles = tiles_of(u, 0, V, HV * chunk_slots * C, V, C, BV, TMA)
        r_tiles = tiles_of(d_rhs, 0, V, HV * chunk_slots * C, V, C, BV, TMA)
        q_start = row * q_batch + begin * q_token + tl.cast(h, tl.int64) * q_head
        q_tiles = tiles_of(q, q_start, q_token, length, K, C, BK, TMA)
        k_start = row * k_batch + begin * k_token + tl.cast(h, tl.int64) * k_head
        k_tiles = tiles_of(k, k_start, k_token, length, K, C, BK, TMA)
        inv_q = tl.full([C], 1.0, tl.float32)
        inv_k = inv_q
        if NORM:
            q_tile = read_tile(q_tiles, place, 0, q_token, length, K, C, BK, TMA)
            k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
            inv_q, inv_k = inverse_norm(q_tile), inverse_norm(k_tile)
        places += (tl.cast(h, tl.int64) * chunk_slots + slot) * max(C, BV)
        rare_pairs(
            q_tiles, k_tiles, inv_q, inv_k, v, gates, sums, places, g_tiles, r_tiles, u_tiles,
            scale, i, row, first, place, h, slot, length, chunk_slots, q_token, k_token,
            v_batch, v_token, v_head, o_token, o_head,
            H, R, K, V, C, BK, BV, ERASE, TMA, d_rhs.dtype.element_ty, PRECISION,
        )  # fmt: skip
        # Wait: a thread reads what another one has stored in `sums`.
        tl.debug_barrier()
    write_gradients(
        gate, gates, sums, corners, d_gate, d_beta, row, first, h, slot, place + i < length, T,
        chunk_slots, H, R, C, BV, GATE, HAS_BETA, ERASE,
    )  # fmt: skip
