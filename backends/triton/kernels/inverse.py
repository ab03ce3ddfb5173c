"""Invert unit lower triangular blocks on tensor cores, each in one warp (docs/math.md §3).

T = (I + A)⁻¹ by halves: [[X, 0], [-Y B X, Y]] of [[X⁻¹, 0], [B, Y⁻¹]]. Every step forms entries of
the inverse of a leading block, which stay of the order of β for unit keys; powers of A, as in
(I - A)(I + A²)(I + A⁴)..., would pass through 10⁶ for repeated keys and β = 2.

A lane holds entries of a product in other places than those of an operand, and moving them between
lanes costs more than the product. So every product is x yᵀ of two blocks, whose columns are summed
over in the order in which a lane holds them: then nothing moves, and what must be transposed is
formed a second time, as the transpose of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops._version import version_key

SPREAD = tl.constexpr(version_key(triton.__version__) >= version_key("3.9"))
"""Say that the columns of a block that was loaded in halves are also taken in another order. Before
Triton 3.9 an operand that is joined of two is spread over the lanes as the product is."""


@triton.jit
def by_lanes(x):
    """Return blocks (n, 16, 16) with their columns in the order in which lanes hold them.

    An accumulator has columns 2t and 2t + 1 of eight in lane t of four, an operand t and t + 4.
    """
    n: tl.constexpr = x.shape[0]
    columns = tl.permute(tl.reshape(x, (n, 16, 2, 4, 2)), (0, 1, 2, 4, 3))
    return tl.reshape(columns, (n, 16, 16))


@triton.jit
def transposed_product(z, x, y, IS_JOINED: tl.constexpr, PRECISION: tl.constexpr):
    """Return z + x yᵀ of blocks (n, 16, 16), without z where it is None.

    IS_JOINED: whether x or y is formed, without a product in between, of what `block` has loaded.
    """
    if SPREAD or not IS_JOINED:
        x, y = by_lanes(x), by_lanes(y)
    if z is None:
        z = tl.dot(x, tl.permute(y, (0, 2, 1)), input_precision=PRECISION)
    else:
        z = tl.dot(x, tl.permute(y, (0, 2, 1)), z, input_precision=PRECISION)
    return z


@triton.jit
def inverse_of_sixteen(a, PRECISION: tl.constexpr):
    """Return X = (I + A)⁻¹ and Xᵀ of −A, n strictly lower blocks (n, 16, 16), halving by masks."""
    i = tl.arange(0, 16)
    apart = (i[:, None] ^ i[None, :])[None]
    one = tl.where(apart == 0, 1.0, 0.0) + tl.zeros(a.shape, tl.float32)
    x = tl.where(apart == 1, a, one)
    xt = transposed_product(None, one, x, True, PRECISION)
    for level in tl.static_range(1, 4):
        # The pairs of blocks of 2**level rows: their numbers differ in the last bit only.
        below = tl.where((apart >> level) == 1, a, 0.0)
        # X − X B X and its transpose, of the transpose of −B X.
        right = transposed_product(None, xt, below, True, PRECISION)
        xt = transposed_product(xt, right, x, level == 1, PRECISION)
        x = transposed_product(x, x, right, level == 1, PRECISION)
    return x, xt
