"""Walk dS, the gradient of the state, back over the chunks of a segment.

One program per segment, value head and block of BV columns of V; the gradient with respect to the
state, dS (BK, BV) float32, stays in registers. Three products per chunk depend on it in turn:
K dS, Tᵀ dU and Kᵀ dRHS.

    reads   q, k (M, H, K), dO (M, HV, V); gates, norms, T; dS where segments end
            (places, HV, K, V) float32
    writes  gradients   dRHS (HV, slots, C, V), dS at every chunk's end (HV, slots, K, V), dtype of
                        q; dS of the initial states (N, HV, K, V) float32
            shift       what a segment adds to the dS that it passes on (docs/math.md §6),
                        dS -> Mᵀ dS + R': R' (places, HV, K, V) float32, walked from dS = 0
"""

from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import blocks, fitting, parts_of

F32 = "float32"
MODES = ("gradients", "shift")


def reverse(
    T: Any, *, K: int, BK: int, V: int, BV: int, C: int, dtype: str, erase: bool, mode: str,
    threads: int, stages: int, bulk: bool = True,
) -> Any:  # fmt: skip
    """Make the kernel. Grid (places ceil(V / BV), HV).

    Args:
        T: the language.
        K, BK: width of a key, and of the tile that holds it.
        V, BV: width of a value, and of the block that a program has.
        C: tokens per chunk.
        dtype: of q, k, dO and of what is kept.
        erase: whether the rule has an error term.
        mode: one of MODES.
        threads: per program, at most.
        stages: of the software pipeline; 0 for none.
        bulk: whether tiles are copied whole (by the copy engine that Hopper and later GPUs have)
            and cleared where a sequence ends, or read element by element as far as it goes.
    """
    b = blocks(T)
    M, H, HV = T.dynamic("M"), T.dynamic("H"), T.dynamic("HV")
    N1, slots, places = T.dynamic("N1"), T.dynamic("slots"), T.dynamic("places")
    T_HV, T_slots, kept_HV, kept_slots = (
        T.dynamic(x) for x in ("T_HV", "T_slots", "kept_HV", "kept_slots")
    )
    out_places, ends_HV = T.dynamic("out_places"), T.dynamic("ends_HV")
    threads, stages = fitting(threads, stages, C, BV)
    is_split, is_shift, columns = parts_of(dtype) > 1, mode == "shift", -(-V // BV)

    @T.macro
    def load(x, first, head, column, width, rest, parts):
        """Copy C rows of x (M, heads, D) into an operand."""
        if is_split or not bulk:
            for i, j in T.Parallel(C, width):
                found = T.if_then_else(
                    i < rest and column + j < x.shape[2],
                    x[first + i, head, column + j],
                    T.cast(0.0, dtype),
                )
                if is_split:
                    b.put(parts, i, j, found)
                else:
                    parts[0][i, j] = found
        else:
            T.copy(x[first : first + C, head, column : column + width], parts[0])

    @T.macro
    def clear_tail(tile, rest, width):
        """Zero the rows that belong to no token of this sequence, whatever is in them."""
        for i, j in T.Parallel(C, width):
            tile[i, j] = T.if_then_else(i < rest, tile[i, j], T.cast(0.0, dtype))

    @T.macro
    def lower(x, parts, height, width):
        """Round a fragment to an operand."""
        if is_split:
            for i, j in T.Parallel(height, width):
                b.put(parts, i, j, x[i, j])
        else:
            T.copy(x, parts[0])

    @T.prim_func
    def reverse(
        q: T.Tensor((M, H, K), dtype),
        k: T.Tensor((M, H, K), dtype),
        d_o: T.Tensor((M, HV, V), dtype),
        gates: T.Tensor((HV, slots, 4, C), F32),
        norms: T.Tensor((H, slots, 2, C), F32),
        inverses: T.Tensor((T_HV, T_slots, C, C), dtype),
        d_ends: T.Tensor((places, ends_HV, K, V), F32),
        cu: T.Tensor((N1,), "int32"),
        d_rhs: T.Tensor((kept_HV, kept_slots, C, V), dtype),
        d_states: T.Tensor((kept_HV, kept_slots, K, V), dtype),
        d_starts: T.Tensor((out_places, HV, K, V), F32),
        scale: T.float32,
        L: T.int32,
        grid: T.int32,
    ):
        with T.Kernel(columns * grid, HV, threads=threads) as (program, hv):
            q_tile = b.operand((C, BK), dtype)
            k_tile = b.operand((C, BK), dtype)
            o_tile = b.operand((C, BV), dtype)
            x_tile = b.operand((C, C), dtype)
            g = T.alloc_shared((4, C), F32)
            norm = T.alloc_shared((2, C), F32)
            from_start = T.alloc_shared((C,), F32)
            to_end = T.alloc_shared((C,), F32)
            dS = T.alloc_fragment((BK, BV), F32)
            dS_low = b.operand((BK, BV), dtype)
            kq = T.alloc_fragment((C, C), F32)
            P = b.operand((C, C), dtype)
            dU = T.alloc_fragment((C, BV), F32)
            dR = T.alloc_fragment((C, BV), F32)
            low = b.operand((C, BV), dtype)
            place = program // columns
            n = T.alloc_var("int32")
            h = T.alloc_var("int32")
            segment = T.alloc_var("int32")
            chunks = T.alloc_var("int32")
            last_slot = T.alloc_var("int32")
            last_first = T.alloc_var("int32")
            last_rest = T.alloc_var("int32")

            n = b.owner(cu, N1 - 1, C * L, place)
            h = hv // (HV // H)
            segment = place - (cu[n] // (C * L) + n)
            chunks = T.max(T.min(T.ceildiv(cu[n + 1] - cu[n], C) - segment * L, L), 0)
            last_slot = cu[n] // C + n + segment * L + chunks - 1
            last_first = cu[n] + (segment * L + chunks - 1) * C
            last_rest = cu[n + 1] - last_first
            dv = program % columns * BV
            if is_shift:
                T.clear(dS)
            else:
                T.copy(d_ends[place, hv, 0:BK, dv : dv + BV], dS)
            for step in T.Pipelined(chunks, num_stages=stages):
                slot = last_slot - step
                first = last_first - step * C
                rest = last_rest + step * C
                load(k, first, h, 0, BK, rest, k_tile)
                load(q, first, h, 0, BK, rest, q_tile)
                load(d_o, first, hv, dv, BV, rest, o_tile)
                T.copy(gates[hv, slot, 0:4, 0:C], g)
                T.copy(norms[h, slot, 0:2, 0:C], norm)
                if erase:
                    if is_split:
                        for i, j in T.Parallel(C, C):
                            b.put(x_tile, i, j, inverses[hv, slot, i, j])
                    else:
                        T.copy(inverses[hv, slot, 0:C, 0:C], x_tile[0])
                if bulk and not is_split and rest < C:
                    clear_tail(k_tile[0], rest, BK)
                    clear_tail(q_tile[0], rest, BK)
                    clear_tail(o_tile[0], rest, BV)
                # §3 b, d; b_C is the last b                                     [C], [C]
                for i in T.Parallel(C):
                    from_start[i] = b.decay(g[0, i], g[1, i], g[2, i], 0.0, 0.0, 0.0, 0)
                    to_end[i] = b.decay(
                        g[0, C - 1], g[1, C - 1], g[2, C - 1], g[0, i], g[1, i], g[2, i], 0
                    )
                # s Pᵀ = s (K Qᵀ) ⊙ Dᵀ, formed as such: no product is transposed [C, C]
                b.multiply(k_tile, q_tile, kq, False, True, True)
                for i, j in T.Parallel(C, C):
                    D = b.decay(g[0, j], g[1, j], g[2, j], g[0, i], g[1, i], g[2, i], 0)
                    scaled = kq[i, j] * (norm[1, i] * norm[0, j] * scale) * D
                    kq[i, j] = T.if_then_else(i <= j, scaled, 0.0)
                lower(kq, P, C, C)
                lower(dS, dS_low, BK, BV)
                if not is_shift:
                    T.copy(
                        dS if is_split else dS_low[0],
                        d_states[hv, slot, 0:BK, dv : dv + BV],
                        annotations=PLAIN,
                    )
                # §5 dU = s Pᵀ dO + diag(d) K dS_C                               [C, BV]
                b.multiply(k_tile, dS_low, dU, False, False, True)
                for i, j in T.Parallel(C, BV):
                    dU[i, j] = dU[i, j] * (to_end[i] * norm[1, i])
                b.multiply(P, o_tile, dU, False, False, False)
                # §5 dRHS = Tᵀ dU                                                [C, BV]
                if erase:
                    lower(dU, low, C, BV)
                    b.multiply(x_tile, low, dR, True, False, True)
                else:
                    T.copy(dU, dR)
                if not is_shift:
                    if not is_split:
                        lower(dR, low, C, BV)
                    T.copy(
                        dR if is_split else low[0],
                        d_rhs[hv, slot, 0:C, dv : dv + BV],
                        annotations=PLAIN,
                    )
                # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS    [BK, BV]
                for i, j in T.Parallel(BK, BV):
                    dS[i, j] = dS[i, j] * from_start[C - 1]
                for i, j in T.Parallel(C, BV):
                    dU[i, j] = b.value(o_tile, i, j) * (from_start[i] * norm[0, i] * scale)
                lower(dU, low, C, BV)
                b.multiply(q_tile, low, dS, True, False, False)
                if erase:
                    for i, j in T.Parallel(C, BV):
                        dR[i, j] = -dR[i, j] * (g[3, i] * from_start[i] * norm[1, i])
                    lower(dR, low, C, BV)
                    b.multiply(k_tile, low, dS, True, False, False)
            if segment == 0 or (is_shift and chunks > 0):
                to = place if is_shift else n
                for i, j in T.Parallel(BK, BV):
                    if i < K and dv + j < V:
                        d_starts[to, hv, i, dv + j] = dS[i, j]

    return reverse


PLAIN = {"disable_tma": True}
"""Options of a store by threads: the copy engine's store of a whole tile would be waited for."""
