"""Form what the walk needs of every chunk where every key channel decays: the first launch.

One program per PAIRS chunks, or value heads, in the place of `prepare`. P and A of a value head are
sums over its channels, taken by blocks of columns of K, and of pairs of tokens, taken where blocks
of h = 1, 2, 4, ... tokens meet (`channel_decays`): one product for each. What the walks multiply by
the state, and by U, are rows of the size of q and k that have their decays in them:

    reads   q, k (B, T, H, K); α or log α (B, T, HV, K), β (B, T, HV), or with APART the strength
            (B, T, HV, K) that erases; with it, β K is erase ⊙ K in all that follows
    writes  b ⊙ Q s, β b ⊙ K and d ⊙ K, (B, T, HV, K)                      (docs/math.md §9)
            β, the last plane of gates (4, HV, chunk_slots, C) float32
            factors (2, HV, chunk_slots, C) float32 of the rows of K S and Q S: powers of two, by
            which rows of β b ⊙ K and s b ⊙ Q are divided, so that these operands keep their bits
            where b is tiny
            ends (HV, chunk_slots, K) float32: b_C
            T (HV, chunk_slots, C, C), only with an error term
            P = s lower(Q Kᵀ ⊙ D) (HV, chunk_slots, C, C)

T, P and the rows are in the dtype of what is kept. FLA's names are `chunk_kda_fwd_intra` and
`recompute_w_u_fwd`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    L2NORM_EPSILON,
    chunk_row,
    operand,
    owner,
    rows,
    sequence,
    widened,
)
from gdn_ops.backends.triton.kernels.channel_decays import (
    WIDTH,
    decays_at,
    joined,
    levels,
    met,
    write_totals,
)
from gdn_ops.backends.triton.kernels.squares import PAIRS, squares, triangle, write_blocks

LEAST_EXPONENT = tl.constexpr(-126.0)
LEAST_DECAY = tl.constexpr(2.0**-126)
"""The smallest normal number of float32."""


@triton.jit
def inverse_norms(
    x, row, batch, first, token, head, stride, i, left, K: tl.constexpr, D: tl.constexpr
):
    """Return 1 / sqrt(‖x_i‖² + 1e-6) of the tokens of a chunk, float32 (C,)."""
    squared = tl.zeros([i.shape[0]], tl.float32)
    for column in tl.range(0, K, D, num_stages=1, disable_licm=True):
        d = column + tl.arange(0, D)
        inside = (i < left)[:, None] & (d < K)[None, :]
        from_x = rows(x, row, batch, first, token, head, stride, i, d)
        wide = tl.load(from_x, mask=inside, other=0.0).to(tl.float32)
        squared += tl.sum(wide * wide, 1)
    return 1.0 / tl.sqrt(squared + L2NORM_EPSILON)


@triton.jit
def powers_of_decays(
    gate, row, first, left, hv, i, gate_batch, gate_token, gate_head, K: tl.constexpr,
    D: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Return powers of two about as large as 1 / b of channels that decay least, and b, (C,)."""
    most = tl.zeros([i.shape[0]], tl.float32)
    for column in tl.range(0, K, D, num_stages=1, disable_licm=True):
        d = column + tl.arange(0, D)
        x = decays_at(
            gate, row, gate_batch, first, gate_token, hv, gate_head, i, d, left, K, GATE
        )  # fmt: skip
        most = tl.maximum(most, tl.max(tl.where((d < K)[None, :], x, 0.0), 1))
    # No power leaves the range of normal numbers.
    log = tl.cumsum(tl.log2(tl.maximum(most, LEAST_DECAY)), 0)
    exponent = tl.maximum(tl.floor(log), LEAST_EXPONENT).to(tl.int32)
    up, down = (127 - exponent) << 23, (127 + exponent) << 23
    return up.to(tl.float32, bitcast=True), down.to(tl.float32, bitcast=True)


