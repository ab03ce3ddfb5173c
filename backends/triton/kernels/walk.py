"""Walk the state over the chunks of a sequence, the only serial part: the second launch.

One program per segment, value head and block of BV columns of V; a segment is L chunks of a
sequence, or all (docs/math.md §6). It holds Sᵀ, (BV, BK) float32, in
registers, and every product of a chunk has its left operand there: Sᵀ Kᵀ, Eᵀ Tᵀ, Uᵀ K and
Sᵀ Qᵀ + Uᵀ Pᵀ follow one another without a way through shared memory, which holds the right ones.
FLA's names are `chunk_gated_delta_rule_fwd_h` and, for the output, `chunk_fwd_o`.

    reads   q, k, v (B, T, ., .); T, P, β, factors and ends of `prepare`; with CHANNELS rows of
            `prepare_channels` instead of q and k; the state that a segment starts from,
            (segment_slots, HV, K, V), or a sequence, (N, HV, K, V)
    writes  with OUTPUT o (B, T, HV, V)
            with KEEP U (HV, chunk_slots, C, V), only with an error term, and the transposed state
            at the start of every chunk (HV, chunk_slots, V, K), in the dtype of what is kept
            the final state (N, HV, K, V) float32
            or, with MAPS, (segment_slots, HV, V + K, K) float32 instead of all that, for segments
            but the last: the transposed state that a segment makes of 0, and the first one of the
            initial state; and below it, for segments between those two, what they make of each
            unit row without v; with STAGED, where the initial state is not known yet, both of them
            of all segments, or of sequences, (N, HV, V + K, K)

With COMPOSED programs stand before them that compute the gradients of the states at the cuts, as
`compose` does: neither waits for the other, and a backward saves a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    chunk_row,
    decay_of_chunk,
    operand,
    owner,
    read_beta,
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
from gdn_ops.backends.triton.kernels.compose import compose_head


@triton.jit
def part_of(
    cu_seqlens, block, N, T, L, HV, V: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, NEEDED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Return what a program walks: sequence, segment, place of its map, block of columns.

    With NEEDED and sequences that are as long, there are programs for what is needed alone: the
    blocks of V of segments but the last, and then those of K of the ones in between.
    """
    n = tl.program_id(0) // HV
    place = n
    if NEEDED and not VARLEN:
        cuts, of_v, of_k = tl.cdiv(T, C * L), tl.cdiv(V, BV), tl.cdiv(K, BV)
        rest = block - (cuts - 1) * of_v
        segment = tl.where(rest < 0, block // of_v, 1 + rest // of_k)
        block = tl.where(rest < 0, block % of_v, of_v + rest % of_k)
        place = n * cuts + segment
    else:
        n, segment = owner(n, cu_seqlens, N, T, C * L, VARLEN)
    return n, segment, place, block


@triton.jit
def first_state(
    initial, n, hv, begin_chunk, HV, dv, dk, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Return the transposed state that a program starts from, (BV, BK) float32."""
    S = tl.zeros([dv.shape[0], dk.shape[0]], tl.float32)
    if HAS_INITIAL:
        at, known = tl.program_id(0).to(tl.int64), (dv < V)[:, None] & (dk < K)[None, :]
        if MAPS:
            at, known = tl.cast(n, tl.int64) * HV + hv, known & (begin_chunk == 0)
        from_state = initial + at * (K * V) + dk[None, :] * V + dv[:, None]
        S += tl.load(from_state, mask=known, other=0.0).to(tl.float32)
    if MAPS:
        unit = dv - tl.cdiv(V, BV) * BV
        S = tl.where(dk[None, :] == unit[:, None], 1.0, S)
    return S


@triton.jit
def write_end(
    S, maps, final, place, n, hv, HV, dv, dk, is_last, V: tl.constexpr, K: tl.constexpr,
    BV: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Write the final state of a sequence, or with MAPS the rows of the map of a segment."""
    if MAPS:
        unit = dv - tl.cdiv(V, BV) * BV
        in_map = (dv < V)[:, None] | ((unit >= 0) & (unit < K))[:, None]
        at = tl.where(unit < 0, dv, V + unit)
        of_segment = (tl.cast(place, tl.int64) * HV + hv) * ((V + K) * K)
        to_map = maps + of_segment + at[:, None] * K
        tl.store(to_map + dk[None, :], S, mask=in_map & (dk < K)[None, :])
    else:
        if is_last:
            of_sequence = (tl.cast(n, tl.int64) * HV + hv) * (K * V)
            to_final = final + of_sequence + dk[None, :] * V + dv[:, None]
            tl.store(to_final, S, mask=(dv < V)[:, None] & (dk < K)[None, :])


@triton.jit(do_not_specialize=("N", "T", "L", "chunk_slots", "HV", "R"))
def walk(
    q, k, v, writes, gates, factors, ends, inverses, scores, initial, o, u, states, final, maps,
    shifts, d_final, d_cuts, d_initial, cu_seqlens,
    N, T, L, chunk_slots, HV, R, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, HAS_INITIAL: tl.constexpr, OUTPUT: tl.constexpr,
    KEEP: tl.constexpr, MAPS: tl.constexpr, COMPOSED: tl.constexpr, SEGMENTED: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, CUT_PRECISION: tl.constexpr, STAGED: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Walk the state over the chunks, see the module.

    Grid (N HV or segment_slots HV, ceil(V / BV)); with MAPS the second is + ceil(K / BV), or, where
    sequences are as long, (N HV, those of `part_of`) unless STAGED; COMPOSED stand before them.
    """
    if COMPOSED > 0 and tl.program_id(1) < COMPOSED:
        if tl.program_id(0) < N * HV:
            compose_head(
                maps, shifts, d_final, d_cuts, d_initial, cu_seqlens, tl.program_id(0),
                tl.program_id(1), T, C * L, HV, K, V, BK, BC, BR, True, True, STAGED, VARLEN,
                CUT_PRECISION,
            )  # fmt: skip
        return
    n, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    h, block, place = hv // R, tl.program_id(1) - COMPOSED, n
    begin_chunk = 0
    if SEGMENTED:
        n, segment, place, block = part_of(
            cu_seqlens, block, N, T, L, HV, V, K, C, BV, MAPS and not STAGED, VARLEN
        )  # fmt: skip
        begin_chunk = segment * L
    row, begin, length, first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    end_chunk = tl.cdiv(length, C)
    is_last = True
    if SEGMENTED:
        is_last = begin_chunk + L >= end_chunk
        end_chunk = tl.minimum(end_chunk, begin_chunk + L)
        # A slot may be empty.
        if begin_chunk >= end_chunk:
            return
        if (MAPS and not STAGED) and is_last:
            return
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv_0 = block * BV
    # Leave out the map of the first segment, whose start is known.
    if (MAPS and not STAGED) and (begin_chunk == 0 and dv_0 >= V):
        return
    dv = dv_0 + tl.arange(0, BV)
    k_tiles = tokens_of(k, row, k_batch, begin, k_token, h, k_head, length, K, C, BK, TMA)
    v_tiles = tokens_of(v, row, v_batch, begin, v_token, hv, v_head, length, V, C, BV, TMA)
    squares = tl.cast(hv, tl.int64) * chunk_slots * (C * C)
    if ERASE:
        x_tiles = tiles_of(inverses, squares, C, chunk_slots * C, C, C, C, TMA)
    if OUTPUT:
        q_tiles = tokens_of(q, row, q_batch, begin, q_token, h, q_head, length, K, C, BK, TMA)
        p_tiles = tiles_of(scores, squares, C, chunk_slots * C, C, C, C, TMA)
        o_start = ((row * T + begin) * HV + hv) * V
        o_tiles = tiles_of(o, o_start, HV * V, length, V, C, BV, TMA)
    if KEEP:
        s_tiles = state_tiles(states, hv, chunk_slots, V, K, BV, BK, TMA)
        if ERASE:
            in_u = tl.cast(hv, tl.int64) * chunk_slots * (C * V)
            u_tiles = tiles_of(u, in_u, V, chunk_slots * C, V, C, BV, TMA)
    if CHANNELS:
        w_tiles = tokens_of(writes, row, k_batch, begin, k_token, h, k_head, length, K, C, BK, TMA)
    S = first_state(initial, n, hv, begin_chunk, HV, dv, dk, V, K, BV, HAS_INITIAL, MAPS)
    for chunk in range(begin_chunk, end_chunk):
        slot = (first_slot + chunk).to(tl.int32)
        first = chunk * C
        k_tile = widened(read_tile(k_tiles, first, 0, k_token, length, K, C, BK, TMA))
        v_tile = read_tile(v_tiles, first, dv_0, v_token, length, V, C, BV, TMA)
        # Only what leads to the operand of a product is loaded ahead by the compiler.
        if OUTPUT:
            read = tl.load(chunk_row(factors, HV + hv, slot, i, chunk_slots, C))
        if DECAY:
            b_C = decay_of_chunk(ends, hv, slot, dk, chunk_slots, K, CHANNELS)
        # Beside an output and what is kept it has no registers.
        if not (OUTPUT and KEEP):
            write = write_factors(factors, hv, slot, i, HV, chunk_slots, C, CHANNELS)
        S_low = operand(S, k_tile.dtype, PRECISION)
        if KEEP:
            kept = S_low.to(states.dtype.element_ty)
            write_state(s_tiles, kept, slot, dv_0, V, K, BV, BK, TMA)
        # §3 V − diag(b) K S, times β where T is not, transposed                 [BV, C]
        U = tl.trans(v_tile).to(tl.float32)
        if not WEIGHTED:
            U *= read_beta(gates, hv, slot, i, HV, chunk_slots, C)[None, :]
        if ERASE:
            erase = tl.load(chunk_row(factors, hv, slot, i, chunk_slots, C))
            U -= tl.dot(S_low, tl.trans(k_tile), input_precision=PRECISION) * erase[None, :]
            # §3 U = T U                                                         [BV, C]
            x = read_tile(x_tiles, slot * C, 0, C, chunk_slots * C, C, C, C, TMA)
            U = tl.dot(operand(U, x.dtype, PRECISION), tl.trans(x), input_precision=PRECISION)
            if KEEP:
                kept = tl.trans(operand(U, u.dtype.element_ty, PRECISION))
                write_tile(u_tiles, kept, slot * C, dv_0, V, chunk_slots * C, V, C, BV, TMA)
        if OUTPUT:
            # §3 O = s diag(b) Q S + P U                                         [BV, C]
            q_tile = widened(read_tile(q_tiles, first, 0, q_token, length, K, C, BK, TMA))
            out = tl.dot(S_low, tl.trans(q_tile), input_precision=PRECISION) * read[None, :]
            if KEEP:
                write = write_factors(factors, hv, slot, i, HV, chunk_slots, C, CHANNELS)
            p = read_tile(p_tiles, slot * C, 0, C, chunk_slots * C, C, C, C, TMA)
            out = tl.dot(operand(U, p.dtype, PRECISION), tl.trans(p), out, PRECISION)
            out_low = tl.trans(out).to(o.dtype.element_ty)
            if not TMA:
                write_tile(o_tiles, out_low, first, dv_0, HV * V, length, V, C, BV, TMA)
        # §3 S_C = b_C S + (diag(d) K)ᵀ U                                        [BV, BK]
        if DECAY:
            S *= b_C
        if CHANNELS:
            k_tile = read_tile(w_tiles, first, 0, k_token, length, K, C, BK, TMA)
        U_low = operand(U * write[None, :], k_tile.dtype, PRECISION)
        S = tl.dot(U_low, k_tile, S, input_precision=PRECISION)
        if OUTPUT and TMA:
            # Write it last: all warps wait for its copy, and for no product above.
            write_tile(o_tiles, out_low, first, dv_0, HV * V, length, V, C, BV, TMA)
    write_end(S, maps, final, place, n, hv, HV, dv, dk, is_last, V, K, BV, MAPS)
