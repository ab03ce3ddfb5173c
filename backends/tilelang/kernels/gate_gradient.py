"""Define the macros of the gradients of the gate and of β (docs/math.md §5), for one head.

What they work on are vectors (Row.COUNT, C) and squares (C, C) in shared memory, float32.
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    ALPHA,
    EXP_OF_LIFT,
    F32,
    LIFT,
    LIFTED,
    blocks,
    macros,
)
from gdn_ops.backends.tilelang.kernels.gates import Norm

QUARTERS = 4
"""Parts of a row or a column that threads sum at once."""


class Row:
    """Name the rows of the vectors of a head."""

    FROM_START = 0  # b, or b¹
    TO_END = 1  # d, or d¹
    READING = 2  # s b, the weight of dO Sᵀ in dQ
    ERASING = 3  # −β b, the weight of dRHS Sᵀ in dK
    START = 4  # E in column start
    ERASED = 5  # rowsum(dRHS ⊙ K S)
    END = 6  # E in row C
    CORNER = 7  # E_C,start: the first element of what is summed over K
    BETA = 8  # dβ
    PAIR = 9  # rowsum(dA ⊙ K Kᵀ ⊙ D), later the sums of X¹
    TOTAL = 10  # the gradient of the gate
    IS_ZERO = 11  # 1 where α_t = 0
    COUNT = 12


def gate_gradient(T: Any, C: int, BK: int, erase: bool, decay: Any) -> SimpleNamespace:
    """Return the macros; squares of decays are formed by `decay`, one of the two of `blocks`."""
    b = blocks(T)
    quarter = C // QUARTERS

    @T.macro
    def chunk_decay(g, t, crossed):
        """Set b and d of a chunk with `crossed` zeros (docs/math.md §3); b_C is the last b."""
        for i in T.Parallel(C):
            t[Row.FROM_START, i] = b.start_decay(g, i, crossed)
            t[Row.TO_END, i] = b.pair_decay(g, C - 1, i, crossed)

    @T.macro
    def finish_sums(m, sums, scale, rest):
        """Turn the sums over rows of a head into E in column start, E in row C, and dβ."""
        t = m.t
        T.copy(sums.start, t[Row.START, 0:C])
        T.copy(sums.end, t[Row.END, 0:C])
        T.copy(sums.beta, t[Row.BETA, 0:C])
        T.copy(sums.corner, m.corners)
        if erase:
            T.copy(sums.erased, t[Row.ERASED, 0:C])
            T.copy(sums.pair, t[Row.PAIR, 0:C])
        for i in T.Parallel(C):
            t[Row.CORNER, i] = m.corners[i]
            for part in [*range(1, BK // C)]:
                t[Row.CORNER, i] += m.corners[part * C + i]
            t[Row.START, i] = T.if_then_else(
                i < rest, t[Row.START, i] * (scale * m.inv_norm[Norm.QUERY, i]), 0.0
            )
            t[Row.END, i] = t[Row.END, i] * m.inv_norm[Norm.KEY, i]
            if erase:
                t[Row.ERASED, i] = t[Row.ERASED, i] * m.inv_norm[Norm.KEY, i]
                t[Row.START, i] -= m.g[3, i] * t[Row.ERASED, i]
                t[Row.BETA, i] += t[Row.PAIR, i] - t[Row.FROM_START, i] * t[Row.ERASED, i]

    @T.macro
    def sum_straddling(m, total):
        """Set row `total` of t to the sum of X_ij over i ≥ t > j, column start and row C included.

        Only such pairs are added and none is subtracted: each holds α_t as a factor, so that
        the sum keeps its precision relative to a tiny α_t.
        """
        X, t, before, partial = m.X, m.t, m.before, m.partial
        run = T.alloc_var(F32)
        for part, i in T.Parallel(QUARTERS, C):
            run = 0.0
            for j in T.serial(quarter):
                here = X[i, part * quarter + j]
                X[i, part * quarter + j] = run
                run = run + here
            before[part, i] = run
        for i in T.Parallel(C):
            run = t[Row.START, i] * t[Row.FROM_START, i]
            for part in T.serial(QUARTERS):
                here = before[part, i]
                before[part, i] = run
                run = run + here
        for part, j in T.Parallel(QUARTERS, C):
            run = 0.0
            for i in T.serial(quarter):
                row = part * quarter + i
                own = X[row, j] + before[j // quarter, row]
                run = run + T.if_then_else(row >= j, own, t[Row.END, row] * t[Row.TO_END, row])
                run = run + t[Row.CORNER, row] * t[Row.FROM_START, C - 1]
            partial[part, j] = run
        for j in T.Parallel(C):
            t[total, j] = (partial[0, j] + partial[1, j]) + (partial[2, j] + partial[3, j])

    @T.macro
    def form_gate(gate, d_gate, first, hv, m, f, kind, rest):
        """Write d log α, or dα; X is E ⊙ D, f.dP is E, and f.D is free."""
        g, t = m.g, m.t
        # §5 d log α_t: X = E ⊙ D over i ≥ t > j                                 [C]
        sum_straddling(m, Row.TOTAL)
        for i in T.Parallel(C):
            before = T.if_then_else(i > 0, g[2, T.max(i - 1, 0)], 0.0)
            t[Row.IS_ZERO, i] = T.if_then_else(g[2, i] > before, 1.0, 0.0)
            is_divided = kind == ALPHA and i < rest and g[2, i] <= before
            given = T.if_then_else(is_divided, gate[first + i, hv], 1.0)
            t[Row.TOTAL, i] = T.if_then_else(g[2, i] > before, 0.0, t[Row.TOTAL, i] / given)
        if kind == ALPHA and g[2, C - 1] > 0.0:
            # §5 dα_t where α_t = 0: X¹ = E ⊙ D¹                                 [C]
            for i, j in T.Parallel(C, C):
                f.D[i, j] = decay(g, i, j, 1)
            for i, j in T.Parallel(C, C):
                m.X[i, j] = f.dP[i, j] * f.D[i, j]
            chunk_decay(g, t, 1)
            sum_straddling(m, Row.PAIR)
            for i in T.Parallel(C):
                if t[Row.IS_ZERO, i] > 0.0:
                    t[Row.TOTAL, i] = t[Row.PAIR, i]
        if kind == ALPHA and g[0, C - 1] < -LIFT:
            # §5 dα_t where 0 < α_t < e⁻⁶⁰: X is e⁶⁰ E ⊙ D                           [C]
            for i, j in T.Parallel(C, C):
                f.D[i, j] = decay(g, i, j, LIFTED)
            for i, j in T.Parallel(C, C):
                m.X[i, j] = f.dP[i, j] * f.D[i, j]
            chunk_decay(g, t, LIFTED)
            sum_straddling(m, Row.PAIR)
            for i in T.Parallel(C):
                hi = T.if_then_else(i > 0, g[0, T.max(i - 1, 0)], 0.0)
                lo = T.if_then_else(i > 0, g[1, T.max(i - 1, 0)], 0.0)
                if i < rest and (g[0, i] - hi) + (g[1, i] - lo) < -LIFT:
                    t[Row.TOTAL, i] = t[Row.PAIR, i] / (gate[first + i, hv] * EXP_OF_LIFT)
        for i in T.Parallel(C):
            if i < rest:
                d_gate[first + i, hv] = t[Row.TOTAL, i]

    return macros(chunk_decay, finish_sums, form_gate)
