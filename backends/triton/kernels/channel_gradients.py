"""Compute the gradients of q, k, the decays and β, where every key channel decays.

One program per chunk and key head, in the place of `token_gradients`; columns of K are taken by
blocks, and dq and dk are summed over the R value heads in registers. The products of decays are
differentiated as they are formed, from blocks of C tokens down to one (`channel_decays`): no
gradient is divided by a decay, so that it is right where one is 0, or too small for a number.

    reads   q, k (B, T, H, K); α or log α (B, T, HV, K); dO; β; U, dRHS (HV, chunk_slots, C, V);
            S, dS (HV, chunk_slots, V, K), transposed; what `square_gradients` has written
    writes  dq, dk (B, T, H, K), dα or d log α (B, T, HV, K), dβ (B, T, HV)
            with APART that of erase (B, T, HV, K) float32, which stands in place of β
            with NORM the gradients of the normalised q and k, (B, T, H, K) float32, on the way

FLA's name is `chunk_kda_bwd_wy_dqkg_fused`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    LOG_ALPHA,
    chunk_row,
    head_tile,
    kept_tile,
    operand,
    owner,
    read_beta,
    rows,
    sequence,
    widened,
    written,
)
from gdn_ops.backends.triton.kernels.channel_decays import (
    WIDTH,
    decays_at,
    halved,
    joined,
    levels,
    met,
    write_totals,
)
from gdn_ops.backends.triton.kernels.pair_gradients import SMALL_BETA
from gdn_ops.backends.triton.kernels.prepare_channels import inverse_norms


@triton.jit
def through_states(
    v, g_tiles, gates, u, d_rhs, states, d_states, row, first, place, hv, r, slot, i, column,
    length, chunk_slots, HV, v_batch, v_token, v_head, o_token, o_head,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dO Sᵀ, dRHS Sᵀ and U dSᵀ, (C, D), and the diagonal of S dSᵀ, (D,)."""
    at = hv * chunk_slots + slot
    read = tl.zeros([C, D], tl.float32)
    erased = tl.zeros([C, D], tl.float32)
    wrote = tl.zeros([C, D], tl.float32)
    corner = tl.zeros([D], tl.float32)
    for dv_0 in tl.range(0, V, BV, num_stages=1, disable_licm=True):
        dv = dv_0 + tl.arange(0, BV)
        S = kept_tile(states, at, dv_0, column, V, K, BV, D, False)
        dS = kept_tile(d_states, at, dv_0, column, V, K, BV, D, False)
        g = head_tile(g_tiles, r, o_head, place, dv_0, o_token, length, V, C, BV, False)
        read = tl.dot(widened(g), S, read, input_precision=PRECISION)
        if ERASE:
            dR = kept_tile(d_rhs, at, 0, dv_0, C, V, C, BV, False)
            erased = tl.dot(dR, S, erased, input_precision=PRECISION)
        U = written(
            u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, place + i < length,
            dv < V, HV, chunk_slots, V, C, ERASE, PRECISION,
        )  # fmt: skip
        wrote = tl.dot(U, dS, wrote, input_precision=PRECISION)
        corner += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
    return read, erased, wrote, corner


