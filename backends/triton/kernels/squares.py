"""Form T and P of chunks, each by one warp: the second half of `prepare`.

    reads   K Kᵀ and s Q Kᵀ of `write_blocks`; β; decays of pairs
    writes  T (HV, chunk_slots, C, C), only with an error term                (docs/math.md §3);
            WEIGHTED: T diag(β)
            P = s lower(Q Kᵀ ⊙ D) (HV, chunk_slots, C, C)

A square is made of blocks of 16 x 16. A tensor (PAIRS, 16, 16) holds a block of PAIRS value heads
or chunks, one in each warp, so that no warp waits for another one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import operand
from gdn_ops.backends.triton.kernels.inverse import inverse_of_sixteen, transposed_product

PAIRS = tl.constexpr(4)
"""Squares that are formed together: as many as a program has warps."""

BLOCK = tl.constexpr(256)
"""Entries of a block."""


@triton.jit
def triangle(C: tl.constexpr):
    """Return how many entries the blocks of the lower triangle of a square (C, C) have."""
    return (C // 16) * (C // 16 + 1) // 2 * BLOCK


@triton.jit
def write_blocks(blocks, square, C: tl.constexpr):
    """Write the blocks of the lower triangle of a square (C, C), as `block` reads them.

    Block (m, n) is number m (m + 1) / 2 + n. In it, lane after lane has the entries of an
    accumulator of `mma`: columns 2t and 2t + 1 of rows g and g + 8, for lane 4g + t, of its left
    half and then of its right one.
    """
    n: tl.constexpr = C // 16
    # m, rows g and g + 8; n, halves, columns 2t and 2t + 1
    x = tl.reshape(square, (n, 2, 8, n, 2, 4, 2))
    # A warp has the rows of an m: nothing moves between lanes.
    x = tl.reshape(tl.permute(x, (3, 4, 0, 2, 5, 1, 6)), (2 * n * n, BLOCK // 2))
    r = tl.arange(0, 2 * n * n)
    at_m, at_n, half = r % n, r // (2 * n), r // n % 2
    start = (at_m * (at_m + 1) // 2 + at_n) * BLOCK + half * (BLOCK // 2)
    to = blocks + start[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(to, x, mask=(at_m >= at_n)[:, None])


@triton.jit
def block(blocks, number: tl.constexpr):
    """Return a block that `write_blocks` has written, given a pointer for each pair (PAIRS,)."""
    n: tl.constexpr = blocks.shape[0]
    half: tl.constexpr = BLOCK // 2
    at = blocks[:, None] + (number * BLOCK + tl.arange(0, half)[None, :])
    x = tl.reshape(tl.join(tl.load(at), tl.load(at + half)), (n, 8, 4, 2, 2, 2))
    # Lane (g, t), rows g and g + 8, columns 2t and 2t + 1, halves.
    return tl.reshape(tl.permute(x, (0, 3, 1, 5, 2, 4)), (n, 16, 16))


@triton.jit
def write_block(
    square, x, inside, row: tl.constexpr, column: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a block (PAIRS, 16, 16) to a row and column of squares (C, C), as lanes hold it."""
    pairs: tl.constexpr = x.shape[0]
    n = tl.arange(0, 64)
    to = square[:, None] + (row * C + column + n // 8 * C + n % 8)[None, :]
    x = tl.reshape(operand(x, square.dtype.element_ty, PRECISION), (pairs, 2, 8, 2, 4, 2))
    x = tl.reshape(tl.permute(x, (0, 2, 4, 5, 3, 1)), (pairs, 64, 2, 2))
    above, below = tl.split(x)
    upper_left, upper_right = tl.split(above)
    lower_left, lower_right = tl.split(below)
    mask = inside[:, None]
    tl.store(to, upper_left, mask=mask)
    tl.store(to + 8, upper_right, mask=mask)
    tl.store(to + 8 * C, lower_left, mask=mask)
    tl.store(to + (8 * C + 8), lower_right, mask=mask)


@triton.jit
def write_zeros(square, inside, row: tl.constexpr, column: tl.constexpr, C: tl.constexpr):
    """Write a block of zeros to a row and column of squares (C, C)."""
    n = tl.arange(0, BLOCK)
    to = square[:, None] + (row * C + column + n // 16 * C + n % 16)[None, :]
    tl.store(to, tl.zeros(to.shape, square.dtype.element_ty), mask=inside[:, None])


@triton.jit
def sixteen(x, first: tl.constexpr):
    """Return entries `first` to `first` + 15 of a row for each pair, (PAIRS, 16)."""
    return tl.load(x[:, None] + (first + tl.arange(0, 16))[None, :])


@triton.jit
def within(decays, plane, first: tl.constexpr):
    """Return D_ij for tokens i, j of a run of 16: float32 (PAIRS, 16, 16), D_ji above."""
    hi, lo = sixteen(decays, first), sixteen(decays + plane, first)
    log = (hi[:, :, None] - hi[:, None, :]) + (lo[:, :, None] - lo[:, None, :])
    return tl.exp2(-tl.abs(log))


@triton.jit
def across(decays, row: tl.constexpr, column: tl.constexpr):
    """Return D_ij of 16 later tokens i and 16 earlier ones j: float32 (PAIRS, 16, 16)."""
    return sixteen(decays, row)[:, :, None] * sixteen(decays, column)[:, None, :]


@triton.jit
def entries(
    qk, kk, decays, beta, to_P, inside, plane,
    row: tl.constexpr, column: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a block of P; return that of −A = −strict_lower(diag(β) (K Kᵀ ⊙ D)), (PAIRS, 16, 16).

    `row` and `column`: tokens that the block begins with.
    """
    number: tl.constexpr = (row // 16) * (row // 16 + 1) // 2 + column // 16
    P = block(qk, number)
    A = P
    if ERASE:
        A = block(kk, number) * -sixteen(beta, row)[:, :, None]
    if DECAY:
        if row == column:
            D = within(decays, plane, row)
        elif row // 32 == column // 32:
            D = across(decays + 2 * plane, row, column)
        else:
            D = across(decays + 3 * plane, row, column)
        P *= D
        A *= D
    write_block(to_P, P, inside, row, column, C, PRECISION)
    if row != column:
        write_zeros(to_P, inside, column, row, C)
    return A


@triton.jit
def write_inverse(
    to_T, x, beta, inside, row: tl.constexpr, column: tl.constexpr, C: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a block of T, or of T diag(β)."""
    if WEIGHTED:
        x *= sixteen(beta, column)[:, None, :]
    write_block(to_T, x, inside, row, column, C, PRECISION)
    if row != column:
        write_zeros(to_T, inside, column, row, C)


@triton.jit
def half_squares(
    qk, kk, decays, beta, to_P, to_T, inside, plane, first: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, ERASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Write P and T of 32 tokens of a chunk from `first` on.

    Returns:
        T's blocks: the two on the diagonal and the one below, each followed by its transpose;
        without an error term something else.
    """
    second: tl.constexpr = first + 16
    x = entries(qk, kk, decays, beta, to_P, inside, plane, first, first, C, DECAY, ERASE, PRECISION)
    xt = x
    if ERASE:
        x, xt = inverse_of_sixteen(x, SOLVE_PRECISION)
        write_inverse(to_T, x, beta, inside, first, first, C, WEIGHTED, PRECISION)
    y = entries(
        qk, kk, decays, beta, to_P, inside, plane, second, second, C, DECAY, ERASE, PRECISION
    )
    yt = y
    if ERASE:
        y, yt = inverse_of_sixteen(y, SOLVE_PRECISION)
        write_inverse(to_T, y, beta, inside, second, second, C, WEIGHTED, PRECISION)
    z = entries(
        qk, kk, decays, beta, to_P, inside, plane, second, first, C, DECAY, ERASE, PRECISION
    )
    zt = z
    if ERASE:
        right = transposed_product(None, xt, z, True, SOLVE_PRECISION)
        z = transposed_product(None, y, right, False, SOLVE_PRECISION)
        zt = transposed_product(None, right, y, False, SOLVE_PRECISION)
        write_inverse(to_T, z, beta, inside, second, first, C, WEIGHTED, PRECISION)
    return x, xt, y, yt, z, zt


@triton.jit
def squares(
    qk, kk, decays, beta, to_P, to_T, inside, plane, C: tl.constexpr, DECAY: tl.constexpr,
    ERASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Write P and T of PAIRS squares, given pointers (PAIRS,) to what is read and written."""
    if C == 16:
        x = entries(qk, kk, decays, beta, to_P, inside, plane, 0, 0, C, DECAY, ERASE, PRECISION)
        if ERASE:
            x, _xt = inverse_of_sixteen(x, SOLVE_PRECISION)
            write_inverse(to_T, x, beta, inside, 0, 0, C, WEIGHTED, PRECISION)
    else:
        _x, xt, _y, yt, _z, zt = half_squares(
            qk, kk, decays, beta, to_P, to_T, inside, plane, 0, C, DECAY, ERASE, WEIGHTED,
            PRECISION, SOLVE_PRECISION,
        )  # fmt: skip
    if C == 64:
        u, _ut, v, _vt, w, _wt = half_squares(
            qk, kk, decays, beta, to_P, to_T, inside, plane, 32, C, DECAY, ERASE, WEIGHTED,
            PRECISION, SOLVE_PRECISION,
        )  # fmt: skip
        # Form the four blocks below, [[U, 0], [W, V]] (-A) [[X, 0], [Z, Y]], by columns of 16.
        a = entries(qk, kk, decays, beta, to_P, inside, plane, 32, 0, C, DECAY, ERASE, PRECISION)
        b = entries(qk, kk, decays, beta, to_P, inside, plane, 48, 0, C, DECAY, ERASE, PRECISION)
        c = entries(qk, kk, decays, beta, to_P, inside, plane, 32, 16, C, DECAY, ERASE, PRECISION)
        d = entries(qk, kk, decays, beta, to_P, inside, plane, 48, 16, C, DECAY, ERASE, PRECISION)
        if ERASE:
            for column in tl.static_range(0, 32, 16):
                if column == 0:
                    upper = transposed_product(None, xt, a, True, SOLVE_PRECISION)
                    lower = transposed_product(None, xt, b, True, SOLVE_PRECISION)
                    upper = transposed_product(upper, zt, c, True, SOLVE_PRECISION)
                    lower = transposed_product(lower, zt, d, True, SOLVE_PRECISION)
                else:
                    upper = transposed_product(None, yt, c, True, SOLVE_PRECISION)
                    lower = transposed_product(None, yt, d, True, SOLVE_PRECISION)
                x = transposed_product(None, u, upper, False, SOLVE_PRECISION)
                write_inverse(to_T, x, beta, inside, 32, column, C, WEIGHTED, PRECISION)
                x = transposed_product(None, v, lower, False, SOLVE_PRECISION)
                x = transposed_product(x, w, upper, False, SOLVE_PRECISION)
                write_inverse(to_T, x, beta, inside, 48, column, C, WEIGHTED, PRECISION)
