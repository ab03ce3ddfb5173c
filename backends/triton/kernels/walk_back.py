"""Walk dS, the gradient of the state, back over the chunks of a sequence.

One program per segment, value head and block of BV columns of V, as in `walk`: it holds dSᵀ,
(BV, BK) float32, in registers, the left operand of every product. FLA's names are
`chunk_bwd_dv_local` and `chunk_gated_delta_rule_bwd_dhu`.

    reads   q, k, dO (B, T, ., .); T, P, factors and ends of `prepare`; with CHANNELS rows of
            `prepare_channels` instead of q and k; dS at the end of a segment,
            (segment_slots, HV, K, V), or of the final state (N, HV, K, V)
    writes  dRHS (HV, chunk_slots, C, V) and the transposed dS at every chunk's end
            (HV, chunk_slots, V, K), in the dtype of what is kept
            dS of the initial state (N, HV, K, V) float32
            or, with SHIFTS, dS at the start of segments but the first, (segment_slots, HV, K, V),
            instead of all that, given that it is 0 at the end, and for the last one that of the
            final state; with STAGED, where that is not known yet, of all segments given 0
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    chunk_row,
    decay_of_chunk,
    operand,
    owner,
    read_tile,
    sequence,
    state_tiles,
    tiles_of,
    tokens_of,
    widened,
    write_factors,
    write_state,
    write_tile,
)


@triton.jit(do_not_specialize=("N", "T", "L", "chunk_slots", "HV", "R"))
def walk_back(
    q, k, d_o, writes, factors, ends, inverses, scores, d_end, d_rhs, d_states, d_start, cu_seqlens,
    N, T, L, chunk_slots, HV, R, q_batch, q_token, q_head, k_batch, k_token, k_head,
    o_batch, o_token, o_head,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, SHIFTS: tl.constexpr, SEGMENTED: tl.constexpr,
    STAGED: tl.constexpr, VARLEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Walk dS back, see the module. Grid (N HV or segment_slots HV, ceil(V / BV)).

    With SHIFTS, where sequences are as long, (N HV, that times the segments but one) unless STAGED.
    """
    n, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    h, block, place = hv // R, tl.program_id(1), n
    begin_chunk = 0
    if SEGMENTED:
        if (SHIFTS and not STAGED) and not VARLEN:
            segment, block = 1 + block // tl.cdiv(V, BV), block % tl.cdiv(V, BV)
            place = n * tl.cdiv(T, C * L) + segment
        else:
            n, segment = owner(n, cu_seqlens, N, T, C * L, VARLEN)
        begin_chunk = segment * L
    row, begin, length, first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    end_chunk = tl.cdiv(length, C)
    is_last = True
    if SEGMENTED:
        is_last = begin_chunk + L >= end_chunk
        end_chunk = tl.minimum(end_chunk, begin_chunk + L)
        # A slot may be empty, and what the first segment shifts is not needed.
        if begin_chunk >= end_chunk:
            return
        if (SHIFTS and not STAGED) and segment == 0:
            return
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv_0 = block * BV
    dv = dv_0 + tl.arange(0, BV)
    in_state = (dv < V)[:, None] & (dk < K)[None, :]
    q_tiles = tokens_of(q, row, q_batch, begin, q_token, h, q_head, length, K, C, BK, TMA)
    k_tiles = tokens_of(k, row, k_batch, begin, k_token, h, k_head, length, K, C, BK, TMA)
    w_tiles = k_tiles
    if CHANNELS:
        w_tiles = tokens_of(writes, row, k_batch, begin, k_token, h, k_head, length, K, C, BK, TMA)
    g_tiles = tokens_of(d_o, row, o_batch, begin, o_token, hv, o_head, length, V, C, BV, TMA)
    in_head = tl.cast(hv, tl.int64) * chunk_slots * C
    p_tiles = tiles_of(scores, in_head * C, C, chunk_slots * C, C, C, C, TMA)
    if ERASE:
        x_tiles = tiles_of(inverses, in_head * C, C, chunk_slots * C, C, C, C, TMA)
    if not SHIFTS:
        r_tiles = tiles_of(d_rhs, in_head * V, V, chunk_slots * C, V, C, BV, TMA)
        s_tiles = state_tiles(d_states, hv, chunk_slots, V, K, BV, BK, TMA)
    own = (tl.cast(place, tl.int64) * HV + hv) * (K * V)
    cell = dk[None, :] * V + dv[:, None]
    dS = tl.zeros([BV, BK], tl.float32)
    if not STAGED:
        from_end, known = d_end + own + cell, in_state
        if SHIFTS and SEGMENTED:
            from_end = d_end + (tl.cast(n, tl.int64) * HV + hv) * (K * V) + cell
            known = in_state & is_last
        dS = tl.load(from_end, mask=known, other=0.0)
    for step in range(end_chunk - begin_chunk):
        chunk = end_chunk - 1 - step
        slot = (first_slot + chunk).to(tl.int32)
        first = chunk * C
        k_tile = widened(read_tile(w_tiles, first, 0, k_token, length, K, C, BK, TMA))
        g = tl.trans(widened(read_tile(g_tiles, first, dv_0, o_token, length, V, C, BV, TMA)))
        # Only what leads to the operand of a product is loaded ahead by the compiler.
        if DECAY:
            b_C = decay_of_chunk(ends, hv, slot, dk, chunk_slots, K, CHANNELS)
        write = write_factors(factors, hv, slot, i, HV, chunk_slots, C, CHANNELS)
        dS_low = operand(dS, k_tile.dtype, PRECISION)
        if not SHIFTS:
            kept = dS_low.to(d_states.dtype.element_ty)
            write_state(s_tiles, kept, slot, dv_0, V, K, BV, BK, TMA)
        # §5 dU = Pᵀ dO + diag(d) K dS_C, transposed                             [BV, C]
        dU = tl.dot(dS_low, tl.trans(k_tile), input_precision=PRECISION) * write[None, :]
        p = read_tile(p_tiles, slot * C, 0, C, chunk_slots * C, C, C, C, TMA)
        dU = tl.dot(g, p, dU, input_precision=PRECISION)
        if ERASE:
            # §5 dRHS = Tᵀ dU                                                    [BV, C]
            x = read_tile(x_tiles, slot * C, 0, C, chunk_slots * C, C, C, C, TMA)
            dU = tl.dot(operand(dU, x.dtype, PRECISION), x, input_precision=PRECISION)
        if not SHIFTS:
            kept = tl.trans(operand(dU, d_rhs.dtype.element_ty, PRECISION))
            write_tile(r_tiles, kept, slot * C, dv_0, V, chunk_slots * C, V, C, BV, TMA)
        # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS            [BV, BK]
        if DECAY:
            dS *= b_C
        q_tile = widened(read_tile(q_tiles, first, 0, q_token, length, K, C, BK, TMA))
        read = tl.load(chunk_row(factors, HV + hv, slot, i, chunk_slots, C))
        g_low = operand(g.to(tl.float32) * read[None, :], q_tile.dtype, PRECISION)
        dS = tl.dot(g_low, q_tile, dS, input_precision=PRECISION)
        if ERASE:
            if CHANNELS:
                k_tile = read_tile(k_tiles, first, 0, k_token, length, K, C, BK, TMA)
            erase = tl.load(chunk_row(factors, hv, slot, i, chunk_slots, C))
            dU_low = operand(-dU * erase[None, :], k_tile.dtype, PRECISION)
            dS = tl.dot(dU_low, k_tile, dS, input_precision=PRECISION)
    if SEGMENTED and not SHIFTS:
        if segment > 0:
            return
        own = (tl.cast(n, tl.int64) * HV + hv) * (K * V)
    tl.store(d_start + own + cell, dS, mask=in_state)
