"""Compute the gates of every chunk and, with an error term, T = (I + A)⁻¹: the first launch.

One program per chunk and key head. K Kᵀ is formed once and serves the R value heads. FLA's names
are `chunk_local_cumsum` and `chunk_gated_delta_rule_fwd_kkt_solve`.

    reads   k, and q with qk_l2norm, (M, H, K); α or log α, β (M, HV) float32
    writes  gates (HV, chunk_slots, 4, C) float32: G as hi and lo, z, β (docs/math.md §4)
            inv_norms (H, chunk_slots, 4, C) float32: 1/‖q‖, 1/‖k‖, or 1, as factors and powers
            T (HV, chunk_slots, C, C) in the dtype of what is kept      (docs/math.md §3)
"""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import F32, blocks, kept_of, named, parts_of
from gdn_ops.backends.tilelang.kernels.chunk_tiles import chunk_tiles
from gdn_ops.backends.tilelang.kernels.gates import Norm, gates_of_chunk
from gdn_ops.backends.tilelang.kernels.inverse import ROWS, inverse


def solve(T: Any, *, K: int, BK: int, C: int, dtype: str, erase: bool, threads: int) -> Any:
    """Make the kernel. Grid (chunk_slots, H)."""
    b, chunk_of, gates_of = blocks(T), chunk_tiles(T, C, dtype, True), gates_of_chunk(T, C, BK)
    inverse_of = inverse(T, C)
    M, H, HV, N1, chunk_slots, T_HV, T_slots = T.dynamic("M, H, HV, N1, chunk_slots, T_HV, T_slots")
    gate_M, gate_HV, beta_M, beta_HV = T.dynamic("gate_M, gate_HV, beta_M, beta_HV")
    is_split, last, kept = parts_of(dtype) > 1, gates_of.last, kept_of(dtype)

    @T.prim_func
    def solve(
        k: T.Tensor((M, H, K), dtype),
        q: T.Tensor((M, H, K), dtype),
        gate: T.Tensor((gate_M, gate_HV), F32),
        beta: T.Tensor((beta_M, beta_HV), F32),
        cu: T.Tensor((N1,), "int32"),
        gates: T.Tensor((HV, chunk_slots, 4, C), F32),
        inv_norms: T.Tensor((H, chunk_slots, Norm.COUNT, C), F32),
        inverses: T.Tensor((T_HV, T_slots, C, C), kept),
        kind: T.int32,
        has_beta: T.int32,
        has_norm: T.int32,
    ):
        with T.Kernel(chunk_slots, H, threads=threads) as (slot, h):
            m = _tiles(T, BK, C, dtype)
            n = b.owner(cu, N1 - 1, C, slot)
            begin = cu[n]
            first = begin + (slot - (begin // C + n)) * C
            rest = cu[n + 1] - first
            R = HV // H
            if rest > 0:
                T.fill(m.inv_norm, 1.0)
                if has_norm != 0:
                    T.copy(q[first : first + C, h, 0:BK], m.landing)
                    gates_of.inverse_norms(
                        m.landing, m.squares, m.sums, m.inv_norm, Norm.QUERY, rest
                    )
                T.copy(k[first : first + C, h, 0:BK], m.landing)
                if rest < C:
                    chunk_of.clear_tail(m.landing, rest, BK)
                if has_norm != 0:
                    gates_of.inverse_norms(m.landing, m.squares, m.sums, m.inv_norm, Norm.KEY, rest)
                T.copy(m.inv_norm, inv_norms[h, slot, 0 : Norm.COUNT, 0:C])
                if erase:
                    if is_split:
                        chunk_of.lower(m.landing, m.k, C, BK)
                    if has_norm != 0:
                        chunk_of.scale_rows(m.k, m.inv_norm, Norm.KEY_POWER, BK)
                    # §3 K Kᵀ, once for the R value heads                        [C, C]
                    b.multiply(m.k, m.k, m.kk, False, True, True)
                for r in T.serial(R):
                    hv = h * R + r
                    at = SimpleNamespace(first=first, rest=rest, hv=hv)
                    # §4 G, z                                                    [C]
                    gates_of.form(m, gate, beta, at, kind, has_beta)
                    gates_of.store(m, gates, hv, slot)
                    if erase:
                        # §3 A = strict_lower(diag(β) (K Kᵀ ⊙ D))                [C, C]
                        for i, j in T.Parallel(C, C):
                            D = b.decay(
                                m.hi[i], m.lo[i], m.z_sums[last, i],
                                m.hi[j], m.lo[j], m.z_sums[last, j], 0, i > j,
                            )  # fmt: skip
                            left = m.inv_norm[Norm.KEY, i] * m.beta[i]
                            scaled = (m.kk[i, j] * left) * (m.inv_norm[Norm.KEY, j] * D)
                            m.pairs[i, j] = T.Select(i > j, scaled, 0.0)
                        T.copy(m.pairs, m.a)
                        # §3 T = (I + A)⁻¹                                       [C, C]
                        inverse_of.form(m)
                        b.store(m.x, inverses, hv, slot, 0)

    return solve


def _tiles(T: Any, BK: int, C: int, dtype: str) -> SimpleNamespace:
    """Allocate the tiles of a program."""
    b, half = blocks(T), C // 2
    landing = T.alloc_shared((C, BK), dtype)
    return SimpleNamespace(
        landing=landing,
        k=b.operand((C, BK), dtype) if parts_of(dtype) > 1 else [landing],
        x_sums=T.alloc_shared((2, C), "float64"),
        **named(T.alloc_shared, F32, z_sums=(2, C), beta=(C,), hi=(C,), lo=(C,)),
        inv_norm=T.alloc_shared((Norm.COUNT, C), F32),
        **named(T.alloc_shared, F32, a=(C, C), x=(C, C)),
        **named(T.alloc_shared, F32, blocks_right=(half, ROWS), blocks_lower=(half, ROWS)),
        **named(b.operand, F32, left=(half, half), right=(half, half)),
        **named(T.alloc_fragment, F32, squares=(C, BK), sums=(C,), kk=(C, C), pairs=(C, C)),
        product=T.alloc_fragment((half, half), F32),
        column=T.alloc_local((ROWS,), F32),
    )
