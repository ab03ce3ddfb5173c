"""Read the operands of an emulated tile operation: rectangles of tensors and of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Tile(NamedTuple):
    """Represent a rectangle of a tensor or of a tile.

    Attributes:
        buffer: the tensor or tile that it is a part of.
        start: its first index in every axis.
        extents: its size in every axis; empty for `x[i, j]`, which takes that of the other side.
    """

    buffer: Any
    start: list[Any]
    extents: list[Any]

    @property
    def name(self) -> str:
        """Return the name of the buffer in the source of the kernel, if it has one there."""
        return str(self.buffer.name) or "a tile"

    @property
    def inner(self) -> list[Any]:
        """Return the extents that are not 1."""
        return [n for n in self.extents if not _is_one(n)]

    def at(self, indices: Sequence[Any]) -> list[Any]:
        """Return the indices in the buffer of an element of the rectangle.

        Args:
            indices: one for every axis whose extent is not 1.
        """
        inner = iter(indices)
        return [
            start if _is_one(extent) else start + next(inner)
            for start, extent in zip(self.start, self.extents, strict=True)
        ]


def _is_one(extent: Any) -> bool:
    return isinstance(extent, int) and extent == 1


def simplified(expression: Any) -> Any:
    """Simplify an expression, to an int where TileLang can tell its value."""
    if isinstance(expression, int):
        return expression
    from tvm import arith, tirx

    simple = arith.Analyzer().simplify(expression)
    return int(simple) if isinstance(simple, tirx.IntImm) else simple


def tile(operand: Any, operation: str) -> Tile:
    """Return the rectangle that an operand of a tile operation names.

    Args:
        operand: a tensor, a tile, a slice `x[i, 0:8]`, or an element `x[i, 0]`.
        operation: for the error.

    Raises:
        TypeError: anything else.
    """
    from tilelang.language import get_let_value, has_let_value
    from tvm import tirx

    if isinstance(operand, tirx.Var) and has_let_value(operand):
        operand = get_let_value(operand)
    if isinstance(operand, tirx.Buffer):
        return Tile(operand, [0] * len(operand.shape), [simplified(n) for n in operand.shape])
    if isinstance(operand, tirx.BufferRegion):
        starts = [part.min for part in operand.region]
        return Tile(operand.buffer, starts, [simplified(part.extent) for part in operand.region])
    if isinstance(operand, tirx.BufferLoad):
        slices = [isinstance(index, tirx.Ramp) for index in operand.indices]
        if not any(slices):
            return Tile(operand.buffer, list(operand.indices), [])
        axes = list(zip(operand.indices, slices, strict=True))
        starts = [index.base if is_slice else index for index, is_slice in axes]
        extents = [simplified(index.lanes) if is_slice else 1 for index, is_slice in axes]
        return Tile(operand.buffer, starts, extents)
    raise TypeError(
        f"{operation}: an operand is {type(operand).__name__}, should be a tensor, a tile or a "
        f"slice of one"
    )


def whole(operand: Any, operation: str) -> Tile:
    """Return the rectangle of an operand; an element is a rectangle of size 1."""
    part = tile(operand, operation)
    return part if part.extents else part._replace(extents=[1] * len(part.start))


def matched(src: Any, dst: Any, operation: str) -> tuple[Tile, Tile]:
    """Return the rectangles of two operands, which must have the same size.

    Axes of extent 1 do not count. An element on one side stands for the rectangle that begins
    there and has the other side's size in its last axes.

    Raises:
        ValueError: sizes that differ, or that cannot be compared.
    """
    from tvm import arith

    a, b = tile(src, operation), tile(dst, operation)
    if not a.extents and not b.extents:
        a, b = whole(src, operation), whole(dst, operation)
    elif not a.extents:
        a = a._replace(extents=_taken(b.inner, len(a.start)))
    elif not b.extents:
        b = b._replace(extents=_taken(a.inner, len(b.start)))
    can_prove_equal = arith.Analyzer().can_prove_equal
    if len(a.inner) != len(b.inner) or not all(map(can_prove_equal, a.inner, b.inner)):
        raise ValueError(
            f"{operation}: {a.name} gives {tuple(a.extents)} elements and {b.name} takes "
            f"{tuple(b.extents)}, should be the same but for axes of 1"
        )
    return a, b


def _taken(extents: list[Any], rank: int) -> list[Any]:
    """Return extents of `rank` axes: the given ones in the last axes, 1 in those before."""
    return [1] * (rank - len(extents)) + extents


class Matrix(NamedTuple):
    """Represent a matrix that is an operand of a product.

    Attributes:
        part: the rectangle; every axis but the last two has extent 1.
        shape: rows and columns.
    """

    part: Tile
    shape: tuple[int, int]

    @property
    def dtype(self) -> str:
        """Return the dtype of the elements."""
        return str(self.part.buffer.dtype)

    @property
    def scope(self) -> str:
        """Return the memory that holds the matrix on a GPU: "shared", "local.fragment", ..."""
        return str(self.part.buffer.scope()).removesuffix(".dyn")

    def pointer(self) -> list[Any]:
        """Return the address of the first element, and the elements from one row to the next."""
        from tvm import tirx

        first = tirx.BufferLoad(self.part.buffer, self.part.start)
        stride = simplified(self.part.buffer.shape[-1])
        return [tirx.call_intrin("handle", "tirx.address_of", first), stride]


def matrix(operand: Any, operation: str) -> Matrix:
    """Return an operand of a product as a matrix.

    Raises:
        ValueError: not a matrix, or of a size that is not known before the kernel runs.
    """
    part = whole(operand, operation)
    rows_and_columns = part.extents[-2:]
    if (
        len(rows_and_columns) != 2
        or not all(isinstance(n, int) for n in rows_and_columns)
        or not all(_is_one(n) for n in part.extents[:-2])
    ):
        raise ValueError(
            f"{operation}: {part.name} has shape {tuple(part.extents)}, should be a matrix of a "
            f"size that is a constant"
        )
    return Matrix(part, (rows_and_columns[0], rows_and_columns[1]))


def check_product(a: Matrix, b: Matrix, c: Matrix, transposed: tuple[bool, bool]) -> None:
    """Check that a GPU has an instruction for C += A B in the precision of its operands.

    Raises:
        ValueError: otherwise.
    """
    a_shape = a.shape[::-1] if transposed[0] else a.shape
    b_shape = b.shape[::-1] if transposed[1] else b.shape
    if (a_shape[0], b_shape[1], a_shape[1]) != (*c.shape, b_shape[0]):
        raise ValueError(
            f"T.gemm: {a.part.name} is {a_shape} and {b.part.name} is {b_shape}, should be (M, K) "
            f"and (K, N) for {c.part.name} of (M, N) = {c.shape}"
        )
    if c.shape[0] % 16 or c.shape[1] % 8 or a_shape[1] % 16:
        raise ValueError(
            f"T.gemm: M, N, K are {c.shape[0]}, {c.shape[1]}, {a_shape[1]}, should be multiples of "
            f"16, 8 and 16"
        )
    if a.dtype != b.dtype or a.dtype not in ("bfloat16", "float16"):
        raise ValueError(
            f"T.gemm: {a.part.name} is {a.dtype} and {b.part.name} is {b.dtype}, should both be "
            f"bfloat16 or both float16; a GPU rounds float32 to TF32"
        )
    if c.dtype != "float32":
        raise ValueError(f"T.gemm: {c.part.name} is {c.dtype}, should be float32")
    allowed = (a, ("shared", "local.fragment")), (b, ("shared",)), (c, ("local.fragment",))
    for operand, scopes in allowed:
        if operand.scope not in scopes:
            raise ValueError(
                f"T.gemm: {operand.part.name} is in {operand.scope} memory, should be in "
                f"{' or '.join(scopes)}"
            )
