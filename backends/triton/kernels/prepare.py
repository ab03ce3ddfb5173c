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
    operand,
    owner,
    rows,
    scaled_rows,
    sequence,
    widened,
)
from gdn_ops.backends.triton.kernels.inverse import (
    ends_of_pairs,
    halves,
    inverse_of_sixteen,
    merged,
    products,
)

HEADS = tl.constexpr(4)
"""Value heads whose gates are summed together."""


@triton.jit
def log_sums(gate, valid, GATE: tl.constexpr):
    """Return G, float64, and z, float32, of heads of a chunk (docs/math.md §4): (HEADS, C).

    The logarithm and the sum G are float64: next to a strong decay, G_i - G_j of later tokens
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
    gate, beta, gates, factors, ends, pair_decays, norm_q, norm_k, row, first, h, slot, valid,
    T, chunk_slots, HV, R,
    C: tl.constexpr, GATE: tl.constexpr, HAS_BETA: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write gates, factors, ends and pair_decays of a chunk, for HEADS value heads at a time."""
    i = tl.arange(0, C)[None, :]
    plane = tl.cast(HV, tl.int64) * chunk_slots * C
    for r_0 in range(0, R, HEADS):
        r = r_0 + tl.arange(0, HEADS)[:, None]
        hv, inside = h * R + r, (r < R) & valid[None, :]
        at = (row * T + first) * HV + hv + i * HV
        to = (tl.cast(hv, tl.int64) * chunk_slots + slot) * C + i
        in_heads = (r < R) & (i < C)
        if HAS_BETA:
            b_beta = tl.load(beta + at, mask=inside, other=0.0).to(tl.float32)
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
            G, z = log_sums(gate + at, inside, GATE)
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
def tokens_of(first, apart, n: tl.constexpr, b: tl.constexpr):
    """Return the tokens of n runs of b, `apart` from one another: int32 (n, b)."""
    return (first + apart * tl.arange(0, n))[:, None] + tl.arange(0, b)[None, :]


