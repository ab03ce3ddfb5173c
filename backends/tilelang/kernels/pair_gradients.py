"""Define the macros of the terms that are quadratic in a chunk (docs/math.md §5): E, M, dP ⊙ D."""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import blocks, macros
from gdn_ops.backends.tilelang.kernels.gates import Norm


def pair_gradients(
    T: Any, C: int, slices: int, width: int, erase: bool, decay: Any
) -> SimpleNamespace:
    """Return the macros, for gradients formed in so many slices of K of so many columns each.

    D is formed by `decay`, one of the two of `blocks`.
    """
    b = blocks(T)

    @T.macro
    def form(m, f, scale, rest):
        """Add s dP ⊙ D of a head to the first of the squares, M to the second.

        dP becomes E, dA becomes dA ⊙ K Kᵀ ⊙ D, and X is E ⊙ D.
        """
        for i, j in T.Parallel(C, C):
            f.D[i, j] = decay(m.g, i, j, 0)
        b.multiply_rows(m.q, m.k, f.pair, False, True, True)
        for i, j in T.Parallel(C, C):
            own = T.if_then_else(i >= j and i < rest, f.dP[i, j] * scale, 0.0)
            both = m.inv_norm[Norm.QUERY, i] * m.inv_norm[Norm.KEY, j]
            f.dP[i, j] = own * (f.pair[i, j] * both)
            f.pair[i, j] = m.squares[0][i, j] + own * f.D[i, j]
        T.copy(f.pair, m.squares[0][0:C, 0:C])
        if erase:
            b.multiply_rows(m.k, m.k, f.pair, False, True, True)
            for i, j in T.Parallel(C, C):
                own = T.if_then_else(i > j, -f.dA[i, j], 0.0)
                both = m.inv_norm[Norm.KEY, i] * m.inv_norm[Norm.KEY, j]
                f.dA[i, j] = own * (f.pair[i, j] * both)
                f.dP[i, j] += f.dA[i, j] * m.g[3, i]
                f.dA[i, j] = f.dA[i, j] * f.D[i, j]
                f.pair[i, j] = m.squares[1][i, j] + own * (f.D[i, j] * m.g[3, i])
            T.copy(f.pair, m.squares[1][0:C, 0:C])
        for i, j in T.Parallel(C, C):
            m.X[i, j] = f.dP[i, j] * f.D[i, j]

    @T.macro
    def multiply(m, which, row, axis, tile, to):
        """Add the product of a square of pair sums with normalised q or k to `to`.

        Tokens of q or k are columns of the square (axis 1), or its rows (0): then it is transposed.
        """
        for i, j in T.Parallel(C, C):
            b.put(m.pairs, i, j, m.squares[which][i, j] * m.inv_norm[row, j if axis else i])
        for at in [*range(slices)]:
            columns = [part[0:C, at * width : (at + 1) * width] for part in tile]
            if at < slices - 1:
                b.issue_rows(m.pairs, columns, to[at], axis == 0, False, False)
            else:
                b.multiply_rows(m.pairs, columns, to[at], axis == 0, False, False)

    return macros(form, multiply)
