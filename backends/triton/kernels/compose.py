"""Compute the state at every cut between segments, exactly (docs/math.md §6).

One program per sequence, value head and block of BV columns of V. The map of a segment,
Sᵀ -> Sᵀ Mᵀ + Rᵀ, is applied segment by segment; with REVERSE dSᵀ -> dSᵀ M + rᵀ from the last to
the first. What the first of them starts from is in its R, or r, already, but with STAGED, where it
was not known when they were formed.

    reads   maps (segment_slots, HV, V + K, K) float32 of `walk`: Rᵀ and Mᵀ; with REVERSE the shifts
            r (segment_slots, HV, K, V) float32 of `walk_back`; the initial state, or the gradient
            of the final one, (N, HV, K, V)
    writes  the state at the start of every segment, or its gradient at the end,
            (segment_slots, HV, K, V) float32; of sequences without tokens what is asked for in the
            end, (N, HV, K, V) float32

`compose_whole` writes what a whole sequence makes of a state, R and M (N, HV, K, V + K) float32, or
with REVERSE the gradient of its initial state (N, HV, K, V) float32, given that of the final one.

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
def mapped(
    S, from_cut, from_map, dk, dv, in_v, in_k, W: tl.constexpr, K: tl.constexpr,
    BR: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return S + xᵀ Mᵀ, or with REVERSE S + xᵀ M, (BV, BK), of columns dv of x (K, W).

    x lies at from_cut, Mᵀ (K, K) at from_map. BR: entries of K that are summed over at a time.
    """
    for r_0 in range(0, K, BR):
        r = r_0 + tl.arange(0, BR)
        in_r = r < K
        x = tl.load(from_cut + r[None, :] * W + dv[:, None], mask=in_v & in_r[None, :], other=0.0)
        if REVERSE:
            entry = dk[None, :] * K + r[:, None]
        else:
            entry = r[:, None] * K + dk[None, :]
        M = tl.load(from_map + entry, mask=in_r[:, None] & in_k, other=0.0)
        S = tl.dot(x, M, S, input_precision=PRECISION)
    return S


@triton.jit
def compose_head(
    maps, shifts, first, cuts, last, cu_seqlens, program, block, T, tokens, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, STAGED: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
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
    if not STAGED and segments > 1:
        S = shift_of(maps, shifts, at, dk, dv, inside, K, V, REVERSE)
        at += onwards
        tl.store(cuts + at * (K * V) + cell, S, mask=inside)
    for _step in range(1 if STAGED else 2, segments):
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
        # §6 S = M S + R, or dS = Mᵀ dS + r                                      [BV, BK]
        S = shift_of(maps, shifts, at, dk, dv, inside, K, V, REVERSE)
        from_cut, from_map = cuts + at * (K * V), maps + at * ((V + K) * K) + V * K
        S = mapped(S, from_cut, from_map, dk, dv, in_v, in_k, V, K, BR, REVERSE, PRECISION)
        at += onwards
        tl.store(cuts + at * (K * V) + cell, S, mask=inside)


@triton.jit(do_not_specialize=("T", "tokens", "HV"))
def compose(
    maps, shifts, first, cuts, last, cu_seqlens, T, tokens, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, STAGED: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the states at cuts, see the module; `tokens` of a segment. Grid (N HV, ceil(V / BV)).

    BR: entries of the axis of K that are summed over at a time.
    """
    compose_head(
        maps, shifts, first, cuts, last, cu_seqlens, tl.program_id(0), tl.program_id(1), T, tokens,
        HV, K, V, BK, BV, BR, REVERSE, HAS_FIRST, STAGED, VARLEN, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=("T", "tokens", "HV"))
def compose_whole(
    maps, shifts, d_final, whole, cu_seqlens, T, tokens, HV,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BR: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what whole sequences make of a state, see the module, of maps that are STAGED.

    W: columns, V + K or with REVERSE V. Grid (N HV, ceil(W / BV)).
    """
    n, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    _row, _begin, length, first_slot = sequence(n, cu_seqlens, T, tokens, VARLEN)
    dk, dv = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_w = (dk < K)[None, :], (dv < W)[:, None]
    own = tl.program_id(0).to(tl.int64) * (K * W)
    cell = dk[None, :] * W + dv[:, None]
    segments = tl.cdiv(length, tokens)
    if REVERSE:
        onwards, at = -HV, (first_slot + segments - 1) * HV + hv
        S = tl.load(d_final + own + cell, mask=in_w & in_k, other=0.0)
    else:
        onwards, at = HV, first_slot * HV + hv
        S = tl.where(dk[None, :] == dv[:, None] - V, 1.0, 0.0)
    tl.store(whole + own + cell, S, mask=in_w & in_k)
    for _step in range(segments):
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
        # §6 R = M₂ R + R₂, M = M₂ M, or dS = Mᵀ dS + r                          [BV, BK]
        S = shift_of(maps, shifts, at, dk, dv, (dv < V)[:, None] & in_k, K, V, REVERSE)
        from_map = maps + at * ((V + K) * K) + V * K
        S = mapped(S, whole + own, from_map, dk, dv, in_w, in_k, W, K, BR, REVERSE, PRECISION)
        at += onwards
        # Wait: a thread stores what another one has read.
        tl.debug_barrier()
        tl.store(whole + own + cell, S, mask=in_w & in_k)
