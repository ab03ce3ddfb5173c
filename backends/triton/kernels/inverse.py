"""Invert unit lower triangular blocks on tensor cores (docs/math.md §3)."""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops._version import version_key

# T = (I + A)⁻¹ by halves (docs/math.md §3): [[X, 0], [-Y B X, Y]] of [[X⁻¹, 0], [B, Y⁻¹]]. Every
# step forms entries of the inverse of a leading block, which stay of the order of β for unit keys;
# powers of A, as in (I - A)(I + A²)(I + A⁴)..., would pass through 10⁶ for repeated keys and β = 2.


@triton.jit
def halves(m, n: tl.constexpr, b: tl.constexpr):
    """Return the diagonal blocks (2n, b, b) and the lower left ones (n, b, b) of (n, 2b, 2b)."""
    x = tl.permute(tl.reshape(m, (n, 2, b, 2, b)), (0, 2, 4, 1, 3))
    left, right = tl.split(x)
    top, below = tl.split(left)
    _above, bottom = tl.split(right)
    diagonal = tl.permute(tl.join(top, bottom), (0, 3, 1, 2))
    return tl.reshape(diagonal, (2 * n, b, b)), below


SINGLES_SPILL = tl.constexpr(version_key(triton.__version__) < version_key("3.9"))
"""Say that a batch of one must be multiplied in two dimensions: as a batch it makes `solve` spill
18 to 34 registers on sm_90 before Triton 3.9. From 3.9 on two dimensions cost 57 registers more."""


@triton.jit
def products(x, y, PRECISION: tl.constexpr):
    """Return the products (n, b, c) of two batches of n blocks, (b, a) and (a, c)."""
    if x.shape[0] == 1 and SINGLES_SPILL:
        left = tl.reshape(x, (x.shape[1], x.shape[2]))
        right = tl.reshape(y, (y.shape[1], y.shape[2]))
        xy = tl.dot(left, right, input_precision=PRECISION)[None, :, :]
    else:
        xy = tl.dot(x, y, input_precision=PRECISION)
    return xy


@triton.jit
def ends_of_pairs(x, n: tl.constexpr, b: tl.constexpr):
    """Return the first and the second blocks (n, b, b) of n pairs, (2n, b, b)."""
    return tl.split(tl.permute(tl.reshape(x, (n, 2, b, b)), (0, 2, 3, 1)))


@triton.jit
def merged(x, below, n: tl.constexpr, b: tl.constexpr, PRECISION: tl.constexpr):
    """Return inverses (n, 2b, 2b), given those of the diagonal blocks (2n, b, b) and −A below."""
    top, bottom = ends_of_pairs(x, n, b)
    lower = products(products(bottom, below, PRECISION), top, PRECISION)
    whole = tl.join(tl.join(top, lower), tl.join(tl.zeros_like(top), bottom))
    return tl.reshape(tl.permute(whole, (0, 3, 1, 4, 2)), (n, 2 * b, 2 * b))


@triton.jit
def inverse_of_sixteen(a, n: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + A)⁻¹ of −A, n strictly lower blocks (n, 16, 16), halving by masks."""
    i = tl.arange(0, 16)
    apart = (i[:, None] ^ i[None, :])[None]
    x = tl.where(apart == 1, a, tl.where(apart == 0, 1.0, 0.0))
    for level in tl.static_range(1, 4):
        # The pairs of blocks of 2**level rows: their numbers differ in the last bit only.
        below = tl.where((apart >> level) == 1, a, 0.0)
        right = tl.dot(below, x, input_precision=PRECISION)
        x = tl.dot(x, right, x, input_precision=PRECISION)
    return x
