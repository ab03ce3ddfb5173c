"""Form the terms of a backward that are quadratic in a chunk, summed over R value heads.

`token_gradients` calls it, for P and for A: the sums stay in the registers of its program. In FLA
they are part of `chunk_bwd_dqkwg` and `prepare_wy_repr_bwd`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    LOG2_E,
    LOG_FLOOR,
    NO_DECAY,
    chunk_row,
    decay,
    head_tile,
    kept_tile,
    operand,
    read_beta,
    read_gates,
    widened,
    written,
)

SMALL_BETA = tl.constexpr(1e-6)
"""The least β that dβ is divided by; below it, dβ is formed without a quotient."""

STARTS = tl.constexpr(0)
ENDS = tl.constexpr(1)
ERASED = tl.constexpr(2)
INNER = tl.constexpr(3)
OF_BETA = tl.constexpr(5)
"""Planes of the sums of a token: E_i,start but for what is erased; E_C,i; rowsum(dRHS ⊙ K S);
those over pairs i ≥ t > j, of P and of A; and what dβ is formed of."""


@triton.jit
def pair_decay(gates, hv, slot, i, j, HV, chunk_slots, C: tl.constexpr, ROUNDED: tl.constexpr):
    """Return D_ij, (C, C), at most 1 where i < j.

    With ROUNDED, of sums that are float32: the error is that of a bfloat16 at most.
    """
    hi_i, lo_i, z_i = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
    hi, lo, z = read_gates(gates, hv, slot, j, HV, chunk_slots, C)
    if ROUNDED:
        # A zero is as good as e**-1000: what crosses it is 0.
        G_i = (hi_i + z_i * LOG_FLOOR) * LOG2_E
        G = (hi + z * LOG_FLOOR) * LOG2_E
        log = G_i[:, None] - G[None, :]
        # A minimum that drops NaN would hide one.
        return tl.exp2(tl.minimum(log, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return decay(
        hi_i[:, None], lo_i[:, None], z_i[:, None], hi[None, :], lo[None, :], z[None, :], 0
    )


@triton.jit
def straddling(X, later, i, j, PRECISION: tl.constexpr):
    """Return the sum of X_ij over the pairs i ≥ t > j, for every t: (C,).

    Only such pairs are added and none is subtracted: each holds α_t as a factor, so that
    the sum keeps its precision relative to a tiny α_t.

    Args:
        X: (C, C) float32.
        later: 1 for j ≥ i, else 0, in the dtype of operands.
    """
    from_t = tl.dot(later, operand(X, later.dtype, PRECISION), input_precision=PRECISION)
    return tl.sum(tl.where(i[:, None] > j[None, :], from_t, 0.0), 1)


@triton.jit
def pair_gradients(
    xy, v, gates, sums, places, left_tiles, u_tiles, i, row, first, place, h, slot, length,
    chunk_slots, v_batch, v_token, v_head, left_token, left_head,
    H, R, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    HAS_BETA: tl.constexpr, ERASE: tl.constexpr, OF_A: tl.constexpr, TMA: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Σ_r dP ⊙ D / s, (C, C), or with OF_A Σ_r M.

    Write sums of INNER, with OF_A of INNER + 1 and OF_BETA. What is returned has no meaning above
    the diagonal, nor has M on it.

    Args:
        xy: s lower(Q Kᵀ), with OF_A strict_lower(K Kᵀ).
        left_tiles: of dO, with OF_A of dRHS.
        place: the chunk's first token in its sequence; `first` counts from the row's beginning.
        the others: as in `token_gradients`.
    """
    HV = H * R
    valid = place + i < length
    total = tl.zeros([C, C], tl.float32)
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        at = hv * chunk_slots + slot
        # §5 dP = s lower(dO Uᵀ),  −dA = strict_lower(dRHS Uᵀ), but for scale and mask       [C, C]
        x = tl.zeros([C, C], tl.float32)
        for column in tl.range(0, V, BV, disable_licm=True):
            if OF_A:
                left = kept_tile(left_tiles, at, 0, column, C, V, C, BV, TMA)
            else:
                left = head_tile(
                    left_tiles, r, left_head, place, column, left_token, length, V, C, BV, TMA
                )
            if ERASE:
                U = kept_tile(u_tiles, at, 0, column, C, V, C, BV, TMA)
            else:
                dv = column + tl.arange(0, BV)
                U = written(
                    u_tiles, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid,
                    dv < V, HV, chunk_slots, V, C, ERASE, PRECISION,
                )  # fmt: skip
            x = tl.dot(widened(left), tl.trans(U), x, input_precision=PRECISION)
        if GATE != NO_DECAY:
            D = pair_decay(
                gates, hv, slot, i, tl.arange(0, C), HV, chunk_slots, C, dtype == tl.bfloat16
            )
        if OF_A:
            beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
            if HAS_BETA:
                # §5 dβ = rowsum(dRHS ⊙ U) / β, or rowsum(dA ⊙ K Kᵀ ⊙ D) + ...               [C]
                j = tl.load(places + tl.arange(0, C))
                of_beta = tl.sum(tl.where(i[:, None] == j[None, :], x, 0.0), 1)
                is_small = valid & (beta < SMALL_BETA)
                if tl.max(is_small.to(tl.int32), 0) > 0:
                    others = -x * xy
                    if GATE != NO_DECAY:
                        others *= D
                    of_beta = tl.where(is_small, tl.sum(others, 1), of_beta)
                tl.store(chunk_row(sums, HV * OF_BETA + hv, slot, i, chunk_slots, C), of_beta)
            x *= -beta[:, None]
        # §5 dP ⊙ D,  M = diag(β) dA ⊙ D                                                  [C, C]
        if GATE != NO_DECAY:
            x *= D
        total += x
        if GATE != NO_DECAY:
            # §5 d log α_t: X = E ⊙ D over i ≥ t > j                                        [C]
            # Form the mask after the sum, in the layout of operands: x and D are held no longer.
            j = tl.load(places + tl.arange(0, C))
            later = tl.where((i[:, None] <= j[None, :]) & (total == total), 1.0, 0.0).to(dtype)
            inner = straddling(x * xy, later, i, j, PRECISION)
            to_inner = chunk_row(sums, HV * (INNER + OF_A) + hv, slot, i, chunk_slots, C)
            tl.store(to_inner, inner)
    return total