@triton.jit
def through_pairs(
    d_q, d_k, d_erased, dF, dL, square, q_hat, k_hat, strength, F, L, i, level,
    C: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what comes through the pairs where blocks of h = 2**level tokens meet, all (C, D).

    Args:
        d_erased: the gradient of k as the one that is erased, over the strength.
        strength: β, (C, 1), or erase (C, D).
        square: pointer to dP, and to dA behind it.
        F, L: of blocks of h tokens, and dF, dL their gradients.
    """
    kept: tl.constexpr = square.dtype.element_ty
    j = tl.arange(0, C)
    # Squares are read as they are, and transposed: a tile that is formed is not for Hopper.
    to, to_transposed = i[:, None] * C + j[None, :], i[None, :] * C + j[:, None]
    later = operand(k_hat * L, kept, PRECISION)
    earlier = operand(q_hat * F, kept, PRECISION)
    # §5 dP (K ⊙ L) to dQ and dF; dPᵀ (Q ⊙ F) to dK and dL                               [C, D]
    x = met(tl.load(square + to), level)
    x = tl.dot(x, later, input_precision=PRECISION)
    y = met(tl.load(square + to_transposed), level)
    y = tl.dot(y, earlier, input_precision=PRECISION)
    d_q += F * x
    dF += q_hat * x
    if ERASE:
        # §5 the same of dA and β K ⊙ F                                                  [C, D]
        square += C * C
        weighted = strength * k_hat
        earlier = operand(weighted * F, kept, PRECISION)
        x = met(tl.load(square + to), level)
        x = tl.dot(x, later, input_precision=PRECISION)
        dA = met(tl.load(square + to_transposed), level)
        y = tl.dot(dA, earlier, y, input_precision=PRECISION)
        d_erased += F * x
        dF += weighted * x
    d_k += L * y
    dL += k_hat * y
    return d_q, d_k, d_erased, dF, dL


@triton.jit
def of_head(
    d_q, d_k, q_hat, k_hat, v, gate, g_tiles, gates, u, d_rhs, states, d_states, squares, sums,
    totals, d_gate, d_beta, erase, d_erase, scale, row, first, place, hv, r, slot, i, column,
    length, T, chunk_slots, HV, v_batch, v_token, v_head, gate_batch, gate_token, gate_head,
    o_token, o_head,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, APART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dQ and dK (C, D) with those of a value head; write d α, and dβ once it is summed."""
    d, left = column + tl.arange(0, D), length - place
    beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
    strength = beta[:, None]
    inside = (i < left)[:, None] & (d < K)[None, :]
    if APART:
        from_erase = rows(erase, row * T, HV * K, first, HV * K, hv, K, i, d)
        strength = tl.load(from_erase, mask=inside, other=0.0).to(tl.float32)
    read, erased, wrote, corner = through_states(
        v, g_tiles, gates, u, d_rhs, states, d_states, row, first, place, hv, r, slot, i, column,
        length, chunk_slots, HV, v_batch, v_token, v_head, o_token, o_head, K, V, C, D, BV, ERASE,
        PRECISION,
    )  # fmt: skip
    decays = decays_at(
        gate, row, gate_batch, first, gate_token, hv, gate_head, i, d, left, K, GATE
    )  # fmt: skip
    F, L = decays, tl.full([C, D], 1.0, tl.float32)
    for level in tl.range(0, levels(C), num_stages=1, disable_licm=True):
        write_totals(totals, F, i, level)
        F, L = joined(totals, F, L, i, level)
    # §5 s b ⊙ dO Sᵀ to dQ,  −β b ⊙ dRHS Sᵀ and d ⊙ U dS_Cᵀ to dK,  all of them to b, d   [C, D]
    read *= scale
    d_q += F * read
    d_k += L * wrote
    d_erased = -F * erased
    dF = q_hat * read - strength * k_hat * erased
    # §5 d b_C = rowsum(dS_C ⊙ S)                                                        [D]
    dF += tl.where((i == C - 1)[:, None], corner[None, :], 0.0)
    dL = k_hat * wrote
    square = squares + tl.cast(hv * chunk_slots + slot, tl.int64) * (2 * C * C)
    # Take blocks of C / 2, C / 4, ..., 1 tokens.
    for step in tl.range(0, levels(C), num_stages=1, disable_licm=True):
        level = levels(C) - 1 - step
        F, L = decays, tl.full([C, D], 1.0, tl.float32)
        for below in tl.range(0, level, num_stages=1, disable_licm=True):
            F, L = joined(totals, F, L, i, below)
        dF, dL = halved(totals, dF, dL, F, L, i, level, square.dtype.element_ty, PRECISION)
        d_q, d_k, d_erased, dF, dL = through_pairs(
            d_q, d_k, d_erased, dF, dL, square, q_hat, k_hat, strength, F, L, i, level, C, ERASE,
            PRECISION,
        )  # fmt: skip
    # Wait: the totals are written again, of the next head.
    tl.debug_barrier()
    # §5 dP_ii = s dO_i · U_i                                                              [C, D]
    own = tl.load(square + i * (C + 1)).to(tl.float32)[:, None]
    d_q += own * k_hat
    d_k += own * q_hat
    to_sums = chunk_row(sums, hv, slot, i, chunk_slots, C)
    of_beta = tl.load(to_sums)
    if ERASE:
        d_k += strength * d_erased
        if APART:
            to_erase = rows(d_erase, row * T, HV * K, first, HV * K, hv, K, i, d)
            tl.store(to_erase, k_hat * d_erased, mask=inside)
        # §5 dβ = ... + rowsum(K ⊙ dK / β), where it is not rowsum(dRHS ⊙ U) / β             [C]
        of_beta += tl.where(beta < SMALL_BETA, tl.sum(k_hat * d_erased, 1), 0.0)
        tl.store(to_sums, of_beta)
    if HAS_BETA:
        to_beta = d_beta + (row * T + first) * HV + hv + i * HV
        of_beta = of_beta.to(d_beta.dtype.element_ty)
        tl.store(to_beta, of_beta, mask=(i < left) & (column + D >= K))
    if GATE == LOG_ALPHA:
        dF *= decays
    to_gate = rows(d_gate, row * T, HV * K, first, HV * K, hv, K, i, d)
    tl.store(to_gate, dF.to(d_gate.dtype.element_ty), mask=inside)
    return d_q, d_k


@triton.jit
def projected(
    wide, x, to, inv_norm, along, row, batch, first, token, h, head, i, left, T, H,
    K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, given those of x / ‖x‖, and their sums with it, (C,)."""
    for column in tl.range(0, K, D, num_stages=1, disable_licm=True):
        d = column + tl.arange(0, D)
        inside = (i < left)[:, None] & (d < K)[None, :]
        from_x = rows(x, row, batch, first, token, h, head, i, d)
        x_hat = tl.load(from_x, mask=inside, other=0.0).to(tl.float32) * inv_norm[:, None]
        d_x = tl.load(rows(wide, row * T, H * K, first, H * K, h, K, i, d), mask=inside, other=0.0)
        d_x = (d_x - x_hat * along[:, None]) * inv_norm[:, None]
        to_x = rows(to, row * T, H * K, first, H * K, h, K, i, d)
        tl.store(to_x, d_x.to(to.dtype.element_ty), mask=inside)


@triton.jit
def of_chunk(
    q, k, v, gate, d_o, gates, u, d_rhs, states, d_states, squares, sums, totals, wide_q, wide_k,
    d_q, d_k, d_gate, d_beta, erase, d_erase, scale, row, first, place, h, slot, length, T,
    chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    gate_batch, gate_token, gate_head, o_batch, o_token, o_head, H, R,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, APART: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the tokens of a chunk for a key head."""
    HV, left, i = H * R, length - place, tl.arange(0, C)
    g_tiles = d_o + row * o_batch + (first - place) * o_token + tl.cast(h, tl.int64) * R * o_head
    inv_q, inv_k = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    along_q, along_k = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if NORM:
        inv_q = inverse_norms(q, row, q_batch, first, q_token, h, q_head, i, left, K, D)
        inv_k = inverse_norms(k, row, k_batch, first, k_token, h, k_head, i, left, K, D)
    for column in tl.range(0, K, D, num_stages=1, disable_licm=True):
        d = column + tl.arange(0, D)
        inside = (i < left)[:, None] & (d < K)[None, :]
        from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, d)
        from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, d)
        q_hat = tl.load(from_q, mask=inside, other=0.0).to(tl.float32) * inv_q[:, None]
        k_hat = tl.load(from_k, mask=inside, other=0.0).to(tl.float32) * inv_k[:, None]
        dQ = tl.zeros([C, D], tl.float32)
        dK = tl.zeros([C, D], tl.float32)
        for r in tl.range(0, R, num_stages=1, disable_licm=True):
            dQ, dK = of_head(
                dQ, dK, q_hat, k_hat, v, gate, g_tiles, gates, u, d_rhs, states, d_states, squares,
                sums, totals, d_gate, d_beta, erase, d_erase, scale, row, first, place, h * R + r,
                r, slot, i, column, length, T, chunk_slots, HV, v_batch, v_token, v_head,
                gate_batch, gate_token, gate_head, o_token, o_head, K, V, C, D, BV, GATE,
                HAS_BETA, ERASE, APART, PRECISION,
            )  # fmt: skip
        if NORM:
            along_q += tl.sum(q_hat * dQ, 1)
            along_k += tl.sum(k_hat * dK, 1)
        to_q = rows(wide_q, row * T, H * K, first, H * K, h, K, i, d)
        to_k = rows(wide_k, row * T, H * K, first, H * K, h, K, i, d)
        tl.store(to_q, dQ.to(wide_q.dtype.element_ty), mask=inside)
        tl.store(to_k, dK.to(wide_k.dtype.element_ty), mask=inside)
    if NORM:
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
        projected(
            wide_q, q, d_q, inv_q, along_q, row, q_batch, first, q_token, h, q_head, i, left, T, H,
            K, D,
        )  # fmt: skip
        projected(
            wide_k, k, d_k, inv_k, along_k, row, k_batch, first, k_token, h, k_head, i, left, T, H,
            K, D,
        )  # fmt: skip


