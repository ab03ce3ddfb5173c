"""Compute the state at every cut between segments, exactly (docs/math.md §6).

One program per sequence, value head and block of BV columns of V. The map of a segment,
Sᵀ -> Sᵀ Mᵀ + Rᵀ, is applied segment by segment; with REVERSE dSᵀ -> dSᵀ M + rᵀ from the last to
the first. What the first of them starts from is in its R, or r, already.

    reads   maps (segment_slots, HV, V + K, K) float32 of `walk`: Rᵀ and Mᵀ; with REVERSE the shifts
            r (segment_slots, HV, K, V) float32 of `walk_back`; the initial state, or the gradient
            of the final one, (N, HV, K, V)
    writes  the state at the start of every segment, or its gradient at the end,
            (segment_slots, HV, K, V) float32; of sequences without tokens what is asked for in the
            end, (N, HV, K, V) float32

The products are of float32, whatever the dtype of the call: a cut costs no precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import sequence


@triton.jit
def shift_of(
    maps, shifts, at, dk, dv, inside, K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr
):
    """Return Rᵀ, or with REVERSE rᵀ, of the segment of a head, (BV, BK)."""
    if REVERSE:
        S = tl.load(shifts + at * (K * V) + dk[None, :] * V + dv[:, None], mask=inside, other=0.0)
    else:
        from_map = maps + at * ((V + K) * K) + dv[:, None] * K + dk[None, :]
        S = tl.load(from_map, mask=inside, other=0.0)
    return S


@triton.jit
def compose_head(
    maps, shifts, first, cuts, last, cu_seqlens, program, block, T, tokens, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the states at the cuts of one sequence and head, see `compose`."""
    n, hv = program // HV, program % HV
    _row, _begin, length, first_slot = sequence(n, cu_seqlens, T, tokens, VARLEN)
    dk, dv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_k, in_v = (dk < K)[None, :], (dv < V)[:, None]
    cell = dk[None, :] * V + dv[:, None]
    own = tl.cast(program, tl.int64) * (K * V)
    S = tl.zeros([BV, BK], tl.float32)
    if HAS_FIRST:
        S += tl.load(first + own + cell, mask=in_v & in_k, other=0.0).to(tl.float32)
    segments = tl.cdiv(length, tokens)
    onwards, at = HV, first_slot * HV + hv
    if REVERSE:
        onwards, at = -HV, (first_slot + segments - 1) * HV + hv
    inside = in_v & in_k
    if segments == 0:
        tl.store(last + own + cell, S, mask=inside)
    else:
        tl.store(cuts + at * (K * V) + cell, S, mask=inside)
    if segments > 1:
        S = shift_of(maps, shifts, at, dk, dv, inside, K, V, REVERSE)
        at += onwards
        tl.store(cuts + at * (K * V) + cell, S, mask=inside)
    for _step in range(2, segments):
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
        # §6 S = M S + R, or dS = Mᵀ dS + r                                      [BV, BK]
        S = shift_of(maps, shifts, at, dk, dv, inside, K, V, REVERSE)
        from_cut, from_map = cuts + at * (K * V), maps + at * ((V + K) * K) + V * K
        for r_0 in range(0, K, BR):
            r = r_0 + tl.arange(0, BR)
            in_r = r < K
            x = tl.load(
                from_cut + r[None, :] * V + dv[:, None], mask=in_v & in_r[None, :], other=0.0
            )
            if REVERSE:
                entry = dk[None, :] * K + r[:, None]
            else:
                entry = r[:, None] * K + dk[None, :]
            M = tl.load(from_map + entry, mask=in_r[:, None] & in_k, other=0.0)
            S = tl.dot(x, M, S, input_precision=PRECISION)
        at += onwards
        tl.store(cuts + at * (K * V) + cell, S, mask=inside)


@triton.jit(do_not_specialize=("T", "tokens", "HV"))
def compose(
    maps, shifts, first, cuts, last, cu_seqlens, T, tokens, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the states at cuts, see the module; `tokens` of a segment. Grid (N HV, ceil(V / BV)).

    BR: entries of the axis of K that are summed over at a time.
    """
    compose_head(
        maps, shifts, first, cuts, last, cu_seqlens, tl.program_id(0), tl.program_id(1), T, tokens,
        HV, K, V, BK, BV, BR, REVERSE, HAS_FIRST, VARLEN, PRECISION,
    )  # fmt: skip
