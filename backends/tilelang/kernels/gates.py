"""Define the macros of a chunk's gates, G = hi + lo, z and β (docs/math.md §4), and of norms."""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    ALPHA,
    F32,
    L2NORM_EPSILON,
    LOG_FLOOR,
    NO_DECAY,
)

LOWEST = -3.4028234663852886e38
"""The lowest finite float32: what is below it is -inf."""

POWERS = [(2.0**n, 2.0**-n) for n in (64, 32, 16, 8, 4, 2, 1)]
"""Powers of two, and their inverses, that bring any normal float32 to (1/2, 2]."""


class Norm:
    """Name the rows of the norms of a chunk: 1 / norm is a power of two times a factor."""

    QUERY = 0  # the factor, in (1/2, 1], or 1 without qk_l2norm
    KEY = 1
    QUERY_POWER = 2
    KEY_POWER = 3
    COUNT = 4


def gates_of_chunk(T: Any, C: int, BK: int) -> SimpleNamespace:
    """Return the macros."""
    doublings = [1 << level for level in range(C.bit_length() - 1)]
    last = len(doublings) % 2

    @T.macro
    def running_sums(x, z):
        """Sum x and z (2, C) over the tokens, from row 0 into row `len(doublings) % 2`."""
        for level, apart in [*enumerate(doublings)]:
            source = level % 2
            for i in T.Parallel(C):
                before = T.max(i - apart, 0)
                x[1 - source, i] = x[source, i] + T.if_then_else(
                    i >= apart, x[source, before], T.cast(0.0, "float64")
                )
                z[1 - source, i] = z[source, i] + T.if_then_else(i >= apart, z[source, before], 0.0)

    @T.macro
    def inverse_norms(x, squares, sums, to, row, rest):
        """Set a factor and a power of two of `to` to 1 / sqrt(sum(x²) + 1e-6) of a tile's rows."""
        for i, j in T.Parallel(C, BK):
            squares[i, j] = T.cast(x[i, j], F32) * T.cast(x[i, j], F32)
        T.reduce_sum(squares, sums, dim=1, clear=True)
        # By way of shared memory each row is one thread's, not that of all that have summed it.
        T.copy(sums, to[row, 0:C])
        factor = T.alloc_var(F32)
        power = T.alloc_var(F32)
        step = T.alloc_var(F32)
        back = T.alloc_var(F32)
        for i in T.Parallel(C):
            factor = T.if_then_else(i < rest, 1.0 / T.sqrt(to[row, i] + L2NORM_EPSILON), 1.0)
            power = 1.0
            for large, small in POWERS:
                step = T.if_then_else(factor <= small, large, 1.0)
                step = T.if_then_else(factor > large, small, step)
                back = T.if_then_else(factor <= small, small, 1.0)
                back = T.if_then_else(factor > large, large, back)
                factor = factor * step
                power = power * back
            is_above = factor > 1.0
            to[row, i] = T.Select(is_above, factor * 0.5, factor)
            to[row + Norm.QUERY_POWER, i] = T.Select(is_above, power * 2.0, power)

    @T.macro
    def form(m, gate, beta, at, kind, has_beta):
        """Set G, z and β of a head in shared memory; z is the last row of its sums."""
        for i in T.Parallel(C):
            given = T.if_then_else(kind != NO_DECAY and i < at.rest, gate[at.first + i, at.hv], 0.0)
            is_zero = T.if_then_else(kind == ALPHA, given == 0.0, given < LOWEST)
            is_zero = is_zero and i < at.rest and kind != NO_DECAY
            alpha = T.if_then_else(is_zero or kind != ALPHA or i >= at.rest, 1.0, given)
            in_logs = T.if_then_else(is_zero or kind == ALPHA, 0.0, given)
            in_logs = T.if_then_else(in_logs < LOG_FLOOR, LOG_FLOOR, in_logs)
            m.x_sums[0, i] = T.log(T.cast(alpha, "float64")) + T.cast(in_logs, "float64")
            m.z_sums[0, i] = T.if_then_else(is_zero, 1.0, 0.0)
            m.beta[i] = T.if_then_else(
                i < at.rest, T.if_then_else(has_beta != 0, beta[at.first + i, at.hv], 1.0), 0.0
            )
        running_sums(m.x_sums, m.z_sums)

    @T.macro
    def store(m, gates, hv, slot):
        """Split G into hi and lo, and store the gates of a head."""
        for i in T.Parallel(C):
            m.hi[i] = T.cast(m.x_sums[last, i], F32)
            m.lo[i] = T.cast(m.x_sums[last, i] - T.cast(m.hi[i], "float64"), F32)
            gates[hv, slot, 0, i] = m.hi[i]
            gates[hv, slot, 1, i] = m.lo[i]
            gates[hv, slot, 2, i] = m.z_sums[last, i]
            gates[hv, slot, 3, i] = m.beta[i]

    return SimpleNamespace(inverse_norms=inverse_norms, form=form, store=store, last=last)
