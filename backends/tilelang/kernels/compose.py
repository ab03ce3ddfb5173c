"""Compute the state at every cut between segments, exactly (docs/math.md §6).

One program per sequence, value head and block of BV columns of V. The map of a
segment, S -> M S + R, is applied segment by segment; dS -> Mᵀ dS + R from the last to the first.

    reads   M (segment_slots, HV, K, K), R (segment_slots, HV, K, V) float32; the state that a
            sequence starts from, or the gradient of the one it ends in, (N, HV, K, V) float32
    writes  the state at the start of every segment, or dS at its end,
            (segment_slots, HV, K, V) float32

The products are of split float32 operands, whatever the dtype of the call: a cut costs no
precision.
"""

from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import F32, blocks


def compose(
    T: Any, *, K: int, BK: int, V: int, BV: int, C: int, reverse: bool, threads: int
) -> Any:
    """Make the kernel; `reverse`: gradients go from the end to the start.

    Grid (N ceil(V / BV), HV).
    """
    # Columns of M, or rows of Mᵀ, that are multiplied at a time: 96 KiB of tiles at most.
    width = 64 if BK <= 128 else 32
    b, columns = blocks(T), -(-V // BV)
    segment_slots, HV, N1, first_N, first_HV = T.dynamic("segment_slots, HV, N1, first_N, first_HV")
    shape = (width, BK) if reverse else (BK, width)

    @T.prim_func
    def compose(
        maps: T.Tensor((segment_slots, HV, K, K), F32),
        shifts: T.Tensor((segment_slots, HV, K, V), F32),
        begin_with: T.Tensor((first_N, first_HV, K, V), F32),
        cu: T.Tensor((N1,), "int32"),
        cuts: T.Tensor((segment_slots, HV, K, V), F32),
        has_first: T.int32,
        L: T.int32,
        N: T.int32,
    ):
        with T.Kernel(columns * N, HV, threads=threads) as (program, hv):
            factor = b.operand(shape, F32)
            S_low = b.operand((BK, BV), F32)
            S = T.alloc_fragment((BK, BV), F32)
            n = program // columns
            dv = program % columns * BV
            tokens = C * L
            first = cu[n] // tokens + n
            segments = T.max(T.ceildiv(cu[n + 1] - cu[n], tokens), 1)
            if has_first != 0:
                T.copy(begin_with[n, hv, 0:BK, dv : dv + BV], S)
            else:
                T.clear(S)
            for turn in T.serial(segments):
                slot = first + (segments - 1 - turn if reverse else turn)
                b.store(S, cuts, slot, hv, dv)
                if turn < segments - 1:
                    for i, j in T.Parallel(BK, BV):
                        b.put(S_low, i, j, S[i, j])
                    T.copy(shifts[slot, hv, 0:BK, dv : dv + BV], S)
                    for block in [*range(0, BK, width)]:
                        for i, j in T.Parallel(*shape):
                            row = i + block if reverse else i
                            at = j if reverse else j + block
                            b.put(
                                factor, i, j,
                                T.if_then_else(
                                    row < K and at < K, maps[slot, hv, row, at], 0.0
                                ),
                            )  # fmt: skip
                        rows = [part[block : block + width, 0:BV] for part in S_low]
                        # §6 S = M S + R, or Mᵀ S + R                            [BK, BV]
                        b.multiply(factor, rows, S, reverse, False, False)

    return compose