@triton.jit
def write_rows(
    to, x, row, first, hv, i, d, inside, T, HV, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Write columns d of the rows of a chunk, (C, D), to a tensor (B, T, HV, K)."""
    at = rows(to, row * T, HV * K, first, HV * K, hv, K, i, d)
    tl.store(at, operand(x, to.dtype.element_ty, PRECISION), mask=inside)


@triton.jit
def of_columns(
    P, A, q, k, gate, erase, reads, erases, writes, ends, totals, norm_q, norm_k, beta, up, row,
    first, left, h, hv, column, i, T, HV, q_batch, q_token, q_head, k_batch, k_token, k_head,
    gate_batch, gate_token, gate_head,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr,
    APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return P and A with what columns of K add to them; write their rows, and b_C.

    What they have above the diagonal has no meaning.
    """
    d = column + tl.arange(0, D)
    inside = (i < left)[:, None] & (d < K)[None, :]
    from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, d)
    from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, d)
    q_tile = widened(tl.load(from_q, mask=inside, other=0.0))
    k_tile = widened(tl.load(from_k, mask=inside, other=0.0))
    dtype: tl.constexpr = q_tile.dtype
    q_tile = q_tile.to(tl.float32) * norm_q[:, None]
    k_tile = k_tile.to(tl.float32) * norm_k[:, None]
    e_tile = k_tile
    if APART:
        from_erase = rows(erase, row * T, HV * K, first, HV * K, hv, K, i, d)
        e_tile = k_tile * tl.load(from_erase, mask=inside, other=0.0).to(tl.float32)
    # §9 P_ii = s q_i · k_i; A has no diagonal                                   [C, C]
    own = tl.sum(q_tile * k_tile, 1)
    P += tl.where(i[:, None] == tl.arange(0, C)[None, :], own[:, None], 0.0)
    F = decays_at(
        gate, row, gate_batch, first, gate_token, hv, gate_head, i, d, left, K, GATE
    )  # fmt: skip
    L = tl.full([C, D], 1.0, tl.float32)
    for level in tl.range(0, levels(C), num_stages=1, disable_licm=True):
        # §9 Σ_c q_ic F_ic L_jc k_jc, and so for A, where blocks of h tokens meet  [C, C]
        later = tl.trans(operand(k_tile * L, dtype, PRECISION))
        x = tl.dot(operand(q_tile * F, dtype, PRECISION), later, input_precision=PRECISION)
        P += met(x, level)
        if ERASE:
            x = tl.dot(operand(e_tile * F, dtype, PRECISION), later, input_precision=PRECISION)
            A += met(x, level)
        write_totals(totals, F, i, level)
        F, L = joined(totals, F, L, i, level)
    # §9 s b ⊙ Q, β b ⊙ K, d ⊙ K, b_C                                            [C, D]
    last = tl.sum(tl.where((i == C - 1)[:, None], F, 0.0), 0)
    tl.store(ends + d, last, mask=d < K)
    F *= up[:, None]
    write_rows(reads, q_tile * F, row, first, hv, i, d, inside, T, HV, K, PRECISION)
    if ERASE:
        erased = e_tile * F * beta[:, None]
        write_rows(erases, erased, row, first, hv, i, d, inside, T, HV, K, PRECISION)
    write_rows(writes, k_tile * L, row, first, hv, i, d, inside, T, HV, K, PRECISION)
    # Wait: the totals are written again for the next columns.
    tl.debug_barrier()
    return P, A


