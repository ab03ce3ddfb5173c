"""Define the macros that fill the tiles of a chunk, shared by the walks and the gradients."""

from types import SimpleNamespace
from typing import Any

from gdn_ops.backends.tilelang.kernels.blocks import F32, blocks, macros, parts_of


def chunk_tiles(T: Any, C: int, dtype: str, bulk: bool) -> SimpleNamespace:
    """Return the macros, for tensors of a dtype."""
    b = blocks(T)
    is_split = parts_of(dtype) > 1

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
    def load_operand(x, first, head, column, width, rest, parts):
        """Copy C rows of x (M, heads, D) into an operand."""
        if is_split:
            for i, j in T.Parallel(C, width):
                element = T.if_then_else(
                    i < rest and column + j < x.shape[2],
                    T.cast(x[first + i, head, column + j], F32),
                    0.0,
                )
                b.put(parts, i, j, element)
        else:
            load(x, first, head, column, width, rest, parts[0])

    @T.macro
    def scale_rows(parts, factors, row, width):
        """Multiply the rows of an operand by powers of two, which is exact in bfloat16."""
        for part in parts:
            # By way of registers: a tile that is read and written has a barrier for every pass.
            scaled = T.alloc_fragment((C, width), part.dtype)
            for i, j in T.Parallel(C, width):
                scaled[i, j] = part[i, j] * T.cast(factors[row, i], part.dtype)
            T.copy(scaled, part)

    @T.macro
    def scale_rows_in_place(parts, factors, row, width):
        """Do the same where TileLang finds no layout for what is in registers."""
        for part in parts:
            for i, j in T.Parallel(C, width):
                part[i, j] = part[i, j] * T.cast(factors[row, i], part.dtype)

    @T.macro
    def load_inverse(inverses, hv, slot, parts):
        """Copy T of a chunk into an operand."""
        if is_split:
            for i, j in T.Parallel(C, C):
                b.put(parts, i, j, inverses[hv, slot, i, j])
        else:
            T.copy(inverses[hv, slot, 0:C, 0:C], parts[0])

    @T.macro
    def clear_tail(tile, rest, width):
        """Zero the rows that belong to no token of this sequence, whatever is in them."""
        for i, j in T.Parallel(C, width):
            if i >= rest:
                tile[i, j] = T.cast(0.0, tile.dtype)

    @T.macro
    def lower(x, parts, height, width):
        """Round a fragment to an operand."""
        if is_split:
            for i, j in T.Parallel(height, width):
                b.put(parts, i, j, T.cast(x[i, j], F32))
        else:
            T.copy(x, parts[0])

    @T.macro
    def chunk_decay(g, from_start, to_end):
        """Set b and d of a chunk (docs/math.md §3), (C,); b_C is the last b."""
        for i in T.Parallel(C):
            from_start[i] = b.start_decay(g, i, 0)
            to_end[i] = b.pair_decay(g, C - 1, i, 0)

    return macros(
        load, load_operand, scale_rows, scale_rows_in_place, load_inverse, clear_tail, lower,
        chunk_decay,
    )  # fmt: skip
