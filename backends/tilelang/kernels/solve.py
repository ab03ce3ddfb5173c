"""Compute the gates of every chunk and, with an error term, T = (I + A)⁻¹: the first launch.

One program per chunk and key head. K Kᵀ is formed once and serves the R value heads.

    reads   k, and q with qk_l2norm, (M, H, K); α or log α, β (M, HV) float32
    writes  gates (HV, slots, 4, C) float32: G as hi and lo, z, β       (docs/math.md §4)
            norms (H, slots, 2, C) float32: 1/‖q‖, 1/‖k‖, or 1
            T (HV, slots, C, C) in the dtype of k                       (docs/math.md §3)
"""

from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    ALPHA,
    L2NORM_EPSILON,
    LOG_FLOOR,
    NO_DECAY,
    SMALLEST_NORMAL,
    blocks,
    parts_of,
)

F32 = "float32"
LOWEST = -3.4028234663852886e38
"""The lowest finite float32: what is below it is -inf."""
ROWS = 16
"""Rows of the blocks that are inverted by substitution, a column in the registers of a thread."""


def solve(T: Any, *, K: int, BK: int, C: int, dtype: str, erase: bool, threads: int) -> Any:
    """Make the kernel. Grid (slots, H).

    Args:
        T: the language.
        K, BK: width of a key, and of the tile that holds it.
        C: tokens per chunk: 16, 32 or 64.
        dtype: of q and k.
        erase: whether the rule has an error term.
        threads: per program.
    """
    b = blocks(T)
    M, H, HV = T.dynamic("M"), T.dynamic("H"), T.dynamic("HV")
    N1, slots = T.dynamic("N1"), T.dynamic("slots")
    gate_M, gate_HV = T.dynamic("gate_M"), T.dynamic("gate_HV")
    beta_M, beta_HV = T.dynamic("beta_M"), T.dynamic("beta_HV")
    T_HV, T_slots = T.dynamic("T_HV"), T.dynamic("T_slots")
    doublings = [1 << level for level in range(C.bit_length() - 1)]
    inner = [*range(1, ROWS)]
    is_split = parts_of(dtype) > 1
    half = C // 2

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
    def inverse_norms(x, squares, sums, to, row):
        """Set a row of `to` (2, C) to 1 / sqrt(sum(x²) + 1e-6) of the rows of a tile."""
        for i, j in T.Parallel(C, BK):
            squares[i, j] = T.cast(x[i, j], F32) * T.cast(x[i, j], F32)
        T.reduce_sum(squares, sums, dim=1, clear=True)
        for i in T.Parallel(C):
            to[row, i] = 1.0 / T.sqrt(sums[i] + L2NORM_EPSILON)

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

    @T.prim_func
    def solve(
        k: T.Tensor((M, H, K), dtype),
        q: T.Tensor((M, H, K), dtype),
        gate: T.Tensor((gate_M, gate_HV), F32),
        beta: T.Tensor((beta_M, beta_HV), F32),
        cu: T.Tensor((N1,), "int32"),
        gates: T.Tensor((HV, slots, 4, C), F32),
        norms: T.Tensor((H, slots, 2, C), F32),
        inverses: T.Tensor((T_HV, T_slots, C, C), dtype),
        kind: T.int32,
        has_beta: T.int32,
        has_norm: T.int32,
    ):
        with T.Kernel(slots, H, threads=threads) as (slot, h):
            landing = T.alloc_shared((C, BK), dtype)
            k_tile = b.operand((C, BK), dtype) if is_split else [landing]
            squares = T.alloc_fragment((C, BK), F32)
            sums = T.alloc_fragment((C,), F32)
            norm = T.alloc_shared((2, C), F32)
            x_sums = T.alloc_shared((2, C), "float64")
            z_sums = T.alloc_shared((2, C), F32)
            own_beta = T.alloc_shared((C,), F32)
            hi = T.alloc_shared((C,), F32)
            lo = T.alloc_shared((C,), F32)
            kk = T.alloc_fragment((C, C), F32)
            a = T.alloc_shared((C, C), F32)
            x = T.alloc_shared((C, C), F32)
            column = T.alloc_local((ROWS,), F32)
            blocks_right = T.alloc_shared((half, ROWS), F32)
            blocks_lower = T.alloc_shared((half, ROWS), F32)
            left = b.operand((half, half), F32)
            right = b.operand((half, half), F32)
            product = T.alloc_fragment((half, half), F32)
            n = b.owner(cu, N1 - 1, C, slot)
            begin = cu[n]
            first = begin + (slot - (begin // C + n)) * C
            rest = cu[n + 1] - first
            R = HV // H
            last = len(doublings) % 2
            if rest > 0:
                for i in T.Parallel(C):
                    norm[0, i] = 1.0
                    norm[1, i] = 1.0
                if has_norm != 0:
                    T.copy(q[first : first + C, h, 0:BK], landing)
                    inverse_norms(landing, squares, sums, norm, 0)
                T.copy(k[first : first + C, h, 0:BK], landing)
                if rest < C:
                    for i, j in T.Parallel(C, BK):
                        landing[i, j] = T.if_then_else(i < rest, landing[i, j], T.cast(0.0, dtype))
                if has_norm != 0:
                    inverse_norms(landing, squares, sums, norm, 1)
                T.copy(norm, norms[h, slot, 0:2, 0:C])
                if erase:
                    if is_split:
                        for i, j in T.Parallel(C, BK):
                            b.put(k_tile, i, j, T.cast(landing[i, j], F32))
                    # K Kᵀ, once for the R value heads                           [C, C]
                    b.multiply(k_tile, k_tile, kk, False, True, True)
                for r in T.serial(R):
                    hv = h * R + r
                    # §4 G, z                                                    [C]
                    for i in T.Parallel(C):
                        given = T.if_then_else(
                            kind != NO_DECAY and i < rest, gate[first + i, hv], 0.0
                        )
                        is_zero = T.if_then_else(
                            kind == ALPHA, given < SMALLEST_NORMAL, given < LOWEST
                        )
                        is_zero = is_zero and i < rest and kind != NO_DECAY
                        alpha = T.if_then_else(is_zero or kind != ALPHA or i >= rest, 1.0, given)
                        in_logs = T.if_then_else(
                            is_zero or kind == ALPHA, 0.0, T.max(given, LOG_FLOOR)
                        )
                        x_sums[0, i] = T.log(T.cast(alpha, "float64")) + T.cast(in_logs, "float64")
                        z_sums[0, i] = T.if_then_else(is_zero, 1.0, 0.0)
                        own_beta[i] = T.if_then_else(
                            i < rest,
                            T.if_then_else(has_beta != 0, beta[first + i, hv], 1.0),
                            0.0,
                        )
                    running_sums(x_sums, z_sums)
                    for i in T.Parallel(C):
                        hi[i] = T.cast(x_sums[last, i], F32)
                        lo[i] = T.cast(x_sums[last, i] - T.cast(hi[i], "float64"), F32)
                        gates[hv, slot, 0, i] = hi[i]
                        gates[hv, slot, 1, i] = lo[i]
                        gates[hv, slot, 2, i] = z_sums[last, i]
                        gates[hv, slot, 3, i] = own_beta[i]
                    if erase:
                        # §3 A = strict_lower(diag(β) (K Kᵀ ⊙ D))                [C, C]
                        for i, j in T.Parallel(C, C):
                            D = b.decay(
                                hi[i], lo[i], z_sums[last, i], hi[j], lo[j], z_sums[last, j], 0
                            )
                            scaled = kk[i, j] * (norm[1, i] * norm[1, j]) * own_beta[i]
                            a[i, j] = T.if_then_else(i > j, scaled * D, 0.0)
                        # §3 T = (I + A)⁻¹                                       [C, C]
                        invert_sixteens(a, x, column)
                        if C > ROWS:
                            merge_sixteens(a, x, blocks_right, blocks_lower)
                        if C > 2 * ROWS:
                            merge_halves(a, x, left, right, product)
                        for i, j in T.Parallel(C, C):
                            inverses[hv, slot, i, j] = T.cast(x[i, j], dtype)

    return solve
