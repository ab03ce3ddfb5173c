"""Compute all gradients of a chunk, given dRHS and dS: the parallel part of the backward.

One program per chunk and key head. It loops over the R value heads of the key head and blocks of
BV columns of V. The sums over value heads, dQ and dK (C, BK) and their pairs (C, C), stay in the
program, float32: no atomics, and the same call gives the same bits. K is taken SLICE columns at a
time, so that what is multiplied fits the registers beside dQ and dK.

    reads   q, k (M, H, K), v, dO (M, HV, V), α or log α (M, HV) float32; gates, norms;
            U, dRHS (HV, slots, C, V); S at the starts, dS at the ends of chunks (HV, slots, K, V)
    writes  dq, dk (M, H, K), dv (M, HV, V) in their dtype; dα or d log α, dβ (M, HV) float32
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    ALPHA,
    NO_DECAY,
    PAIRS,
    blocks,
    fitting,
    parts_of,
)

F32 = "float32"
SLICE = 64
"""Columns of K that a gradient is formed of at a time."""
QUARTERS = 4
"""Parts of a row or a column that threads sum at once."""
(
    *(FROM_START, TO_END, READING, ERASING, START, ERASED, END, CORNER, BETA, PAIR, TOTAL, IS_ZERO),
    VECTORS,
) = range(13)
"""Rows of the per-token vectors of a head in shared memory."""
PAD = 8
"""Columns that a square has in shared memory beside its own, so that rows lie in other banks."""


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
        threads: per program, at most.
        stages: of the software pipeline; 0 for none.
    """
    b = blocks(T)
    M, H, HV = T.dynamic("M"), T.dynamic("H"), T.dynamic("HV")
    N1, slots = T.dynamic("N1"), T.dynamic("slots")
    u_HV, u_slots, gate_M, gate_HV, beta_M, beta_HV = (
        T.dynamic(x) for x in ("u_HV", "u_slots", "gate_M", "gate_HV", "beta_M", "beta_HV")
    )
    threads, stages = fitting(threads, stages, C, C)
    is_split = parts_of(dtype) > 1
    columns, quarter, slices = -(-V // BV), C // QUARTERS, [*range(BK // SLICE)]

    def rows_of(parts: list[Any], at: int) -> list[Any]:
        """Return SLICE rows of a state."""
        return [part[at * SLICE : (at + 1) * SLICE, 0:BV] for part in parts]

    def columns_of(parts: list[Any], at: int) -> list[Any]:
        """Return SLICE columns of q or k."""
        return [part[0:C, at * SLICE : (at + 1) * SLICE] for part in parts]

    def tiles() -> SimpleNamespace:
        """Allocate the tiles in shared memory."""
        S = b.operand((BK, BV), dtype)
        return SimpleNamespace(
            q=b.operand((C, BK), dtype),
            k=b.operand((C, BK), dtype),
            S=S,
            # float32 operands take three tiles: there dS replaces S.
            dS=S if is_split else b.operand((BK, BV), dtype),
            U=b.operand((C, BV), dtype),
            dR=b.operand((C, BV), dtype),
            d_o=b.operand((C, BV), dtype),
            v=T.alloc_shared((C, BV), dtype),
            pairs=b.operand((C, C), dtype),
            g=T.alloc_shared((4, C), F32),
            norm=T.alloc_shared((2, C), F32),
            squares=[T.alloc_shared((C, C + PAD), F32) for _ in range(2 if erase else 1)],
            X=T.alloc_shared((C, C + 1), F32),
            t=T.alloc_shared((VECTORS, C), F32),
            corners=T.alloc_shared((BK,), F32),
            before=T.alloc_shared((QUARTERS, C), F32),
            partial=T.alloc_shared((QUARTERS, C), F32),
        )

    def fragments() -> SimpleNamespace:
        """Allocate the results and sums of products in registers."""
        names = {"dP": C, "dA": C, "pair": C, "D": C, "x": SLICE, "products": SLICE, "values": BV}
        return SimpleNamespace(
            dQ=[T.alloc_fragment((C, SLICE), F32) for _ in slices],
            dK=[T.alloc_fragment((C, SLICE), F32) for _ in slices],
            state=T.alloc_fragment((BK, BV), F32),
            both=T.alloc_fragment((BK, BV), F32),
            **{name: T.alloc_fragment((C, width), F32) for name, width in names.items()},
        )

    def row_sums() -> SimpleNamespace:
        """Allocate the sums over rows in registers."""
        names = ("start", "erased", "end", "beta", "pair", "along")
        return SimpleNamespace(
            corner=T.alloc_fragment((BK,), F32),
            **{name: T.alloc_fragment((C,), F32) for name in names},
        )

    def pair_decay(g: Any, i: Any, j: Any, crossed: int) -> Any:
        """Return D_ij of a chunk, or D¹_ij."""
        return b.decay(g[0, i], g[1, i], g[2, i], g[0, j], g[1, j], g[2, j], crossed)

    @T.macro
    def multiply(left, right, to, transpose_A, transpose_B, clear):
        """Add the product of two operands to `to`, or set `to` to it.

        Rows are spread over as many warps as possible, for the sums over rows that follow.
        """
        for index, (x, y) in [*enumerate(PAIRS[len(left)])]:
            T.gemm(
                left[x], right[y], to,
                transpose_A=transpose_A, transpose_B=transpose_B,
                policy=T.GemmWarpPolicy.FullRow, clear_accum=clear and index == 0,
            )  # fmt: skip

    @T.macro
    def lower(x, parts, height, width):
        """Round a fragment to an operand."""
        if is_split:
            for i, j in T.Parallel(height, width):
                b.put(parts, i, j, x[i, j])
        else:
            T.copy(x, parts[0])

    @T.macro
    def load(x, parts, landing, height, width):
        """Copy a region of a tensor into an operand."""
        if is_split:
            T.copy(x, landing)
            lower(landing, parts, height, width)
        else:
            T.copy(x, parts[0])

    @T.macro
    def load_rows(x, first, head, rest, parts):
        """Copy the C rows of a head of x (M, heads, K) into an operand, 0 where no token is.

        Element by element: TileLang 0.1.15 would wait for a whole copy inside the pipelined loop.
        """
        for i, j in T.Parallel(C, BK):
            found = T.if_then_else(i < rest and j < K, x[first + i, head, j], T.cast(0.0, dtype))
            if is_split:
                b.put(parts, i, j, found)
            else:
                parts[0][i, j] = found

    @T.macro
    def chunk_decay(g, t, crossed):
        """Set b and d of a chunk with `crossed` zeros (docs/math.md §3); b_C is the last b."""
        for i in T.Parallel(C):
            t[FROM_START, i] = b.decay(g[0, i], g[1, i], g[2, i], 0.0, 0.0, 0.0, crossed)
            t[TO_END, i] = b.decay(
                g[0, C - 1], g[1, C - 1], g[2, C - 1], g[0, i], g[1, i], g[2, i], crossed
            )

    @T.macro
    def through(left, state, t, weight, tile, to, f, sums):
        """Add diag(t_weight) L Sᵀ to `to`, and rowsum(L Sᵀ ⊙ tile) to `sums`."""
        T.clear(f.products)
        for at in slices:
            multiply(left, rows_of(state, at), f.x, False, True, True)
            for i, j in T.Parallel(C, SLICE):
                to[at][i, j] = to[at][i, j] + f.x[i, j] * t[weight, i]
                f.products[i, j] += f.x[i, j] * b.value(tile, i, at * SLICE + j)
        T.reduce_sum(f.products, sums, dim=1, clear=False)

    @T.macro
    def pair_gradients(m, f, scale, rest):
        """Add s dP ⊙ D of a head to the first of the squares, M to the second.

        dP becomes E, dA becomes dA ⊙ K Kᵀ ⊙ D, and X is E ⊙ D.
        """
        for i, j in T.Parallel(C, C):
            f.D[i, j] = pair_decay(m.g, i, j, 0)
        multiply(m.q, m.k, f.pair, False, True, True)
        for i, j in T.Parallel(C, C):
            own = T.if_then_else(i >= j and i < rest, f.dP[i, j] * scale, 0.0)
            f.dP[i, j] = own * (f.pair[i, j] * (m.norm[0, i] * m.norm[1, j]))
            m.squares[0][i, j] += own * f.D[i, j]
        if erase:
            multiply(m.k, m.k, f.pair, False, True, True)
            for i, j in T.Parallel(C, C):
                own = T.if_then_else(i > j, -f.dA[i, j], 0.0)
                f.dA[i, j] = own * (f.pair[i, j] * (m.norm[1, i] * m.norm[1, j]))
                f.dP[i, j] += f.dA[i, j] * m.g[3, i]
                f.dA[i, j] = f.dA[i, j] * f.D[i, j]
                m.squares[1][i, j] += own * (f.D[i, j] * m.g[3, i])
        for i, j in T.Parallel(C, C):
            m.X[i, j] = f.dP[i, j] * f.D[i, j]

    @T.macro
    def finish_sums(m, sums, scale, rest):
        """Turn the sums over rows of a head into E in column start, E in row C, and dβ."""
        t = m.t
        T.copy(sums.start, t[START, 0:C])
        T.copy(sums.end, t[END, 0:C])
        T.copy(sums.beta, t[BETA, 0:C])
        T.copy(sums.corner, m.corners)
        if erase:
            T.copy(sums.erased, t[ERASED, 0:C])
            T.copy(sums.pair, t[PAIR, 0:C])
        for i in T.Parallel(C):
            t[CORNER, i] = m.corners[i]
            for part in [*range(1, BK // C)]:
                t[CORNER, i] += m.corners[part * C + i]
            t[START, i] = T.if_then_else(i < rest, t[START, i] * (scale * m.norm[0, i]), 0.0)
            t[END, i] = t[END, i] * m.norm[1, i]
            if erase:
                t[ERASED, i] = t[ERASED, i] * m.norm[1, i]
                t[START, i] -= m.g[3, i] * t[ERASED, i]
                t[BETA, i] += t[PAIR, i] - t[FROM_START, i] * t[ERASED, i]

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
            run = t[START, i] * t[FROM_START, i]
            for part in T.serial(QUARTERS):
                here = before[part, i]
                before[part, i] = run
                run = run + here
        for part, j in T.Parallel(QUARTERS, C):
            run = 0.0
            for i in T.serial(quarter):
                row = part * quarter + i
                own = X[row, j] + before[j // quarter, row]
                run = run + T.if_then_else(row >= j, own, t[END, row] * t[TO_END, row])
                run = run + t[CORNER, row] * t[FROM_START, C - 1]
            partial[part, j] = run
        for j in T.Parallel(C):
            t[total, j] = (partial[0, j] + partial[1, j]) + (partial[2, j] + partial[3, j])

    @T.macro
    def gate_gradient(gate, d_gate, first, hv, m, f, kind, rest):
        """Write d log α, or dα."""
        g, t = m.g, m.t
        # §5 d log α_t: X = E ⊙ D over i ≥ t > j                                 [C]
        sum_straddling(m, TOTAL)
        for i in T.Parallel(C):
            before = T.if_then_else(i > 0, g[2, T.max(i - 1, 0)], 0.0)
            t[IS_ZERO, i] = T.if_then_else(g[2, i] > before, 1.0, 0.0)
            is_divided = kind == ALPHA and i < rest and g[2, i] <= before
            given = T.if_then_else(is_divided, gate[first + i, hv], 1.0)
            t[TOTAL, i] = T.if_then_else(g[2, i] > before, 0.0, t[TOTAL, i] / given)
        if kind == ALPHA and g[2, C - 1] > 0.0:
            # §5 dα_t where α_t = 0: X¹ = E ⊙ D¹                                 [C]
            for i, j in T.Parallel(C, C):
                m.X[i, j] = f.dP[i, j] * pair_decay(g, i, j, 1)
            chunk_decay(g, t, 1)
            sum_straddling(m, PAIR)
            for i in T.Parallel(C):
                if t[IS_ZERO, i] > 0.0:
                    t[TOTAL, i] = t[PAIR, i]
        for i in T.Parallel(C):
            if i < rest:
                d_gate[first + i, hv] = t[TOTAL, i]

    @T.macro
    def multiply_pairs(m, which, row, axis, tile, to):
        """Add the product of a square of pair sums with normalised q or k to `to`.

        Tokens of q or k are columns of the square (axis 1), or its rows (0): then it is transposed.
        """
        for i, j in T.Parallel(C, C):
            b.put(m.pairs, i, j, m.squares[which][i, j] * m.norm[row, j if axis else i])
        for at in slices:
            multiply(m.pairs, columns_of(tile, at), to[at], axis == 0, False, False)

    @T.macro
    def project(x, tile, row, m, f, sums):
        """Turn the gradient of y / ‖y‖ into that of y."""
        T.clear(f.products)
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                f.products[i, j] += x[at][i, j] * b.value(tile, i, at * SLICE + j)
        T.reduce_sum(f.products, sums.along, dim=1, clear=True)
        T.copy(sums.along, m.t[START, 0:C])
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                squared = m.norm[row, i] * m.norm[row, i]
                same = squared * m.t[START, i] * b.value(tile, i, at * SLICE + j)
                x[at][i, j] = (x[at][i, j] - same) * m.norm[row, i]

    @T.macro
    def store(x, to, first, head, rest):
        """Store the rows that are tokens in `to` (M, heads, K)."""
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
            m, f, sums = tiles(), fragments(), row_sums()
            q_tile, k_tile, S, dS, U, dR = m.q, m.k, m.S, m.dS, m.U, m.dR
            g, norm, t, values = m.g, m.norm, m.t, f.values
            n = T.alloc_var("int32")
            first = T.alloc_var("int32")
            rest = T.alloc_var("int32")
            turns = T.alloc_var("int32")
            first_head = T.alloc_var("int32")

            if stages > 0:
                T.annotate_producer_reg_dealloc(24)
                T.annotate_consumer_reg_alloc(240)
            n = b.owner(cu, N1 - 1, C, slot)
            first = cu[n] + (slot - (cu[n] // C + n)) * C
            rest = cu[n + 1] - first
            first_head = h * (HV // H)
            turns = T.if_then_else(rest > 0, HV // H * columns, 0)
            load_rows(q, first, h, rest, q_tile)
            load_rows(k, first, h, rest, k_tile)
            for row, i in T.Parallel(2, C):
                norm[row, i] = norms[h, slot, row, i]
            for tile in [*f.dQ, *f.dK, *m.squares]:
                T.clear(tile)
            for turn in T.Pipelined(turns, num_stages=stages):
                hv = first_head + turn // columns
                dv = turn % columns * BV
                T.copy(gates[hv, slot, 0:4, 0:C], g)
                load(d_o[first : first + C, hv, dv : dv + BV], m.d_o, values, C, BV)
                if erase:
                    load(u[hv, slot, 0:C, dv : dv + BV], U, values, C, BV)
                load(d_rhs[hv, slot, 0:C, dv : dv + BV], dR, values, C, BV)
                load(kept[hv, slot, 0:BK, dv : dv + BV], S, f.state, BK, BV)
                if not is_split:
                    load(d_states[hv, slot, 0:BK, dv : dv + BV], dS, f.state, BK, BV)
                T.copy(v[first : first + C, hv, dv : dv + BV], m.v)
                if not erase:
                    for i, j in T.Parallel(C, BV):
                        value = T.cast(m.v[i, j], F32) * g[3, i]
                        values[i, j] = T.if_then_else(i < rest, value, 0.0)
                    lower(values, U, C, BV)
                # §3 b, d                                                        [C], [C]
                chunk_decay(g, t, 0)
                for i in T.Parallel(C):
                    t[READING, i] = scale * t[FROM_START, i]
                    t[ERASING, i] = -g[3, i] * t[FROM_START, i]
                if turn % columns == 0:
                    for tile in [f.dP, sums.start, sums.end, sums.beta, sums.corner]:
                        T.clear(tile)
                    if erase:
                        T.clear(f.dA)
                        T.clear(sums.erased)
                # §5 dP = s lower(dO Uᵀ),  dA = −strict_lower(dRHS Uᵀ)           [C, C]
                multiply(m.d_o, U, f.dP, False, True, False)
                if erase:
                    multiply(dR, U, f.dA, False, True, False)
                # §5 s diag(b) dO Sᵀ to dQ; E_i,start += s rowsum(dO ⊙ Q S)      [C, BK]
                through(m.d_o, S, t, READING, q_tile, f.dQ, f, sums.start)
                if erase:
                    # §5 − diag(βb) dRHS Sᵀ to dK; rowsum(dRHS ⊙ K S)            [C, BK]
                    through(dR, S, t, ERASING, k_tile, f.dK, f, sums.erased)
                # §5 E_C,start = ⟨dS_C, S⟩                                       [BK]
                if is_split:
                    T.copy(d_states[hv, slot, 0:BK, dv : dv + BV], f.state)
                    for i, j in T.Parallel(BK, BV):
                        f.both[i, j] = f.state[i, j] * b.value(S, i, j)
                    lower(f.state, dS, BK, BV)
                else:
                    for i, j in T.Parallel(BK, BV):
                        f.both[i, j] = b.value(dS, i, j) * b.value(S, i, j)
                T.reduce_sum(f.both, sums.corner, dim=1, clear=False)
                # §5 diag(d) U dS_Cᵀ to dK; E_C,j += rowsum((K dS_C) ⊙ U)        [C, BK]
                through(U, dS, t, TO_END, k_tile, f.dK, f, sums.end)
                # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ V) ...               [C, BV]
                for i, j in T.Parallel(C, BV):
                    if i < rest and dv + j < V:
                        d_v[first + i, hv, dv + j] = T.cast(b.value(dR, i, j) * g[3, i], dtype)
                for i, j in T.Parallel(C, BV):
                    values[i, j] = b.value(dR, i, j) * T.cast(m.v[i, j], F32)
                T.reduce_sum(values, sums.beta, dim=1, clear=False)
                if turn % columns == columns - 1:
                    # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ,  M = diag(β) dA ⊙ D  [C, C]
                    pair_gradients(m, f, scale, rest)
                    if erase:
                        # §5 dβ ... + rowsum(dA ⊙ K Kᵀ ⊙ D)                      [C]
                        T.reduce_sum(f.dA, sums.pair, dim=1, clear=True)
                    finish_sums(m, sums, scale, rest)
                    if has_beta != 0:
                        for i in T.Parallel(C):
                            if i < rest:
                                d_beta[first + i, hv] = t[BETA, i]
                    if kind != NO_DECAY:
                        gate_gradient(gate, d_gate, first, hv, m, f, kind, rest)
            # §5 (dP ⊙ D) K to dQ, (dP ⊙ D)ᵀ Q to dK, of the normalised q, k       [C, BK]
            multiply_pairs(m, 0, 1, 1, k_tile, f.dQ)
            multiply_pairs(m, 0, 0, 0, q_tile, f.dK)
            if erase:
                # §5 M K + Mᵀ K to dK                                            [C, BK]
                multiply_pairs(m, 1, 1, 1, k_tile, f.dK)
                multiply_pairs(m, 1, 1, 0, k_tile, f.dK)
            if has_norm != 0:
                project(f.dQ, q_tile, 0, m, f, sums)
                project(f.dK, k_tile, 1, m, f, sums)
            store(f.dQ, d_q, first, h, rest)
            store(f.dK, d_k, first, h, rest)

    return gradients
