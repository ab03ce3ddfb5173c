"""Define the macros that invert I + A, a unit lower triangular matrix (docs/math.md §3).

Blocks of 16 rows by substitution, then by halves: [[X, 0], [−Y B X, Y]] of [[X⁻¹, 0], [B, Y⁻¹]].
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import F32, blocks

ROWS = 16
"""Rows of the blocks that are inverted by substitution, a column in the registers of a thread."""


def inverse(T: Any, C: int) -> SimpleNamespace:
    """Return the macro `form`, for 16, 32 or 64 rows."""
    b = blocks(T)
    half, inner = C // 2, [*range(1, ROWS)]

    @T.macro
    def invert_sixteens(a, x, column):
        """Set the diagonal blocks of x to those of (I + A)⁻¹, row after row, and the rest to 0."""
        for j in T.Parallel(C):
            first = j // ROWS * ROWS
            column[0] = T.if_then_else(j == first, 1.0, 0.0)
            for i in inner:
                column[i] = T.if_then_else(j == first + i, 1.0, 0.0)
                for l in [*range(i)]:  # noqa: E741
                    column[i] = column[i] - a[first + i, first + l] * column[l]
            for i in T.serial(C):
                x[i, j] = 0.0
            for i in [0, *inner]:
                x[first + i, j] = column[i]

    @T.macro
    def merge_sixteens(a, x, right, lower):
        """Invert pairs of blocks of 16 rows, by scalars: −Y B X below them (docs/math.md §3)."""
        total = T.alloc_var(F32)
        for pair, i, j in T.Parallel(C // (2 * ROWS), ROWS, ROWS):
            top = pair * 2 * ROWS
            total = 0.0
            for l in T.serial(ROWS):  # noqa: E741
                total += a[top + ROWS + i, top + l] * x[top + l, top + j]
            right[pair * ROWS + i, j] = total
        for pair, i, j in T.Parallel(C // (2 * ROWS), ROWS, ROWS):
            top = pair * 2 * ROWS
            total = 0.0
            for l in T.serial(ROWS):  # noqa: E741
                total += x[top + ROWS + i, top + ROWS + l] * right[pair * ROWS + l, j]
            lower[pair * ROWS + i, j] = total
        for pair, i, j in T.Parallel(C // (2 * ROWS), ROWS, ROWS):
            x[pair * 2 * ROWS + ROWS + i, pair * 2 * ROWS + j] = -lower[pair * ROWS + i, j]

    @T.macro
    def merge_halves(a, x, left, right, product):
        """Invert I + A from its inverted halves: −Y B X, by products of split operands."""
        for i, j in T.Parallel(half, half):
            b.put(left, i, j, a[half + i, j])
            b.put(right, i, j, x[i, j])
        b.multiply(left, right, product, False, False, True)
        for i, j in T.Parallel(half, half):
            b.put(left, i, j, x[half + i, half + j])
        for i, j in T.Parallel(half, half):
            b.put(right, i, j, product[i, j])
        b.multiply(left, right, product, False, False, True)
        for i, j in T.Parallel(half, half):
            x[half + i, j] = -product[i, j]

    @T.macro
    def form(m):
        """Set x (C, C) to (I + A)⁻¹ of the strictly lower a (C, C)."""
        invert_sixteens(m.a, m.x, m.column)
        if C > ROWS:
            merge_sixteens(m.a, m.x, m.blocks_right, m.blocks_lower)
        if C > 2 * ROWS:
            merge_halves(m.a, m.x, m.left, m.right, m.product)

    return SimpleNamespace(form=form)
