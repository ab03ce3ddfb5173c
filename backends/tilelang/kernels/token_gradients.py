"""Compute all gradients of a chunk, given dRHS and dS: the parallel part of the backward.

One program per chunk and key head. It loops over the R value heads of the key head and blocks of
BV columns of V. The sums over value heads, dQ and dK (C, BK) and their pairs (C, C), stay in the
program, float32: no atomics, and the same call gives the same bits. K is taken SLICE columns at a
time, so that what is multiplied fits the registers beside dQ and dK. FLA forms them with
`chunk_bwd_dqkwg` and `prepare_wy_repr_bwd`.

    reads   q, k (M, H, K), v, dO (M, HV, V), α or log α (M, HV) float32; gates, inv_norms;
            U, dRHS (HV, chunk_slots, C, V); S at the starts, dS at the ends of chunks
            (HV, chunk_slots, K, V), in the dtype of what is kept
    writes  dq, dk (M, H, K), dv (M, HV, V) in their dtype; dα or d log α, dβ (M, HV) float32

What is quadratic in the chunk is in `pair_gradients`, the gate's part in `gate_gradient`.
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    F32,
    I32,
    NO_DECAY,
    blocks,
    fitting,
    kept_of,
    macros,
    named,
    parts_of,
)
from gdn_ops.backends.tilelang.kernels.chunk_tiles import chunk_tiles
from gdn_ops.backends.tilelang.kernels.gate_gradient import QUARTERS, Row, gate_gradient
from gdn_ops.backends.tilelang.kernels.gates import Norm
from gdn_ops.backends.tilelang.kernels.pair_gradients import pair_gradients

SLICE = 64
"""Columns of K that a gradient is formed of at a time."""
PAD = 8
"""Columns that a square has in shared memory beside its own, so that rows lie in other banks."""


def token_gradients(
    T: Any, *, K: int, BK: int, V: int, BV: int, C: int, dtype: str, erase: bool, threads: int,
    stages: int,
) -> Any:  # fmt: skip
    """Make the kernel. Grid (chunk_slots, H)."""
    b = blocks(T)
    M, H, HV, N1, chunk_slots, u_HV, u_slots = T.dynamic("M, H, HV, N1, chunk_slots, u_HV, u_slots")
    gate_M, gate_HV, beta_M, beta_HV = T.dynamic("gate_M, gate_HV, beta_M, beta_HV")
    threads, stages = fitting(threads, stages, C, C)
    columns, kept = -(-V // BV), kept_of(dtype)
    # Element by element: TileLang 0.1.15 would wait for a whole copy inside the pipelined loop.
    rows_of = chunk_tiles(T, C, dtype, False)
    turn_of = _turns(T, BK, V, BV, C, dtype, erase)
    # Without a second group of warps that copies, a thread has no register to spare.
    decay = b.pair_decay if stages > 0 else b.branched_pair_decay
    pairs = pair_gradients(T, C, BK // SLICE, SLICE, erase, decay)
    gate_of = gate_gradient(T, C, BK, erase, decay)
    finish = _results(T, K, BK, C, dtype)

    @T.prim_func
    def token_gradients(
        q: T.Tensor((M, H, K), dtype),
        k: T.Tensor((M, H, K), dtype),
        v: T.Tensor((M, HV, V), dtype),
        d_o: T.Tensor((M, HV, V), dtype),
        gate: T.Tensor((gate_M, gate_HV), F32),
        gates: T.Tensor((HV, chunk_slots, 4, C), F32),
        inv_norms: T.Tensor((H, chunk_slots, Norm.COUNT, C), F32),
        u: T.Tensor((u_HV, u_slots, C, V), kept),
        d_rhs: T.Tensor((HV, chunk_slots, C, V), kept),
        states: T.Tensor((HV, chunk_slots, K, V), kept),
        d_states: T.Tensor((HV, chunk_slots, K, V), kept),
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
        with T.Kernel(chunk_slots, H, threads=threads) as (slot, h):
            m, f = _tiles(T, BK, BV, C, dtype, erase), _fragments(T, BK, BV, C)
            sums = _row_sums(T, BK, C)
            if stages > 0:
                T.annotate_producer_reg_dealloc(24)
                T.annotate_consumer_reg_alloc(240)
            n = T.alloc_var(I32, b.owner(cu, N1 - 1, C, slot))
            first = T.alloc_var(I32, cu[n] + (slot - (cu[n] // C + n)) * C)
            rest = T.alloc_var(I32, cu[n + 1] - first)
            first_head = T.alloc_var(I32, h * (HV // H))
            turns = T.alloc_var(I32, T.if_then_else(rest > 0, HV // H * columns, 0))
            rows_of.load_operand(q, first, h, 0, BK, rest, m.q)
            rows_of.load_operand(k, first, h, 0, BK, rest, m.k)
            for row, i in T.Parallel(Norm.COUNT, C):
                m.inv_norm[row, i] = inv_norms[h, slot, row, i]
            if has_norm != 0:
                rows_of.scale_rows_in_place(m.q, m.inv_norm, Norm.QUERY_POWER, BK)
                rows_of.scale_rows_in_place(m.k, m.inv_norm, Norm.KEY_POWER, BK)
            for tile in [*f.dQ, *f.dK, *m.squares]:
                T.clear(tile)
            for turn in T.Pipelined(turns, num_stages=stages):
                hv = first_head + turn // columns
                dv = turn % columns * BV
                at = SimpleNamespace(first=first, rest=rest, slot=slot, hv=hv, dv=dv)
                T.copy(gates[hv, slot, 0:4, 0:C], m.g)
                turn_of.load(v, d_o, u, d_rhs, states, d_states, at, m, f)
                # §3 b, d                                                        [C], [C]
                gate_of.chunk_decay(m.g, m.t, 0)
                turn_of.set_weights(m, scale)
                if turn % columns == 0:
                    turn_of.clear_sums(f, sums)
                turn_of.form_pairs(m, f)
                turn_of.form_rows(d_states, at, m, f, sums)
                turn_of.form_values(d_v, at, m, f, sums)
                if turn % columns == columns - 1:
                    # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ,  M = diag(β) dA ⊙ D  [C, C]
                    pairs.form(m, f, scale, rest)
                    if erase:
                        # §5 dβ ... + rowsum(dA ⊙ K Kᵀ ⊙ D)                      [C]
                        T.reduce_sum(f.dA, sums.pair, dim=1, clear=True)
                    gate_of.finish_sums(m, sums, scale, rest)
                    if has_beta != 0:
                        for i in T.Parallel(C):
                            if i < rest:
                                d_beta[first + i, hv] = m.t[Row.BETA, i]
                    if kind != NO_DECAY:
                        gate_of.form_gate(gate, d_gate, first, hv, m, f, kind, rest)
            # §5 (dP ⊙ D) K to dQ, (dP ⊙ D)ᵀ Q to dK, of the normalised q, k       [C, BK]
            pairs.multiply(m, 0, Norm.KEY, 1, m.k, f.dQ)
            pairs.multiply(m, 0, Norm.QUERY, 0, m.q, f.dK)
            if erase:
                # §5 M K + Mᵀ K to dK                                            [C, BK]
                pairs.multiply(m, 1, Norm.KEY, 1, m.k, f.dK)
                pairs.multiply(m, 1, Norm.KEY, 0, m.k, f.dK)
            if has_norm != 0:
                finish.project(f.dQ, m.q, Norm.QUERY, m, f, sums)
                finish.project(f.dK, m.k, Norm.KEY, m, f, sums)
            finish.store(f.dQ, d_q, first, h, rest)
            finish.store(f.dK, d_k, first, h, rest)

    return token_gradients


def _tiles(T: Any, BK: int, BV: int, C: int, dtype: str, erase: bool) -> SimpleNamespace:
    """Allocate the tiles in shared memory."""
    b = blocks(T)
    S = b.operand((BK, BV), dtype)
    return SimpleNamespace(
        S=S,
        **named(b.operand, dtype, q=(C, BK), k=(C, BK), pairs=(C, C)),
        **named(b.operand, dtype, U=(C, BV), dR=(C, BV), d_o=(C, BV)),
        # Operands of several tiles take more memory: there dS replaces S.
        dS=S if parts_of(dtype) > 1 else b.operand((BK, BV), dtype),
        v=T.alloc_shared((C, BV), dtype),
        squares=[T.alloc_shared((C, C + PAD), F32) for _ in range(2 if erase else 1)],
        **named(T.alloc_shared, F32, g=(4, C), X=(C, C + 1), t=(Row.COUNT, C)),
        inv_norm=T.alloc_shared((Norm.COUNT, C), F32),
        **named(T.alloc_shared, F32, corners=(BK,), before=(QUARTERS, C), partial=(QUARTERS, C)),
    )


def _fragments(T: Any, BK: int, BV: int, C: int) -> SimpleNamespace:
    """Allocate the results and sums of products in registers."""
    return SimpleNamespace(
        dQ=[T.alloc_fragment((C, SLICE), F32) for _ in range(BK // SLICE)],
        dK=[T.alloc_fragment((C, SLICE), F32) for _ in range(BK // SLICE)],
        **named(T.alloc_fragment, F32, state=(BK, BV), both=(BK, BV), values=(C, BV)),
        **named(T.alloc_fragment, F32, dP=(C, C), dA=(C, C), pair=(C, C), D=(C, C)),
        **named(T.alloc_fragment, F32, x=(C, SLICE), products=(C, SLICE)),
    )


def _row_sums(T: Any, BK: int, C: int) -> SimpleNamespace:
    """Allocate the sums over rows in registers."""
    rows = dict.fromkeys(("start", "erased", "end", "beta", "pair", "along"), (C,))
    return SimpleNamespace(**named(T.alloc_fragment, F32, corner=(BK,), **rows))


def _turns(T: Any, BK: int, V: int, BV: int, C: int, dtype: str, erase: bool) -> SimpleNamespace:
    """Return the macros of a turn: BV columns of V of a value head."""
    b, lower = blocks(T), chunk_tiles(T, C, dtype, True).lower
    is_split = parts_of(dtype) > 1
    slices = [*range(BK // SLICE)]

    @T.macro
    def load_tile(x, parts, landing, height, width):
        """Copy a region of a tensor into an operand."""
        if is_split:
            T.copy(x, landing)
            lower(landing, parts, height, width)
        else:
            T.copy(x, parts[0])

    @T.macro
    def load(v, d_o, u, d_rhs, states, d_states, at, m, f):
        """Load dO, U, dRHS, S, dS and V; without an error term U is diag(β) V."""
        load_tile(d_o[at.first : at.first + C, at.hv, at.dv : at.dv + BV], m.d_o, f.values, C, BV)
        if erase:
            load_tile(u[at.hv, at.slot, 0:C, at.dv : at.dv + BV], m.U, f.values, C, BV)
        load_tile(d_rhs[at.hv, at.slot, 0:C, at.dv : at.dv + BV], m.dR, f.values, C, BV)
        load_tile(states[at.hv, at.slot, 0:BK, at.dv : at.dv + BV], m.S, f.state, BK, BV)
        if not is_split:
            load_tile(d_states[at.hv, at.slot, 0:BK, at.dv : at.dv + BV], m.dS, f.state, BK, BV)
        T.copy(v[at.first : at.first + C, at.hv, at.dv : at.dv + BV], m.v)
        if not erase:
            for i, j in T.Parallel(C, BV):
                value = T.cast(m.v[i, j], F32) * m.g[3, i]
                f.values[i, j] = T.if_then_else(i < at.rest, value, 0.0)
            lower(f.values, m.U, C, BV)

    @T.macro
    def set_weights(m, scale):
        """Set the weights of a head."""
        for i in T.Parallel(C):
            m.t[Row.READING, i] = scale * m.t[Row.FROM_START, i]
            m.t[Row.ERASING, i] = -m.g[3, i] * m.t[Row.FROM_START, i]

    @T.macro
    def clear_sums(f, sums):
        """Clear the sums of a head."""
        for tile in [f.dP, sums.start, sums.end, sums.beta, sums.corner]:
            T.clear(tile)
        if erase:
            T.clear(f.dA)
            T.clear(sums.erased)

    @T.macro
    def form_pairs(m, f):
        """Add the products of the turn to dP and dA."""
        # §5 dP = s lower(dO Uᵀ),  dA = −strict_lower(dRHS Uᵀ)                   [C, C]
        # The next product is waited for, and these with it.
        b.issue_rows(m.d_o, m.U, f.dP, False, True, False)
        if erase:
            b.issue_rows(m.dR, m.U, f.dA, False, True, False)

    @T.macro
    def through(left, state, t, weight, tile, to, f, sums):
        """Add diag(t_weight) L Sᵀ to `to`, and rowsum(L Sᵀ ⊙ tile) to `sums`."""
        T.clear(f.products)
        for at in slices:
            rows = [part[at * SLICE : (at + 1) * SLICE, 0:BV] for part in state]
            b.multiply_rows(left, rows, f.x, False, True, True)
            for i, j in T.Parallel(C, SLICE):
                to[at][i, j] = to[at][i, j] + f.x[i, j] * t[weight, i]
                f.products[i, j] += f.x[i, j] * b.value(tile, i, at * SLICE + j)
        T.reduce_sum(f.products, sums, dim=1, clear=False)

    @T.macro
    def form_rows(d_states, at, m, f, sums):
        """Add the products with the states to dQ and dK, and their sums over rows to E."""
        # §5 s diag(b) dO Sᵀ to dQ; E_i,start += s rowsum(dO ⊙ Q S)              [C, BK]
        through(m.d_o, m.S, m.t, Row.READING, m.q, f.dQ, f, sums.start)
        if erase:
            # §5 − diag(βb) dRHS Sᵀ to dK; rowsum(dRHS ⊙ K S)                    [C, BK]
            through(m.dR, m.S, m.t, Row.ERASING, m.k, f.dK, f, sums.erased)
        # §5 E_C,start = ⟨dS_C, S⟩                                               [BK]
        if is_split:
            T.copy(d_states[at.hv, at.slot, 0:BK, at.dv : at.dv + BV], f.state)
            for i, j in T.Parallel(BK, BV):
                f.both[i, j] = f.state[i, j] * b.value(m.S, i, j)
            lower(f.state, m.dS, BK, BV)
        else:
            for i, j in T.Parallel(BK, BV):
                f.both[i, j] = b.value(m.dS, i, j) * b.value(m.S, i, j)
        T.reduce_sum(f.both, sums.corner, dim=1, clear=False)
        # §5 diag(d) U dS_Cᵀ to dK; E_C,j += rowsum((K dS_C) ⊙ U)                [C, BK]
        through(m.U, m.dS, m.t, Row.TO_END, m.k, f.dK, f, sums.end)

    @T.macro
    def form_values(d_v, at, m, f, sums):
        """Write dV, and add to dβ."""
        # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ V) ...                       [C, BV]
        for i, j in T.Parallel(C, BV):
            if i < at.rest and at.dv + j < V:
                x = b.value(m.dR, i, j) * m.g[3, i]
                d_v[at.first + i, at.hv, at.dv + j] = T.cast(x, dtype)
        for i, j in T.Parallel(C, BV):
            f.values[i, j] = b.value(m.dR, i, j) * T.cast(m.v[i, j], F32)
        T.reduce_sum(f.values, sums.beta, dim=1, clear=False)

    return macros(load, set_weights, clear_sums, form_pairs, form_rows, form_values)


def _results(T: Any, K: int, BK: int, C: int, dtype: str) -> SimpleNamespace:
    """Return the macros that finish dQ and dK."""
    b = blocks(T)
    slices = [*range(BK // SLICE)]

    @T.macro
    def project(x, tile, row, m, f, sums):
        """Turn the gradient of y / ‖y‖ into that of y."""
        T.clear(f.products)
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                f.products[i, j] += x[at][i, j] * b.value(tile, i, at * SLICE + j)
        T.reduce_sum(f.products, sums.along, dim=1, clear=True)
        T.copy(sums.along, m.t[Row.START, 0:C])
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                squared = m.inv_norm[row, i] * m.inv_norm[row, i]
                same = squared * m.t[Row.START, i] * b.value(tile, i, at * SLICE + j)
                x[at][i, j] = (x[at][i, j] - same) * m.inv_norm[row, i]
                x[at][i, j] = x[at][i, j] * m.inv_norm[row + Norm.QUERY_POWER, i]

    @T.macro
    def store(x, to, first, head, rest):
        """Store the rows that are tokens in `to` (M, heads, K)."""
        for at in slices:
            for i, j in T.Parallel(C, SLICE):
                if i < rest and at * SLICE + j < K:
                    to[first + i, head, at * SLICE + j] = T.cast(x[at][i, j], dtype)

    return macros(project, store)
