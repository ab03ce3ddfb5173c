"""Walk the state over the chunks of a segment and write the output: the second launch.

One program per segment, value head and block of BV columns of V; the state, (BK, BV) float32, stays
in registers. Three products per chunk depend on it in turn: K S, T E and Kᵀ U. FLA's name for the
walk is `chunk_gated_delta_rule_fwd_h`, and for the output `chunk_fwd_o`.

    reads   q, k (M, H, K), v (M, HV, V); gates, inv_norms, T; the states that segments start from
    writes  output   o (M, HV, V); the final states (N, HV, K, V) float32
            states   S at every chunk start (HV, chunk_slots, K, V), U (HV, chunk_slots, C, V),
                     in the dtype of what is kept
            map      M (segment_slots, HV, K, K), R (segment_slots, HV, K, V) float32: what a
                     segment does to the state it starts from, S -> M S + R (docs/math.md §6)

M and R are walked like a state: R from 0, and M from the identity with no values.
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    F32,
    I32,
    blocks,
    kept_of,
    macros,
    named,
    parts_of,
)
from gdn_ops.backends.tilelang.kernels.chunk_tiles import chunk_tiles
from gdn_ops.backends.tilelang.kernels.gates import Norm

MODES = ("output", "states", "map")


def states(
    T: Any, *, K: int, BK: int, V: int, BV: int, C: int, dtype: str, erase: bool, mode: str,
    threads: int, stages: int, bulk: bool = True,
) -> Any:  # fmt: skip
    """Make the kernel. Grid (segment_slots ceil(V / BV), HV), with ceil(K / BV) more for a map."""
    b, chunk_of = blocks(T), chunk_tiles(T, C, dtype, bulk)
    M, H, HV, N, N1, segments = T.dynamic("M, H, HV, N, N1, segments")
    chunk_slots, segment_slots, starts_HV = T.dynamic("chunk_slots, segment_slots, starts_HV")
    T_HV, T_slots, u_HV, u_slots = T.dynamic("T_HV, T_slots, u_HV, u_slots")
    states_HV, states_slots, o_M, o_HV = T.dynamic("states_HV, states_slots, o_M, o_HV")
    final_HV, map_slots, map_HV = T.dynamic("final_HV, map_slots, map_HV")
    is_split, has_output, is_map = parts_of(dtype) > 1, mode == "output", mode == "map"
    kept = kept_of(dtype)
    columns = -(-V // BV)
    all_columns = columns + (-(-K // BV) if is_map else 0)
    update = _updates(T, BK, BV, C, dtype, erase, columns, is_map)
    output = _outputs(T, V, BV, C, dtype, erase)

    @T.prim_func
    def states(
        q: T.Tensor((M, H, K), dtype),
        k: T.Tensor((M, H, K), dtype),
        v: T.Tensor((M, HV, V), dtype),
        gates: T.Tensor((HV, chunk_slots, 4, C), F32),
        inv_norms: T.Tensor((H, chunk_slots, Norm.COUNT, C), F32),
        inverses: T.Tensor((T_HV, T_slots, C, C), kept),
        starts: T.Tensor((segment_slots, starts_HV, K, V), F32),
        cu: T.Tensor((N1,), "int32"),
        o: T.Tensor((o_M, o_HV, V), dtype),
        final: T.Tensor((N, final_HV, K, V), F32),
        chunk_states: T.Tensor((states_HV, states_slots, K, V), kept),
        u: T.Tensor((u_HV, u_slots, C, V), kept),
        maps: T.Tensor((map_slots, map_HV, K, K), F32),
        shifts: T.Tensor((segments, map_HV, K, V), F32),
        scale: T.float32,
        has_norm: T.int32,
        has_start: T.int32,
        L: T.int32,
        grid: T.int32,
    ):
        with T.Kernel(all_columns * grid, HV, threads=threads) as (program, hv):
            m = _tiles(T, BK, BV, C, dtype)
            slot_of_segment = program // all_columns
            column = program % all_columns
            n = T.alloc_var(I32, b.owner(cu, N1 - 1, C * L, slot_of_segment))
            h = T.alloc_var(I32, hv // (HV // H))
            segment = T.alloc_var(I32, slot_of_segment - (cu[n] // (C * L) + n))
            all_chunks = T.ceildiv(cu[n + 1] - cu[n], C)
            # A slot that no segment has begins where the sequence ends.
            first_chunk = T.alloc_var(I32, T.min(segment * L, all_chunks))
            length = T.alloc_var(I32, cu[n + 1] - cu[n] - first_chunk * C)
            chunks = T.alloc_var(I32, T.max(T.min(T.ceildiv(length, C), L), 0))
            first_slot = T.alloc_var(I32, cu[n] // C + n + first_chunk)
            first_token = T.alloc_var(I32, cu[n] + first_chunk * C)
            dv = column * BV
            is_own = segment == 0 or chunks > 0
            if is_map:
                update.start_map(m.S, column)
            elif has_start != 0:
                T.copy(starts[slot_of_segment, hv, 0:BK, dv : dv + BV], m.S)
            else:
                T.clear(m.S)
            for chunk in T.Pipelined(chunks, num_stages=stages):
                slot = first_slot + chunk
                first = first_token + chunk * C
                rest = length - chunk * C
                chunk_of.load_operand(k, first, h, 0, BK, rest, m.k)
                chunk_of.load(v, first, hv, dv, BV, rest, m.v)
                T.copy(gates[hv, slot, 0:4, 0:C], m.g)
                T.copy(inv_norms[h, slot, 0 : Norm.COUNT, 0:C], m.inv_norm)
                if erase:
                    chunk_of.load_inverse(inverses, hv, slot, m.x)
                if has_output:
                    chunk_of.load_operand(q, first, h, 0, BK, rest, m.q)
                if bulk and rest < C:
                    if not is_split:
                        chunk_of.clear_tail(m.k[0], rest, BK)
                    chunk_of.clear_tail(m.v, rest, BV)
                if has_norm != 0:
                    chunk_of.scale_rows(m.k, m.inv_norm, Norm.KEY_POWER, BK)
                    if has_output:
                        chunk_of.scale_rows(m.q, m.inv_norm, Norm.QUERY_POWER, BK)
                # §3 b, d; b_C is the last b                                     [C], [C]
                chunk_of.chunk_decay(m.g, m.from_start, m.to_end)
                chunk_of.lower(m.S, m.S_low, BK, BV)
                if mode == "states":
                    b.store(m.S, chunk_states, hv, slot, dv)
                # §3 K S, and beside it Q Kᵀ and Q S                     [C, BV], [C, C], [C, BV]
                if has_output:
                    output.read(m)
                elif erase:
                    b.multiply(m.k, m.S_low, m.read, False, False, True)
                # §3 E = V − diag(b) K S                                         [C, BV]
                if erase:
                    update.form_E(m, column)
                # §3 P = lower(Q Kᵀ ⊙ D), and s in it                            [C, C]
                if has_output:
                    output.form_P(m, scale)
                # §3 U = T diag(β) E                                             [C, BV]
                update.form_U(m, column)
                if mode == "states" and erase:
                    b.store(m.U, u, hv, slot, dv)
                update.weigh(m)
                # §3 O = s (diag(b) Q S + P U), not waited for                   [C, BV]
                if has_output:
                    output.add(m)
                # §3 S_C = b_C S + (diag(d) K)ᵀ U                                [BK, BV]
                b.multiply(m.k, m.weighted, m.S, True, False, False)
                if has_output:
                    output.store(m.out, m.out_tile, o, first, hv, dv, rest)
            if has_output and is_own and length <= L * C:
                b.store(m.S, final, n, hv, dv)
            if is_map and is_own:
                if column < columns:
                    b.store(m.S, shifts, slot_of_segment, hv, dv)
                else:
                    b.store(m.S, maps, slot_of_segment, hv, dv - columns * BV)

    return states


def _tiles(T: Any, BK: int, BV: int, C: int, dtype: str) -> SimpleNamespace:
    """Allocate the tiles of a program: operands and vectors shared, sums in registers."""
    b = blocks(T)
    return SimpleNamespace(
        **named(b.operand, dtype, q=(C, BK), k=(C, BK), x=(C, C), P=(C, C), S_low=(BK, BV)),
        **named(b.operand, dtype, E=(C, BV), U_low=(C, BV), weighted=(C, BV)),
        **named(T.alloc_shared, dtype, v=(C, BV), out_tile=(C, BV)),
        **named(T.alloc_shared, F32, g=(4, C), from_start=(C,), to_end=(C,)),
        inv_norm=T.alloc_shared((Norm.COUNT, C), F32),
        **named(T.alloc_fragment, F32, S=(BK, BV), read=(C, BV), U=(C, BV), out=(C, BV), qk=(C, C)),
    )


def _updates(
    T: Any, BK: int, BV: int, C: int, dtype: str, erase: bool, columns: int, is_map: bool
) -> SimpleNamespace:
    """Return the macros of the state: from S at the start of a chunk to S at its end."""
    b, chunk_of = blocks(T), chunk_tiles(T, C, dtype, True)

    def value(m: Any, i: Any, j: Any, column: Any) -> Any:
        """Return element (i, j) of V, 0 in the columns of a map."""
        element = T.cast(m.v[i, j], F32)
        return T.Select(column < columns, element, 0.0) if is_map else element

    @T.macro
    def start_map(S, column):
        """Set S to 0 in the columns of R, and to its part of the identity in those of M."""
        dk = (column - columns) * BV
        for i, j in T.Parallel(BK, BV):
            S[i, j] = T.if_then_else(column >= columns and i == dk + j, 1.0, 0.0)

    @T.macro
    def form_E(m, column):
        """Round diag(β) E to an operand."""
        for i, j in T.Parallel(C, BV):
            left = m.from_start[i] * m.inv_norm[Norm.KEY, i]
            x = value(m, i, j, column) - m.read[i, j] * left
            m.read[i, j] = x * m.g[3, i]
        chunk_of.lower(m.read, m.E, C, BV)

    @T.macro
    def form_U(m, column):
        """Set U to T diag(β) E, or to diag(β) V for rules without an error term."""
        if erase:
            b.multiply(m.x, m.E, m.U, False, False, True)
        else:
            for i, j in T.Parallel(C, BV):
                m.U[i, j] = value(m, i, j, column) * m.g[3, i]

    @T.macro
    def weigh(m):
        """Round diag(d) U to an operand, and set S to b_C S."""
        for i, j in T.Parallel(C, BV):
            m.read[i, j] = m.U[i, j] * (m.to_end[i] * m.inv_norm[Norm.KEY, i])
        chunk_of.lower(m.read, m.weighted, C, BV)
        for i, j in T.Parallel(BK, BV):
            m.S[i, j] = m.S[i, j] * m.from_start[C - 1]

    return macros(start_map, form_E, form_U, weigh)


def _outputs(T: Any, V: int, BV: int, C: int, dtype: str, erase: bool) -> SimpleNamespace:
    """Return the macros of the output of a chunk."""
    b, chunk_of = blocks(T), chunk_tiles(T, C, dtype, True)

    @T.macro
    def read(m):
        """Multiply Q and K by S, and Q by K."""
        b.issue(m.q, m.k, m.qk, False, True, True)
        if erase:
            b.issue(m.k, m.S_low, m.read, False, False, True)
        b.multiply(m.q, m.S_low, m.out, False, False, True)

    @T.macro
    def form_P(m, scale):
        """Round s P to an operand, and set `out` to s diag(b) Q S."""
        for i, j in T.Parallel(C, BV):
            left = m.from_start[i] * m.inv_norm[Norm.QUERY, i]
            m.out[i, j] = m.out[i, j] * (left * scale)
        for i, j in T.Parallel(C, C):
            D = b.pair_decay(m.g, i, j, 0)
            left = m.inv_norm[Norm.QUERY, i] * scale
            scaled = (m.qk[i, j] * left) * (m.inv_norm[Norm.KEY, j] * D)
            m.qk[i, j] = T.Select(i >= j, scaled, 0.0)
        chunk_of.lower(m.qk, m.P, C, C)

    @T.macro
    def add(m):
        """Issue the product that adds s P U to `out`."""
        chunk_of.lower(m.U, m.U_low, C, BV)
        b.issue(m.P, m.U_low, m.out, False, False, False)

    @T.macro
    def store(x, tile, o, first, hv, dv, rest):
        """Store the rows of o that are tokens."""
        T.copy(x, tile)
        if rest >= C:
            T.copy(tile, o[first : first + C, hv, dv : dv + BV])
        else:
            for i, j in T.Parallel(C, BV):
                if i < rest and dv + j < V:
                    o[first + i, hv, dv + j] = tile[i, j]

    return macros(read, form_P, add, store)
