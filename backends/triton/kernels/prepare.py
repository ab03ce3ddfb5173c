"""Form what the walk needs of every chunk, all chunks in parallel: the first launch.

One program per chunk and key head. K Kᵀ and Q Kᵀ are formed once and serve the R value heads. FLA's
names are `chunk_local_cumsum` and `chunk_gated_delta_rule_fwd_kkt_solve`.

    reads   q, k (B, T, H, K); α or log α, β (B, T, HV)
    writes  gates (4, HV, chunk_slots, C) float32: G as hi and lo, z, β       (docs/math.md §4)
            factors (3, HV, chunk_slots, C) float32 of the rows of K S, Q S and U: β b, s b, d
            ends (HV, chunk_slots) float32: b_C
            T (HV, chunk_slots, C, C), only with an error term                (docs/math.md §3);
            WEIGHTED: T diag(β), and then β is in no factor
            P = s lower(Q Kᵀ ⊙ D) (HV, chunk_slots, C, C)
            with qk_l2norm inv_norms (H, chunk_slots, C) float32: 1/‖k‖, and q and k
            (B, T, H, K) times powers of two; what is left of the norms is in the factors

T, P and the scaled q and k are in the dtype of what is kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import (
    ALPHA,
    L2NORM_EPSILON,
    LOG2_E,
    LOG_FLOOR,
    NO_DECAY,
    chunk_row,
    owner,
    rows,
    scaled_rows,
    sequence,
    widened,
)
from gdn_ops.backends.triton.kernels.squares import (
    PAIRS,
    squares,
    triangle,
    write_blocks,
)

HEADS = tl.constexpr(4)
"""Value heads whose gates are summed together."""


@triton.jit
def by_token(x, to, inside, written, other: tl.constexpr):
    """Return what x points to, (HEADS, C) float32, such that a warp has the tokens of a head.

    Reading has a warp take the heads of a token, which lie together; so what is read is written
    and read again.
    """
    tl.store(to, tl.load(x, mask=inside, other=other).to(tl.float32), mask=written)
    # Wait: a thread reads what another one has stored.
    tl.debug_barrier()
    return tl.load(to, mask=written, other=other)


@triton.jit
def log_sums(given, GATE: tl.constexpr):
    """Return G, float64, and z, float32, of heads of a chunk (docs/math.md §4): (HEADS, C).

    The logarithm and the sum G are float64: next to a strong decay, G_i - G_j of later tokens
    is a small difference of large numbers, and fast float32 logarithms are off near α = 1.
    """
    if GATE == ALPHA:
        zero = given == 0.0
        log = tl.log(tl.where(zero, 1.0, given).to(tl.float64))
    else:
        zero = given == float("-inf")
        finite = tl.where(zero, 0.0, given)
        log = tl.where(finite < LOG_FLOOR, LOG_FLOOR, finite).to(tl.float64)
    counted = zero.to(tl.float32)
    return tl.cumsum(log, 1), tl.cumsum(counted, 1)


@triton.jit
def parts(G):
    """Return hi and lo, float32, of G = hi + lo, float64."""
    hi = G.to(tl.float32)
    return hi, (G - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def inverse_norms(xx, i):
    """Return 1 / sqrt(‖x_i‖² + 1e-6), float32 (C,), given all products x_i · x_j (C, C)."""
    squares = tl.sum(tl.where(i[:, None] == i[None, :], xx, 0.0), 1)
    return 1.0 / tl.sqrt(squares + L2NORM_EPSILON)


# Tiles are read again where they are needed again: kept in registers they would spill.


@triton.jit
def gram(from_x, from_y, inside, PRECISION: tl.constexpr):
    """Return the products x_i · y_j of rows, (C, C) float32."""
    x = widened(tl.load(from_x, mask=inside, other=0.0))
    y = widened(tl.load(from_y, mask=inside, other=0.0))
    return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
def write_scaled(to_x, from_x, inside, inv_norm):
    """Write the rows of x times powers of two; return what is left of 1 / norm, (C,)."""
    x, rest = scaled_rows(widened(tl.load(from_x, mask=inside, other=0.0)), inv_norm)
    tl.store(to_x, x, mask=inside)
    return rest


@triton.jit
def entry(x, i, at):
    """Return the entry `at` of the last axis of x, which i counts: (..., 1)."""
    return tl.sum(tl.where(i == at, x, 0.0), -1, keep_dims=True)


@triton.jit
def vectors(
    gate, beta, gates, factors, ends, pair_decays, norm_q, norm_k, row, first, left, h, slot,
    chunk_slots, HV, R, gate_batch, gate_token, gate_head, beta_batch, beta_token, beta_head,
    C: tl.constexpr, GATE: tl.constexpr, HAS_BETA: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write gates, factors, ends and pair_decays of a chunk, for HEADS value heads at a time."""
    i = tl.arange(0, C)[None, :]
    plane = tl.cast(HV, tl.int64) * chunk_slots * C
    for r_0 in range(0, R, HEADS):
        r = r_0 + tl.arange(0, HEADS)[:, None]
        hv, inside = h * R + r, (r < R) & (i < left)
        to = (tl.cast(hv, tl.int64) * chunk_slots + slot) * C + i
        in_heads = (r < R) & (i < C)
        if HAS_BETA:
            at = row * beta_batch + first * beta_token + i * beta_token + hv * beta_head
            b_beta = by_token(beta + at, gates + to + 3 * plane, inside, in_heads, 0.0)
        else:
            b_beta = tl.where(inside, 1.0, 0.0)
            tl.store(gates + to + 3 * plane, b_beta, mask=in_heads)
        erase = norm_k[None, :] + tl.zeros([HEADS, C], tl.float32)
        read = norm_q[None, :] + tl.zeros([HEADS, C], tl.float32)
        write = norm_k[None, :] + tl.zeros([HEADS, C], tl.float32)
        if not WEIGHTED:
            erase *= b_beta
        if GATE != NO_DECAY:
            # §4 G, z                                                            [HEADS, C]
            at = row * gate_batch + first * gate_token + i * gate_token + hv * gate_head
            unit: tl.constexpr = 1.0 if GATE == ALPHA else 0.0
            G, z = log_sums(by_token(gate + at, gates + to, inside, in_heads, unit), GATE)
            hi, lo = parts(G)
            tl.store(gates + to, hi, mask=in_heads)
            tl.store(gates + to + plane, lo, mask=in_heads)
            tl.store(gates + to + 2 * plane, z, mask=in_heads)
            # A zero is as good as e**-1000: what crosses it is 0.
            G = (G + z.to(tl.float64) * LOG_FLOOR) * LOG2_E
            hi, lo = parts(G)
            tl.store(pair_decays + to, hi, mask=in_heads)
            tl.store(pair_decays + to + plane, lo, mask=in_heads)
            if C >= 32:
                runs = tl.reshape(G, (HEADS, C // 32, 32))
                runs -= entry(runs, tl.arange(0, 32)[None, None, :], 15)
                across = tl.reshape(tl.exp2(-tl.abs(runs.to(tl.float32))), (HEADS, C))
                tl.store(pair_decays + to + 2 * plane, across, mask=in_heads)
            if C == 64:
                across = tl.exp2(-tl.abs((G - entry(G, i, 31)).to(tl.float32)))
                tl.store(pair_decays + to + 3 * plane, across, mask=in_heads)
            # §3 b, d, b_C                                                       [HEADS, C]
            G_C = entry(G, i, C - 1)
            b = tl.exp2(G.to(tl.float32))
            erase *= b
            read *= b
            write *= tl.exp2((G_C - G).to(tl.float32))
            to_end = ends + tl.cast(hv, tl.int64) * chunk_slots + slot
            tl.store(to_end, tl.exp2(G_C.to(tl.float32)), mask=r < R)
        tl.store(factors + to, erase, mask=in_heads)
        tl.store(factors + to + plane, read, mask=in_heads)
        tl.store(factors + to + 2 * plane, write, mask=in_heads)


@triton.jit
def of_chunk(
    q, k, gate, beta, gates, factors, ends, pair_decays, inv_norms, blocks, scaled_q, scaled_k,
    scale, row, first, left, h, slot, H, T, chunk_slots, HV, R,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    gate_batch, gate_token, gate_head, beta_batch, beta_token, beta_head,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    HAS_BETA: tl.constexpr, ERASE: tl.constexpr, WEIGHTED: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what the value heads of a chunk share, and the vectors of each."""
    i, d = tl.arange(0, C), tl.arange(0, BK)
    inside = (i < left)[:, None] & (d < K)[None, :]
    from_q = rows(q, row, q_batch, first, q_token, h, q_head, i, d)
    from_k = rows(k, row, k_batch, first, k_token, h, k_head, i, d)
    norm_q, norm_k = tl.full([C], scale, tl.float32), tl.full([C], 1.0, tl.float32)
    if NORM:
        # ‖q‖² is on the diagonal of Q Qᵀ, ‖k‖² on that of K Kᵀ.
        inv_q = inverse_norms(gram(from_q, from_q, inside, PRECISION), i)
        to_q = rows(scaled_q, row * T, H * K, first, H * K, h, K, i, d)
        norm_q *= write_scaled(to_q, from_q, inside, inv_q)
    # strict_lower(K Kᵀ) and s lower(Q Kᵀ), once for the R value heads           [C, C]
    if ERASE or NORM:
        kk = gram(from_k, from_k, inside, PRECISION)
    if NORM:
        inv_k = inverse_norms(kk, i)
        tl.store(chunk_row(inv_norms, h, slot, i, chunk_slots, C), inv_k)
        to_k = rows(scaled_k, row * T, H * K, first, H * K, h, K, i, d)
        norm_k = write_scaled(to_k, from_k, inside, inv_k)
        kk *= inv_k[:, None] * inv_k[None, :]
    if ERASE:
        kk = tl.where(i[:, None] > i[None, :], kk, 0.0)
        write_blocks(blocks + triangle(C), kk, C)
    qk = gram(from_q, from_k, inside, PRECISION) * scale
    if NORM:
        qk *= inv_q[:, None] * inv_k[None, :]
    qk = tl.where(i[:, None] >= i[None, :], qk, 0.0)
    write_blocks(blocks, qk, C)
    vectors(
        gate, beta, gates, factors, ends, pair_decays, norm_q, norm_k, row, first, left, h, slot,
        chunk_slots, HV, R, gate_batch, gate_token, gate_head, beta_batch, beta_token,
        beta_head, C, GATE, HAS_BETA, WEIGHTED,
    )  # fmt: skip


COUNTS = ("N", "T", "chunk_slots", "H", "HV", "R", "chunks")
STRIDES = ("gate_batch", "gate_token", "gate_head", "beta_batch", "beta_token", "beta_head")


@triton.jit(do_not_specialize=COUNTS + STRIDES)
def prepare(
    q, k, gate, beta, gates, factors, ends, pair_decays, inv_norms, grams, inverses, scores,
    scaled_q, scaled_k, cu_seqlens, scale, N, T, chunk_slots, H, HV, R, chunks,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    gate_batch, gate_token, gate_head, beta_batch, beta_token, beta_head,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    HAS_BETA: tl.constexpr, ERASE: tl.constexpr, WEIGHTED: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Form what the walk needs, see the module. Grid (tasks that run at a time,)."""
    blocks = grams + tl.program_id(0).to(tl.int64) * (chunks * 2 * triangle(C))
    plane = tl.cast(HV, tl.int64) * chunk_slots * C
    # Hoisting out of the loops what tasks and squares share would spill registers.
    tasks = tl.cdiv(chunk_slots, chunks) * H
    for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        h, first_slot = task % H, task // H * chunks
        # Wait: the blocks of the last task have been read.
        tl.debug_barrier()
        for slot in range(first_slot, tl.minimum(first_slot + chunks, chunk_slots)):
            n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
            row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
            # A slot may be empty: what is formed below of it is not read.
            if chunk * C < length:
                of_chunk(
                    q, k, gate, beta, gates, factors, ends, pair_decays, inv_norms,
                    blocks + (slot - first_slot) * 2 * triangle(C), scaled_q, scaled_k, scale,
                    row, begin + chunk * C, length - chunk * C, h, slot, H, T, chunk_slots, HV, R,
                    q_batch, q_token, q_head, k_batch, k_token, k_head, gate_batch, gate_token,
                    gate_head, beta_batch, beta_token, beta_head, K, C, BK, GATE, HAS_BETA, ERASE,
                    WEIGHTED, NORM, PRECISION,
                )  # fmt: skip
        # Wait: a thread reads what another one has stored.
        tl.debug_barrier()
        for pair_0 in tl.range(0, chunks * R, PAIRS, disable_licm=True):
            pair = pair_0 + tl.arange(0, PAIRS)
            own = tl.minimum(pair // R, chunks - 1)
            inside = (pair < chunks * R) & (first_slot + own < chunk_slots)
            of_pair = tl.minimum(first_slot + own, chunk_slots - 1)
            at = tl.cast(h * R + pair % R, tl.int64) * chunk_slots + of_pair
            of_pair_blocks = blocks + own * (2 * triangle(C))
            squares(
                of_pair_blocks, of_pair_blocks + triangle(C),
                pair_decays + at * C, gates + 3 * plane + at * C, scores + at * (C * C),
                inverses + at * (C * C), inside, plane, C, GATE != NO_DECAY, ERASE, WEIGHTED,
                PRECISION, SOLVE_PRECISION,
            )  # fmt: skip
