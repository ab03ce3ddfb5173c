"""Compute the gradients of the tokens of a chunk, given U, S, dRHS and dS.

One program per chunk and key head. The squares of the chunk are summed over the R value heads
(`pair_gradients`), and what comes through the states is added to dq, then to dk; each sum has a
loop over the heads of its own, so that no two lie in registers at a time. Sums of tokens are
written to memory, and the gradients of gates and β made of them in the end (`gate_gradients`). No
sum leaves a program: no atomics, and the same call gives the same bits. FLA's names are
`chunk_bwd_dqkwg` and `prepare_wy_repr_bwd`.

    reads   q, k, v, α, dO; gates; U, dRHS (HV, chunk_slots, C, V); S, dS (HV, chunk_slots, V, K),
            transposed
    writes  dq, dk (B, T, H, K), dv (B, T, HV, V), dα or d log α, dβ (B, T, HV)
            sums of tokens (6, HV, chunk_slots, C) and of rows of S dS_Cᵀ (HV, chunk_slots, BV),
            float32, numbers of rows (H, chunk_slots, C or BV) int32
            with REREAD squares (H, chunk_slots, 2, C, C), to read them transposed
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    NO_DECAY,
    chunk_decay,
    chunk_row,
    head_tile,
    inverse_norm,
    kept_tile,
    operand,
    owner,
    read_beta,
    read_tile,
    rows,
    sequence,
    tiles_of,
    widened,
    write_head_tile,
    write_tile,
    written,
)
from gdn_ops.backends.triton.kernels.gate_gradients import gate_gradients
from gdn_ops.backends.triton.kernels.pair_gradients import (
    ENDS,
    ERASED,
    OF_BETA,
    SMALL_BETA,
    STARTS,
    pair_gradients,
)


@triton.jit
def normalised(tile, inv_norm, NORM: tl.constexpr, PRECISION: tl.constexpr):
    """Return a tile as an operand, its rows of norm 1 with NORM."""
    x = widened(tile)
    if NORM:
        x = operand(tile.to(tl.float32) * inv_norm[:, None], x.dtype, PRECISION)
    return x


@triton.jit
def projected(d_x, tile, inv_norm):
    """Return the gradient of y from that of y / ‖y‖, (C, BK)."""
    wide = tile.to(tl.float32) * inv_norm[:, None]
    return (d_x - wide * tl.sum(wide * d_x, 1)[:, None]) * inv_norm[:, None]


@triton.jit
def erased_pairs(
    k_tiles, inv_k, v, gates, sums, places, r_tiles, u_tiles, i, row, first, place, h, slot,
    length, chunk_slots, k_token, v_batch, v_token, v_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    TMA: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return M summed over the R value heads as an operand, (C, C); write sums of tokens."""
    # §5 M                                                                               [C, C]
    k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
    kk = tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    if NORM:
        kk *= inv_k[:, None] * inv_k[None, :]
    j = tl.load(places + i)
    kk = tl.where(i[:, None] > j[None, :], kk, 0.0)
    M = pair_gradients(
        kk, v, gates, sums, places, r_tiles, u_tiles, i, row, first, place, h, slot, length,
        chunk_slots, v_batch, v_token, v_head, V, V,
        H, R, V, C, BV, GATE, HAS_BETA, ERASE, True, TMA, dtype, PRECISION,
    )  # fmt: skip
    j = tl.load(places + i)
    M = tl.where(i[:, None] > j[None, :], M, 0.0)
    return operand(M, dtype, PRECISION)


