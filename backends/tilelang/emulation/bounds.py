"""Find the indices of tiles that may be out of bounds, which a GPU would use without an error.

An index that the loops and conditions around it keep inside costs nothing. Any other is checked
when the kernel runs: 0 is taken instead, and the call raises IndexError. Indices of tensors are not
checked here: what is outside of a tensor is 0, on a GPU too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tilelang  # noqa: F401, it is what brings tvm
from tvm import arith, ir, tirx

from gdn_ops.backends.tilelang.emulation.programs import GRID

MOST_PROGRAMS = 65535
"""Programs of a GPU along the second and the third axis of a grid; an int32 may be larger."""


class Bounds:
    """Track the bounds of variables at the place that a pass visits.

    Attributes:
        tiles: the names of tiles with an index that is checked; a check says which by number.
    """

    def __init__(self) -> None:
        self.tiles: list[str] = []
        self._analyzer = arith.Analyzer()

    def loop(self, op: Any) -> None:
        """Record the range of a loop's variable."""
        self._analyzer.bind(op.loop_var, ir.Range.from_min_extent(op.min, op.extent), True)

    def bind(self, variable: Any, value: Any) -> None:
        """Record the bounds of a variable, those of the value bound to it."""
        if str(variable.dtype).startswith("int"):
            self._analyzer.update(variable, self._analyzer.const_int_bound(value), True)

    def of_grid(self, extents: dict[str, Any]) -> list[Any]:
        """Return statements that check the sizes of a grid, by the names of its axes."""
        checks = []
        for axis in ("blockIdx.y", "blockIdx.z"):
            extent = extents.get(axis, 1)
            if isinstance(extent, int | tirx.IntImm) and int(extent) <= MOST_PROGRAMS:
                continue
            self.tiles.append(f"{GRID}{axis[-1]}, of at most {MOST_PROGRAMS} programs")
            last = tirx.Cast("int64", extent) - 1
            call = ("int32", "gdn_ops_index", last, MOST_PROGRAMS, len(self.tiles))
            checks.append(tirx.Evaluate(tirx.call_extern(*call)))
        return checks

    @contextlib.contextmanager
    def condition(self, condition: Any) -> Iterator[None]:
        """Assume a condition inside the `with` block."""
        with self._analyzer.constraint_scope(condition):
            yield

    def checked(self, buffer: Any, indices: Sequence[Any], originals: Sequence[Any]) -> list[Any]:
        """Return the indices of a tile, with a check of each that may be out of bounds.

        Args:
            buffer: the tile.
            indices: as they are to be used.
            originals: as they were traced; the bounds known are those of their variables.
        """
        return [
            self._checked(buffer, int(size), index, original)
            for size, index, original in zip(buffer.shape, indices, originals, strict=True)
        ]

    def _checked(self, buffer: Any, size: int, index: Any, original: Any) -> Any:
        bound = self._analyzer.const_int_bound(original)
        if bound.min_value >= 0 and bound.max_value < size:
            return index
        name = str(buffer.name)
        if name not in self.tiles:
            self.tiles.append(name)
        number = self.tiles.index(name) + 1
        return tirx.call_pure_extern(str(index.dtype), "gdn_ops_index", index, size, number)
