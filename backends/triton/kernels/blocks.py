"""Define device functions that the kernels share: where a chunk lies, its decay, its inverse.

The tokens of a sequence are cut into chunks of C. Chunk c of sequence n has the *slot*

    slot(n, c) = begin_n // C + n + c        begin_n: first token of sequence n in a pack
    slot(n, c) = n * ceil(T / C) + c         without packing

which no other chunk has: a sequence of L tokens has at most (begin + L) // C + 1 - begin // C
chunks, and `+ n` gives it one more. So what is kept per chunk needs no table of chunk indices, no
prefix sum and no look at cu_seqlens from the host. A slot may be empty.

Everything kept per chunk is padded to whole chunks: padded tokens have β = 0 and the
cumulative log sum of the last token, so that later kernels read it without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

SEARCH = tl.constexpr(128)
"""Sequences looked at together when the owner of a slot is searched."""

NO_DECAY = tl.constexpr(0)
ALPHA = tl.constexpr(1)
LOG_ALPHA = tl.constexpr(2)
"""Forms in which a call may give the decay."""

L2NORM_EPSILON = tl.constexpr(1e-6)
LOG_FLOOR = tl.constexpr(-1000.0)
"""The conventions of `gdn_ops.call.numerics`, for float32."""

LOG2_E = tl.constexpr(1.4426950408889634)

EXPONENT = tl.constexpr(0x7F800000)
LEAST_EXPONENT = tl.constexpr(0x00800000)
TWICE_ONE_EXPONENT = tl.constexpr(0x7F000000)
"""The bits of a float32's exponent; those of the smallest normal, and twice those of 1."""
HALF_OF_TF32 = tl.constexpr(0x1000)
UPPER_OF_TF32 = tl.constexpr(-0x2000)
"""Half of the last bit of TF32 in a float32, and the bits of sign, exponent and mantissa."""

LIFTED = tl.constexpr(-1)
LIFT = tl.constexpr(60.0)
EXP_OF_LIFT = tl.constexpr(1.1420073898156842e26)
"""Stand in place of a count of zeros for decays that are e**60 times as large, and 1 at most.

With α_t below e**-60 that is what its gradient is formed of, so that neither a product with α_t
nor a quotient by it leaves the range of float32 (docs/math.md §5).
"""


@triton.jit
def sequence(n, cu_seqlens, T, C, VARLEN: tl.constexpr):
    """Return (batch row, first token in it, tokens, first slot) of sequence n."""
    if VARLEN:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
        row = tl.zeros([], tl.int64)
        slot = begin // C + n
    else:
        begin = tl.zeros([], tl.int64)
        end = begin + T
        row = begin + n
        slot = row * tl.cdiv(T, C)
    return row, begin, (end - begin).to(tl.int32), slot