@triton.jit
def of_square(
    q, k, gate, beta, erase, gates, factors, reads, erases, writes, ends, totals, blocks, scale,
    row, first, left, h, hv, slot, T, chunk_slots, HV, q_batch, q_token, q_head,
    k_batch, k_token, k_head, gate_batch, gate_token, gate_head, beta_batch, beta_token, beta_head,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr,
    HAS_BETA: tl.constexpr, ERASE: tl.constexpr, APART: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write β, the rows and the products of a chunk and value head; the latter by blocks."""
    i = tl.arange(0, C)
    b_beta = tl.where(i < left, 1.0, 0.0)
    if HAS_BETA:
        at = row * beta_batch + first * beta_token + i * beta_token + hv * beta_head
        b_beta = tl.load(beta + at, mask=i < left, other=0.0).to(tl.float32)
    tl.store(chunk_row(gates, 3 * HV + hv, slot, i, chunk_slots, C), b_beta)
    up, down = powers_of_decays(
        gate, row, first, left, hv, i, gate_batch, gate_token, gate_head, K, D, GATE
    )  # fmt: skip
    to_factors = chunk_row(factors, hv, slot, i, chunk_slots, C)
    plane = tl.cast(HV, tl.int64) * chunk_slots * C
    tl.store(to_factors, down)
    tl.store(to_factors + plane, down)
    norm_q, norm_k = tl.full([C], scale, tl.float32), tl.full([C], 1.0, tl.float32)
    if NORM:
        norm_q *= inverse_norms(q, row, q_batch, first, q_token, h, q_head, i, left, K, D)
        norm_k *= inverse_norms(k, row, k_batch, first, k_token, h, k_head, i, left, K, D)
    P = tl.zeros([C, C], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    to_ends = ends + (tl.cast(hv, tl.int64) * chunk_slots + slot) * K
    for column in tl.range(0, K, D, num_stages=1, disable_licm=True):
        P, A = of_columns(
            P, A, q, k, gate, erase, reads, erases, writes, to_ends, totals, norm_q, norm_k, b_beta,
            up, row, first, left, h, hv, column, i, T, HV, q_batch, q_token, q_head, k_batch,
            k_token, k_head, gate_batch, gate_token, gate_head, K, C, D, GATE, ERASE, APART,
            PRECISION,
        )  # fmt: skip
    is_lower = i[:, None] >= tl.arange(0, C)[None, :]
    write_blocks(blocks, tl.where(is_lower, P, 0.0), C)
    if ERASE:
        write_blocks(blocks + triangle(C), tl.where(is_lower, A, 0.0), C)


COUNTS = ("N", "T", "chunk_slots", "HV", "R")
STRIDES = ("gate_batch", "gate_token", "gate_head", "beta_batch", "beta_token", "beta_head")


@triton.jit(do_not_specialize=COUNTS + STRIDES)
def prepare_channels(
    q, k, gate, beta, erase, gates, factors, reads, erases, writes, ends, totals, grams, inverses,
    scores, cu_seqlens, scale, N, T, chunk_slots, HV, R, q_batch, q_token, q_head,
    k_batch, k_token, k_head, gate_batch, gate_token, gate_head, beta_batch, beta_token, beta_head,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    HAS_BETA: tl.constexpr, ERASE: tl.constexpr, APART: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Form what the walk needs, see the module. Grid (tasks that run at a time,)."""
    D: tl.constexpr = min(BK, WIDTH)
    to_totals = totals + tl.program_id(0).to(tl.int64) * (2 * C * D)
    blocks = grams + tl.program_id(0).to(tl.int64) * (PAIRS * 2 * triangle(C))
    plane = tl.cast(HV, tl.int64) * chunk_slots * C
    # Heads of a chunk follow one another: they read the same q and k.
    squares_in_all = chunk_slots * HV
    tasks = tl.cdiv(squares_in_all, PAIRS)
    for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        # Wait: the blocks of the last task have been read.
        tl.debug_barrier()
        count = tl.minimum(squares_in_all - task * PAIRS, PAIRS)
        for own in tl.range(0, count, num_stages=1, disable_licm=True):
            slot, hv = (task * PAIRS + own) // HV, (task * PAIRS + own) % HV
            n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
            row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
            # A slot may be empty: what is formed below of it is not read.
            if chunk * C < length:
                of_square(
                    q, k, gate, beta, erase, gates, factors, reads, erases, writes, ends, to_totals,
                    blocks + own * 2 * triangle(C), scale, row, begin + chunk * C,
                    length - chunk * C, hv // R, hv, slot, T, chunk_slots, HV,
                    q_batch, q_token, q_head, k_batch, k_token, k_head, gate_batch, gate_token,
                    gate_head, beta_batch, beta_token, beta_head, K, C, D, GATE, HAS_BETA, ERASE,
                    APART, NORM, PRECISION,
                )  # fmt: skip
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
        own = tl.arange(0, PAIRS)
        pair = tl.minimum(task * PAIRS + own, squares_in_all - 1)
        at = tl.cast(pair % HV, tl.int64) * chunk_slots + pair // HV
        of_pair = blocks + own * (2 * triangle(C))
        squares(
            of_pair, of_pair + triangle(C), gates, gates + 3 * plane + at * C,
            scores + at * (C * C), inverses + at * (C * C), task * PAIRS + own < squares_in_all,
            plane, C, False, ERASE, False, PRECISION, SOLVE_PRECISION,
        )  # fmt: skip
