"""Walk dS, the gradient of the state, back over the chunks of a segment.

One program per segment, value head and block of BV columns of V; the gradient with respect to the
state, dS (BK, BV) float32, stays in registers. Three products per chunk depend on it in turn:
K dS, Tᵀ dU and Kᵀ dRHS. FLA's name for the walk is `chunk_gated_delta_rule_bwd_dhu`.

    reads   q, k (M, H, K), dO (M, HV, V); gates, inv_norms, T; dS where segments end
            (segment_slots, HV, K, V) float32
    writes  gradients   dRHS (HV, chunk_slots, C, V), dS at every chunk's end
                        (HV, chunk_slots, K, V), in the dtype of what is kept; dS of the initial
                        states (N, HV, K, V) float32
            shift       what a segment adds to the dS that it passes on (docs/math.md §6),
                        dS -> Mᵀ dS + R': R' (segment_slots, HV, K, V) float32, walked from dS = 0
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import (
    F32,
    I32,
    blocks,
    fitting,
    kept_of,
    macros,
    named,
    parts_of,
)
from gdn_ops.backends.tilelang.kernels.chunk_tiles import chunk_tiles
from gdn_ops.backends.tilelang.kernels.gates import Norm

MODES = ("gradients", "shift")
PLAIN = {"disable_tma": True}
"""Options of a store by threads: the copy engine's store of a whole tile would be waited for."""