@triton.jit
def owner(p, cu_seqlens, N, T, C, VARLEN: tl.constexpr):
    """Return (sequence, chunk in it) of slot p; an empty slot's chunk is past the sequence."""
    if VARLEN:
        n = tl.zeros([], tl.int32) - 1
        for first in range(0, N, SEARCH):
            m = first + tl.arange(0, SEARCH)
            begin = tl.load(cu_seqlens + m, mask=m < N, other=0)
            n += tl.sum(((m < N) & (begin // C + m <= p)).to(tl.int32))
        begin = tl.load(cu_seqlens + n)
        chunk = p - (begin // C + n).to(tl.int32)
    else:
        chunks = tl.cdiv(T, C)
        n = p // chunks
        chunk = p % chunks
    return n, chunk


@triton.jit
def decay(hi_i, lo_i, z_i, hi_j, lo_j, z_j, CROSSED: tl.constexpr):
    """Return exp(G_i - G_j) where CROSSED zeros lie between, else 0 (docs/math.md §4).

    G = hi + lo: equal parts cancel exactly, so a difference of large sums keeps its precision.
    It is at most 0 for i >= j; the other half is kept finite. A minimum would lose NaN.
    """
    log = (hi_i - hi_j) + (lo_i - lo_j)
    zeros = CROSSED
    if CROSSED == LIFTED:
        log += LIFT
        zeros = 0
    return tl.where(z_i - z_j == zeros, tl.exp(tl.where(log > 0.0, 0.0, log)), 0.0)


@triton.jit
def rows(x, row, batch_stride, first, token_stride, head, head_stride, i, d):
    """Return the pointers to tokens first + i (C,) and columns d (D,) of one head, (C, D).

    Only the offset of the tile can pass 2**31, one scalar; offsets within the tile are int32.
    """
    start = row * batch_stride + first * token_stride + tl.cast(head, tl.int64) * head_stride
    return x + start + (i * token_stride)[:, None] + d[None, :]


# A tile is read and written by a tensor descriptor where the GPU has them (TMA), which needs no
# mask for what lies outside of its matrix, and by pointers elsewhere.


@triton.jit
def tiles_of(x, start, stride, M, N, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Return the tiles (BM, BN) of a matrix (M, N) that begins at x + start, for `read_tile`."""
    if TMA:
        tiles = tl.make_tensor_descriptor(x + start, [M, N], [stride, 1], [BM, BN])
    else:
        tiles = x + start
    return tiles


@triton.jit
def tokens_of(
    x, row, batch_stride, begin, token_stride, head, head_stride, length, D, C: tl.constexpr,
    BD: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return the tiles (C, BD) of a head of a sequence of x (B, T, heads, D), for `read_tile`."""
    start = row * batch_stride + begin * token_stride + tl.cast(head, tl.int64) * head_stride
    return tiles_of(x, start, token_stride, length, D, C, BD, TMA)


@triton.jit
def tile_pointers(tiles, m_0, n_0, stride, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Return the pointers to a tile (BM, BN) and which of its entries lie in the matrix (M, N)."""
    m, n = m_0 + tl.arange(0, BM), n_0 + tl.arange(0, BN)
    start = tiles + tl.cast(m_0, tl.int64) * stride
    pointers = start + (tl.arange(0, BM) * stride)[:, None] + n[None, :]
    return pointers, (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def read_tile(tiles, m_0, n_0, stride, M, N, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Return the tile (BM, BN) that begins in row m_0 and column n_0; 0 outside of the matrix."""
    if TMA:
        tile = tiles.load([m_0, n_0])
    else:
        pointers, inside = tile_pointers(tiles, m_0, n_0, stride, M, N, BM, BN)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def write_tile(
    tiles, x, m_0, n_0, stride, M, N, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr
):
    """Write x (BM, BN) to the tile that begins in row m_0 and column n_0."""
    if TMA:
        tiles.store([m_0, n_0], x)
    else:
        pointers, inside = tile_pointers(tiles, m_0, n_0, stride, M, N, BM, BN)
        tl.store(pointers, x, mask=inside)


# A transposed state is written half by half of its columns: a whole one takes so much shared memory
# on its way that only one program would fit a processor.


@triton.jit
def state_tiles(
    states, hv, chunk_slots, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Return the transposed states of a head, of (HV, chunk_slots, V, K), for `write_state`."""
    start = tl.cast(hv, tl.int64) * chunk_slots * (V * K)
    # A block that reached beyond its state would write to the next one.
    return tiles_of(states, start, K, chunk_slots * V, K, BV, BK // 2, TMA and V % BV == 0)


@triton.jit
def write_columns(
    tiles, x, slot, dv_0, dk_0: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
    BV: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write x (BV, BK) to rows from dv_0 and columns from dk_0 on of a chunk's transposed state."""
    if TMA and V % BV == 0:
        tiles.store([slot * V + dv_0, dk_0], x)
    else:
        dv, dk = dv_0 + tl.arange(0, BV), dk_0 + tl.arange(0, BK)
        to = tiles + tl.cast(slot, tl.int64) * (V * K) + dv[:, None] * K + dk[None, :]
        tl.store(to, x, mask=(dv < V)[:, None] & (dk < K)[None, :])


@triton.jit
def write_state(
    tiles, x, slot, dv_0, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Write x (BV, BK) to rows from dv_0 on of a chunk's transposed state."""
    left, right = tl.split(tl.permute(tl.reshape(x, (BV, 2, BK // 2)), (0, 2, 1)))
    write_columns(tiles, left, slot, dv_0, 0, V, K, BV, BK // 2, TMA)
    write_columns(tiles, right, slot, dv_0, BK // 2, V, K, BV, BK // 2, TMA)


@triton.jit
def head_tile(
    tiles, head, head_stride, m_0, n_0, stride, M, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return a tile (BM, BN) of a head's matrix (M, N); with TMA heads lie side by side."""
    if TMA:
        tile = tiles.load([m_0, head * N + n_0])
    else:
        start = tiles + tl.cast(head, tl.int64) * head_stride
        tile = read_tile(start, m_0, n_0, stride, M, N, BM, BN, TMA)
    return tile


@triton.jit
def write_head_tile(
    tiles, x, head, head_stride, m_0, n_0, stride, M, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write x (BM, BN) to a tile of a head's matrix (M, N), as `head_tile` reads it."""
    if TMA:
        tiles.store([m_0, head * N + n_0], x.to(tiles.dtype))
    else:
        start = tiles + tl.cast(head, tl.int64) * head_stride
        x = x.to(tiles.dtype.element_ty)
        write_tile(start, x, m_0, n_0, stride, M, N, BM, BN, TMA)


@triton.jit
def kept_tile(
    tiles, at, m_0, n_0, M: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return a tile (BM, BN) of matrix `at` of many (M, N), which lie one behind another."""
    if TMA:
        tile = tiles.load([at * M + m_0, n_0])
    else:
        m, n = m_0 + tl.arange(0, BM), n_0 + tl.arange(0, BN)
        pointers = tiles + tl.cast(at, tl.int64) * (M * N) + m[:, None] * N + n[None, :]
        if M % BM == 0 and N % BN == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
    return tile


@triton.jit
def chunk_rows(x, head, slot, i, d, chunk_slots, C: tl.constexpr, D: tl.constexpr):
    """Return the pointers to rows i, columns d of a tensor (heads, chunk_slots, C, D)."""
    start = (tl.cast(head, tl.int64) * chunk_slots + slot) * (C * D)
    return x + start + i[:, None] * D + d[None, :]


@triton.jit
def chunk_row(x, head, slot, i, chunk_slots, C: tl.constexpr):
    """Return the pointers to entries i of a tensor (heads, chunk_slots, C)."""
    return x + (tl.cast(head, tl.int64) * chunk_slots + slot) * C + i


@triton.jit
def read_gates(gates, hv, slot, i, HV, chunk_slots, C: tl.constexpr):
    """Return hi, lo, z of a chunk, float32 (C,), from (4, HV, chunk_slots, C)."""
    at = chunk_row(gates, hv, slot, i, chunk_slots, C)
    plane = tl.cast(HV, tl.int64) * chunk_slots * C
    return tl.load(at), tl.load(at + plane), tl.load(at + 2 * plane)


@triton.jit
def read_beta(gates, hv, slot, i, HV, chunk_slots, C: tl.constexpr):
    """Return β of a chunk, float32 (C,), 0 for padding."""
    return tl.load(chunk_row(gates, 3 * HV + hv, slot, i, chunk_slots, C))


@triton.jit
def chunk_decay(gates, hv, slot, i, HV, chunk_slots, C: tl.constexpr, CROSSED: tl.constexpr):
    """Return b (C,), d (C,) and b_C of a chunk (docs/math.md §3), with CROSSED zeros in between."""
    hi, lo, z = read_gates(gates, hv, slot, i, HV, chunk_slots, C)
    hi_C, lo_C, z_C = read_gates(gates, hv, slot, C - 1, HV, chunk_slots, C)
    b = decay(hi, lo, z, 0.0, 0.0, 0.0, CROSSED)
    d = decay(hi_C, lo_C, z_C, hi, lo, z, CROSSED)
    return b, d, decay(hi_C, lo_C, z_C, 0.0, 0.0, 0.0, CROSSED)


@triton.jit
def write_factors(factors, hv, slot, i, HV, chunk_slots, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the factors of the rows of U, (C,); with CHANNELS 1: those of k have them."""
    if CHANNELS:
        write = tl.full([C], 1.0, tl.float32)
    else:
        write = tl.load(chunk_row(factors, 2 * HV + hv, slot, i, chunk_slots, C))
    return write


@triton.jit
def decay_of_chunk(ends, hv, slot, dk, chunk_slots, K: tl.constexpr, CHANNELS: tl.constexpr):
    """Return b_C of a chunk, or with CHANNELS that of every channel, (1, BK)."""
    if CHANNELS:
        at = (tl.cast(hv, tl.int64) * chunk_slots + slot) * K
        b_C = tl.load(ends + at + dk, mask=dk < K, other=0.0)[None, :]
    else:
        b_C = tl.load(ends + tl.cast(hv, tl.int64) * chunk_slots + slot)
    return b_C


@triton.jit
def inverse_norm(x):
    """Return 1 / sqrt(sum(x²) + 1e-6) of every row, float32."""
    wide = x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(wide * wide, 1) + L2NORM_EPSILON)


@triton.jit
def scaled_rows(x, inv_norm):
    """Return the rows of x times powers of two, and the factors that are left of 1 / norm.

    The powers are exact and bring the norms below 2; the factors are at most 1. Otherwise a zero
    key would have the factor 1000 multiplied into values, which it is a zero for.
    """
    exponent = (inv_norm.to(tl.int32, bitcast=True) & EXPONENT) + LEAST_EXPONENT
    power = exponent.to(tl.float32, bitcast=True).to(x.dtype)
    return x * power[:, None], rest_of_norm(inv_norm)


@triton.jit
def rest_of_norm(inv_norm):
    """Return what `scaled_rows` leaves of 1 / norm: above 1/2, at most 1."""
    exponent = (inv_norm.to(tl.int32, bitcast=True) & EXPONENT) + LEAST_EXPONENT
    return inv_norm * (-exponent + TWICE_ONE_EXPONENT).to(tl.float32, bitcast=True)


# Beside tiles of float16, everything else is a TF32 operand, rounded here, since a GPU cuts off.
# It has the same 11 bits and the range of float32: a state, an inverse or a gradient may be far
# beyond 65504 where the results are not.


@triton.jit
def widened(tile):
    """Return a tile as an operand beside states: float16 in float32, exactly."""
    if tile.dtype == tl.float16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return float32 values as an operand of products, rounded to a dtype, or to TF32."""
    if PRECISION == "tf32" and dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) + HALF_OF_TF32
        # Adding to the bits of a NaN may make a number of it.
        x = tl.where(x == x, (bits & UPPER_OF_TF32).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def written(
    u, v, gates, hv, slot, i, first, row, v_batch, v_token, v_head, dv, valid, in_v, HV,
    chunk_slots, V: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return U of a chunk (C, BV): kept, or diag(β) V for rules without an error term."""
    if ERASE:
        from_u = chunk_rows(u, hv, slot, i, dv, chunk_slots, C, V)
        return tl.load(from_u, mask=in_v[None, :], other=0.0)
    from_v = rows(v, row, v_batch, first, v_token, hv, v_head, i, dv)
    values = widened(tl.load(from_v, mask=valid[:, None] & in_v[None, :], other=0.0))
    beta = read_beta(gates, hv, slot, i, HV, chunk_slots, C)
    return operand(values.to(tl.float32) * beta[:, None], values.dtype, PRECISION)