@triton.jit
def within(pair_decays, i, plane):
    """Return D_ij for pairs of tokens i of a run: float32 (n, b, b), 1 where i < j."""
    hi, lo = tl.load(pair_decays + i), tl.load(pair_decays + plane + i)
    log = (hi[:, :, None] - hi[:, None, :]) + (lo[:, :, None] - lo[:, None, :])
    # A minimum that drops NaN would hide one.
    return tl.exp2(tl.minimum(log, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def across(pair_decays, i, j):
    """Return D_ij of later tokens i and earlier ones j (n, b): float32 (n, b, b)."""
    return tl.load(pair_decays + i)[:, :, None] * tl.load(pair_decays + j)[:, None, :]


@triton.jit
def write_blocks(square, x, i, j, C: tl.constexpr, PRECISION: tl.constexpr):
    """Write blocks (n, b, b) to rows i and columns j (n, b) of a square (C, C)."""
    to = square + i[:, :, None] * C + j[:, None, :]
    tl.store(to, operand(x, square.dtype.element_ty, PRECISION))


@triton.jit
def write_inverse(
    square, x, i, j, beta, C: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr
):
    """Write blocks of T (n, b, b), or of T diag(β), given the pointer to β of a chunk."""
    if WEIGHTED:
        x *= tl.load(beta + j)[:, None, :]
    write_blocks(square, x, i, j, C, PRECISION)


@triton.jit
def write_zeros(square, i, j, C: tl.constexpr):
    """Write zeros to the mirror images of blocks of rows i and columns j (n, b)."""
    to = square + j[:, :, None] * C + i[:, None, :]
    tl.store(to, tl.zeros(to.shape, square.dtype.element_ty))


@triton.jit(do_not_specialize=("N", "T", "chunk_slots", "HV", "R"))
def prepare(
    q, k, gate, beta, gates, factors, ends, pair_decays, inv_norms, inverses, scores,
    scaled_q, scaled_k, cu_seqlens, scale, N, T, chunk_slots, HV, R,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    HAS_BETA: tl.constexpr, ERASE: tl.constexpr, WEIGHTED: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Form what the walk needs, see the module. Grid (chunk_slots, H)."""
    slot, h, H = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n, chunk = owner(slot, cu_seqlens, N, T, C, VARLEN)
    row, begin, length, _first_slot = sequence(n, cu_seqlens, T, C, VARLEN)
    left = length - chunk * C
    if left <= 0:
        return
    first = begin + chunk * C
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
    qk = gram(from_q, from_k, inside, PRECISION) * scale
    if NORM:
        qk *= inv_q[:, None] * inv_k[None, :]
    qk = tl.where(i[:, None] >= i[None, :], qk, 0.0)
    vectors(
        gate, beta, gates, factors, ends, pair_decays, norm_q, norm_k, row, first, h, slot,
        i < left, T, chunk_slots, HV, R, C, GATE, HAS_BETA, WEIGHTED,
    )  # fmt: skip
    # Wait: a thread reads what another one has stored.
    tl.debug_barrier()
    # The blocks of the lower triangle: of 16 on the diagonal, of 16 and of 32 below it.
    i_0 = tokens_of(0, 16, C // 16, 16)
    qk_0 = tl.reshape(qk, (1, C, C))
    if ERASE:
        kk_0 = tl.reshape(kk, (1, C, C))
    if C == 64:
        i_2, j_2 = tokens_of(32, 64, 1, 32), tokens_of(0, 64, 1, 32)
        qk_0, qk_2 = halves(qk_0, 1, 32)
        if ERASE:
            kk_0, kk_2 = halves(kk_0, 1, 32)
    if C >= 32:
        i_1, j_1 = tokens_of(16, 32, C // 32, 16), tokens_of(0, 32, C // 32, 16)
        whole = tokens_of(0, 32, C // 32, 32)
        qk_0, qk_1 = halves(qk_0, C // 32, 16)
        if ERASE:
            kk_0, kk_1 = halves(kk_0, C // 32, 16)
    plane = tl.cast(HV, tl.int64) * chunk_slots * C
    # Hoisting what the heads share out of the loop would spill registers.
    for r in tl.range(0, R, disable_licm=True):
        at = tl.cast(h * R + r, tl.int64) * chunk_slots + slot
        to_P, to_T = scores + at * (C * C), inverses + at * (C * C)
        decays, betas = pair_decays + at * C, gates + 3 * plane + at * C
        # §3 P = s lower(Q Kᵀ ⊙ D), −A = −strict_lower(diag(β) (K Kᵀ ⊙ D)), T = (I + A)⁻¹
        P = qk_0
        if GATE != NO_DECAY:
            D = within(decays, i_0, plane)
            P = qk_0 * D
        write_blocks(to_P, P, i_0, i_0, C, PRECISION)
        if ERASE:
            A = kk_0 * -tl.load(betas + i_0)[:, :, None]
            if GATE != NO_DECAY:
                A *= D
            x = inverse_of_sixteen(A, C // 16, SOLVE_PRECISION)
            if C == 16:
                write_inverse(to_T, x, i_0, i_0, betas, C, WEIGHTED, PRECISION)
        if C >= 32:
            P = qk_1
            if GATE != NO_DECAY:
                D = across(decays + 2 * plane, i_1, j_1)
                P = qk_1 * D
            write_blocks(to_P, P, i_1, j_1, C, PRECISION)
            write_zeros(to_P, i_1, j_1, C)
            if ERASE:
                A = kk_1 * -tl.load(betas + i_1)[:, :, None]
                if GATE != NO_DECAY:
                    A *= D
                x = merged(x, A, C // 32, 16, SOLVE_PRECISION)
                write_inverse(to_T, x, whole, whole, betas, C, WEIGHTED, PRECISION)
        if C == 64:
            P = qk_2
            if GATE != NO_DECAY:
                D = across(decays + 3 * plane, i_2, j_2)
                P = qk_2 * D
            write_blocks(to_P, P, i_2, j_2, C, PRECISION)
            write_zeros(to_P, i_2, j_2, C)
            if ERASE:
                A = kk_2 * -tl.load(betas + i_2)[:, :, None]
                if GATE != NO_DECAY:
                    A *= D
                top, bottom = ends_of_pairs(x, 1, 32)
                x = products(products(bottom, A, SOLVE_PRECISION), top, SOLVE_PRECISION)
                write_inverse(to_T, x, i_2, j_2, betas, C, WEIGHTED, PRECISION)
                write_zeros(to_T, i_2, j_2, C)
