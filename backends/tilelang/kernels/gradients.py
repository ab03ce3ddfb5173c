"""The parallel part of the backward: all gradients of a chunk, given dRHS and dS.

One program per chunk and key head. It turns over the R value heads of the key head and the blocks of
BV columns of V; the sums over value heads, dQ and dK (C, BK) and their pairs (C, C), stay in
registers, float32. No sum leaves a program: no atomics, and the same call gives the same bits.

    reads   q, k (M, H, K), v, dO (M, HV, V), α or log α (M, HV) float32; gates, norms;
            U, dRHS (HV, slots, C, V); S, dS at the ends of chunks (HV, slots, K, V)
    writes  dq, dk (M, H, K), dv (M, HV, V) in their dtype; dα or d log α, dβ (M, HV) float32
"""

from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    ALPHA,
    NO_DECAY,
    PAIRS,
    blocks,
    parts_of,
)

F32 = "float32"
SLICE = 64
"""Columns of K that a gradient is formed of at a time."""

QUARTERS = 4
"""Into how many parts a row or a column is cut that threads sum at once."""


def gradients(
    T: Any, *, K: int, BK: int, V: int, BV: int, C: int, dtype: str, erase: bool, threads: int,
    stages: int,
) -> Any:  # fmt: skip
    """Make the kernel. Grid (slots, H).

    Args:
        T: the language.
        K, BK: width of a key, and of the tile that holds it.
        V, BV: width of a value, and of the block of a turn.
        C: tokens per chunk.
        dtype: of q, k, v, dO and of what is kept.
        erase: whether the rule has an error term.
        threads: per program.
        stages: of the software pipeline; 0 for none.
    """
    b = blocks(T)
    M, H, HV = T.dynamic("M"), T.dynamic("H"), T.dynamic("HV")
    N1, slots = T.dynamic("N1"), T.dynamic("slots")
    u_HV, u_slots, gate_M, gate_HV, beta_M, beta_HV = (
        T.dynamic(f"{x}") for x in ("u_HV", "u_slots", "gate_M", "gate_HV", "beta_M", "beta_HV")
    )
    is_split = parts_of(dtype) > 1
    columns = -(-V // BV)
    quarter = C // QUARTERS
    slices = [*range(BK // SLICE)]

    def rows(parts: list[Any], at: int) -> list[Any]:
        """Return SLICE rows of a state."""
        return [part[at * SLICE : (at + 1) * SLICE, 0:BV] for part in parts]

    def columns_of(parts: list[Any], at: int) -> list[Any]:
        """Return SLICE columns of q or k."""
        return [part[0:C, at * SLICE : (at + 1) * SLICE] for part in parts]

    @T.macro
    def multiply(left, right, to, transpose_A, transpose_B, clear):  # type: ignore[no-untyped-def]
        """Add the product of two operands to `to`, or set it: its rows over as many warps as can be."""
        for index, (x, y) in [*enumerate(PAIRS[len(left)])]:
            T.gemm(
                left[x], right[y], to,
                transpose_A=transpose_A, transpose_B=transpose_B,
                policy=T.GemmWarpPolicy.FullRow, clear_accum=clear and index == 0,
            )  # fmt: skip

    @T.macro
    def lower(x, parts, height, width):  # type: ignore[no-untyped-def]
        """Round a fragment to an operand."""
        if is_split:
            for i, j in T.Parallel(height, width):
                b.put(parts, i, j, x[i, j])
        else:
            T.copy(x, parts[0])

    @T.macro
    def load(x, parts, landing, height, width):  # type: ignore[no-untyped-def]
        """Copy a region of a tensor into an operand."""
        if is_split:
            T.copy(x, landing)
            lower(landing, parts, height, width)
        else:
            T.copy(x, parts[0])

    @T.macro
    def load_rows(x, first, head, rest, parts):  # type: ignore[no-untyped-def]
        """Copy the C rows of a head of x (M, heads, K) into an operand, 0 where there is no token."""
        for i, j in T.Parallel(C, BK):
            found = T.if_then_else(i < rest and j < K, x[first + i, head, j], T.cast(0.0, dtype))
            if is_split:
                b.put(parts, i, j, found)
            else:
                parts[0][i, j] = found

    @T.macro
    def chunk_decay(g, from_start, to_end, crossed):  # type: ignore[no-untyped-def]
        """Set b and d of a chunk (MATH §3), with so many zeros in between."""
        for i in T.Parallel(C):
            from_start[i] = b.decay(g[0, i], g[1, i], g[2, i], 0.0, 0.0, 0.0, crossed)
            to_end[i] = b.decay(
                g[0, C - 1], g[1, C - 1], g[2, C - 1], g[0, i], g[1, i], g[2, i], crossed
            )

    @T.macro
    def weigh(  # type: ignore[no-untyped-def]
        start, end, corner, g, from_start, to_end, starts, ends, corners, crossed
    ):
        """Multiply what reaches out of the chunk by its decay: X in column start and in row C."""
        for i in T.Parallel(C):
            starts[i] = start[i] * from_start[i]
            ends[i] = end[i] * to_end[i]
            corners[i] = corner[i] * b.decay(
                g[0, C - 1], g[1, C - 1], g[2, C - 1], 0.0, 0.0, 0.0, crossed
            )

    @T.macro
    def sum_straddling(X, parts, partial, starts, ends, corners, total):  # type: ignore[no-untyped-def]
        """Set total_t to the sum of X_ij over i ≥ t > j, column start and row C included.

        Only such pairs are added and none is subtracted: each holds α_t as a factor, so that
        the sum keeps its precision relative to a tiny α_t.
        """
        run = T.alloc_var(F32)
        for part, i in T.Parallel(QUARTERS, C):
            run = 0.0
            for j in T.serial(quarter):
                here = X[i, part * quarter + j]
                X[i, part * quarter + j] = run
                run = run + here
            parts[part, i] = run
        for i in T.Parallel(C):
            run = starts[i]
            for part in T.serial(QUARTERS):
                here = parts[part, i]
                parts[part, i] = run
                run = run + here
        for part, t in T.Parallel(QUARTERS, C):
            run = 0.0
            for i in T.serial(quarter):
                row = part * quarter + i
                run = (
                    run
                    + corners[row]
                    + T.if_then_else(row >= t, X[row, t] + parts[t // quarter, row], ends[row])
                )
            partial[part, t] = run
        for t in T.Parallel(C):
            total[t] = (partial[0, t] + partial[1, t]) + (partial[2, t] + partial[3, t])

    @T.macro
    def weighted(x, norm, row, axis, parts):  # type: ignore[no-untyped-def]
        """Round a sum of pairs, times a row of norms along an axis, to an operand."""
        for i, j in T.Parallel(C, C):
            b.put(parts, i, j, x[i, j] * norm[row, j if axis else i])

    @T.macro
    def project(x, parts, norm, row, products, sums, along):  # type: ignore[no-untyped-def]
        """Turn the gradient of y / ‖y‖ into that of y."""
        T.clear(products)
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                products[i, j] += x[at][i, j] * b.value(parts, i, at * SLICE + j)
        T.reduce_sum(products, sums, dim=1, clear=True)
        T.copy(sums, along)
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                same = norm[row, i] * norm[row, i] * along[i] * b.value(parts, i, at * SLICE + j)
                x[at][i, j] = (x[at][i, j] - same) * norm[row, i]

    @T.macro
    def store(x, to, first, head, rest):  # type: ignore[no-untyped-def]
        """Copy the rows that are tokens to (M, heads, K)."""
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                if i < rest and at * SLICE + j < K:
                    to[first + i, head, at * SLICE + j] = T.cast(x[at][i, j], dtype)

    @T.prim_func
    def gradients(
        q: T.Tensor((M, H, K), dtype),
        k: T.Tensor((M, H, K), dtype),
        v: T.Tensor((M, HV, V), dtype),
        d_o: T.Tensor((M, HV, V), dtype),
        gate: T.Tensor((gate_M, gate_HV), F32),
        gates: T.Tensor((HV, slots, 4, C), F32),
        norms: T.Tensor((H, slots, 2, C), F32),
        u: T.Tensor((u_HV, u_slots, C, V), dtype),
        d_rhs: T.Tensor((HV, slots, C, V), dtype),
        kept: T.Tensor((HV, slots, K, V), dtype),
        d_states: T.Tensor((HV, slots, K, V), dtype),
        cu: T.Tensor((N1,), "int32"),
        d_q: T.Tensor((M, H, K), dtype),
        d_k: T.Tensor((M, H, K), dtype),
        d_v: T.Tensor((M, HV, V), dtype),
        d_gate: T.Tensor((gate_M, gate_HV), F32),
        d_beta: T.Tensor((beta_M, beta_HV), F32),
        scale: T.float32,
        kind: T.int32,
        has_beta: T.int32,
        has_norm: T.int32,
    ):
        with T.Kernel(slots, H, threads=threads) as (slot, h):
            q_tile = b.operand((C, BK), dtype)
            k_tile = b.operand((C, BK), dtype)
            S = b.operand((BK, BV), dtype)
            dS = b.operand((BK, BV), dtype)
            U = b.operand((C, BV), dtype)
            dR = b.operand((C, BV), dtype)
            d_o_tile = b.operand((C, BV), dtype)
            v_tile = T.alloc_shared((C, BV), dtype)
            g = T.alloc_shared((4, C), F32)
            norm = T.alloc_shared((2, C), F32)
            from_start = T.alloc_shared((C,), F32)
            to_end = T.alloc_shared((C,), F32)
            dQ = [T.alloc_fragment((C, SLICE), F32) for _ in slices]
            dK = [T.alloc_fragment((C, SLICE), F32) for _ in slices]
            x = T.alloc_fragment((C, SLICE), F32)
            products = T.alloc_fragment((C, SLICE), F32)
            state = T.alloc_fragment((BK, BV), F32)
            values = T.alloc_fragment((C, BV), F32)
            D = T.alloc_fragment((C, C), F32)
            pair = T.alloc_fragment((C, C), F32)
            dP = T.alloc_fragment((C, C), F32)
            dA = T.alloc_fragment((C, C), F32)
            sum_qk = T.alloc_shared((C, C + 8), F32)
            sum_kk = T.alloc_shared((C, C + 8), F32)
            pairs = b.operand((C, C), dtype)
            X = T.alloc_shared((C, C + 1), F32)
            start_sums = T.alloc_fragment((C,), F32)
            erased_sums = T.alloc_fragment((C,), F32)
            end_sums = T.alloc_fragment((C,), F32)
            beta_sums = T.alloc_fragment((C,), F32)
            corner_sums = T.alloc_fragment((C,), F32)
            pair_sums = T.alloc_fragment((C,), F32)
            start = T.alloc_shared((C,), F32)
            erased = T.alloc_shared((C,), F32)
            end = T.alloc_shared((C,), F32)
            corner = T.alloc_shared((C,), F32)
            own_beta = T.alloc_shared((C,), F32)
            starts = T.alloc_shared((C,), F32)
            ends = T.alloc_shared((C,), F32)
            total = T.alloc_shared((C,), F32)
            at_zero = T.alloc_shared((C,), F32)
            corners = T.alloc_shared((C,), F32)
            quarters = T.alloc_shared((QUARTERS, C), F32)
            partial = T.alloc_shared((QUARTERS, C), F32)
            n = T.alloc_var("int32")
            first = T.alloc_var("int32")
            rest = T.alloc_var("int32")
            turns = T.alloc_var("int32")
            first_head = T.alloc_var("int32")

            T.annotate_producer_reg_dealloc(24)
            T.annotate_consumer_reg_alloc(240)
            n = b.owner(cu, N1 - 1, C, slot)
            first = cu[n] + (slot - (cu[n] // C + n)) * C
            rest = cu[n + 1] - first
            first_head = h * (HV // H)
            turns = T.if_then_else(rest > 0, HV // H * columns, 0)
            load_rows(q, first, h, rest, q_tile)
            load_rows(k, first, h, rest, k_tile)
            for a, i in T.Parallel(2, C):
                norm[a, i] = norms[h, slot, a, i]
            for part in [*dQ, *dK]:
                T.clear(part)
            T.clear(sum_qk)
            T.clear(sum_kk)
            for turn in T.Pipelined(turns, num_stages=stages):
                hv = first_head + turn // columns
                dv = turn % columns * BV
                T.copy(gates[hv, slot, 0:4, 0:C], g)
                load(d_o[first : first + C, hv, dv : dv + BV], d_o_tile, values, C, BV)
                if erase:
                    load(u[hv, slot, 0:C, dv : dv + BV], U, values, C, BV)
                load(d_rhs[hv, slot, 0:C, dv : dv + BV], dR, values, C, BV)
                load(kept[hv, slot, 0:BK, dv : dv + BV], S, state, BK, BV)
                load(d_states[hv, slot, 0:BK, dv : dv + BV], dS, state, BK, BV)
                T.copy(v[first : first + C, hv, dv : dv + BV], v_tile)
                if not erase:
                    for i, j in T.Parallel(C, BV):
                        values[i, j] = T.if_then_else(
                            i < rest, T.cast(v_tile[i, j], F32) * g[3, i], 0.0
                        )
                    lower(values, U, C, BV)
                chunk_decay(g, from_start, to_end, 0)
                if turn % columns == 0:
                    T.clear(dP)
                    T.clear(dA)
                    T.clear(start_sums)
                    T.clear(erased_sums)
                    T.clear(end_sums)
                    T.clear(beta_sums)
                    T.clear(corner_sums)
                # §5 dP = s lower(dO Uᵀ),  dA = −strict_lower(dRHS Uᵀ)           [C, C]
                multiply(d_o_tile, U, dP, False, True, False)
                if erase:
                    multiply(dR, U, dA, False, True, False)
                # §5 s diag(b) dO Sᵀ to dQ; E_i,start += s rowsum(dO ⊙ Q S)      [C, BK]
                T.clear(products)
                for at in slices:
                    multiply(d_o_tile, rows(S, at), x, False, True, True)
                    for i, j in T.Parallel(C, SLICE):
                        dQ[at][i, j] = dQ[at][i, j] + x[i, j] * (scale * from_start[i])
                        products[i, j] += x[i, j] * b.value(q_tile, i, at * SLICE + j)
                T.reduce_sum(products, start_sums, dim=1, clear=False)
                if erase:
                    # §5 − diag(βb) dRHS Sᵀ to dK; rowsum(dRHS ⊙ K S)            [C, BK]
                    T.clear(products)
                    for at in slices:
                        multiply(dR, rows(S, at), x, False, True, True)
                        for i, j in T.Parallel(C, SLICE):
                            dK[at][i, j] = dK[at][i, j] - x[i, j] * (g[3, i] * from_start[i])
                            products[i, j] += x[i, j] * b.value(k_tile, i, at * SLICE + j)
                    T.reduce_sum(products, erased_sums, dim=1, clear=False)
                # §5 diag(d) U dS_Cᵀ to dK; E_C,j += rowsum((K dS_C) ⊙ U)        [C, BK]
                T.clear(products)
                for at in slices:
                    multiply(U, rows(dS, at), x, False, True, True)
                    for i, j in T.Parallel(C, SLICE):
                        dK[at][i, j] = dK[at][i, j] + x[i, j] * to_end[i]
                        products[i, j] += x[i, j] * b.value(k_tile, i, at * SLICE + j)
                T.reduce_sum(products, end_sums, dim=1, clear=False)
                # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ V) ...               [C, BV]
                for i, j in T.Parallel(C, BV):
                    if i < rest and dv + j < V:
                        d_v[first + i, hv, dv + j] = T.cast(b.value(dR, i, j) * g[3, i], dtype)
                for i, j in T.Parallel(C, BV):
                    values[i, j] = b.value(dR, i, j) * T.cast(v_tile[i, j], F32)
                T.reduce_sum(values, beta_sums, dim=1, clear=False)
                # §5 E_C,start = ⟨dS_C, S⟩
                T.clear(values)
                for part in T.serial(BK // C):
                    for i, j in T.Parallel(C, BV):
                        values[i, j] += b.value(S, part * C + i, j) * b.value(dS, part * C + i, j)
                T.reduce_sum(values, corner_sums, dim=1, clear=False)
                if turn % columns == columns - 1:
                    # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ,  M = diag(β) dA ⊙ D  [C, C]
                    for i, j in T.Parallel(C, C):
                        D[i, j] = b.decay(g[0, i], g[1, i], g[2, i], g[0, j], g[1, j], g[2, j], 0)
                    multiply(q_tile, k_tile, pair, False, True, True)
                    for i, j in T.Parallel(C, C):
                        own = T.if_then_else(i >= j and i < rest, dP[i, j] * scale, 0.0)
                        sum_qk[i, j] = sum_qk[i, j] + own * D[i, j]
                        dP[i, j] = own * (pair[i, j] * (norm[0, i] * norm[1, j]))
                    if erase:
                        multiply(k_tile, k_tile, pair, False, True, True)
                        for i, j in T.Parallel(C, C):
                            own = T.if_then_else(i > j, -dA[i, j], 0.0)
                            sum_kk[i, j] = sum_kk[i, j] + own * (D[i, j] * g[3, i])
                            dA[i, j] = own * (pair[i, j] * (norm[1, i] * norm[1, j]))
                            dP[i, j] = dP[i, j] + dA[i, j] * g[3, i]
                            dA[i, j] = dA[i, j] * D[i, j]
                    for i, j in T.Parallel(C, C):
                        X[i, j] = dP[i, j] * D[i, j]
                    if erase:
                        # §5 dβ: rowsum(dA ⊙ K Kᵀ ⊙ D)                           [C]
                        T.reduce_sum(dA, pair_sums, dim=1, clear=True)
                        T.copy(pair_sums, total)
                    T.copy(start_sums, start)
                    T.copy(erased_sums, erased)
                    T.copy(end_sums, end)
                    T.copy(beta_sums, own_beta)
                    T.copy(corner_sums, corner)
                    for i in T.Parallel(C):
                        start[i] = T.if_then_else(i < rest, start[i] * (scale * norm[0, i]), 0.0)
                        end[i] = end[i] * norm[1, i]
                        if erase:
                            erased[i] = erased[i] * norm[1, i]
                            start[i] = start[i] - g[3, i] * erased[i]
                            own_beta[i] = own_beta[i] + total[i] - from_start[i] * erased[i]
                    if has_beta != 0:
                        for i in T.Parallel(C):
                            if i < rest:
                                d_beta[first + i, hv] = own_beta[i]
                    if kind != NO_DECAY:
                        # §5 d log α_t: X = E ⊙ D over i ≥ t > j                 [C]
                        weigh(start, end, corner, g, from_start, to_end, starts, ends, corners, 0)
                        sum_straddling(X, quarters, partial, starts, ends, corners, total)
                        for i in T.Parallel(C):
                            before = T.if_then_else(i > 0, g[2, T.max(i - 1, 0)], 0.0)
                            is_zero = g[2, i] > before
                            given = T.if_then_else(
                                kind == ALPHA and i < rest and not is_zero,
                                gate[first + i, hv],
                                1.0,
                            )
                            total[i] = T.if_then_else(is_zero, 0.0, total[i] / given)
                        if kind == ALPHA and g[2, C - 1] > 0.0:
                            # §5 dα_t where α_t = 0: X¹ = E ⊙ D¹                 [C]
                            for i, j in T.Parallel(C, C):
                                crossed = b.decay(
                                    g[0, i], g[1, i], g[2, i], g[0, j], g[1, j], g[2, j], 1
                                )
                                X[i, j] = dP[i, j] * crossed
                            chunk_decay(g, from_start, to_end, 1)
                            weigh(
                                start, end, corner, g, from_start, to_end, starts, ends, corners, 1
                            )
                            sum_straddling(X, quarters, partial, starts, ends, corners, at_zero)
                            for i in T.Parallel(C):
                                before = T.if_then_else(i > 0, g[2, T.max(i - 1, 0)], 0.0)
                                if g[2, i] > before:
                                    total[i] = at_zero[i]
                        for i in T.Parallel(C):
                            if i < rest:
                                d_gate[first + i, hv] = total[i]
            # §5 (dP ⊙ D) K to dQ, (dP ⊙ D)ᵀ Q to dK, of the normalised q, k       [C, BK]
            weighted(sum_qk, norm, 1, 1, pairs)
            for at in slices:
                multiply(pairs, columns_of(k_tile, at), dQ[at], False, False, False)
            weighted(sum_qk, norm, 0, 0, pairs)
            for at in slices:
                multiply(pairs, columns_of(q_tile, at), dK[at], True, False, False)
            if erase:
                # §5 M K + Mᵀ K to dK                                            [C, BK]
                weighted(sum_kk, norm, 1, 1, pairs)
                for at in slices:
                    multiply(pairs, columns_of(k_tile, at), dK[at], False, False, False)
                weighted(sum_kk, norm, 1, 0, pairs)
                for at in slices:
                    multiply(pairs, columns_of(k_tile, at), dK[at], True, False, False)
            if has_norm != 0:
                project(dQ, q_tile, norm, 0, products, start_sums, start)
                project(dK, k_tile, norm, 1, products, start_sums, start)
            store(dQ, d_q, first, h, rest)
            store(dK, d_k, first, h, rest)

    return gradients