@triton.jit
def through_states(
    d_x, q_tiles, inv_q, gates, sums, corners, places, g_tiles, s_tiles, ds_tiles, scale, i, place,
    h, slot, length, chunk_slots, q_token, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dQ (C, BK) with what comes through the states; write sums of STARTS, and corners."""
    HV = H * R
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        at = hv * chunk_slots + slot
        # §5 s diag(b) dO Sᵀ to dQ; E_i,start += s rowsum(dO ⊙ Q S)                          [C, BK]
        x = tl.zeros([C, BK], tl.float32)
        corner = tl.zeros([BV, BV], tl.float32)
        for column in tl.range(0, V, BV, disable_licm=True):
            g = head_tile(g_tiles, r, o_head, place, column, o_token, length, V, C, BV, TMA)
            S = kept_tile(s_tiles, at, column, 0, V, K, BV, BK, TMA)
            x = tl.dot(widened(g), S, x, input_precision=PRECISION)
            if GATE != NO_DECAY and TMA:
                dS = kept_tile(ds_tiles, at, column, 0, V, K, BV, BK, TMA)
                corner = tl.dot(S, tl.trans(dS), corner, input_precision=PRECISION)
        if GATE != NO_DECAY:
            if not TMA:
                # Form this product apart: both at once would not fit the registers.
                for column in tl.range(0, V, BV, disable_licm=True):
                    S = kept_tile(s_tiles, at, column, 0, V, K, BV, BK, TMA)
                    dS = kept_tile(ds_tiles, at, column, 0, V, K, BV, BK, TMA)
                    corner = tl.dot(S, tl.trans(dS), corner, input_precision=PRECISION)
            # §5 E_C,start = ⟨dS_C, S⟩, the sum of the diagonal of S dS_Cᵀ                  [BV, BV]
            m = tl.arange(0, BV)
            corner = tl.where(m[:, None] == tl.load(places + m)[None, :], corner, 0.0)
            to_corner = chunk_row(corners, hv, slot, m, chunk_slots, BV)
            tl.store(to_corner, tl.sum(corner, 1))
            q_tile = read_tile(q_tiles, place, 0, q_token, length, K, C, BK, TMA)
            start = tl.sum(x * q_tile.to(tl.float32), 1) * (inv_q * scale)
            tl.store(chunk_row(sums, HV * STARTS + hv, slot, i, chunk_slots, C), start)
            b, _d, _b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
            d_x += x * (b * scale)[:, None]
        else:
            d_x += x * scale
    return d_x


@triton.jit
def through_rhs(
    d_x, k_tiles, inv_k, v, gates, sums, r_tiles, s_tiles, dv_tiles, i, row, first, place, h, slot,
    length, chunk_slots, k_token, v_batch, v_token, v_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dK (C, BK) with what comes through dRHS; write dV, sums of ERASED; finish OF_BETA."""
    HV = H * R
    valid = place + i < length
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        at = hv * chunk_slots + slot
        beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
        is_small = valid
        if ERASE:
            is_small = valid & (beta < SMALL_BETA)
        with_v = HAS_BETA and tl.max(is_small.to(tl.int32), 0) > 0
        d_b = tl.zeros([C], tl.float32)
        x = tl.zeros([C, BK], tl.float32)
        for column in tl.range(0, V, BV, disable_licm=True):
            dR = kept_tile(r_tiles, at, 0, column, C, V, C, BV, TMA)
            if ERASE:
                S = kept_tile(s_tiles, at, column, 0, V, K, BV, BK, TMA)
                x = tl.dot(dR, S, x, input_precision=PRECISION)
            if with_v:
                # §5 dβ = rowsum(dRHS ⊙ V) ..., where it is not rowsum(dRHS ⊙ U) / β             [C]
                dv = column + tl.arange(0, BV)
                from_v = rows(v, row, v_batch, first, v_token, hv, v_head, i, dv)
                inside = is_small[:, None] & (dv < V)[None, :]
                values = tl.load(from_v, mask=inside, other=0.0)
                d_b += tl.sum(dR.to(tl.float32) * values.to(tl.float32), 1)
            # §5 dV = diag(β) dRHS                                                           [C, BV]
            dV = dR.to(tl.float32) * beta[:, None]
            write_head_tile(dv_tiles, dV, r, V, place, column, HV * V, length, V, C, BV, TMA)
        if with_v:
            to_beta = chunk_row(sums, HV * OF_BETA + hv, slot, i, chunk_slots, C)
            if ERASE:
                d_b += tl.load(to_beta)
            tl.store(to_beta, d_b, mask=is_small)
        if ERASE:
            # §5 − diag(βb) dRHS Sᵀ to dK,  rowsum(dRHS ⊙ K S)                               [C, BK]
            k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
            erased = tl.sum(x * k_tile.to(tl.float32), 1) * inv_k
            tl.store(chunk_row(sums, HV * ERASED + hv, slot, i, chunk_slots, C), erased)
            if GATE != NO_DECAY:
                b, _d, _b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
                beta *= b
            d_x -= x * beta[:, None]
    return d_x


@triton.jit
def through_written(
    d_x, k_tiles, inv_k, v, gates, sums, u_tiles, ds_tiles, i, row, first, place, h, slot, length,
    chunk_slots, k_token, v_batch, v_token, v_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dK (C, BK) with what comes through dS at the chunk's end; write sums of ENDS."""
    HV = H * R
    valid = place + i < length
    for r in tl.range(0, R, disable_licm=True):
        hv = h * R + r
        at = hv * chunk_slots + slot
        # §5 diag(d) U dS_Cᵀ to dK; E_C,j += rowsum((K dS_C) ⊙ U)                            [C, BK]
        x = tl.zeros([C, BK], tl.float32)
        for column in tl.range(0, V, BV, disable_licm=True):
            dS = kept_tile(ds_tiles, at, column, 0, V, K, BV, BK, TMA)
            if ERASE:
                U = kept_tile(u_tiles, at, 0, column, C, V, C, BV, TMA)
            else:
                dv = column + tl.arange(0, BV)
                U = written(
                    u_tiles, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid,
                    dv < V, HV, chunk_slots, V, C, ERASE, PRECISION,
                )  # fmt: skip
            x = tl.dot(U, dS, x, input_precision=PRECISION)
        if GATE != NO_DECAY:
            k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
            end = tl.sum(x * k_tile.to(tl.float32), 1) * inv_k
            tl.store(chunk_row(sums, HV * ENDS + hv, slot, i, chunk_slots, C), end)
            _b, d, _b_C = chunk_decay(gates, hv, slot, i, HV, chunk_slots, C, 0)
            x *= d[:, None]
        d_x += x
    return d_x


@triton.jit
def keep_square(square, x, i, C: tl.constexpr, REREAD: tl.constexpr):
    """Write x (C, C) with REREAD, for `turned`."""
    if REREAD:
        tl.store(square + i[:, None] * C + tl.arange(0, C)[None, :], x)


@triton.jit
def turned(square, x, i, C: tl.constexpr, REREAD: tl.constexpr):
    """Return x transposed; with REREAD it is what `keep_square` has written.

    Before Triton 3.7.1 a product with a transposed product is wrong on Hopper.
    """
    if REREAD:
        x = tl.load(square + i[:, None] * C + tl.arange(0, C)[None, :])
    return tl.trans(x)


@triton.jit
def places_of_rows(places, h, slot, chunk_slots, WIDEST: tl.constexpr):
    """Write the numbers of rows of a chunk to memory of its own; return the pointer to them."""
    places += (tl.cast(h, tl.int64) * chunk_slots + slot) * WIDEST
    tl.store(places + tl.arange(0, WIDEST), tl.arange(0, WIDEST))
    return places


@triton.jit(do_not_specialize=("N", "T", "chunk_slots", "H", "R"))
def token_gradients(
    q, k, v, gate, d_o, gates, u, d_rhs, states, d_states, squares, sums, corners, places, d_q,
    d_k, d_v, d_gate, d_beta, cu_seqlens, scale,
    N, T, chunk_slots, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, o_batch, o_token, o_head,
    H, R, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, HAS_BETA: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, TMA: tl.constexpr, REREAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form the gradients of tokens, see the module. Grid (chunk_slots, H)."""
    HV = H * R
    slot, h = tl.program_id(0), tl.program_id(1)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    place = chunk * C
    if place >= length:
        return
    first = begin + place
    i = tl.arange(0, C)
    of_heads = tl.cast(h, tl.int64) * R
    o_start = row * o_batch + begin * o_token + of_heads * o_head
    g_tiles = tiles_of(d_o, o_start, o_token, length, R * V, C, BV, TMA)
    u_tiles = u
    if ERASE:
        u_tiles = tiles_of(u, 0, V, HV * chunk_slots * C, V, C, BV, TMA)
    r_tiles = tiles_of(d_rhs, 0, V, HV * chunk_slots * C, V, C, BV, TMA)
    s_tiles = tiles_of(states, 0, K, HV * chunk_slots * V, K, BV, BK, TMA)
    ds_tiles = tiles_of(d_states, 0, K, HV * chunk_slots * V, K, BV, BK, TMA)
    v_start = ((row * T + begin) * HV + of_heads) * V
    dv_tiles = tiles_of(d_v, v_start, HV * V, length, R * V, C, BV, TMA)
    q_start = row * q_batch + begin * q_token + tl.cast(h, tl.int64) * q_head
    q_tiles = tiles_of(q, q_start, q_token, length, K, C, BK, TMA)
    k_start = row * k_batch + begin * k_token + tl.cast(h, tl.int64) * k_head
    k_tiles = tiles_of(k, k_start, k_token, length, K, C, BK, TMA)

    # Numbers of rows are read where masks need them: formed, they would be kept in registers.
    places = places_of_rows(places, h, slot, chunk_slots, max(C, BV))
    tl.debug_barrier()
    # §5 dP ⊙ D                                                                               [C, C]
    q_tile = read_tile(q_tiles, place, 0, q_token, length, K, C, BK, TMA)
    k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    inv_q = tl.full([C], 1.0, tl.float32)
    inv_k = inv_q
    if NORM:
        inv_q, inv_k = inverse_norm(q_tile), inverse_norm(k_tile)
        qk *= inv_q[:, None] * inv_k[None, :]
    j = tl.load(places + i)
    qk = tl.where(i[:, None] >= j[None, :], qk, 0.0)
    pairs = pair_gradients(
        qk, v, gates, sums, places, g_tiles, u_tiles, i, row, first, place, h, slot, length,
        chunk_slots, v_batch, v_token, v_head, o_token, o_head,
        H, R, V, C, BV, GATE, HAS_BETA, ERASE, False, TMA, d_rhs.dtype.element_ty, PRECISION,
    )  # fmt: skip
    j = tl.load(places + i)
    pairs = tl.where(i[:, None] >= j[None, :], pairs, 0.0) * scale
    pairs = operand(pairs, d_rhs.dtype.element_ty, PRECISION)
    squares += (tl.cast(h, tl.int64) * chunk_slots + slot) * (2 * C * C)
    keep_square(squares, pairs, i, C, REREAD)
    # q and k are read again for every head: they would not fit the registers either.
    # §5 (dP ⊙ D) K to dQ, of the normalised q, k                                            [C, BK]
    k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
    d_x = tl.dot(pairs, normalised(k_tile, inv_k, NORM, PRECISION), input_precision=PRECISION)
    d_x = through_states(
        d_x, q_tiles, inv_q, gates, sums, corners, places, g_tiles, s_tiles, ds_tiles, scale, i,
        place, h, slot, length, chunk_slots, q_token, o_token, o_head,
        H, R, K, V, C, BK, BV, GATE, TMA, PRECISION,
    )  # fmt: skip
    if NORM:
        q_tile = read_tile(q_tiles, place, 0, q_token, length, K, C, BK, TMA)
        d_x = projected(d_x, q_tile, inv_q)
    x_start = ((row * T + begin) * H + h) * K
    dq_tiles = tiles_of(d_q, x_start, H * K, length, K, C, BK, TMA)
    write_tile(dq_tiles, d_x.to(d_q.dtype.element_ty), place, 0, H * K, length, K, C, BK, TMA)

    if ERASE:
        M = erased_pairs(
            k_tiles, inv_k, v, gates, sums, places, r_tiles, u_tiles, i, row, first, place, h, slot,
            length, chunk_slots, k_token, v_batch, v_token, v_head, H, R, K, V, C, BK, BV, GATE,
            HAS_BETA, ERASE, NORM, TMA, d_rhs.dtype.element_ty, PRECISION,
        )  # fmt: skip
        keep_square(squares + C * C, M, i, C, REREAD)
    # §5 (dP ⊙ D)ᵀ Q,  (M + Mᵀ) K to dK                                                      [C, BK]
    q_tile = read_tile(q_tiles, place, 0, q_token, length, K, C, BK, TMA)
    q_hat = normalised(q_tile, inv_q, NORM, PRECISION)
    # Wait: a thread reads what another one has stored.
    tl.debug_barrier()
    d_x = tl.dot(turned(squares, pairs, i, C, REREAD), q_hat, input_precision=PRECISION)
    k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
    if ERASE:
        k_hat = normalised(k_tile, inv_k, NORM, PRECISION)
        d_x = tl.dot(M, k_hat, d_x, input_precision=PRECISION)
        Mt = turned(squares + C * C, M, i, C, REREAD)
        d_x = tl.dot(Mt, k_hat, d_x, input_precision=PRECISION)
    d_x = through_rhs(
        d_x, k_tiles, inv_k, v, gates, sums, r_tiles, s_tiles, dv_tiles, i, row, first, place, h,
        slot, length, chunk_slots, k_token, v_batch, v_token, v_head,
        H, R, K, V, C, BK, BV, GATE, HAS_BETA, ERASE, TMA, PRECISION,
    )  # fmt: skip
    d_x = through_written(
        d_x, k_tiles, inv_k, v, gates, sums, u_tiles, ds_tiles, i, row, first, place, h, slot,
        length, chunk_slots, k_token, v_batch, v_token, v_head,
        H, R, K, V, C, BK, BV, GATE, ERASE, TMA, PRECISION,
    )  # fmt: skip
    if NORM:
        k_tile = read_tile(k_tiles, place, 0, k_token, length, K, C, BK, TMA)
        d_x = projected(d_x, k_tile, inv_k)
    dk_tiles = tiles_of(d_k, x_start, H * K, length, K, C, BK, TMA)
    write_tile(dk_tiles, d_x.to(d_k.dtype.element_ty), place, 0, H * K, length, K, C, BK, TMA)
    if GATE != NO_DECAY or HAS_BETA:
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
        # Find the chunk again, by a zero that is read: kept, it would not fit the registers.
        zero = tl.load(places)
        gate_gradients(
            q, k, v, gate, d_o, gates, u, d_rhs, sums, corners, d_gate, d_beta, cu_seqlens, scale,
            slot + zero, h + zero, N, T, chunk_slots, q_batch, q_token, q_head,
            k_batch, k_token, k_head, v_batch, v_token, v_head, o_batch, o_token, o_head,
            H, R, K, V, C, BK, BV, GATE, HAS_BETA, ERASE, NORM, VARLEN, PRECISION,
        )  # fmt: skip