COUNTS = ("N", "T", "chunk_slots", "H", "R")
STRIDES = ("gate_batch", "gate_token", "gate_head")


@triton.jit(do_not_specialize=COUNTS + STRIDES)
def channel_gradients(
    q, k, v, gate, d_o, gates, u, d_rhs, states, d_states, squares, sums, totals, wide_q, wide_k,
    d_q, d_k, d_gate, d_beta, erase, d_erase, cu_seqlens, scale, N, T, chunk_slots,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    gate_batch, gate_token, gate_head,
    o_batch, o_token, o_head, H, R,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, APART: tl.constexpr,
    NORM: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form the gradients of tokens, see the module. Grid (tasks that run at a time,)."""
    D: tl.constexpr = min(BK, WIDTH)
    own = totals + tl.program_id(0).to(tl.int64) * (2 * C * D)
    tasks = chunk_slots * H
    for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        slot, h = task // H, task % H
        n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
        row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
        place = chunk * C
        if place < length:
            of_chunk(
                q, k, v, gate, d_o, gates, u, d_rhs, states, d_states, squares, sums, own, wide_q,
                wide_k, d_q, d_k, d_gate, d_beta, erase, d_erase, scale, row, begin + place, place,
                h, slot, length, T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
                v_batch, v_token, v_head, gate_batch, gate_token, gate_head, o_batch, o_token,
                o_head, H, R, K, V, C, D, BV, GATE, HAS_BETA, ERASE, APART, NORM, PRECISION,
            )  # fmt: skip