def state_gradients(
    T: Any, *, K: int, BK: int, V: int, BV: int, C: int, dtype: str, erase: bool, mode: str,
    threads: int, stages: int, bulk: bool = True,
) -> Any:  # fmt: skip
    """Make the kernel. Grid (segment_slots ceil(V / BV), HV)."""
    is_split, is_shift, columns = parts_of(dtype) > 1, mode == "shift", -(-V // BV)
    b, chunk_of = blocks(T), chunk_tiles(T, C, dtype, bulk and not is_split)
    M, H, HV, N1, chunk_slots, segment_slots = T.dynamic("M, H, HV, N1, chunk_slots, segment_slots")
    T_HV, T_slots, kept_HV, kept_slots = T.dynamic("T_HV, T_slots, kept_HV, kept_slots")
    out_slots, ends_HV = T.dynamic("out_slots, ends_HV")
    threads, stages = fitting(threads, stages, C, BV)
    step, kept = _steps(T, BK, BV, C, dtype, erase, bulk), kept_of(dtype)

    @T.prim_func
    def state_gradients(
        q: T.Tensor((M, H, K), dtype),
        k: T.Tensor((M, H, K), dtype),
        d_o: T.Tensor((M, HV, V), dtype),
        gates: T.Tensor((HV, chunk_slots, 4, C), F32),
        inv_norms: T.Tensor((H, chunk_slots, Norm.COUNT, C), F32),
        inverses: T.Tensor((T_HV, T_slots, C, C), kept),
        d_ends: T.Tensor((segment_slots, ends_HV, K, V), F32),
        cu: T.Tensor((N1,), "int32"),
        d_rhs: T.Tensor((kept_HV, kept_slots, C, V), kept),
        d_states: T.Tensor((kept_HV, kept_slots, K, V), kept),
        d_starts: T.Tensor((out_slots, HV, K, V), F32),
        scale: T.float32,
        has_norm: T.int32,
        L: T.int32,
        grid: T.int32,
    ):
        with T.Kernel(columns * grid, HV, threads=threads) as (program, hv):
            m = _tiles(T, BK, BV, C, dtype)
            slot_of_segment = program // columns
            n = T.alloc_var(I32, b.owner(cu, N1 - 1, C * L, slot_of_segment))
            h = T.alloc_var(I32, hv // (HV // H))
            segment = T.alloc_var(I32, slot_of_segment - (cu[n] // (C * L) + n))
            length = T.ceildiv(cu[n + 1] - cu[n], C)
            chunks = T.alloc_var(I32, T.max(T.min(length - segment * L, L), 0))
            last_slot = T.alloc_var(I32, cu[n] // C + n + segment * L + chunks - 1)
            last_first = T.alloc_var(I32, cu[n] + (segment * L + chunks - 1) * C)
            last_rest = T.alloc_var(I32, cu[n + 1] - last_first)
            dv = program % columns * BV
            if is_shift:
                T.clear(m.dS)
            else:
                T.copy(d_ends[slot_of_segment, hv, 0:BK, dv : dv + BV], m.dS)
            for turn in T.Pipelined(chunks, num_stages=stages):
                slot = last_slot - turn
                first = last_first - turn * C
                rest = last_rest + turn * C
                chunk_of.load_operand(k, first, h, 0, BK, rest, m.k)
                chunk_of.load_operand(q, first, h, 0, BK, rest, m.q)
                chunk_of.load_operand(d_o, first, hv, dv, BV, rest, m.d_o)
                T.copy(gates[hv, slot, 0:4, 0:C], m.g)
                T.copy(inv_norms[h, slot, 0 : Norm.COUNT, 0:C], m.inv_norm)
                if erase:
                    chunk_of.load_inverse(inverses, hv, slot, m.x)
                if bulk and not is_split and rest < C:
                    chunk_of.clear_tail(m.k[0], rest, BK)
                    chunk_of.clear_tail(m.q[0], rest, BK)
                    chunk_of.clear_tail(m.d_o[0], rest, BV)
                if has_norm != 0:
                    chunk_of.scale_rows(m.k, m.inv_norm, Norm.KEY_POWER, BK)
                    chunk_of.scale_rows(m.q, m.inv_norm, Norm.QUERY_POWER, BK)
                # §3 b, d; b_C is the last b                                     [C], [C]
                chunk_of.chunk_decay(m.g, m.from_start, m.to_end)
                chunk_of.lower(m.dS, m.dS_low, BK, BV)
                if not is_shift:
                    T.copy(
                        m.dS if is_split else m.dS_low[0],
                        d_states[hv, slot, 0:BK, dv : dv + BV],
                        annotations=PLAIN,
                    )
                # §5 s Pᵀ = s (K Qᵀ) ⊙ Dᵀ, and beside it K dS_C             [C, C], [C, BV]
                step.form_P(m, scale)
                # §5 dU = s Pᵀ dO + diag(d) K dS_C, and beside it s (diag(b) Q)ᵀ dO
                step.form_dU(m, scale)
                # §5 dRHS = Tᵀ dU                                                [C, BV]
                step.form_dRHS(m)
                if not is_shift:
                    if not is_split:
                        chunk_of.lower(m.dR, m.low, C, BV)
                    T.copy(
                        m.dR if is_split else m.low[0],
                        d_rhs[hv, slot, 0:C, dv : dv + BV],
                        annotations=PLAIN,
                    )
                # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS    [BK, BV]
                if erase:
                    step.go_back(m)
            if segment == 0 or (is_shift and chunks > 0):
                b.store(m.dS, d_starts, slot_of_segment if is_shift else n, hv, dv)

    return state_gradients


def _tiles(T: Any, BK: int, BV: int, C: int, dtype: str) -> SimpleNamespace:
    """Allocate the tiles of a program: operands and vectors shared, sums in registers."""
    b = blocks(T)
    return SimpleNamespace(
        **named(b.operand, dtype, q=(C, BK), k=(C, BK), x=(C, C), P=(C, C), dS_low=(BK, BV)),
        **named(b.operand, dtype, d_o=(C, BV), low=(C, BV)),
        **named(T.alloc_shared, F32, g=(4, C), from_start=(C,), to_end=(C,)),
        inv_norm=T.alloc_shared((Norm.COUNT, C), F32),
        **named(T.alloc_fragment, F32, dS=(BK, BV), kq=(C, C), dU=(C, BV), dR=(C, BV)),
    )


def _steps(
    T: Any, BK: int, BV: int, C: int, dtype: str, erase: bool, is_beside: bool
) -> SimpleNamespace:
    """Return the macros of a chunk: from dS at its end to dS at its start.

    With `is_beside`, K dS is formed beside K Qᵀ, which takes registers that sm_80 lacks.
    """
    b, chunk_of = blocks(T), chunk_tiles(T, C, dtype, True)

    @T.macro
    def read(m):
        """Set dU to diag(d) K dS."""
        b.multiply(m.k, m.dS_low, m.dU, False, False, True)
        for i, j in T.Parallel(C, BV):
            m.dU[i, j] = m.dU[i, j] * (m.to_end[i] * m.inv_norm[Norm.KEY, i])

    @T.macro
    def form_P(m, scale):
        """Set P to s Pᵀ, formed as such: no product is transposed; and dU to diag(d) K dS."""
        if is_beside:
            b.issue(m.k, m.q, m.kq, False, True, True)
            read(m)
        else:
            b.multiply(m.k, m.q, m.kq, False, True, True)
        for i, j in T.Parallel(C, C):
            D = b.pair_decay(m.g, j, i, 0)
            left = m.inv_norm[Norm.KEY, i] * scale
            scaled = (m.kq[i, j] * left) * (m.inv_norm[Norm.QUERY, j] * D)
            m.kq[i, j] = T.Select(i <= j, scaled, 0.0)
        chunk_of.lower(m.kq, m.P, C, C)
        if not is_beside:
            read(m)

    @T.macro
    def form_dU(m, scale):
        """Add s Pᵀ dO to dU, and carry dS to the start of the chunk as far as dO goes."""
        for i, j in T.Parallel(C, BV):
            left = m.from_start[i] * m.inv_norm[Norm.QUERY, i]
            m.dR[i, j] = b.value(m.d_o, i, j) * (left * scale)
        chunk_of.lower(m.dR, m.low, C, BV)
        for i, j in T.Parallel(BK, BV):
            m.dS[i, j] = m.dS[i, j] * m.from_start[C - 1]
        b.issue(m.q, m.low, m.dS, True, False, False)
        b.multiply(m.P, m.d_o, m.dU, False, False, False)
        b.hold(m.q)

    @T.macro
    def form_dRHS(m):
        """Set dRHS to Tᵀ dU, or to dU for rules without an error term."""
        if erase:
            chunk_of.lower(m.dU, m.low, C, BV)
            b.multiply(m.x, m.low, m.dR, True, False, True)
        else:
            T.copy(m.dU, m.dR)

    @T.macro
    def go_back(m):
        """Take from dS what the error term takes from the state."""
        for i, j in T.Parallel(C, BV):
            left = m.g[3, i] * m.from_start[i] * m.inv_norm[Norm.KEY, i]
            m.dR[i, j] = -m.dR[i, j] * left
        chunk_of.lower(m.dR, m.low, C, BV)
        b.multiply(m.k, m.low, m.dS, True, False, False)

    return macros(form_P, form_dU, form_dRHS, go_back)
