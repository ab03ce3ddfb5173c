"""Compute the gates of every chunk and, with an error term, T = (I + A)⁻¹: the first launch.

One program per chunk and key head. K Kᵀ is formed once and serves the R value heads. FLA's names
are `chunk_local_cumsum` and `chunk_gated_delta_rule_fwd_kkt_solve`.

    reads   k (B, T, H, K); α or log α, β (B, T, HV)
    writes  gates (4, HV, chunk_slots, C) float32: G as hi and lo, z, β       (docs/math.md §4)
            inv_norms (H, chunk_slots, C) float32: 1/‖k‖, only with qk_l2norm
            T (HV, chunk_slots, C, C) in the dtype of what is kept            (docs/math.md §3)
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    ALPHA,
    LOG_FLOOR,
    NO_DECAY,
    chunk_row,
    chunk_rows,
    decay,
    inverse_norm,
    operand,
    owner,
    rows,
    sequence,
    unit_lower_inverse,
)


@triton.jit
def log_sums(gate, valid, GATE: tl.constexpr):
    """Return G = hi + lo and z of a chunk, float32 (C,) each (docs/math.md §4).

    The logarithm and the sum are float64: next to a strong decay, G_i - G_j of later tokens
    is a small difference of large numbers, and fast float32 logarithms are off near α = 1.
    """
    if GATE == ALPHA:
        alpha = tl.load(gate, mask=valid, other=1.0).to(tl.float32)
        zero = alpha == 0.0
        log = tl.log(tl.where(zero, 1.0, alpha).to(tl.float64))
    else:
        given = tl.load(gate, mask=valid, other=0.0).to(tl.float32)
        zero = given == float("-inf")
        finite = tl.where(zero, 0.0, given)
        log = tl.where(finite < LOG_FLOOR, LOG_FLOOR, finite).to(tl.float64)
    G = tl.cumsum(log, 0)
    hi = G.to(tl.float32)
    return hi, (G - hi.to(tl.float64)).to(tl.float32), tl.cumsum(zero.to(tl.float32), 0)


@triton.jit
def solve(
    k, gate, beta, gates, inv_norms, inverses, cu_seqlens,
    N, T, chunk_slots, k_batch, k_token, k_head,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute gates, inv_norms and T, see the module. Grid (chunk_slots, H)."""
    HV: tl.constexpr = H * R
    slot, h = tl.program_id(0), tl.program_id(1)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    i = tl.arange(0, C)
    valid = chunk * C + i < length
    if chunk * C >= length:
        return
    first = begin + chunk * C
    if ERASE or NORM:
        d = tl.arange(0, BK)
        from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, d)
        k_tile = tl.load(from_k, mask=valid[:, None] & (d < K)[None, :], other=0.0)
    if NORM:
        inv_norm = inverse_norm(k_tile)
        tl.store(chunk_row(inv_norms, h, slot, i, chunk_slots, C), inv_norm)
    if ERASE:
        # K Kᵀ, once for the R value heads                                       [C, C]
        kk = tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
        if NORM:
            kk *= inv_norm[:, None] * inv_norm[None, :]
        kk = tl.where(i[:, None] > i[None, :], kk, 0.0)
    # Hoisting what the heads share out of the loop would spill registers.
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        at = (row * T + first) * HV + hv
        plane = tl.cast(HV, tl.int64) * chunk_slots * C
        to = chunk_row(gates, hv, slot, i, chunk_slots, C)
        if HAS_BETA:
            b = tl.load(beta + at + i * HV, mask=valid, other=0.0).to(tl.float32)
        else:
            b = tl.where(valid, 1.0, 0.0)
        tl.store(to + 3 * plane, b)
        if GATE != NO_DECAY:
            # §4 G, z                                                            [C]
            hi, lo, z = log_sums(gate + at + i * HV, valid, GATE)
            tl.store(to, hi)
            tl.store(to + plane, lo)
            tl.store(to + 2 * plane, z)
        if ERASE:
            # §3 A = strict_lower(diag(β) (K Kᵀ ⊙ D)),  T = (I + A)⁻¹            [C, C]
            a = kk * b[:, None]
            if GATE != NO_DECAY:
                a *= decay(
                    hi[:, None], lo[:, None], z[:, None], hi[None, :], lo[None, :], z[None, :], 0
                )
            x = unit_lower_inverse(a, C, SOLVE_PRECISION)
            to_T = chunk_rows(inverses, hv, slot, i, i, chunk_slots, C, C)
            tl.store(to_T, operand(x, inverses.dtype.element_ty, PRECISION))
