"""Form the terms of a backward that are quadratic in a chunk, where every key channel decays.

One program per chunk and value head. They are used for every block of channels, and as they are and
transposed, by `channel_gradients`, which reads them.

    reads   dO, v (B, T, HV, V); U, dRHS (HV, chunk_slots, C, V); β
    writes  dP = s lower(dO Uᵀ) and dA / β = −strict_lower(dRHS Uᵀ)            (docs/math.md §5),
            (HV, chunk_slots, 2, C, C), the second only with an error term
            dv (B, T, HV, V)
            dβ (HV, chunk_slots, C) float32 as rowsum(dRHS ⊙ U) / β; of a β below SMALL_BETA, and
            without an error term, rowsum(dRHS ⊙ V) alone
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
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
from gdn_ops.backends.triton.kernels.pair_gradients import SMALL_BETA


@triton.jit(do_not_specialize=("N", "T", "chunk_slots", "HV"))
def square_gradients(
    v, d_o, gates, u, d_rhs, squares, sums, d_v, cu_seqlens, scale, N, T, chunk_slots, HV,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, ERASE: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form dP, dA, dV and most of dβ, see the module. Grid (chunk_slots, HV)."""
    slot, hv = tl.program_id(0), tl.program_id(1)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    place = chunk * C
    if place >= length:
        return
    first, at = begin + place, hv * chunk_slots + slot
    i, j = tl.arange(0, C), tl.arange(0, C)
    valid = place + i < length
    g_tiles = d_o + row * o_batch + begin * o_token
    beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
    is_small = beta < SMALL_BETA
    dP = tl.zeros([C, C], tl.float32)
    dA = tl.zeros([C, C], tl.float32)
    d_beta = tl.zeros([C], tl.float32)
    for column in tl.range(0, V, BV, num_stages=1, disable_licm=True):
        dv = column + tl.arange(0, BV)
        inside = valid[:, None] & (dv < V)[None, :]
        from_v = rows(v, row, v_batch, first, v_token, hv, v_head, i, dv)
        U = written(
            u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid, dv < V, HV,
            chunk_slots, V, C, ERASE, PRECISION,
        )  # fmt: skip
        dR = kept_tile(d_rhs, at, 0, column, C, V, C, BV, False)
        g = head_tile(g_tiles, hv, o_head, place, column, o_token, length, V, C, BV, False)
        # §5 dP = s lower(dO Uᵀ),  dA = −strict_lower(dRHS Uᵀ), but for scale and mask     [C, C]
        dP = tl.dot(widened(g), tl.trans(U), dP, input_precision=PRECISION)
        wide, values = dR.to(tl.float32), tl.load(from_v, mask=inside, other=0.0).to(tl.float32)
        if ERASE:
            dA = tl.dot(dR, tl.trans(U), dA, input_precision=PRECISION)
            values = tl.where(is_small[:, None], values, U.to(tl.float32))
        # §5 dβ = rowsum(dRHS ⊙ U) / β, or rowsum(dRHS ⊙ V) + ...                           [C]
        d_beta += tl.sum(tl.where(inside, wide * values, 0.0), 1)
        # §5 dV = diag(β) dRHS                                                             [C, BV]
        to_dv = rows(d_v, row * T, HV * V, first, HV * V, hv, V, i, dv)
        tl.store(to_dv, (wide * beta[:, None]).to(d_v.dtype.element_ty), mask=inside)
    if ERASE:
        d_beta = tl.where(is_small, d_beta, d_beta / tl.where(is_small, 1.0, beta))
    tl.store(chunk_row(sums, hv, slot, i, chunk_slots, C), d_beta)
    to = squares + tl.cast(at, tl.int64) * (2 * C * C) + i[:, None] * C + j[None, :]
    kept: tl.constexpr = squares.dtype.element_ty
    dP = tl.where(i[:, None] >= j[None, :], dP * scale, 0.0)
    tl.store(to, operand(dP, kept, PRECISION))
    if ERASE:
        dA = tl.where(i[:, None] > j[None, :], -dA, 0.0)
        tl.store(to + C * C, operand(dA, kept, PRECISION))
