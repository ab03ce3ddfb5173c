"""Walk the state over the chunks of a segment and write the output: the second launch.

One program per segment, value head and block of BV columns of V; the state, (BK, BV) float32, stays
in registers. Three products per chunk depend on it in turn: K S, T E and Kᵀ U.

    reads   q, k (M, H, K), v (M, HV, V); gates, norms, T; the states that segments start from
    writes  output   o (M, HV, V); the final states (N, HV, K, V) float32
            states   S at every chunk start (HV, slots, K, V), U (HV, slots, C, V), dtype of q
            map      M (places, HV, K, K), R (places, HV, K, V) float32: what a segment does to the
                     state it starts from, S -> M S + R (docs/math.md §6)

M and R are walked like a state: R from 0, and M from the identity with no values.
"""

from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import blocks, parts_of

F32 = "float32"
MODES = ("output", "states", "map")


def walk(
    T: Any, *, K: int, BK: int, V: int, BV: int, C: int, dtype: str, erase: bool, mode: str,
    threads: int, stages: int, bulk: bool = True,
) -> Any:  # fmt: skip
    """Make the kernel. Grid (ceil(V / BV), places, HV); a map has ceil(K / BV) blocks more.

    Args:
        T: the language.
        K, BK: width of a key, and of the tile that holds it.
        V, BV: width of a value, and of the block that a program has.
        C: tokens per chunk.
        dtype: of q, k, v and of what is kept.
        erase: whether the rule has an error term.
        mode: one of MODES.
        threads: per program.
        stages: of the software pipeline; 0 for none.
        bulk: whether tiles are copied whole (by the copy engine that Hopper and later GPUs have)
            and cleared where a sequence ends, or read element by element as far as it goes.
    """
    b = blocks(T)
    M, H, HV = T.dynamic("M"), T.dynamic("H"), T.dynamic("HV")
    N1, slots = T.dynamic("N1"), T.dynamic("slots")
    places, starts_HV, N = T.dynamic("places"), T.dynamic("starts_HV"), T.dynamic("N")
    T_HV, T_slots, u_HV, u_slots = (T.dynamic(f"{x}_{y}") for x in "Tu" for y in ("HV", "slots"))
    kept_HV, kept_slots, o_M, o_HV = (
        T.dynamic(f"{x}") for x in ("kept_HV", "kept_slots", "o_M", "o_HV")
    )
    final_HV, map_places, map_HV = (T.dynamic(x) for x in ("final_HV", "map_places", "map_HV"))
    segments = T.dynamic("segments")
    is_split = parts_of(dtype) > 1
    has_output, is_map = mode == "output", mode == "map"
    columns = -(-V // BV)
    all_columns = columns + (-(-K // BV) if is_map else 0)

    @T.macro
    def load(x, first, head, column, width, rest, tile):
        """Copy C rows of x (M, heads, D) into a tile."""
        if bulk:
            T.copy(x[first : first + C, head, column : column + width], tile)
        else:
            for i, j in T.Parallel(C, width):
                tile[i, j] = T.if_then_else(
                    i < rest and column + j < x.shape[2],
                    x[first + i, head, column + j],
                    T.cast(0.0, dtype),
                )

    @T.macro
    def load_operand(x, first, head, rest, parts):
        """Copy C rows of x (M, H, K) into an operand."""
        if is_split:
            for i, j in T.Parallel(C, BK):
                found = T.if_then_else(i < rest and j < K, x[first + i, head, j], 0.0)
                b.put(parts, i, j, found)
        else:
            load(x, first, head, 0, BK, rest, parts[0])

    @T.macro
    def clear_tail(tile, rest, width):
        """Zero the rows that belong to no token of this sequence, whatever is in them."""
        for i, j in T.Parallel(C, width):
            tile[i, j] = T.if_then_else(i < rest, tile[i, j], T.cast(0.0, tile.dtype))

    @T.prim_func
    def walk(
        q: T.Tensor((M, H, K), dtype),
        k: T.Tensor((M, H, K), dtype),
        v: T.Tensor((M, HV, V), dtype),
        gates: T.Tensor((HV, slots, 4, C), F32),
        norms: T.Tensor((H, slots, 2, C), F32),
        inverses: T.Tensor((T_HV, T_slots, C, C), dtype),
        starts: T.Tensor((places, starts_HV, K, V), F32),
        cu: T.Tensor((N1,), "int32"),
        o: T.Tensor((o_M, o_HV, V), dtype),
        final: T.Tensor((N, final_HV, K, V), F32),
        kept: T.Tensor((kept_HV, kept_slots, K, V), dtype),
        u: T.Tensor((u_HV, u_slots, C, V), dtype),
        maps: T.Tensor((map_places, map_HV, K, K), F32),
        shifts: T.Tensor((segments, map_HV, K, V), F32),
        scale: T.float32,
        has_start: T.int32,
        L: T.int32,
        grid: T.int32,
    ):
        with T.Kernel(all_columns, grid, HV, threads=threads) as (column, place, hv):
            q_tile = b.operand((C, BK), dtype)
            k_tile = b.operand((C, BK), dtype)
            v_tile = T.alloc_shared((C, BV), dtype)
            x_tile = b.operand((C, C), dtype)
            g = T.alloc_shared((4, C), F32)
            norm = T.alloc_shared((2, C), F32)
            from_start = T.alloc_shared((C,), F32)
            to_end = T.alloc_shared((C,), F32)
            over = T.alloc_shared((1,), F32)
            S = T.alloc_fragment((BK, BV), F32)
            S_low = b.operand((BK, BV), dtype)
            error = b.operand((C, BV), dtype)
            U_low = b.operand((C, BV), dtype)
            weighted = b.operand((C, BV), dtype)
            P = b.operand((C, C), dtype)
            read = T.alloc_fragment((C, BV), F32)
            U = T.alloc_fragment((C, BV), F32)
            out = T.alloc_fragment((C, BV), F32)
            qk = T.alloc_fragment((C, C), F32)
            out_tile = T.alloc_shared((C, BV), dtype)

            R = HV // H
            h = hv // R
            n = b.owner(cu, N1 - 1, C * L, place)
            begin = cu[n]
            length = cu[n + 1] - begin
            segment = place - (begin // (C * L) + n)
            first_chunk = segment * L
            chunks = T.max(T.min(T.ceildiv(length, C) - first_chunk, L), 0)
            first_slot = begin // C + n + first_chunk
            dv = column * BV
            is_own = segment == 0 or chunks > 0
            if is_map:
                dk = (column - columns) * BV
                for i, j in T.Parallel(BK, BV):
                    S[i, j] = T.if_then_else(column >= columns and i == dk + j, 1.0, 0.0)
            elif has_start != 0:
                T.copy(starts[place, hv, 0:BK, dv : dv + BV], S)
            else:
                T.clear(S)
            for chunk in T.Pipelined(chunks, num_stages=stages):
                slot = first_slot + chunk
                first = begin + (first_chunk + chunk) * C
                rest = length - (first_chunk + chunk) * C
                load_operand(k, first, h, rest, k_tile)
                load(v, first, hv, dv, BV, rest, v_tile)
                T.copy(gates[hv, slot, 0:4, 0:C], g)
                T.copy(norms[h, slot, 0:2, 0:C], norm)
                if erase:
                    if is_split:
                        for i, j in T.Parallel(C, C):
                            b.put(x_tile, i, j, inverses[hv, slot, i, j])
                    else:
                        T.copy(inverses[hv, slot, 0:C, 0:C], x_tile[0])
                if has_output:
                    load_operand(q, first, h, rest, q_tile)
                if bulk and rest < C:
                    if not is_split:
                        clear_tail(k_tile[0], rest, BK)
                    clear_tail(v_tile, rest, BV)
                # §3 b, d, b_C                                                   [C], [C], 1
                for i in T.Parallel(C):
                    from_start[i] = b.decay(g[0, i], g[1, i], g[2, i], 0.0, 0.0, 0.0, 0)
                    to_end[i] = b.decay(
                        g[0, C - 1], g[1, C - 1], g[2, C - 1], g[0, i], g[1, i], g[2, i], 0
                    )
                for i in T.Parallel(1):
                    over[i] = b.decay(g[0, C - 1], g[1, C - 1], g[2, C - 1], 0.0, 0.0, 0.0, 0)
                for i, j in T.Parallel(BK, BV):
                    b.put(S_low, i, j, S[i, j])
                if mode == "states":
                    for i, j in T.Parallel(BK, BV):
                        if i < K and dv + j < V:
                            kept[hv, slot, i, dv + j] = T.cast(S[i, j], dtype)
                if erase:
                    # §3 E = V − diag(b) K S                                     [C, BV]
                    b.multiply(k_tile, S_low, read, False, False, True)
                    for i, j in T.Parallel(C, BV):
                        value = T.cast(v_tile[i, j], F32)
                        if is_map:
                            value = T.if_then_else(column < columns, value, 0.0)
                        x = value - read[i, j] * (from_start[i] * norm[1, i])
                        b.put(error, i, j, x * g[3, i])
                    # §3 U = T diag(β) E                                         [C, BV]
                    b.multiply(x_tile, error, U, False, False, True)
                else:
                    for i, j in T.Parallel(C, BV):
                        value = T.cast(v_tile[i, j], F32)
                        if is_map:
                            value = T.if_then_else(column < columns, value, 0.0)
                        U[i, j] = value * g[3, i]
                if mode == "states" and erase:
                    for i, j in T.Parallel(C, BV):
                        if dv + j < V:
                            u[hv, slot, i, dv + j] = T.cast(U[i, j], dtype)
                # §3 S_C = b_C S + (diag(d) K)ᵀ U                                [BK, BV]
                for i, j in T.Parallel(C, BV):
                    b.put(weighted, i, j, U[i, j] * (to_end[i] * norm[1, i]))
                for i, j in T.Parallel(BK, BV):
                    S[i, j] = S[i, j] * over[0]
                b.multiply(k_tile, weighted, S, True, False, False)
                if has_output:
                    # §3 O = s (diag(b) Q S + lower(Q Kᵀ ⊙ D) U)                 [C, BV]
                    for i, j in T.Parallel(C, BV):
                        b.put(U_low, i, j, U[i, j])
                    b.multiply(q_tile, k_tile, qk, False, True, True)
                    for i, j in T.Parallel(C, C):
                        D = b.decay(g[0, i], g[1, i], g[2, i], g[0, j], g[1, j], g[2, j], 0)
                        scaled = qk[i, j] * (norm[0, i] * norm[1, j]) * D
                        b.put(P, i, j, T.if_then_else(i >= j and i < rest, scaled, 0.0))
                    b.multiply(q_tile, S_low, out, False, False, True)
                    for i, j in T.Parallel(C, BV):
                        out[i, j] = out[i, j] * (from_start[i] * norm[0, i])
                    b.multiply(P, U_low, out, False, False, False)
                    for i, j in T.Parallel(C, BV):
                        out_tile[i, j] = T.cast(out[i, j] * scale, dtype)
                    if rest >= C:
                        T.copy(out_tile, o[first : first + C, hv, dv : dv + BV])
                    else:
                        for i, j in T.Parallel(C, BV):
                            if i < rest and dv + j < V:
                                o[first + i, hv, dv + j] = out_tile[i, j]
            if has_output and is_own and (first_chunk + L) * C >= length:
                for i, j in T.Parallel(BK, BV):
                    if i < K and dv + j < V:
                        final[n, hv, i, dv + j] = S[i, j]
            if is_map and is_own:
                for i, j in T.Parallel(BK, BV):
                    if column < columns and i < K and dv + j < V:
                        shifts[place, hv, i, dv + j] = S[i, j]
                    if column >= columns and i < K and (column - columns) * BV + j < K:
                        maps[place, hv, i, (column - columns) * BV + j] = S[i, j]

    return walk
